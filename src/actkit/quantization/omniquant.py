"""OmniQuant: clipping, scales and shifts that are learned block by block (2023, arXiv:2308.13137).

    low' = sigmoid(l) min(w),   high' = sigmoid(u) max(w)          of each group of weights; u and l begin at 4
    W' = round((W diag(s)) / scale) * scale,   x' = (x - z) / s    s and z begin as SmoothQuant's, and are folded

Each block is taught to give what the float block gave on the float model's states, while it reads those that the
rounded blocks before it left (`core/recipe/reconstruction.py`). Weights stay as they are until the end; then scales
and shifts are folded into norms and layers, and the weights are rounded to the learned ranges. Nothing is left to do
at run time, but for the rounding of inputs if `input_bits` asks for it.
When to use it: for 3 bits and less, or for 4-bit weights with 4- or 6-bit inputs, if minutes of learning are no
matter. `gptq` is quicker; at 4 bits with wide inputs there is little to gain.
Cost: `epochs` passes forward and back over the calibration data, block by block; the memory of one block's graph.
As in the release: Adam at rates of 1e-2 and 5e-3, one row a step, 20 epochs (40 for 2 bits), scales of at least 0.01,
only s and z between norm -> linear layers and value -> output, none in front of down.
Settled here: a scale begins with the largest column of all layers of a set, the release takes one layer's; rows come
in a new order each epoch; the range of a group holds 0, and its zero point is a code (the release lets it go to 1e4);
inputs are rounded per token with zero points. Queries stay as they are, keys and values are rounded behind the rotary
embedding, as `quantize_cache` rounds them, if `cache_bits` says so; then scales between query and key are learned too,
one for two features that turn together and for the query heads of a key head, so that they are exact (the release ties
none). They are refused, with a line, if query and key go through norms. Left open: shifts between value and output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from actkit.core.edit.edits import (
    ATTENTION,
    Configure,
    Edit,
    Insert,
    Note,
    Replace,
    Skip,
    get_module,
    get_tensor,
)
from actkit.core.edit.folding import fold, fold_query_key, why_no_shift
from actkit.core.grids.grid import Grid, straight_through
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.ranges import min_max
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.cache_rounding import CHILD, IMPLEMENTATION, CacheRounding
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Block, EqualizationSet, Linear, Norm, QueryKeySet, Site, query_key_set
from actkit.core.model.own_attention import why_no_cache
from actkit.core.recipe.reconstruction import Learned, examples, graph_bytes, learned_bytes, reconstruct
from actkit.core.recipe.scalable import Sets, scalable_sets, scalable_sites, scalable_targets
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Slot, Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import AbsMax, Range, Statistic
from actkit.quantization.rtn import refuse_groups
from actkit.quantization.smooth import refuse_filled, smoothing_scale

START = 4.0  # sigmoid(4) = 0.982
SMALLEST = 0.01  # of a scale
SETS: Sets = ("norm", "value")


class OmniQuant(Transform):
    """Round weights, and inputs if wanted, to ranges, scales and shifts that are learned.

    Attributes:
        bits: 2 to 8, of the weights.
        input_bits: 2 to 8, of what linear layers read, per token; None leaves it.
        group_size: consecutive inputs per scale, must divide the layer; -1 a whole row; 'auto' the largest of 128, 64,
            32 and 16 that divides it.
        symmetric: weights without zero points.
        clip: learn how far ranges are clipped; False takes all of them.
        equalize: learn scales between producers and layers; None does so if inputs are rounded.
        shift: learn shifts as well, if a norm has a bias.
        alpha: 0 to 1, of the scales at the start.
        epochs: passes over the calibration data.
        rows: of a step.
        clip_rate: learning rate of the clipping.
        scale_rate: learning rate of scales and shifts.
        cache_bits: 8 or 4, of keys and values, per token and head; None leaves them. Scales between query and key are
            learned then.
        both_targets: also learn to give what the float block gives on what the rounded blocks left.
        scale_dtype: what scales of weights are rounded to and stored in.
        seed: of the order of rows.

    Raises:
        ValueError: a value is out of bounds, or nothing would be learned.
    """

    bits: int = Field(4, ge=2, le=8)
    input_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    group_size: Annotated[int, Field(ge=-1)] | Literal["auto"] = "auto"
    symmetric: bool = False
    clip: bool = True
    equalize: bool | None = None
    shift: bool = False
    alpha: float = Field(0.5, ge=0, le=1)
    epochs: int = Field(20, ge=1)
    rows: int = Field(1, ge=1)
    clip_rate: float = Field(1e-2, gt=0)
    scale_rate: float = Field(5e-3, gt=0)
    cache_bits: Literal[4, 8] | None = None
    both_targets: bool = False
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(slot="weight", needs_data=True, stream="both", needs_targets=True)
    not_proposed: ClassVar[str] = "it learns for minutes; try it with recipes=['omniquant']"

    @property
    def grid(self) -> IntegerGrid:
        """The grid that weights are rounded to."""
        return IntegerGrid(self.bits, self.group_size, "input", self.symmetric, scale_dtype=self.scale_dtype)

    @property
    def inputs_grid(self) -> IntegerGrid | None:
        """The grid that inputs are rounded to."""
        return None if self.input_bits is None else IntegerGrid(self.input_bits, -1)

    @property
    def equalizes(self) -> bool:
        """Whether scales are learned."""
        return self.input_bits is not None if self.equalize is None else self.equalize

    @property
    def slots(self) -> tuple[Slot, ...]:
        return ("weight",) if self.input_bits is None else ("weight", "inputs")

    @model_validator(mode="after")
    def _something_is_learned(self) -> OmniQuant:
        if not (self.clip or self.equalizes):
            raise ValueError("clip, equalize: neither is on, so nothing would be learned; use rtn, or turn one on")
        if self.shift and not self.equalizes:
            raise ValueError("shift: true was given, and no scales are learned; give equalize: true beside it")
        return self

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        reason = None if self.cache_bits is None else why_no_cache(trial.model)
        if reason is not None:
            kind = type(trial.model).__name__
            raise UnsupportedModelError(f"cache_bits: the cache of {kind} is not rounded: {reason}; leave it out.")
        return self

    def conflicts(self, earlier: Transform) -> str | None:
        return super().conflicts(earlier) or (refuse_filled(earlier) if self.equalizes else None)

    def passes(self, tokens: int, rows: int) -> float:
        return 2 + 3.0 * self.epochs  # forward, and back at twice its cost

    def memory(self, block: Block, length: int) -> int:
        linears = block.linears()
        groups = sum(each.out_features * (each.in_features // self.grid.size(each.in_features)) for each in linears)
        return graph_bytes(block, length * self.rows) + learned_bytes(2 * groups)

    def targets(self, block: Block) -> Iterable[Linear | str]:
        yield from block.linears()
        if self.equalizes:
            yield from (each for each in scalable_targets(block, SETS) if isinstance(each, str))

    def observe(self, block: Block) -> Mapping[Site, Sequence[Statistic]]:
        refuse_groups(self.grid, block)
        if not self.equalizes:
            return {}
        return {site: [AbsMax(), Range()] for site in scalable_sites(block, SETS).values()}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        sets = []
        for each in scalable_sets(block, SETS, seen) if self.equalizes else ():
            if isinstance(each, Skip | Note):
                yield each
            else:
                group, statistics = each
                sets.append(self._set(group, *statistics))
        if self.input_bits is not None and not sets:
            yield Note(block.path or "model", "inputs are rounded, and no scales could be learned for them")
        pair = query_key_set(block) if self.cache_bits is not None else None
        if pair is not None and pair.refused is not None:
            yield Note(pair.inspect, f"no scale is learned between query and key: {pair.refused}")
        learned = Equivalent(block, self, sets, None if pair is None or pair.refused else LearnedPair(pair))
        also: tuple[list[Tensor], ...] = ()
        if self.both_targets:
            module = get_module(block.root, block.path)
            also = ([call.replay(module) for call in seen.block_calls],)
        lessons = examples(seen, self.rows, also=also)
        with seen.trial(learned.stand_ins()):
            found = reconstruct(block, learned, lessons, steps=self.epochs * len(lessons), seed=self.seed + block.index)
        curve = found.curve(len(lessons))
        text = f"squared error of the block's outputs {curve[0]:.3g} in the first epoch, {curve[-1]:.3g} in the last"
        if found.stopped is not None:
            text += f"; stopped at step {found.stopped}, as the loss was no longer finite: the values before it stand"
        yield Note(block.path or "model", text, {"loss": curve, **learned.figures()})
        yield from learned.edits()

    def _set(self, group: EqualizationSet, largest: AbsMax, values: Range) -> LearnedSet:
        weights = [linear.weight.detach() for linear in group.consumers]
        scale = group.of_channels(smoothing_scale(largest.value, weights, self.alpha)).float()
        shifts = self.shift and why_no_shift(group) is None
        return LearnedSet(group, scale, ((values.low + values.high) / 2).float() if shifts else None)


class LearnedClipping(nn.Module):
    """A choice of ranges (`core/grids/ranges.py`) that are clipped by learned shares.

    Args:
        rows: of the weight.
        groups: of each row.
    """

    def __init__(self, rows: int, groups: int) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.full((rows, groups, 1), START))
        self.high = nn.Parameter(torch.full((rows, groups, 1), START))

    def forward(self, groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return the ends of the range of each group [rows, groups, size]: [rows, groups, 1] each."""
        low, high = min_max(groups, grid)
        return low * torch.sigmoid(self.low), high * torch.sigmoid(self.high)


