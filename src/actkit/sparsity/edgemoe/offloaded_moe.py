"""Run a mixture of experts that does not fit into memory: experts come from a store (EdgeMoE, 2023, arXiv:2308.14352).

    hot weights (attention, routers, norms, embedding) stay in memory, experts within `budget` bytes
    the router of layer n has chosen -> what is missing is read; guesses for layer n + 1 are read while n computes

When to use it: the experts of a model are larger than the memory that is free, and it answers one user at a time.
Cost: the time that reading takes and prediction does not hide; `statistics` says how often the model waited, and for
how long. Experts that are stored in the layout of the kernels are multiplied as they lie, up to eight tokens at a time;
all others, and those of longer prompts, are widened as they are multiplied. A prompt reads, in each layer, all experts
that any of its tokens chooses.
Settled here: logits are those of the resident model with the same codes, bit for bit, as both are computed by the same
layers in the same order: that of `pack_for_decode` for a store in the layout of the kernels, and that without kernels
for one of codes (if its weights are in memory of their own: those that transformers loads lie as the file has them, and
products with weights that are aligned in another way differ in their last bits). Preloads are made for single tokens,
of up to ROWS texts side by side; prompts have none. The first layer's experts are preloaded while the last layer of the
token before computes.
Our own reading: `least`, a probability below which nothing is preloaded: a wrong guess takes the time of a read and the
place of an expert.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn

from actkit.core.edit.edits import set_module
from actkit.core.forward.hooks import evaluating, refuse_compiled_or_sharded
from actkit.core.ground.errors import MemoryLimitError, UnsupportedModelError
from actkit.core.ground.memory import format_bytes, parse_bytes
from actkit.core.ground.offload import refuse_offloaded
from actkit.core.layers.kernel_weight import KernelWeight
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.prefill import dense_prompt
from actkit.core.measure.stepping import StepByStep
from actkit.core.model.expert_places import ExpertPlace, expert_places, expert_shape
from actkit.core.model.experts import Expert, ExpertList, mix
from actkit.core.store.expert_source import AbsentExperts, ExpertSource
from actkit.core.store.expert_store import ExpertStore
from actkit.sparsity.edgemoe.expert_cache import ExpertCache, Key, Policy, check_budget
from actkit.sparsity.edgemoe.expert_fetcher import ExpertFetcher, FetchStatistics
from actkit.sparsity.edgemoe.path_predictor import PathPredictor
from actkit.sparsity.edgemoe.throttled_store import ThrottledStore

ROWS = 8  # texts side by side, for whose next tokens experts are predicted
RUN_POLICIES = ("edgemoe", "lru", "lfu", "fifo")  # 'belady' knows the future, which a run does not


class StoredExperts(nn.Module):
    """Stands for the experts of one block, and fetches those that a call needs.

    Args:
        layer: which of the layers with experts.
        fetcher: of all layers.
        guesses: predicts, from what was chosen, what to preload.
    """

    def __init__(self, layer: int, fetcher: ExpertFetcher, guesses: _Guesses) -> None:
        super().__init__()
        self.layer, self._fetcher, self._guesses = layer, fetcher, guesses

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the chosen experts of each token; arguments as in `ExpertList.forward`."""
        chosen = [e for e in torch.unique(top_k_index).tolist() if e < self._guesses.experts]
        self._fetcher.begin(self.layer, [(self.layer, e) for e in chosen])
        guesses = self._guesses
        self._fetcher.preload(guesses.after(self.layer, top_k_index), guesses.preload, guesses.least)
        return mix(self._fetched(chosen), hidden_states, top_k_index, top_k_weights)

    def _fetched(self, chosen: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        for e in chosen:
            key = (self.layer, e)
            expert = self._fetcher.get(key)
            try:
                yield e, expert
            finally:
                self._fetcher.release(key)


class OffloadedMoE(StepByStep):
    """Runs a mixture of experts whose experts are in a store. `close()`, or the end of a `with`, ends its threads.

    It is used by one thread at a time.

    Args:
        model: of the store, with its experts (which then are not used) or without (`ExpertSource`); see `open`.
        store: that holds its experts, or one that reads like a slower disk.
        budget: of experts in memory, bytes or a text such as '500MB'.
        policy: what goes if the budget is used up: 'edgemoe', 'lru', 'lfu' or 'fifo'.
        predictor: of the next layer's experts; None preloads nothing.
        preload: experts that are preloaded at most for the next layer.
        least: probability that a preloaded expert has at least.
        workers: threads that read.
        capacity: tokens of one text; None for the model's context.
        decode_only: take the experts out of the model, so that their memory is free.

    Raises:
        UnsupportedModelError: the model is no mixture of plain gated experts, or does not compute in the dtype of
            experts that are kept as they were.
        CheckpointError: the store is of another model.
        ValueError: the budget holds less than one token may need, or a setting is out of bounds.
        MemoryLimitError: the experts within the budget, and the cache of keys and values, do not fit into free memory.
    """

    closed = False
    _opened = False  # whether the store was opened here
    position: int
    _cache: Any

    def __init__(
        self,
        model: nn.Module,
        store: ExpertStore | ThrottledStore,
        *,
        budget: int | str,
        policy: Policy = "edgemoe",
        predictor: PathPredictor | None = None,
        preload: int = 1,
        least: float = 0.0,
        workers: int = 1,
        capacity: int | None = None,
        decode_only: bool = False,
    ) -> None:
        refuse_compiled_or_sharded(model)
        refuse_offloaded(model, "what is beside the experts stays in memory here")
        reason = supports(model)
        if reason is not None:
            raise UnsupportedModelError(f"model: {type(model).__name__} does not run from a store: {reason}.")
        self.store = store.store if isinstance(store, ThrottledStore) else store
        self.store.check_model(model)
        self.budget, self.shape = parse_bytes(budget), expert_shape(model)
        sizes = {
            (place, e): self.store.record(layer, e).nbytes
            for place, layer in enumerate(self.shape.layers)
            for e in range(self.shape.experts)
        }
        check_budget(self.budget, list(sizes.values()), self.shape.top_k)
        if policy not in RUN_POLICIES or workers < 1 or preload < 0 or not 0 <= least <= self.shape.top_k:
            raise ValueError(
                f"policy, workers, preload, least: {policy!r}, {workers}, {preload} and {least} were given; allowed "
                f"are {', '.join(RUN_POLICIES)}; 1 or more; 0 or more; and a probability."
            )
        if predictor is not None:
            predictor.check(self.shape)
        self.model: Any = model
        config: Any = model.config
        context: int = config.get_text_config().max_position_embeddings
        self.capacity: int = context if capacity is None else capacity
        if not 1 <= self.capacity <= context:
            raise ValueError(f"capacity: {capacity} was given; give 1 to {context}, the model's context.")
        self._check_memory(config.get_text_config())
        dtype = next(model.parameters()).dtype
        shares = None if predictor is None else predictor.shares
        cache = ExpertCache(self.budget, policy, layers=len(self.shape.layers), shares=shares)
        places = expert_places(model)
        read = partial(_read, store, places, [place.activation(model) for place in places], dtype)
        fetcher = ExpertFetcher(read, sizes, cache, workers)
        self._fetcher, guesses = fetcher, _Guesses(self.shape.experts, predictor, preload, least)
        self._stored = {place.path: StoredExperts(n, fetcher, guesses) for n, place in enumerate(places)}
        self._finalizer = weakref.finalize(self, fetcher.close)
        if decode_only:
            for place in places:
                set_module(model, place.path, AbsentExperts(place.activation(model)))
        self.reset()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        store: ExpertStore | ThrottledStore | str | Path,
        *,
        budget: int | str,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> OffloadedMoE:
        """Load a model without its experts, and run it from a store.

        Args:
            folder: of the model that the store was made from, a local one.
            store: an open one, or its file.
            budget: as for the class.
            dtype: of the hot weights, and of what experts compute in; None for that of the folder.
            settings: of the class.

        Raises:
            ActkitError: the folder or the store is not readable, or they are of two models.
            ValueError: as for the class.
        """
        opened = ExpertStore.open(store) if isinstance(store, str | Path) else store
        made = cls(ExpertSource(folder).model_without_experts(dtype), opened, budget=budget, **settings)
        made._opened = opened is not store
        return made

    def _check_memory(self, config: Any) -> None:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = next(self.model.parameters()).element_size()
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * self.capacity * size
        experts, free = min(self.budget, self.store.nbytes), psutil.virtual_memory().available
        if experts + cache > free:
            raise MemoryLimitError(
                f"budget: {format_bytes(experts)} of experts and {format_bytes(cache)} of keys and values for "
                f"{self.capacity} tokens (capacity) do not fit into the {format_bytes(free)} that are free; give less "
                f"of either."
            )

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        """Why a model does not run from a store, or None."""
        return supports(model)

    # -- running

    @contextmanager
    def running(self) -> Iterator[Any]:
        """Let the experts of the store stand in the model for as long as a context lasts, to call it in any way."""
        self._check_open()
        before = {path: self.model.get_submodule(path) for path in self._stored}
        try:
            for path, module in self._stored.items():
                set_module(self.model, path, module)
            yield self.model
        finally:
            for path, module in before.items():
                set_module(self.model, path, module)

    def __call__(self, new: Sequence[int]) -> Tensor:
        """Return the logits of the token after some more tokens: float32 [vocabulary].

        Args:
            new: token ids.

        Raises:
            DataError: there are none, too many, or one is not in the vocabulary.
            NonFiniteError: logits are NaN or Inf.
            CheckpointError: the store was damaged, changed or closed.
        """
        tokens = self._checked_tokens(new)
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config) if self._cache is None else self._cache
        ids = torch.tensor([tokens], device=self.model.get_input_embeddings().weight.device)
        with self.running() as model, evaluating(model), dense_prompt(model, len(tokens)):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        found = self._last_logits(logits)
        self._cache = cache
        self.position += len(tokens)
        return found

    def reset(self) -> None:
        """Forget all tokens; experts stay."""
        self._check_open()
        self._cache, self.position = None, 0

    @property
    def statistics(self) -> FetchStatistics:
        """Hits, reads and stalls since it was made."""
        return self._fetcher.statistics

    @property
    def held(self) -> int:
        """Bytes of experts in memory; never more than the budget."""
        return self._fetcher.held

    # -- closing

    def close(self) -> None:
        """End the threads, and let go of model, experts and cache; more than once is fine.

        The store stays open, unless its path was given.
        """
        self._finalizer()
        if self._opened:
            self.store.close()
        self.closed, self.position = True, 0
        self.model = self._cache = None
        self._stored = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("offloaded: it was closed; make another one.")


