"""AWQ: scale salient input channels up before rounding, and the activations down (2023, arXiv:2306.00978).

    W x = (W diag(s)) (x / s),   s = m^r / sqrt(max(m^r) min(m^r)),   m_j = mean |x_j|,   r in {0, 1/20, ..., 19/20}

r is searched per set of layers that share an input, for the smallest output error of a small submodule with rounded
weights; 1/s is folded into whatever produces the input (a norm, the rows of a linear layer, an activation). Then
weights are clipped: per row and group the best of 10 bounds from 1.00 to 0.55 of the maximum. Then they are rounded.
When to use it: for 3 or 4 bits per weight if some input channels carry large activations, as in language models of a
billion parameters and more. On the small embedded models it is as good as rounding, not better.
Cost: two passes over the calibration tokens, and of each attention, MLP and down projection 20 runs on screen_tokens of
them and 4 on all. No gradients.
As in the release: calibrated on the original model's hidden states, r = 1 never tried, strict minimum, the set from
value to output used only if their shapes agree, query and key are not clipped. `duo_scaling` is AutoAWQ's variant. The
release's grid, which loses groups of one sign, is the setting `convention="llm-awq"` (core/grids/integers.py).
Settled here: every r runs on 1,024 tokens, r = 0 and the three best on all (figures in LOG.md); clipping sees a random
sample of tokens and not evenly spaced ones; padded tokens are masked out of means and errors; if nothing can take the
scale (post-norm, routers) the set is rounded without it, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf, isfinite
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.edit.folding import fold
from actkit.core.grids.integers import Convention, IntegerGrid
from actkit.core.grids.parcels import parcels
from actkit.core.ground.errors import NonFiniteError
from actkit.core.ground.largest import largest
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Block, EqualizationSet, Linear, Norm, Site, equalization_sets
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes, poor_at_four_bits
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Slot, Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.calls import Call
from actkit.core.watch.statistics import Moments, Sample, Statistic
from actkit.quantization.rtn import refuse_groups

NOT_CLIPPED = ("query", "key", "query_key_value")  # clipping them moves attention scores; the release leaves them
CLIP_STEPS, CLIP_GRID = 10, 20
FINALISTS = 4  # ratios that run on all tokens
SEARCHED = 1024  # tokens that the search of a model's front replays for each ratio


class Awq(Transform):
    """Activation-aware weight quantization.

    Attributes:
        bits: 2 to 8.
        group_size: consecutive inputs per scale, must divide the layer; -1 a whole row; 'auto' the largest of 128, 64,
            32 and 16 that divides it.
        symmetric: no zero point.
        n_grid: scales tried.
        duo_scaling: s = m^r / (w^(1-r) + 1e-4) with the mean relative weight w.
        clip: search clipping bounds.
        clip_tokens: how many tokens that search runs on.
        search_tokens: how many tokens the search of r runs on; None for all.
        screen_tokens: r = 0 and the three best on so many tokens go on to all of search_tokens; None tries every r on
            all, as the release does.
        convention: "llm-awq" for the grid of the release.
        round: whether weights are clipped and rounded; False only scales them, exactly, for the quantizer behind it.
        scale_dtype: what scales are rounded to and stored in; a layer whose scales 16 bits cannot hold keeps float32.

    Raises:
        ValueError: a value is out of bounds.
    """

    bits: int = Field(4, ge=2, le=8)
    group_size: Annotated[int, Field(ge=-1)] | Literal["auto"] = "auto"
    symmetric: bool = False
    n_grid: int = Field(20, ge=1, le=200)
    duo_scaling: bool = False
    clip: bool = True
    clip_tokens: int = Field(512, ge=1)
    search_tokens: int | None = Field(None, ge=1)
    screen_tokens: int | None = Field(1024, ge=1)
    convention: Convention = "zero_in_range"
    round: bool = True
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"

    tags: ClassVar[Tags] = Tags(slot="weight", needs_data=True, stream="original", records_calls=True, sums_calls=True)

    @property
    def grid(self) -> IntegerGrid:
        """The grid that weights are rounded to."""
        return IntegerGrid(
            self.bits, self.group_size, "input", self.symmetric, self.convention, scale_dtype=self.scale_dtype
        )

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.tags.slots if self.round else ()

    @model_validator(mode="after")
    def _grid_is_possible(self) -> Self:
        _ = self.grid  # it refuses a group size of 0
        return self

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        yield LeftOut("awq at 3 bits", "3 bits save a quarter of 4 on disk, decode no faster and cost far more quality")
        refused = "; ".join(shapes.refused)
        scalable = shapes.scalable - shapes.shared
        if not scalable:
            refused = refused or "no norm or layer is known that could take a scale"
            yield LeftOut("awq", f"no set of layers can take its scales: {refused}")
            return
        if refused:
            yield LeftOut("awq's scale on some layers, which are rounded without one", refused)
        hard = poor_at_four_bits(profile)
        scales = f"{scalable} sets of layers can take a scale, {len(shapes.refused)} kinds cannot"
        four = cls(bits=4, group_size=shapes.group, search_tokens=SEARCHED)
        yield Idea("awq 4 bit", four, f"{scales}{hard}", 30, base=1)
        if shapes.finer_group is not None:
            finer = four.model_copy(update={"group_size": shapes.finer_group})
            name = f"awq 4 bit, groups of {shapes.finer_group}"
            yield Idea(name, finer, f"finer groups if 4 bits lose too much{hard}", 130)

    def conflicts(self, earlier: Transform) -> str | None:
        if set(earlier.slots) - {"weight"}:
            return "it rescales the inputs that the other slots were filled for; put it first"
        return super().conflicts(earlier)

    def targets(self, block: Block) -> Iterable[Linear | str]:
        yield from block.linears()
        for group in equalization_sets(block):
            if isinstance(group.producer, Norm) and not why_no_scale(group):
                yield f"{group.producer.path}.weight"

    def passes(self, tokens: int, rows: int) -> float:
        searched, screened = self._searched(tokens)
        tried = self.n_grid * screened + FINALISTS * searched if screened else self.n_grid * searched
        return 1 + (tried + 4 * searched) / max(1, tokens)

    def _searched(self, tokens: int) -> tuple[int, int]:
        """Of so many calibration tokens, on how many r is searched, and how many of these screen it (0: none)."""
        searched = tokens if self.search_tokens is None else min(self.search_tokens, tokens)
        return searched, self.screen_tokens if self.screen_tokens and self.screen_tokens < searched else 0

    def observe(self, block: Block) -> Mapping[Site, list[Statistic]]:
        refuse_groups(self.grid, block)
        return {inputs.site: [Moments(), Sample(self.clip_tokens)] for inputs in block.linear_inputs()}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        sites = {linear.path: inputs.site for inputs in block.linear_inputs() for linear in inputs.linears}
        scales: dict[str, Tensor] = {}  # by consumer
        for group in equalization_sets(block):
            refused = why_no_scale(group)
            if refused:
                yield Note(group.inspect, f"rounded without a scale: {refused}")
                continue
            moments, _ = seen[sites[group.consumers[0].path]]
            if not moments.count:
                yield Note(group.inspect, "rounded without a scale: no calibration token reached it")
                continue
            searched, screened = self._searched(seen.tokens)
            calls = seen.calls(group.inspect, max_tokens=searched)
            screen = seen.calls(group.inspect, max_tokens=screened) if screened else None
            inspected = get_module(block.root, group.inspect)
            scale, ratio, losses = search_scale(
                inspected, group.consumers, calls, moments.mean_abs, self, seen.total, screen
            )
            yield Note(
                group.inspect, f"ratio {ratio:.2f}, error {losses.get(0, inf):.3g} -> {min(losses.values()):.3g}"
            )
            yield from fold(block, group, scale)
            scales |= dict.fromkeys((linear.path for linear in group.consumers), scale)
        for linear in block.linears() if self.round else ():
            weight = linear.weight.detach().float()
            _, sample = seen[sites[linear.path]]
            if self.clip and linear.role not in NOT_CLIPPED and sample.count:
                rows = sample.rows.to(weight.device)
                rows = rows / scales[linear.path].to(rows) if linear.path in scales else rows  # as they come by now
                weight = clamp_groups(weight, search_clip(weight, rows, self.grid))
            quantized = IntegerWeight.quantize(weight.to(linear.weight.dtype), self.grid)
            yield Replace(linear.path, ActLinear.of(linear, weight=quantized))


def why_no_scale(group: EqualizationSet) -> str | None:
    """Say why a set is rounded without a scale, or None. Shared value heads get none in the release."""
    if group.refused is None and group.shared is not None:
        return f"{group.shared.readers} query heads read each value head (`smooth` can scale it)"
    return group.refused


def search_scale(
    inspected: nn.Module,
    consumers: tuple[Linear, ...],
    calls: list[Call],
    mean_abs: Tensor,
    settings: Awq,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    screen: list[Call] | None = None,
) -> tuple[Tensor, float, dict[int, float]]:
    """The scale with the smallest error of `inspected` under rounded consumers.

    Args:
        inspected: the module whose output is compared.
        consumers: layers inside it that share an input; their weights are restored from a copy.
        calls: those of `inspected`.
        mean_abs: mean magnitude of the consumers' input, [in].
        settings: the grid of ratios and that of weights.
        total: adds up over processes, which have a share of the calls each.
        screen: calls on fewer tokens, by which all ratios but the first and the three best are left out.

    Returns:
        The scale [in], its ratio, and the finite losses of those steps of the grid that ran on all calls.

    Raises:
        NonFiniteError: no ratio gives a finite loss.
    """
    before = [linear.weight.detach().clone() for linear in consumers]
    scales = list(_scales(mean_abs.float(), before, settings))

    def losses_of(steps: Iterable[int], calls: list[Call]) -> dict[int, float]:
        targets = [call.replay(inspected).float() for call in calls]
        sums: dict[int, tuple[float, int]] = {}  # of squared errors, and of how many values
        try:
            for step in steps:
                for linear, weight in zip(consumers, before, strict=True):
                    for rows, old in zip(parcels(linear.weight.data), parcels(weight), strict=True):
                        rows.copy_(settings.grid.fake(old.float() * scales[step][1]) / scales[step][1])
                sums[step] = _squared_error(calls, inspected, targets)
        finally:
            for linear, weight in zip(consumers, before, strict=True):
                linear.weight.data.copy_(weight)
        totals = zip(sums, total(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist(), strict=True)
        return {step: error / values for step, (error, values) in totals if values and isfinite(error)}

    steps: Iterable[int] = range(len(scales))
    screened = {} if screen is None else losses_of(steps, screen)
    if screened:  # an expert may get none of the screen's tokens
        steps = sorted({0, *sorted(screened, key=screened.__getitem__)[: FINALISTS - 1]})
    losses = losses_of(steps, calls)
    if not losses:
        raise NonFiniteError(
            f"{consumers[0].path}: every ratio gives a NaN or Inf error; check the calibration activations."
        )
    best = min(losses, key=losses.__getitem__)  # the first of equal ones
    return scales[best][1], scales[best][0], losses


def _scales(mean_abs: Tensor, weights: list[Tensor], settings: Awq) -> Iterator[tuple[float, Tensor]]:
    """The grid: (ratio, scale [in]), the first scale being 1. weights: the consumers', [out, in] each."""
    if not settings.duo_scaling:
        for step in range(settings.n_grid):
            ratio = step / settings.n_grid
            yield ratio, _normalised(mean_abs.pow(ratio))
        return
    yield 0.0, torch.ones_like(mean_abs)
    relative = _relative_weight(torch.cat(weights).float(), settings.grid)
    for step in range(settings.n_grid - 1):
        ratio = step / max(1, settings.n_grid - 2)
        yield ratio, _normalised(mean_abs.pow(ratio) / (relative.pow(1 - ratio) + 1e-4))