class LearnedSet(nn.Module):
    """Scales, and shifts, between a producer and the layers that read it.

    Args:
        group: what they move through.
        scale: at the start, [channels].
        shift: at the start, [channels]; None for none.
    """

    def __init__(self, group: EqualizationSet, scale: Tensor, shift: Tensor | None) -> None:
        super().__init__()
        self.group = group
        self.raw = nn.Parameter(scale.clone())
        self.shift = None if shift is None else nn.Parameter(shift.clone())

    @property
    def channels(self) -> Tensor:
        """s of each channel of the producer, at least `SMALLEST`."""
        return straight_through(self.raw.clamp(min=SMALLEST), self.raw)

    @property
    def columns(self) -> Tensor:
        """s of each input of the layers that read it."""
        shared = self.group.shared
        return self.channels if shared is None else self.channels[shared.channels()]


class LearnedPair(nn.Module):
    """Scales between query and key, 1 at the start.

    Args:
        found: what they move through.
    """

    def __init__(self, found: QueryKeySet) -> None:
        super().__init__()
        self.found = found
        self.raw = nn.Parameter(torch.ones(int(found.ties.max()) + 1))

    @property
    def channels(self) -> Tensor:
        """s of each channel of the key, at least `SMALLEST`."""
        return straight_through(self.raw.clamp(min=SMALLEST), self.raw)[self.found.ties.to(self.raw.device)]

    def rows(self) -> Iterator[tuple[Linear, Tensor]]:
        """Yield query and key, each with what its output rows are multiplied by."""
        scale, found = self.channels, self.found
        parts = ((found.query, found.query_rows, found.of_query(1 / scale)), (found.key, found.key_rows, scale))
        for linear, chosen, factors in parts:
            if chosen is not None:
                places = chosen.indices(scale.device)
                factors = scale.new_ones(linear.out_features).index_put((places,), factors)
            yield linear, factors