def supports(model: nn.Module) -> str | None:
    """Why a model does not run from a store, or None.

    Args:
        model: any.
    """
    try:
        places = expert_places(model)
    except UnsupportedModelError as error:
        return str(error).removeprefix("model: ").removesuffix(".")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return "it has no output layer; load the model with its language-model head"
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return "it is not on the CPU"
    for place in places:
        experts = model.get_submodule(place.path)
        if isinstance(experts, ExpertList):
            return f"actkit changed {place.path}; make the store from the original, with the widths as bits="
    return None


class _Guesses:
    """What to preload, from what the tokens chose so far.

    Args:
        experts: of a layer.
        predictor: None guesses nothing.
        preload: at most so many.
        least: probability of each.
    """

    def __init__(self, experts: int, predictor: PathPredictor | None, preload: int, least: float) -> None:
        self.experts, self.preload, self.least, self._predictor = experts, preload, least, predictor
        self._past: list[list[Sequence[int]]] = []  # of each text side by side, the choices of the last two layers

    def after(self, layer: int, top_k_index: Tensor) -> dict[Key, float]:
        """How probable each expert of the next layer is, for the likeliest of the texts."""
        if self._predictor is None or len(top_k_index) > ROWS:
            self._past = []
            return {}
        chosen = top_k_index.tolist()
        if len(self._past) != len(chosen):
            self._past = [[] for _ in chosen]
        following = (layer + 1) % self._predictor.layers
        chances = dict.fromkeys(range(self.experts), 0.0)
        for past, each in zip(self._past, chosen, strict=True):
            past[:] = [*past[-1:], each]
            for e, chance in self._predictor.predict(following, past).items():
                chances[e] = max(chances[e], chance)
        return {(following, e): chance for e, chance in chances.items()}


def _read(
    store: ExpertStore | ThrottledStore,
    places: Sequence[ExpertPlace],
    activations: Sequence[nn.Module],
    dtype: torch.dtype,
    key: Key,
    unwanted: Event,
) -> Expert:
    """An expert as the resident model has it, its memory the pages of its record."""
    weights: Mapping[str, Any] = store.load(places[key[0]].layer, key[1], dtype, unwanted)
    gate, up, down = (ActLinear(weights[part]) for part in ("gate", "up", "down"))
    for layer in (gate, up, down):
        if isinstance(layer.storage, KernelWeight):
            layer.pack()  # nothing is copied
    return Expert(gate, up, down, activations[key[0]]).eval()