def _normalised(scale: Tensor) -> Tensor:
    scale = scale.clamp(min=1e-4)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))


def _relative_weight(weight: Tensor, grid: IntegerGrid) -> Tensor:
    """Return the mean over rows of |w| over the largest |w| of its group: [in]."""
    size = grid.size(weight.shape[1])
    groups = weight.abs().reshape(weight.shape[0], -1, size)
    return (groups / (groups.amax(-1, keepdim=True) + 1e-6)).reshape(weight.shape).mean(0)


def _squared_error(calls: list[Call], inspected: nn.Module, targets: list[Tensor]) -> tuple[float, int]:
    """Return the sum of squared differences over the real tokens of all calls, and how many values that is."""
    total, count = 0.0, 0
    for call, target in zip(calls, targets, strict=True):
        difference = call.real(call.replay(inspected).float() - target)
        total, count = total + float(difference.square().sum()), count + difference.numel()
    return total, count


def search_clip(weight: Tensor, x: Tensor, grid: IntegerGrid) -> Tensor:
    """Find the bound per row and group of a weight that gives the smallest error on inputs.

    The error is that of the group's own contribution to the output.

    Args:
        weight: [out, in].
        x: [tokens, in].
        grid: what the weight is rounded to.

    Returns:
        [out, groups, 1].
    """
    size = grid.size(weight.shape[1])
    columns = x.unflatten(1, (-1, size)).transpose(0, 1)  # [groups, tokens, size]
    # |x d|^2 = |R d|^2 for x = Q R: at most `size` products per weight in place of one per token
    root = torch.linalg.qr(columns, mode="r").R.mT
    bounds = []
    for rows in parcels(weight):
        groups = rows.unflatten(1, (-1, size))  # [rows, groups, size]
        largest = groups.abs().amax(-1, keepdim=True)
        best, best_error = largest.clone(), torch.full_like(largest, inf)
        for step in range(CLIP_STEPS):
            bound = largest * (1 - step / CLIP_GRID)
            rounded = grid.fake(groups.clamp(-bound, bound).flatten(1)).unflatten(1, (-1, size))
            error = ((rounded - groups).transpose(0, 1) @ root).square().sum(-1).t()[..., None]
            better = error < best_error
            best, best_error = torch.where(better, bound, best), torch.where(better, error, best_error)
        bounds.append(best)
    return torch.cat(bounds)


def clamp_groups(weight: Tensor, bound: Tensor) -> Tensor:
    """Clamp a weight [out, in] to +- bound [out, groups, 1]."""
    groups = weight.reshape(weight.shape[0], bound.shape[1], -1)
    return groups.clamp(-bound, bound).reshape(weight.shape)


def saliency_mask(
    mean_abs: Tensor,
    weight: Tensor,
    share: float = 0.01,
    by: Literal["activation", "weight", "random"] = "activation",
    seed: int = 0,
) -> Tensor:
    """Choose the `share` of input channels to keep exact. This is the paper's observation, not part of the method.

    Args:
        mean_abs: [in], the mean |x|.
        weight: [out, in].
        share: of the channels.
        by: mean |x|, the column norm of the weight, or at random.
        seed: of the random choice.

    Returns:
        bool [in].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: {share} was given; give more than 0 and at most 1.")
    count = max(1, round(share * mean_abs.numel()))
    if by != "random":
        return largest(mean_abs if by == "activation" else weight.float().norm(dim=0), count)
    chosen = torch.randperm(mean_abs.numel(), generator=torch.Generator().manual_seed(seed))[:count]
    mask = torch.zeros(mean_abs.numel(), dtype=torch.bool)
    mask[chosen] = True
    return mask
