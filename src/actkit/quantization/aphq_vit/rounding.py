"""Ranges that are searched by the error of a layer's output, and rounding that is learned (APHQ-ViT, arXiv:2504.02508).

    W' = scale (clamp(floor(W / scale) + t(V) + zero, 0, 2^bits - 1) - zero),   t(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)

V begins where t(V) is what floor left, so that W' is W inside of its range; a penalty that sets in after a while pushes
each t(V) to 0 or 1 (AdaRound, 2020, arXiv:2004.10568). While a block is learned, a share of the elements of what its
layers read, and of what its attention multiplies, stays as it is (QDrop, 2022, arXiv:2203.05740), and the scale of the
others is learned too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import Insert, Replace
from actkit.core.grids.grid import straight_through
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Block, Linear
from actkit.core.recipe.reconstruction import Example, Learned, Rate, cosine, error_of
from actkit.quantization.aphq_vit.candidates import candidates
from actkit.quantization.aphq_vit.operands import Operands

STRETCH = 1.2, -0.1  # of the sigmoid
WARM_UP = 0.2  # share of the steps without the penalty
SHARPNESS = 20.0, 2.0  # its exponent after the warm-up, and at the end


@dataclass(frozen=True)
class Rounded:
    """Layers that read one tensor, and the grids that were found for them.

    Attributes:
        linears: as they stand.
        scale: of what they read, float32 [1].
        zero: the same, float32 [1], a whole number.
        weights: scale and zero of each weight, float32 [out, 1].
    """

    linears: tuple[Linear, ...]
    scale: Tensor
    zero: Tensor
    weights: tuple[tuple[Tensor, Tensor], ...]


def search(
    linears: Sequence[Linear], x: Tensor, weight_grid: IntegerGrid, input_grid: IntegerGrid, rounds: int
) -> Rounded:
    """Find the grids of layers that read one tensor: those of the weights and of the inputs in turn.

    Args:
        linears: that read it.
        x: float32 [rows, in], a sample of it.
        weight_grid: with zero points, a scale for each row.
        input_grid: with zero points, one scale.
        rounds: how often each is searched.
    """
    originals = [linear.weight.detach().float() for linear in linears]
    outputs = [x @ weight.t() for weight in originals]
    of_weights = [list(candidates(weight, weight_grid)) for weight in originals]
    of_inputs = [(scale.flatten(), zero.flatten()) for scale, zero in candidates(x.reshape(1, -1), input_grid)]
    rounded, chosen = x, of_inputs[0]
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(rounds):
        found = [
            _best_rows(weight, rounded, y, tried, weight_grid)
            for weight, y, tried in zip(originals, outputs, of_weights, strict=True)
        ]
        weights = [weight_grid.fake(weight, *each) for weight, each in zip(originals, found, strict=True)]
        errors = [
            sum(
                float((input_grid.fake(x, *each) @ weight.t() - y).square().mean())
                for weight, y in zip(weights, outputs, strict=True)
            )
            for each in of_inputs
        ]
        chosen = of_inputs[min(range(len(errors)), key=errors.__getitem__)]
        rounded = input_grid.fake(x, *chosen)
    return Rounded(tuple(linears), *chosen, tuple(found))


def _best_rows(
    weight: Tensor, x: Tensor, y: Tensor, tried: Sequence[tuple[Tensor, Tensor]], grid: IntegerGrid
) -> tuple[Tensor, Tensor]:
    """The scale and zero of each row [rows, 1] whose output errs least: |y - W' x|^2, from second moments."""
    x, y = x.double(), y.double()
    moments, cross = x.t() @ x, y.t() @ x
    least = torch.full((len(weight), 1), torch.inf, dtype=torch.float64)
    best = [torch.ones(len(weight), 1), torch.zeros(len(weight), 1)]
    for scale, zero in tried:
        rounded = grid.fake(weight, scale, zero).double()
        error = (rounded * (rounded @ moments - 2 * cross)).sum(-1, keepdim=True)  # less |y|^2, the same for all
        better = error < least
        least = torch.where(better, error, least)
        best = [torch.where(better, new, old) for new, old in zip((scale, zero), best, strict=True)]
    return best[0], best[1]


