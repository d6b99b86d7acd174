"""Prune a prompt: tokens that attend little to the first one are dropped in the middle of the model (Agile-Quant).

    score_i = sum over heads of A_h[i, 0]      A: the attention weights of block l, rounded if the model rounds them
    behind block l the floor(r_l n) tokens with the smallest scores go      r_l = 1 - (1 - beta)^(1/m) of m blocks

Later blocks see what is left, and their caches hold nothing else. The first and the last token always stay. Single
tokens that follow are not pruned. Of the tokens with the next smallest scores layers may read fewer bits (`low`): in
the block that scored them, and in those behind it.
When to use it: prompts of a thousand tokens and more, for the time that a first token takes. What was dropped no later
token reads any more: measure on your task. `kept` says which positions each block read.
Cost: the attention weights of the blocks that prune, [heads, tokens, tokens], formed beside an attention that forms
none ('sdpa'). A block that prunes computes its MLP for the tokens that it drops.
As in the release: the score, the number that goes, and a perplexity over the kept positions alone.
Settled here: tokens go behind a block, not before its MLP, which is the same function, as an MLP sees one token at a
time; of equal scores, which log2 attention weights have often, the earlier token goes; the last token stays, as the
next one is predicted from it (in the release it may go, and its labels are then off by one); positions stay what they
were ('keep') unless 'renumber' is given, the release's. The first and the last token are never read in fewer bits.
With TRIP the factors of the channels are those of the other tokens.
Our own reading: `quality` scores dropped tokens too, from their last hidden state, so that models are compared on the
same tokens. The perplexity over kept ones says little: those that are dropped may be the hard ones.
Not built: windows of attention and padded batches, which are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn

from actkit.core.forward.hooks import refuse_compiled_or_sharded
from actkit.core.ground.errors import DataError, MemoryLimitError, UnsupportedModelError
from actkit.core.ground.memory import format_bytes
from actkit.core.layers.prefill import dense_prompt
from actkit.core.measure.stepping import StepByStep
from actkit.core.model.anatomy import Block, Site, anatomy, forms_weights
from actkit.core.model.architectures import find_architecture
from actkit.core.model.parts import attention_implementation
from actkit.core.model.sites import Tap
from actkit.core.recipe.rounded_attention import child_path
from actkit.quantization.agile_quant.low_bits import LowBits
from actkit.quantization.agile_quant.prune_schedule import PruneSchedule
from actkit.quantization.agile_quant.pruned_quality import PositionLosses, Pruned, PrunedQuality
from actkit.quantization.agile_quant.reading import SCORES, Positions, Reading, Score, rotary_of

READ = ("query", "key")


class TokenPruner(StepByStep):
    """Runs a language model of Llama's kin whose prompts are pruned. `close()`, or the end of a `with`, lets go of it.

    Args:
        model: with rotary embeddings and full attention in all blocks.
        schedule: what goes where; by default nothing.
        score: of a token: how much it attends to the first one ('start_token'), how much later ones attend to it
            ('column_mean'), or 'random', the control.
        positions: of the tokens that stay: 'keep', or 'renumber' from 0 on, in each block.
        capacity: tokens of one text; None for the model's context.
        decode_only: of no meaning here, as no weights are copied.
        seed: of 'random'.
        low: of which tokens of a prompt layers read fewer bits; None for none.

    Raises:
        UnsupportedModelError: the model is another, its attention weights cannot be known, or `low` was given and its
            layers read no static inputs.
        MemoryLimitError: the cache does not fit into free memory.
        ValueError: a setting is out of bounds.
    """

    closed = False
    _cache: Any
    _kept: list[Tensor]
    _low: list[Tensor]

    def __init__(
        self,
        model: nn.Module,
        schedule: PruneSchedule | None = None,
        *,
        score: Score = "start_token",
        positions: Positions = "keep",
        capacity: int | None = None,
        decode_only: bool = False,
        seed: int = 0,
        low: LowBits | None = None,
    ) -> None:
        refuse_compiled_or_sharded(model)
        reason = supports(model)
        if reason is not None:
            raise UnsupportedModelError(f"model: prompts of {type(model).__name__} are not pruned: {reason}.")
        if score not in SCORES or positions not in ("keep", "renumber"):
            raise ValueError(
                f"score, positions: {score!r} and {positions!r} were given; allowed are {', '.join(SCORES)}; and keep, "
                f"renumber."
            )
        self.model: Any = model
        self.schedule, self.score, self.positions = schedule or PruneSchedule(), score, positions
        self.low = low or LowBits()
        blocks = anatomy(model).blocks
        self.paths = [(block.path, block.attention.path) for block in blocks if block.attention is not None]
        for name, shares in (("schedule", self.schedule.shares), ("low", self.low.shares)):
            last = max(shares, default=0)
            if last >= len(blocks):
                raise ValueError(
                    f"{name}: block {last} was given, and the model has the blocks 0 to {len(blocks) - 1}."
                )
        self.coarser = {block.index: self.low.of(block) for block in blocks if self.low.reads(block.index)}
        self.outputs = {block.index: block.attention.output.path for block in blocks if block.attention is not None}
        self.formed = self._formed(blocks)
        self.operands = self._operands(blocks)
        config: Any = model.config
        context: int = config.max_position_embeddings
        self.capacity: int = context if capacity is None else capacity
        if not 1 <= self.capacity <= context:
            raise ValueError(f"capacity: {capacity} was given; give 1 to {context}, the model's context.")
        attention = blocks[0].attention
        assert attention is not None
        size = next(model.parameters()).element_size()
        needed = 2 * len(blocks) * attention.key_value_heads * attention.head_dim * self.capacity * size
        if needed > psutil.virtual_memory().available:
            raise MemoryLimitError(
                f"capacity: a cache of {self.capacity} tokens ({format_bytes(needed)}) does not fit into the "
                f"{format_bytes(psutil.virtual_memory().available)} that are free; give a smaller capacity."
            )
        self.seed = seed
        keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if keeps_last else {}  # those of the other tokens are the largest tensor
        self.reset()

    def _formed(self, blocks: Sequence[Block]) -> dict[int, str]:
        """The paths of what rounds attention weights, in blocks that score tokens."""
        paths = {block.index: child_path(block) for block in blocks if self.scores(block.index)}
        held = dict(self.model.named_modules())
        return {
            index: path
            for index, path in paths.items()
            if path is not None and getattr(held.get(path), "weights", None) is not None
        }

    def scores(self, block: int) -> bool:
        """Say whether a block's attention weights choose tokens of a prompt.

        Args:
            block: its number.
        """
        chosen = self.schedule.shares.get(block) or self.low.shares.get(block)
        return bool(chosen) and self.score != "random"

    def _operands(self, blocks: Sequence[Block]) -> dict[int, dict[str, Tap]]:
        """The taps of queries and keys in blocks that score tokens by weights which their attention does not form.

        Tokens that are read in fewer bits are chosen before the attention ends, so that its output comes too late.
        """
        scoring = [block for block in blocks if self.scores(block.index) and block.index not in self.formed]
        if forms_weights(self.model):
            scoring = [block for block in scoring if self.low.shares.get(block.index)]
        if not scoring:
            return {}
        sites = {block.index: {name: Site(f"attention.{name}", block.index) for name in READ} for block in scoring}
        known = all(site in block.taps for block in scoring for site in sites[block.index].values())
        implementation = attention_implementation(self.model)
        if implementation not in ("sdpa", "eager") or not known:
            raise UnsupportedModelError(
                f"model: its attention {implementation!r} does not form its weights, which tokens are chosen by; call "
                f"model.set_attn_implementation('eager'), or apply agile_quant with softmax: log2."
            )
        return {block.index: {name: block.taps[site] for name, site in sites[block.index].items()} for block in scoring}

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        """Why a model's prompts cannot be pruned, or None."""
        return supports(model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model and the cache; more than once is fine."""
        self.closed, self.position = True, 0
        self.model = self._cache = None
        self._kept, self._low = [], []

    def reset(self) -> None:
        """Forget all tokens."""
        self._check_open()
        self._cache, self._kept, self._low, self.position = None, [], [], 0

    @property
    def lowered(self) -> tuple[tuple[int, ...], ...]:
        """Of each block the positions of the prompt of which it read fewer bits, in order."""
        return tuple(tuple(each[0].nonzero().flatten().tolist()) for each in self._low)

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """Of each block the positions of the text that its cache holds, in order."""
        return tuple(tuple(each.flatten().tolist()) for each in self._kept)

    def __call__(self, new: Sequence[int]) -> Tensor:
        """Return the logits of the token after some more tokens: float32 [vocabulary].

        If they are the first ones, and several, they are the prompt, which is pruned.

        Args:
            new: token ids.

        Raises:
            DataError: there are none, too many, or one is not in the vocabulary.
            NonFiniteError: logits are NaN or Inf.
        """
        tokens = self._checked_tokens(new)
        from transformers import DynamicCache

        first = self._cache is None
        cache = DynamicCache(config=self.model.config) if first else self._cache
        ids = torch.tensor([tokens], device=self.model.get_input_embeddings().weight.device)
        reading = Reading(self, ids, None if first else self._kept, prunes=first and len(tokens) > 1)
        with reading.running(), dense_prompt(self.model, len(tokens)):
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self._last).logits
        self._cache, self._kept = cache, reading.kept
        self._low = reading.low if first else self._low
        self.position += len(tokens)
        found = self._last_logits(logits)
        return found

    def read(self, input_ids: Tensor) -> Pruned:
        """Read whole texts, each pruned for itself, and predict at every position, without a cache.

        Args:
            input_ids: int64 [batch, tokens], without padding.

        Raises:
            DataError: another shape.
        """
        self._check_open()
        if input_ids.dim() != 2 or not input_ids.numel():
            raise DataError(
                f"input_ids: shape {list(input_ids.shape)} was given; give texts of one length, [batch, tokens]."
            )
        reading = Reading(self, input_ids, None, prunes=True, refills=True)
        with reading.running():
            logits = self.model(input_ids=input_ids, use_cache=False).logits
        return Pruned(logits, tuple(reading.kept), reading.left, tuple(reading.low))

    def losses(self, batches: Iterable[Mapping[str, Tensor]]) -> PositionLosses:
        """Measure the loss at every position that has a next token.

        Args:
            batches: with `input_ids` [batch, tokens]; an `attention_mask` must have no padding.

        Raises:
            DataError: a batch is padded, or there is no position with a next token.
        """
        nats, kept, read, removed = [], [], 0, 0
        for batch in batches:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            if mask is not None and not bool(mask.bool().all()):
                raise DataError("batches: one is padded, and tokens go by number; give texts of one length each.")
            pruned = self.read(ids)
            chances = torch.log_softmax(pruned.logits[:, :-1].float(), -1)
            nats.append(-chances.gather(-1, ids[:, 1:, None]).flatten().double())
            kept.append(pruned.kept_mask[:, :-1].flatten())
            read += ids.numel() * len(pruned.kept)
            removed += sum(ids.numel() - each.numel() for each in pruned.kept)
        if not nats or not sum(map(len, nats)):
            raise DataError("batches: there is no position with a next token; give texts of two tokens or more.")
        return PositionLosses(torch.cat(nats), torch.cat(kept), removed / read)

    def quality(self, batches: Sequence[Mapping[str, Tensor]]) -> PrunedQuality:
        """Measure the losses with and without pruning; arguments and errors as in `losses`."""
        self._check_open()
        return PrunedQuality.of(TokenPruner(self.model).losses(batches), self.losses(batches))

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("pruner: it was closed; make another one.")


def supports(model: nn.Module) -> str | None:
    """Why a model's prompts cannot be pruned, or None.

    Args:
        model: any.
    """
    config: Any = getattr(model, "config", None)
    if config is None or find_architecture(getattr(config, "model_type", "")) is None:
        return "its family has no row; docs/architectures.md lists those that have one"
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return "it has no output layer; load the model with its language-model head"
    if rotary_of(model) is None:
        return "its positions are not one rotary embedding for all blocks, which can be given to each"
    layers = getattr(config, "layer_types", None)
    windows = any(kind != "full_attention" for kind in layers) if layers else getattr(config, "sliding_window", None)
    if windows:
        return "its attention has windows, which dropped tokens would widen"
    if any(block.attention is None for block in anatomy(model).blocks):
        return "the attention of a block is not described"
    return None
