"""APHQ-ViT: blocks learn their rounding, weighted by what matters to the output (CVPR 2025, arXiv:2504.02508).

    minimize over V, scales:   mean of h (block'(x') - block(x))^2,   h = mean over samples of |g(O + eps) - g(O - eps)|

O is what the block gives, g the gradient at O of the divergence between the model's outputs and those it gave
(`core/watch/importance.py`): h says how much an element of O matters to them, and is an average over the calibration
images for each place and channel. Weights are rounded by rows, what layers read by one scale found in advance, both
with zero points: the plain integers that any backend multiplies. Before that, norms take over what differs from channel
to channel of their outputs (RepQ-ViT), so that one scale is enough for what they give. What attention multiplies
(query, key, attention weights, value) is rounded too, by a scale and a zero point of each head. How V and the scales
are found and learned say `rounding.py` and `operands.py`.
When to use it: vision transformers and encoders with 3- or 4-bit weights and static 3- or 4-bit inputs.
`reconstruct_mlp` before it replaces GELU by ReLU, whose outputs are easier to round. At 8 bits `rtn` and `round_inputs`
lose nothing and take seconds.
Cost: two passes back per block over the calibration data in float64, with a float64 copy of the model; then `steps`
steps of `rows` examples for each block. With `operands` attention weights are explicit, also when the model is run:
memory and time grow with the square of the text.
As in the release: importance and its temperature of 20, eps 1e-6, 128 candidates per scale in three rounds, half of the
elements kept as they are (of a block's input those of the float model), the loss scaled to begin at 2, the penalty.
Settled here: 1,000 steps in place of 20,000, at rates so much higher (V goes as far); scales are searched on what the
rounded blocks before leave; importance of text is an average over the places of a sentence too, as these have nothing
in common; a channel's scale is at least a hundredth of their mean; the search of an attention's scales counts padding
like tokens. `importance: brecq` (squared gradients of the model rounded up to the block) and `mse` are the paper's
baselines.
Our own reading: behind the blocks of a vision transformer stand LayerNorms alone, which no shift of all channels
passes, so that the difference of gradients there is exactly 0 but for rounding. It is measured as published (`mode:
perturb`); rounding has the shape of the Hessian's diagonal, which `mode: hutchinson` measures itself.
Left open: the patch embedding, a convolution, and the head stay in float here; the release rounds them, and learns them
as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from actkit.core.edit.edits import ATTENTION, Configure, Edit, Note, Skip, get_module
from actkit.core.edit.folding import fold, why_no_shift
from actkit.core.forward.hooks import evaluating
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.cache_rounding import IMPLEMENTATION
from actkit.core.model.anatomy import Anatomy, Block, Linear, Site
from actkit.core.model.parts import attention_implementation
from actkit.core.recipe.reconstruction import Example, error_of, examples, graph_bytes, learned_bytes, reconstruct
from actkit.core.recipe.rounded_attention import child_path, why_unrounded
from actkit.core.recipe.scalable import Sets, scalable_sets, scalable_sites, scalable_targets
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.importance import Divergence, Mode, perturbation_importance, squared_gradient
from actkit.core.watch.statistics import Sample, Statistic
from actkit.quantization.aphq_vit.operands import search_operands
from actkit.quantization.aphq_vit.rounding import LearnedRounding, search
from actkit.quantization.smooth import refuse_filled

NORMS: Sets = ("norm",)
SHARES = 0.3, 40  # the smallest of a channel's range that is tried, and how many
TRAVEL, SCALE_TRAVEL = 20.0, 0.8  # steps times rate in the release
FEWEST = 200  # steps that rates are found for
SMALLEST = 0.01  # of a channel's scale beside their mean
BEGINS = 2.0  # the loss


class AphqVit(Transform):
    """Round weights and inputs to few bits, and let each block learn how.

    Attributes:
        bits: 2 to 8, of the weights.
        input_bits: 2 to 8, of what linear layers read, and attention multiplies.
        operands: round what attention multiplies: query, key, attention weights and value.
        importance: 'aph' (averaged over samples; over tokens too, if the data are text), 'ph' (of each sample), 'brecq'
            (squared gradients) or 'mse' (none).
        mode: how 'aph' and 'ph' are found, 'perturb', 'hvp' or 'hutchinson'.
        loss: what importance is for: 'kl' of class probabilities, or 'mse' of the model's outputs.
        temperature: of 'kl'.
        importance_tokens: of how many tokens, or images, 'aph' is the average; None for all.
        reparametrize: let norms take over what differs between their channels.
        steps: of learning, per block; 0 takes what the search found.
        rows: of a step, at most.
        keep: share of the elements that are rounded while a block is learned.
        rate: of learning the rounding of weights; None for 20 / steps, 0.1 at most.
        scale_rate: of learning the scales of inputs, which falls to 0 along a cosine; None for 0.8 / steps, 0.004
            at most.
        strength: of the penalty that makes the rounding hard.
        search_rows: tokens that scales are searched on, or a few more.
        rounds: of that search.
        seed: of the order of rows, and of what is kept.

    Raises:
        ValueError: a value is out of bounds.
    """

    bits: int = Field(4, ge=2, le=8)
    input_bits: int = Field(4, ge=2, le=8)
    operands: bool = True
    importance: Literal["aph", "ph", "brecq", "mse"] = "aph"
    mode: Mode = "perturb"
    loss: Literal["kl", "mse"] = "kl"
    temperature: float = Field(20.0, gt=0)
    importance_tokens: int | None = Field(4096, ge=1)
    reparametrize: bool = True
    steps: int = Field(1000, ge=0)
    rows: int = Field(32, ge=1)
    keep: float = Field(0.5, gt=0, le=1)
    rate: Annotated[float, Field(gt=0)] | None = None
    scale_rate: Annotated[float, Field(gt=0)] | None = None
    strength: float = Field(0.01, ge=0)
    search_rows: int = Field(1024, ge=1)
    rounds: int = Field(3, ge=1)
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(
        slot=("weight", "inputs"), needs_data=True, stream="both", needs_targets=True, plans_in_turn=True
    )
    not_proposed: ClassVar[str] = "it learns for minutes; try it with recipes=['aphq_vit']"
    _importance: dict[str, list[Tensor]] = PrivateAttr(default_factory=dict)  # of each block's output
    _batches: Sequence[Any] = PrivateAttr(default=())
    _references: list[Tensor] = PrivateAttr(default_factory=list)  # the outputs on them, for 'brecq'

    @property
    def weight_grid(self) -> IntegerGrid:
        """The grid that weights are rounded to."""
        return IntegerGrid(self.bits, -1)

    @property
    def input_grid(self) -> IntegerGrid:
        """The grid that inputs are rounded to."""
        return IntegerGrid(self.input_bits, -1, scope="tensor")

    @property
    def divergence(self) -> Divergence:
        """What importance is measured by."""
        return Divergence(self.loss, self.temperature)

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        if self.operands:
            self._check_attention(trial, data)
        if self.importance == "mse" or not self.steps:
            return self
        planned = self.model_copy()
        if self.importance == "brecq":
            with evaluating(trial.model):
                planned._references = [self.divergence.outputs(trial.model, batch) for batch in data]
            planned._batches = data
            return planned
        planned._importance = perturbation_importance(
            trial.model,
            [block.path for block in trial.anatomy.blocks],
            data,
            divergence=self.divergence,
            mode=self.mode,
            average="auto" if self.importance == "aph" else None,
            tokens=self.importance_tokens,
            seed=self.seed,
        )
        return planned

    def _check_attention(self, trial: Trial, data: Sequence[Any]) -> None:
        """Refuse a model whose attention would not ask what rounds it, or asks another one already."""
        if all(child_path(block) is None for block in trial.anatomy.blocks):
            return  # the blocks say so
        reason = why_unrounded(trial, data)
        if reason is not None:
            kind = type(trial.model).__name__
            raise UnsupportedModelError(
                f"model: what the attention of {kind} multiplies is not rounded: {reason}. Give operands: false."
            )

    def conflicts(self, earlier: Transform) -> str | None:
        return super().conflicts(earlier) or (refuse_filled(earlier) if self.reparametrize else None)

    def passes(self, tokens: int, rows: int) -> float:
        return 4 + 3.0 * self.steps * min(self.rows, rows) / max(1, rows)

    def memory(self, block: Block, length: int) -> int:
        weights = sum(linear.in_features * linear.out_features for linear in block.linears())
        copied = 8 * sum(parameter.numel() for parameter in block.root.parameters())
        return graph_bytes(block, length * self.rows) + learned_bytes(weights) + copied

    def targets(self, block: Block) -> Iterable[Linear | str]:
        yield from block.linears()
        if self.reparametrize:
            yield from (each for each in scalable_targets(block, NORMS) if isinstance(each, str))

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        sites = scalable_sites(block, NORMS).values() if self.reparametrize else ()
        return {site: Sample(self.search_rows, self.seed) for site in sites}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        path = child_path(block) if self.operands else None
        if path is None and self.operands:
            yield Skip(block.path or "model", "no attention is described here whose operands could be rounded")
        if path is not None and attention_implementation(block.root) != IMPLEMENTATION:
            yield Configure(ATTENTION, IMPLEMENTATION)  # before all, as the blocks behind read what this one leaves
        if self.reparametrize:
            yield from self._reparametrized(block, seen)
        parts = []
        samples = seen.observe({inputs.site: Sample(self.search_rows, self.seed) for inputs in block.linear_inputs()})
        for inputs in block.linear_inputs():
            if not samples[inputs.site].count:
                yield from (Skip(linear.path, "no calibration token reached it") for linear in inputs.linears)
                continue
            now = [replace(each, module=get_module(block.root, each.path)) for each in inputs.linears]
            x = samples[inputs.site].rows.float()
            parts.append(search(now, x, self.weight_grid, self.input_grid, self.rounds))
        if not parts:
            return
        attention = None
        if path is not None:
            calls = seen.calls(block.path, max_tokens=self.search_rows)
            attention = search_operands(block, path, seen, calls, self.input_grid, self.rounds)
        steps = max(FEWEST, self.steps)
        learned = LearnedRounding(
            parts,
            self.weight_grid,
            self.input_grid,
            attention,
            keep=self.keep,
            rate=self.rate or TRAVEL / steps,
            scale_rate=self.scale_rate or SCALE_TRAVEL / steps,
            strength=self.strength,
        )
        if self.steps:
            yield self._learn(block, seen, learned)
        yield from learned.edits()

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        if self.operands and any(block.attention is not None for block in view.blocks):
            yield Note("model", "attention weights are rounded, and formed for that: [heads, queries, keys]")

    def _reparametrized(self, block: Block, seen: Seen) -> Iterator[Edit | Skip | Note]:
        """Yield the edits by which all channels of a norm's output get one range."""
        for each in scalable_sets(block, NORMS, seen):
            if isinstance(each, Skip | Note):
                yield each
                continue
            group, sample = each
            low, scale = channel_ranges(sample.rows, self.input_bits)
            ratio = scale / scale.mean()
            shift = low - low.mean() * ratio
            yield from fold(block, group, ratio, shift if why_no_shift(group) is None else None)

    def _learn(self, block: Block, seen: Seen, learned: LearnedRounding) -> Note:
        """Learn, and say how it went."""
        importance = self._importance_of(block, seen, learned)
        lessons = examples(seen, self.rows, originals=self.keep < 1, importance=importance)
        with seen.trial(learned.stand_ins()):
            before = learned.hard_error(block, lessons)
            first = error_of(block, learned, lessons)
            weighted = [scaled(each, BEGINS / first if first > 0 else 1.0) for each in lessons]
            learning = reconstruct(
                block, learned, weighted, steps=self.steps, seed=self.seed + block.index, keep=self.keep
            )
            after = learned.hard_error(block, lessons)
        values = {"nearest": before, "learned": after, "flipped": learned.flipped()}
        text = f"squared error {before:.3g} by nearest codes, {after:.3g} with {values['flipped']:.1%} of them changed"
        if importance is None and self.importance != "mse":
            text += "; its importance is 0 everywhere, so all of its outputs counted alike"
        if learning.stopped is not None:
            text += f"; stopped at step {learning.stopped}, before the loss was no longer finite"
        return Note(block.path or "model", text, {**values, "loss": learning.curve(len(lessons))})

    def _importance_of(self, block: Block, seen: Seen, learned: LearnedRounding) -> Tensor | list[Tensor] | None:
        """h of the block's output: one for all, one for each call, or None for 1."""
        found = self._importance.get(block.path, [])
        if self.importance == "brecq":
            with seen.trial(learned.edits()):
                found = squared_gradient(block.root, block.path, self._batches, self._references, self.divergence)
        if not any(bool(each.any()) for each in found):
            return None
        return found[0] if self.importance == "aph" else found


def channel_ranges(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the low end, and the step, of the range of each channel whose rounding errs least: float64 [channels].

    Args:
        rows: [n, channels].
        bits: of a code.
    """
    x, grid = rows.double(), IntegerGrid(bits)
    levels = grid.levels
    middle, half = (x.amax(0) + x.amin(0)) / 2, (x.amax(0) - x.amin(0)) / 2
    best, least = torch.ones_like(half), torch.full_like(half, torch.inf)
    for share in torch.linspace(1, SHARES[0], SHARES[1]).tolist():
        step = (2 * share * half / levels).clamp(min=torch.finfo(x.dtype).tiny)
        above = x - (middle - share * half)
        error = (grid.round(above, step, torch.zeros_like(step)) - above).square().sum(0)
        best, least = torch.where(error < least, share, best), torch.minimum(error, least)
    scale = 2 * best * half / levels
    mean = float(scale.mean())
    return middle - best * half, scale.clamp(min=SMALLEST * mean) if mean > 0 else torch.ones_like(scale)


def scaled(example: Example, factor: float) -> Example:
    """Return an example whose error counts `factor` times."""
    h = example.targets[0].new_ones(1, dtype=torch.float32) if example.importance is None else example.importance
    return replace(example, importance=h * factor)