class LearnedRounding(Learned):
    """The rounding of a block's weights, and the scales of what its layers read.

    Args:
        parts: the layers, with their grids.
        weight_grid: of weights.
        input_grid: of inputs.
        attention: what its attention multiplies; None leaves that.
        keep: share of the elements of inputs that are rounded while the block is learned.
        rate: of learning the rounding.
        scale_rate: of learning the scales, at first; it falls to 0 along a cosine.
        strength: of the penalty.
    """

    def __init__(
        self,
        parts: Sequence[Rounded],
        weight_grid: IntegerGrid,
        input_grid: IntegerGrid,
        attention: Operands | None = None,
        *,
        keep: float = 0.5,
        rate: float = 2e-2,
        scale_rate: float = 8e-4,
        strength: float = 0.01,
    ) -> None:
        super().__init__()
        self.parts, self.weight_grid, self.input_grid = tuple(parts), weight_grid, input_grid
        self.keep, self.rate, self.scale_rate, self.strength = keep, rate, scale_rate, strength
        self.attention = attention
        self.scales = nn.ParameterList(nn.Parameter(part.scale.clone()) for part in self.parts)
        found = {} if attention is None else attention.scales
        self.operands = nn.ParameterDict({name: nn.Parameter(scale.clone()) for name, scale in found.items()})
        self.raw = nn.ParameterList()
        self._floors: list[Tensor] = []
        for linear, scale, _ in self._weights():
            steps = linear.weight.detach().float() / scale
            self._floors.append(steps.floor())
            self.raw.append(nn.Parameter(inverse_rounding(steps - steps.floor())))
        self._nearest = [raw.detach() >= 0 for raw in self.raw]
        self._inputs: list[DroppedInputs] = []
        self._hard = False

    def _weights(self) -> Iterator[tuple[Linear, Tensor, Tensor]]:
        """Each layer with scale and zero of its weight."""
        for part in self.parts:
            for linear, (scale, zero) in zip(part.linears, part.weights, strict=True):
                yield linear, scale, zero

    def rates(self) -> Iterator[tuple[Sequence[nn.Parameter], Rate]]:
        yield list(self.raw), self.rate
        yield [*self.scales, *self.operands.values()], cosine(self.scale_rate)

    def stand_ins(self) -> Iterator[Replace | Insert]:
        """Yield what stands in the block while it is learned."""
        self._inputs = []
        for part in self.parts:
            for linear in part.linears:
                inputs = DroppedInputs(self.input_grid, part.scale, part.zero, keep=self.keep)
                self._inputs.append(inputs)
                yield Replace(linear.path, ActLinear.of(linear, inputs=inputs))
        if self.attention is not None:
            dropped = {
                name: DroppedInputs(self.input_grid, scale, self.attention.zeros[name], keep=self.keep)
                for name, scale in self.attention.scales.items()
            }
            self._inputs.extend(dropped.values())
            yield self.attention.insert(dropped)

    def next_step(self, generator: torch.Generator) -> None:
        for inputs in self._inputs:
            inputs.generator = generator

    def tensors(self) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for (linear, scale, zero), floor, raw in zip(self._weights(), self._floors, self.raw, strict=True):
            up = (raw >= 0).float() if self._hard else rounding(raw)
            codes = (floor + up + zero).clamp(0, self.weight_grid.levels)
            found[f"{linear.path}.storage.tensor"] = ((codes - zero) * scale).to(linear.weight.dtype)
        for part, scale in zip(self.parts, self.scales, strict=True):
            found |= {f"{linear.path}.inputs.scale": positive(scale, part.scale) for linear in part.linears}
        if self.attention is not None:
            for name, began in self.attention.scales.items():
                found[f"{self.attention.path}.rounds.{name}.scale"] = positive(self.operands[name], began)
        return found

    def penalty(self, progress: float) -> Tensor | float:
        if progress < WARM_UP:
            return 0.0
        first, last = SHARPNESS
        beta = first + (last - first) * (progress - WARM_UP) / (1 - WARM_UP)
        return self.strength * sum((1 - (2 * rounding(raw) - 1).abs() ** beta).sum() for raw in self.raw)

    def hard_error(self, block: Block, lessons: Sequence[Example]) -> float:
        """Return the error of a block with whole codes, its stand-ins in place; arguments as those of `error_of`."""
        self._hard = True
        try:
            return error_of(block, self, lessons)
        finally:
            self._hard = False

    def flipped(self) -> float:
        """Return the share of the weights that are no longer rounded to their nearest code."""
        changed = sum(int(((raw >= 0) != nearest).sum()) for raw, nearest in zip(self.raw, self._nearest, strict=True))
        return changed / sum(raw.numel() for raw in self.raw)

    @torch.no_grad()
    def edits(self) -> Iterator[Replace | Insert]:
        """Yield the rounded layers, and what rounds the attention."""
        found = iter(zip(self._floors, self.raw, strict=True))
        for part, learned in zip(self.parts, self.scales, strict=True):
            inputs = RoundedInputs(self.input_grid, positive(learned.detach(), part.scale), part.zero.to(torch.uint8))
            for linear, (scale, zero) in zip(part.linears, part.weights, strict=True):
                floor, raw = next(found)
                codes = (floor + (raw >= 0) + zero).clamp(0, self.weight_grid.levels)
                weight = IntegerWeight.of_codes(
                    codes.to(torch.uint8), scale, zero.to(torch.uint8), self.weight_grid, linear.weight.dtype
                )
                yield Replace(linear.path, ActLinear.of(linear, weight=weight, inputs=inputs))
        if self.attention is not None:
            rounded = {
                name: RoundedInputs(
                    self.input_grid,
                    positive(self.operands[name].detach(), began),
                    self.attention.zeros[name].to(torch.uint8),
                )
                for name, began in self.attention.scales.items()
            }
            yield self.attention.insert(rounded)


class DroppedInputs(RoundedInputs):
    """Inputs of which, with gradients, a random share is rounded; without gradients all are."""

    def __init__(self, *args: Any, keep: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep = keep
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        rounded = super().forward(x)
        if self.keep == 1 or not torch.is_grad_enabled():
            return rounded
        kept = torch.rand(x.shape, generator=self.generator).to(x.device) < self.keep
        return torch.where(kept, rounded, x)


def positive(scale: Tensor, began: Tensor) -> Tensor:
    """Return a learned scale, no smaller than a hundredth of what it began as."""
    return straight_through(torch.maximum(scale, began / 100), scale)


def rounding(raw: Tensor) -> Tensor:
    """Return t(V) in [0, 1]."""
    stretch, offset = STRETCH
    return (stretch * torch.sigmoid(raw) + offset).clamp(0, 1)


def inverse_rounding(share: Tensor) -> Tensor:
    """Return the V whose t(V) is a share in [0, 1)."""
    stretch, offset = STRETCH
    return torch.logit((share - offset) / stretch)