class Equivalent(Learned):
    """All that is learned for one block, and the weights that follow from it.

    Args:
        block: to be changed.
        settings: what is learned.
        sets: with their scales at the start.
        pair: query and key, or None.
    """

    def __init__(
        self, block: Block, settings: OmniQuant, sets: Sequence[LearnedSet], pair: LearnedPair | None = None
    ) -> None:
        super().__init__()
        self.block, self.settings, self.pair = block, settings, pair
        self.linears = list(block.linears())
        self.sets = nn.ModuleList(sets)
        self.clipping = nn.ModuleList()
        for linear in self.linears if settings.clip else ():
            groups = settings.grid.parameter_shape(linear.out_features, linear.in_features)
            self.clipping.append(LearnedClipping(*groups))
        self._weights = {linear.path: linear.weight.detach().float() for linear in self.linears}

    def rates(self) -> Iterator[tuple[Sequence[nn.Parameter], float]]:
        yield list(self.clipping.parameters()), self.settings.clip_rate
        pair = [] if self.pair is None else list(self.pair.parameters())
        yield [*self.sets.parameters(), *pair], self.settings.scale_rate

    def cache(self) -> Iterator[Edit]:
        """Yield the edits by which keys and values are rounded."""
        attention, bits = self.block.attention, self.settings.cache_bits
        if attention is None or bits is None:
            return
        path, there = f"{attention.path}.{CHILD}", getattr(attention.module, CHILD, None)
        rounding = CacheRounding(bits, None if there is None else there.rotation)
        yield Insert(path, rounding) if there is None else Replace(path, rounding)
        yield Configure(ATTENTION, IMPLEMENTATION)

    def stand_ins(self) -> Iterator[Edit]:
        """Yield what stands in the block while it is learned."""
        yield from self.cache()
        shifted = {each.path for part in self._parts() if part.shift is not None for each in part.group.consumers}
        grid = self.settings.inputs_grid
        for linear in self.linears:
            needs_bias = linear.path in shifted and linear.bias is None
            bias = linear.weight.new_zeros(linear.out_features) if needs_bias else None
            inputs = None if grid is None else LearnedThrough(grid)
            yield Replace(linear.path, ActLinear.of(linear, bias=bias, inputs=inputs))

    def tensors(self) -> dict[str, Tensor]:
        weights, biases = dict(self._weights), self._biases()
        others: dict[str, Tensor] = {}
        for part in self._parts():
            self._move(part, weights, biases, others)
        for linear, rows in self.pair.rows() if self.pair is not None else ():
            weights[linear.path] = weights[linear.path] * rows[:, None]
            if linear.path in biases:
                biases[linear.path] = biases[linear.path] * rows
        found = {}
        for index, linear in enumerate(self.linears):
            choose = self.clipping[index] if self.settings.clip else min_max
            weight, grid = weights[linear.path], self.settings.grid
            rounded = grid.fake(weight, *grid.tracked_parameters(weight, choose))  # type: ignore[arg-type]
            found[f"{linear.path}.storage.tensor"] = rounded.to(linear.weight.dtype)
            if linear.path in biases:
                found[f"{linear.path}.bias"] = biases[linear.path].to(linear.weight.dtype)
        return found | others

    def _parts(self) -> Iterator[LearnedSet]:
        yield from self.sets  # type: ignore[misc]

    def _biases(self) -> dict[str, Tensor]:
        return {each.path: each.bias.detach().float() for each in self.linears if each.bias is not None}

    def _move(
        self, part: LearnedSet, weights: dict[str, Tensor], biases: dict[str, Tensor], others: dict[str, Tensor]
    ) -> None:
        """What `core/edit/folding.py` does once, with gradients."""
        group, channels, columns = part.group, part.channels, part.columns
        producer = group.producer
        if isinstance(producer, Norm):
            weight: Any = producer.module.weight.detach()  # type: ignore[union-attr, operator]
            others[f"{producer.path}.weight"] = ((producer.offset + weight.float()) / channels - producer.offset).to(
                weight.dtype
            )
            bias = getattr(producer.module, "bias", None)
            if bias is not None:
                moved = bias.detach().float() if part.shift is None else bias.detach().float() - part.shift
                others[f"{producer.path}.bias"] = (moved / channels).to(bias.dtype)
        elif isinstance(producer, Linear):
            rows = channels
            if group.producer_rows is not None:
                chosen = group.producer_rows.indices(channels.device)
                rows = channels.new_ones(producer.out_features).index_put((chosen,), channels)
            weights[producer.path] = weights[producer.path] / rows[:, None]
            if producer.path in biases:
                biases[producer.path] = biases[producer.path] / rows
        for linear in group.consumers:
            if part.shift is not None:
                added = self._weights[linear.path] @ part.shift
                biases[linear.path] = biases[linear.path] + added if linear.path in biases else added
            weights[linear.path] = weights[linear.path] * columns
        for name in group.rescaled:
            other = get_tensor(self.block.root, name).detach()
            others[name] = (other.float() * columns).to(other.dtype)

    def figures(self) -> dict[str, Any]:
        """Return what was learned, in numbers."""
        found: dict[str, Any] = {}
        if len(self.clipping):
            shares = [torch.sigmoid(each).mean() for each in self.clipping.parameters()]
            found["mean share of a range"] = float(torch.stack(shares).mean())
        for part in self._parts():
            scale = part.channels.detach()
            found[f"largest over median scale, {part.group.inspect}"] = float(scale.max() / scale.median())
        if self.pair is not None:
            scale = self.pair.channels.detach()
            found["largest over smallest scale of keys"] = float(scale.max() / scale.min())
        return found

    @torch.no_grad()
    def edits(self) -> Iterator[Edit]:
        """Yield what is folded, then the rounded layers."""
        yield from self.cache()
        if self.pair is not None:
            yield from fold_query_key(self.pair.found, self.pair.channels.detach())
        for part in self._parts():
            shift = None if part.shift is None else part.shift.detach()
            yield from fold(self.block, part.group, part.columns.detach(), shift)
        grid, inputs = self.settings.grid, self.settings.inputs_grid
        for index, linear in enumerate(self.linears):
            module = get_module(self.block.root, linear.path)  # folding a shift may have put another one there
            now = Linear(linear.path, linear.role, module, linear.expert)
            choose: Any = self.clipping[index] if self.settings.clip else min_max
            weight = IntegerWeight.quantize(now.weight, grid.of(*now.weight.shape), choose)
            yield Replace(
                linear.path, ActLinear.of(now, weight=weight, inputs=None if inputs is None else RoundedInputs(inputs))
            )


class LearnedThrough(RoundedInputs):
    """Inputs that are rounded while a block is learned: gradients also reach the range of each token."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        moved = self.rotated(x)
        return self.grid.fake(moved, *self.grid.tracked_parameters(moved)).to(x.dtype)
