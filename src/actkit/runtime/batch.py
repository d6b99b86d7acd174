"""Batch: up to 8 texts that one decoder writes at once, each weight read once for all of them.

    batch = decoder.batch(4)
    for number, token in batch.generate(prompts, max_new_tokens=64): ...

A token of each sequence goes through the layers together: products by the kernels for several rows, attention by the
decoding step's own, sequence by sequence (`kernels.batch_step`). What lies between the two is that of a prompt
(`runtime.prompt`), whose tokens are of different texts here. A prompt is read alone, as the decoder reads it, and takes
the place of a sequence that has ended; a sequence that is left alone goes on in single steps.

Exactness: float32, so that a text is the one that the decoder writes alone but for the order of sums; and but for the
rounding of activations to 16 bits that single steps do with integer weights, and a batch does not. Units that a sparse
gate keeps bundled meet inputs in the dtype of their weights, as in a prompt.
Cost: the cache of each sequence. Selections stay each sequence's own: what one selects is multiplied with zeros for the
others, so the weights of a batch are read where any of them selects. If most inputs are skipped, one text after another
may be faster: `rates` measures it.
Left open: latent attention, and rotary frequencies that change with the length, are refused by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from actkit.core.ground.errors import DataError, MemoryLimitError, NonFiniteError, UnsupportedModelError
from actkit.core.ground.memory import format_bytes
from actkit.core.measure.generation import end_tokens
from actkit.core.measure.sampling import LIKELIEST, Sampling
from actkit.kernels import batch_step
from actkit.kernels import decode_products as forms
from actkit.kernels import decode_step as steps
from actkit.kernels.output_rows import BundledUnits, PackedRows, output_rows
from actkit.kernels.packing import PackedWeight, aligned
from actkit.kernels.process import LOCK
from actkit.kernels.quantized import BLOCK, QuantizedWeight, outputs_of
from actkit.kernels.quantized_operators import quantized_output_rows
from actkit.kernels.quantized_rows import QuantizedRows
from actkit.runtime.prompt import Outputs, Prompt
from actkit.runtime.shards import NoMatrix

if TYPE_CHECKING:
    from actkit.runtime.decoder import Decoder

MOST = batch_step.SIZES[-1]
OF_SEQUENCES = ("keys", "cached", "key_scales", "value_scales")  # what a sequence has of its own
TIMED = 4  # steps that `rates` takes the fastest of


class Batch:
    """Decodes several sequences at once with a decoder, which stays usable for itself.

    Args:
        decoder: whose weights, threads, cache and capacity (of each sequence) they are.
        sequences: at once, 1 to 8.

    Attributes:
        positions: int64 [sequences], how many tokens each holds.

    Raises:
        UnsupportedModelError: the model has latent attention, or rotary frequencies that change with the length.
        MemoryLimitError: the caches do not fit into free memory; raised before anything is allocated.
        ValueError: the number of sequences is out of bounds.
    """

    def __init__(self, decoder: Decoder, sequences: int = MOST) -> None:
        if not 1 <= sequences <= MOST:
            raise ValueError(f"sequences: {sequences} was given; give 1 to {MOST}.")
        decoder._check_open()
        plan, work = decoder._plan, decoder._work
        reason = None
        if plan.latent.any():
            reason = "its attention keeps latents"
        elif len(decoder._rotaries) > 1:
            reason = "its rotary frequencies change with the length of a text"
        if reason is not None:
            raise UnsupportedModelError(
                f"model: it is not decoded in batches, because {reason}; decode its texts one after another."
            )
        needed, free = sequences * decoder.cache_bytes, psutil.virtual_memory().available
        if needed > free:
            raise MemoryLimitError(
                f"sequences: the caches of {sequences} ({format_bytes(needed)}) do not fit into the "
                f"{format_bytes(free)} that are free; give fewer, or build the decoder with a smaller capacity."
            )
        self.decoder, self.sequences = decoder, sequences
        layers = len(plan.norms)
        # One sequence's layers after the other's, so that each has a whole cache of its own.
        caches: Any = {
            name: aligned((sequences * layers, *kept.shape[1:]), kept.dtype)
            for name, kept in work._asdict().items()
            if name in OF_SEQUENCES
        }
        every = work._replace(**caches)
        self._own = [
            work._replace(**{name: kept[b * layers : (b + 1) * layers] for name, kept in caches.items()})
            for b in range(sequences)
        ]
        self._rows = _Rows(decoder, every, sequences)
        self.positions = np.zeros(sequences, np.int64)

    # -- steps

    def read(self, b: int, tokens: Sequence[int]) -> Tensor:
        """Return the logits of one sequence after some more tokens, as the decoder alone: float32 [vocabulary].

        Args:
            b: the place of the sequence.
            tokens: token ids; of an empty sequence, its prompt.

        Raises:
            DataError: the tokens do not fit.
            NonFiniteError: logits are NaN or Inf.
        """
        decoder = self.decoder
        decoder._check_open()
        before = decoder._work, decoder.position
        decoder._work, decoder.position = self._own[b], int(self.positions[b])
        try:
            return decoder(tokens)
        finally:
            self.positions[b] = decoder.position
            decoder._work, decoder.position = before

    def begin(self, b: int) -> None:
        """Empty the place of a sequence.

        Args:
            b: the place.
        """
        self.positions[b] = 0

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits after one more token of each of the first sequences: float32 [sequences, vocabulary].

        Args:
            tokens: one for each sequence, in their order.

        Raises:
            DataError: there are more tokens than sequences, a cache is full, or a token is not in the vocabulary.
            NonFiniteError: logits are NaN or Inf.
        """
        decoder, number = self.decoder, len(tokens)
        decoder._check_open()
        if not 1 <= number <= self.sequences:
            raise DataError(f"tokens: {number} were given; give 1 to {self.sequences}, one for each sequence.")
        if self.positions[:number].max() >= decoder.capacity:
            raise DataError(
                f"capacity: the cache of a sequence holds {decoder.capacity} tokens and is full; build the decoder "
                f"with a larger capacity."
            )
        if not 0 <= min(tokens) <= max(tokens) < decoder.vocabulary_in:
            raise DataError(
                f"tokens: {min(tokens)} to {max(tokens)} were given; the model embeds 0 to {decoder.vocabulary_in - 1}."
            )
        if number == 1:
            return self.read(0, tokens)[None]
        logits = self._rows.step(list(tokens), self.positions[:number])
        self.positions[:number] += 1
        if not logits.isfinite().all():
            raise NonFiniteError("logits: NaN or Inf in a batch; check the weights and scales of the model.")
        return logits

    def move(self, source: int, to: int) -> None:
        """Put a sequence in the place of another, which is forgotten.

        Args:
            source: its place.
            to: the other's.
        """
        end = int(self.positions[source])
        for name in OF_SEQUENCES:
            getattr(self._own[to], name)[:, :, :end] = getattr(self._own[source], name)[:, :, :end]
        self.positions[to] = end

    # -- texts

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = LIKELIEST,
        end: Collection[int] | None = None,
        stopped: Callable[[int, list[int]], bool] = lambda number, tokens: False,
        together: int | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Yield (number of the prompt, a token that follows it), as they come.

        Args:
            prompts: token ids of each, any number of prompts.
            max_new_tokens: at most, for each.
            sampling: as in `core.measure.generation.generate_ids`, with a generator for each prompt.
            end: tokens that end a text, which are yielded too; None for the model's.
            stopped: called with the number of a prompt and its new tokens; True ends the text.
            together: texts at once at most; None for as many as there are places.

        Raises:
            DataError: a prompt is empty, or exceeds the cache with its new tokens.
            ValueError: `together` is out of bounds.
        """
        together = self.sequences if together is None else together
        if not 1 <= together <= self.sequences:
            raise ValueError(f"together: {together} was given; give 1 to {self.sequences}.")
        for number, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= self.decoder.capacity - max_new_tokens:
                raise DataError(
                    f"prompts: {len(prompt)} tokens of prompt {number} and {max_new_tokens} new ones do not fit into "
                    f"a cache of {self.decoder.capacity}; give at least one token, ask for fewer new ones, or build "
                    f"the decoder with a larger capacity."
                )
        ends = end_tokens(self.decoder.model) if end is None else end
        texts = [_Text(number, list(prompt), sampling.generator()) for number, prompt in enumerate(prompts)]
        return self._write(texts, max_new_tokens, sampling, ends, stopped, together)

    def _write(
        self,
        waiting: list[_Text],
        most: int,
        sampling: Sampling,
        end: Collection[int],
        stopped: Callable[[int, list[int]], bool],
        together: int,
    ) -> Iterator[tuple[int, int]]:
        active: list[_Text] = []  # each in its place

        def goes_on(text: _Text, logits: Tensor) -> bool:
            text.tokens.append(sampling.choose(logits, text.generator))
            return not (text.tokens[-1] in end or len(text.tokens) == most or stopped(text.number, text.tokens))

        while waiting or active:
            while waiting and len(active) < together:
                text, place = waiting.pop(0), len(active)
                self.begin(place)
                if goes_on(text, self.read(place, text.prompt)):
                    active.append(text)
                yield text.number, text.tokens[-1]
            if not active:
                continue
            logits = self([text.tokens[-1] for text in active])
            kept = [goes_on(text, own) for text, own in zip(active, logits)]
            new = [(text.number, text.tokens[-1]) for text in active]
            for place in reversed(range(len(active))):
                if not kept[place]:
                    last = active.pop()
                    if place < len(active):  # the last one fills the gap
                        self.move(len(active), place)
                        active[place] = last
            yield from new

    # -- whether it pays

    def rates(self, clock: Callable[[], float] = time.perf_counter) -> dict[int, float]:
        """Measure tokens per second of 1, 2, 4 ... sequences in the middle of the cache. Forgets all sequences.

        Args:
            clock: what counts the seconds.
        """
        numbers = sorted({1, self.sequences, *(size for size in batch_step.SIZES if size < self.sequences)})
        vocabulary, found = self.decoder.vocabulary_in, {}
        for number in numbers:
            seconds = []
            for attempt in range(TIMED + 1):  # the first compiles
                tokens = [(attempt + number * b * vocabulary // MOST) % vocabulary for b in range(number)]
                self.positions[:number] = self.decoder.capacity // 2
                began = clock()
                self(tokens)
                seconds.append(clock() - began)
            found[number] = number / min(seconds[1:])
        self.positions[:] = 0
        return found


@dataclass
class _Text:
    number: int
    prompt: list[int]
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)


class _Stage(NamedTuple):
    """The products of a layer's stage: int64 [threads, 2], the first of each thread and how many.

    alone: whether they are computed one by one; read: the kinds of inputs, what selects them and among which; kinds,
    begins: int64 [all products], of which kind a product reads, and from where on.
    """

    places: np.ndarray
    alone: bool
    read: list[tuple[Any, slice]]
    kinds: np.ndarray
    begins: np.ndarray


class _Rows(Prompt):
    """A prompt of one token of each sequence, its products and its attention those of a batch."""

    def __init__(self, decoder: Decoder, work: steps.Work, sequences: int) -> None:
        plan = decoder._plan
        super().__init__(plan, work, decoder._matrices, decoder._selections, torch.float32, in_integers=False)
        self.decoder, self.threads = decoder, decoder.threads
        # The attention finds the norms of heads where it finds the cache: at the sequence's layers.
        self._own = plan._replace(head_norms=np.tile(plan.head_norms, (sequences, 1, 1)), cut_from=0)
        self._places = [np.ascontiguousarray(plan.layers[:, layer]) for layer in range(plan.layers.shape[1])]
        self._scratch = batch_step.scratch(plan.products, decoder.threads, work.stage.shape[1])
        self._mixtures = aligned((MOST, len(work.mixed)), np.float32)
        self._tables: dict[int, np.ndarray] = {}
        self._stages: dict[tuple[int, int], _Stage] = {}
        self.positions = np.zeros(0, np.int64)

    def step(self, tokens: list[int], positions: np.ndarray) -> Tensor:
        """Run a token of each sequence at its position: float32 [sequences, vocabulary]."""
        self.positions = positions.copy()
        with torch.no_grad():
            x = self.decoder._rows(tokens).float() * float(self.plan.embedding)
            if len(self.plan.positions):
                x += torch.from_numpy(self.plan.positions[positions])
            self.read(x, 0)
            return torch.cat(self.logits(x), 1)[:, : self.decoder.vocabulary]

    def _mixed(self, layer: int, normed: list[Tensor], begin: int) -> list[Tensor]:
        places, scratch, mixed = self._places[layer], self._scratch, self._mixtures
        for own, out in zip(torch.from_numpy(scratch.out), self._products(layer, steps.QKV, normed)):
            kept = own[: len(out), : out.shape[1]]
            if out.data_ptr() != kept.data_ptr():  # products that were computed one by one
                kept.copy_(out)
        with LOCK:
            self.decoder._follow_threads()
            came = batch_step.attend_stage(places, layer, self.positions, scratch.out, mixed, self._own, self.work)
        if not came:
            raise RuntimeError(
                f"threads: {self.threads} threads of the batch did not run side by side; build the decoder with fewer."
            )
        wide, found = self.plan.shared_by * self.plan.size, torch.from_numpy(mixed[: len(self.positions)])
        return list(found.split([int(place[steps.HEADS]) * wide for place in places], 1))

    def _outputs(self, layer: int, stage: int, inputs: list[Tensor]) -> list[Outputs]:
        return [Outputs(out) for out in self._products(layer, stage, inputs)]

    def _products(self, layer: int, stage: int, inputs: list[Tensor]) -> list[Tensor]:
        if (layer, stage) not in self._stages:
            self._stages[layer, stage] = self._stage(layer, stage)
        own = self._stages[layer, stage]
        if own.alone:
            return super()._products(layer, stage, inputs)
        whole = inputs[0] if stage not in (steps.OUTPUT, steps.DOWN) else torch.cat(inputs, 1)
        given = [whole if select is None else select(whole[:, part]) for select, part in own.read]
        self._multiply(own.places, _stacked(given), own.kinds, own.begins)
        outs = torch.from_numpy(self._scratch.out[:, : len(whole)])
        return [out if number else out[:, :0] for out, number in zip(outs, own.places[:, 1].tolist())]

    def _stage(self, layer: int, stage: int) -> _Stage:
        """Find out what the products of a stage read."""
        table, shared = self.plan.products, stage not in (steps.OUTPUT, steps.DOWN)
        places = np.ascontiguousarray(self._places[layer][:, 2 * stage : 2 * stage + 2])
        numbers = [p for first, number in places.tolist() for p in range(first, first + number)]
        alone = stage == steps.UP or not numbers or bool(table[numbers, forms.LOW_RANK].any())
        found = _Stage(places, alone, [], np.zeros(len(table), np.int64), np.zeros(len(table), np.int64))
        known: dict[Any, int] = {}
        for p in numbers:
            row, select = table[p], self.selections[p]
            at = int(row[forms.INPUTS_AT]) if shared else 0
            key = None if select is None else (id(select), at)
            if key not in known:
                known[key] = len(found.read)
                found.read.append((select, slice(at, at + int(row[forms.ALL_INPUTS]))))
            found.kinds[p] = known[key]
            found.begins[p] = row[forms.FIRST_INPUT] + (at if select is None else 0)
        return found

    def _product(self, p: int, x: Tensor) -> Tensor:
        weight, row = self.matrices.weights[p], self.plan.products[p]
        if isinstance(weight, PackedRows | QuantizedRows):
            every, given = torch.arange(weight.out_features, dtype=torch.int32), x.contiguous()
            if isinstance(weight, PackedRows):
                y = output_rows(given, weight, every)
            else:
                y = quantized_output_rows(given, weight, every)
            bias = self.matrices.biases[p]
            return y if bias is None else y + bias[: y.shape[1]]
        if isinstance(weight, NoMatrix):
            return super()._product(p, x)
        assert isinstance(weight, PackedWeight | QuantizedWeight)
        zeros = np.zeros(len(self.plan.products), np.int64)
        self._multiply(np.array([[p, 1]]), _stacked([x]), zeros, zeros)
        at, width = int(row[forms.OUT_AT]), int(row[forms.TILES] * row[forms.TILE])
        y = torch.from_numpy(self._scratch.out[0, : len(x), at : at + width].copy())
        return outputs_of(y, weight.layout) if isinstance(weight, QuantizedWeight) else y[:, : weight.out_features]

    def _multiply(self, places: np.ndarray, x: np.ndarray, kinds: np.ndarray, begins: np.ndarray) -> None:
        size = next(size for size in batch_step.SIZES if size >= x.shape[1])
        if size not in self._tables:
            self._tables[size] = _table(self.plan.products, self.matrices.weights, size)
        with LOCK:
            self.decoder._follow_threads()
            batch_step.multiply_stage(places, self._tables[size], x, kinds, begins, self.work.memory, self._scratch)


def _stacked(given: list[Tensor]) -> np.ndarray:
    """The inputs of products, float32 [kinds, sequences, inputs]."""
    if len(given) == 1:
        return given[0].float().contiguous().numpy()[None]
    width = max(own.shape[1] for own in given)
    return torch.stack([torch.nn.functional.pad(own.float(), (0, width - own.shape[1])) for own in given]).numpy()


def _table(products: np.ndarray, weights: Sequence[Any], size: int) -> np.ndarray:
    """The table with the functions that multiply so many rows."""
    table = products.copy()
    for row, weight in zip(table, weights):
        if weight.buffer.numel() == 0 or isinstance(weight, PackedRows | QuantizedRows | BundledUnits):
            continue  # a thread that has no share; what stands behind a sparse gate
        if isinstance(weight, PackedWeight):
            stored: Any = np.uint16 if weight.buffer.dtype == torch.bfloat16 else np.float32
            row[forms.FUNCTION] = forms.address(batch_step.floats, stored, size)
            continue
        assert isinstance(weight, QuantizedWeight)
        layout, stored = weight.layout, np.uint8 if weight.layout.stored_bits == 4 else np.int8
        if layout.by_input:
            row[forms.FUNCTION] = forms.address(batch_step.groups, stored, bool(layout.zeros), size)
        else:
            pieces = BLOCK // layout.piece
            row[forms.FUNCTION] = forms.address(batch_step.records, stored, pieces, bool(layout.zeros), size)
    return table
