"""NoisyQuant: one fixed noise vector in front of a quantizer, taken back by the bias (CVPR 2023, arXiv:2211.16056).

    y = W q(x + N) + (bias - W N)         N_j = c + b t u_j,  u_j uniform in (-1, 1), drawn once,  b = scale / 2

A value far from the next level of q gains by a shift of up to half a step, one close to it loses less: with heavy tails
and sharp peaks (behind GELU) the error of a layer falls. c is the same for all channels, t the strength in [0, 2].
When to use it: static inputs of 4 to 6 bits, of vision transformers and encoders above all, over weights that were
rounded before (`rtn`, `gptq`). It stands on the scale that `round_inputs: {per: tensor}` or `outliertune` found, or
finds its own. Look at the constant shift alone first (`noise: none`): it is the control, and may be all of the gain.
Cost: a search of some hundred products of `rows` tokens with each weight; at run time one addition, none if a norm with
a bias feeds these layers alone: its bias takes N.
As in the release: the scale is the largest |x| times i / clip_grid with the smallest error of the output, then c, then
t, each the best on calibration data with 0 among the candidates; layers in order, those before them rounded. Settled
here: layers that read one tensor share scale, c and N, so that a norm can take them; the error is a mean over a random
sample of tokens; convolutions stay as they are. `noise: code` is the release's vector, a normal one with mean -scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal
from zlib import crc32

import torch
from pydantic import Field
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.edit.folding import shift_norm
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.model.anatomy import Block, Linear, Norm, Site, equalization_sets
from actkit.core.model.parts import LinearRole
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Range, Sample, Statistic

Kind = Literal["uniform", "code", "none"]


class NoisyQuant(Transform):
    """Round the inputs of linear layers by one scale, with a fixed noise vector added before.

    Attributes:
        bits: of the inputs; of layers whose inputs are rounded already, those stay.
        noise: 'uniform', the release's 'code', or 'none'.
        shift: search a constant shift too.
        clip_grid: ranges that are tried, from the largest |x| down; 1 takes the largest.
        n_grid: strengths that are tried, and twice as many shifts.
        rows: tokens that the search runs on.
        fold: move N into a norm that feeds these layers alone.
        seed: of the noise and of the sample.
        skip: roles that are left as they are.

    Raises:
        ValueError: a value is out of bounds.
    """

    bits: int = Field(6, ge=2, le=8)
    noise: Kind = "uniform"
    shift: bool = True
    clip_grid: int = Field(100, ge=1)
    n_grid: int = Field(200, ge=1)
    rows: int = Field(512, ge=1)
    fold: bool = True
    seed: int = 0
    skip: tuple[LinearRole, ...] = ()

    tags: ClassVar[Tags] = Tags(slot="inputs", needs_data=True, observes_in_turn=True)
    not_proposed: ClassVar[str] = "it pays for static inputs of 4 to 6 bits, which no product here gets faster with"

    def conflicts(self, earlier: Transform) -> str | None:
        if type(earlier) is type(self):
            return super().conflicts(earlier)
        if "select" in earlier.slots:
            return "a dropped input would become the noise; use one of the two"
        if "inputs" in earlier.slots and not earlier.needs_data:
            return "the inputs have a scale for each token; the noise needs one that was found before (per: tensor)"
        return None

    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for linear in block.linears() if linear.role not in self.skip]

    def memory(self, block: Block, length: int) -> int:
        return max((4 * self.rows * linear.in_features for linear in block.linears()), default=0)

    def observe(self, block: Block) -> Mapping[Site, Statistic | Sequence[Statistic]]:
        return {}  # `edit` observes what each layer reads when its turn comes

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        wanted = {linear.path for linear in self.targets(block)}
        norms = self._norms(block)
        for inputs in block.linear_inputs():
            linears = [linear for linear in inputs.linears if linear.path in wanted]
            given = [_rounding(linear) for linear in linears]
            if not linears:
                continue
            reason = _unfit(given)
            if reason is not None:
                yield from (Skip(linear.path, reason) for linear in linears)
                continue
            values, sample = seen.observe({inputs.site: [Range(), Sample(self.rows, self.seed)]})[inputs.site]
            if not values.count:
                yield from (Skip(linear.path, "no calibration token reached it") for linear in linears)
                continue
            largest = float(torch.maximum(-values.low, values.high).max())
            found = self._search(linears, given[0], sample.rows, largest)
            yield Note(linears[0].path, found.describe(), found.figures)
            yield from self._edits(linears, found, norms.get(tuple(linear.path for linear in linears)))

    def _norms(self, block: Block) -> dict[tuple[str, ...], Norm]:
        """The norms with a bias that feed nothing but some layers, by the paths of these."""
        return {
            tuple(linear.path for linear in group.consumers): group.producer
            for group in (equalization_sets(block) if self.fold else ())
            if isinstance(group.producer, Norm)
            and group.fixed is None
            and not group.rescaled
            and getattr(group.producer.module, "bias", None) is not None
        }

    def _search(self, linears: Sequence[Linear], given: RoundedInputs | None, rows: Tensor, largest: float) -> Found:
        """Find scale, shift and noise of the layers that read one tensor."""
        before = given or RoundedInputs(IntegerGrid(self.bits, symmetric=True, scope="tensor"), torch.ones(1))
        x = before.moved(rows.float())
        trial = Trial(before, x, [linear.weight.detach().float() for linear in linears])
        figures: dict[str, float] = {}
        scale = None if given is None else float(given.scale)  # type: ignore[arg-type]
        if scale is None:
            full = largest / (2 ** (self.bits - 1) - 1) if largest > 0 else 1.0
            scales = [full * i / self.clip_grid for i in range(self.clip_grid, 0, -1)]
            errors = [trial.error(each, 0.0) for each in scales]
            scale = scales[_best(errors)]
            figures |= {"by the largest": errors[0]}
        figures |= {"clipped": trial.error(scale, 0.0)}
        offset = 0.0
        if self.shift:
            offsets = [0.0, *(scale * i / self.n_grid for i in range(-self.n_grid, self.n_grid + 1) if i)]
            errors = [trial.error(scale, each) for each in offsets]
            offset = offsets[_best(errors)]
            figures |= {"shifted": min(errors)}
        generator = torch.Generator().manual_seed(self.seed + crc32(linears[0].path.encode()))
        base = sample_noisy_bias(x.shape[1], scale, generator, self.noise)
        strengths = [2 * i / self.n_grid for i in range(self.n_grid + 1)] if self.noise != "none" else [0.0]
        errors = [trial.error(scale, offset + base * each) for each in strengths]
        strength = strengths[_best(errors)]
        figures |= {"with noise": min(errors), "scale": scale, "shift in steps": offset / scale, "strength": strength}
        return Found(before, scale, offset + base * strength, figures)

    def _edits(self, linears: Sequence[Linear], found: Found, norm: Norm | None) -> Iterator[Edit]:
        """Yield the layers with their noise, in the norm before them or in their own inputs."""
        before, noise = found.inputs, found.noise.double()
        scale = torch.tensor([found.scale])
        shift, divisor = before.shift, before.divisor
        if norm is not None and shift is None and divisor is None:
            edit, moved = shift_norm(norm, -noise)
            noise = -moved
            yield edit
        else:
            added = noise if divisor is None else noise * divisor
            shift = (-added if shift is None else shift - added).float()
            noise = (-shift if before.shift is None else before.shift - shift).double()  # as float32 keeps it
            noise = noise if divisor is None else noise / divisor
        inputs = RoundedInputs(before.grid, scale, before.zero, shift, divisor)
        for linear in linears:
            yield Replace(linear.path, ActLinear.of(linear, inputs=inputs, bias=fold_noise(linear, noise)))


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        inputs: as the layers had them, or a quantizer of ours without a scale.
        scale: of the codes.
        noise: N, float32 [in], in front of the codes (behind shift and divisor that were there).
        figures: mean squared errors of the outputs at each stage, and what was chosen.
    """

    inputs: RoundedInputs
    scale: float
    noise: Tensor
    figures: dict[str, float]

    def describe(self) -> str:
        """All figures in a line."""
        return "squared error of the output " + ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items())


@dataclass(frozen=True)
class Trial:
    """Measures the error of layers at a scale and an offset.

    Attributes:
        inputs: whose grid is tried.
        x: float32 [rows, in].
        weights: float32 [out, in] each.
    """

    inputs: RoundedInputs
    x: Tensor
    weights: Sequence[Tensor]

    def error(self, scale: float, offset: Tensor | float) -> float:
        """Return the mean squared error of the outputs under q(x + offset) - offset, summed over the layers."""
        moved = self.x + offset
        lost = self.inputs.grid.fake(moved, torch.tensor([scale]), self.inputs.zero) - moved
        return sum(float((lost @ weight.t()).square().mean()) for weight in self.weights)


def sample_noisy_bias(channels: int, scale: float, generator: torch.Generator, kind: Kind = "uniform") -> Tensor:
    """Draw the noise vector of strength 1: float32 [channels].

    Args:
        channels: of the input.
        scale: the step of the codes.
        generator: of the draw.
        kind: uniform in half a step to both sides, or as the release draws it.
    """
    if kind == "code":
        return (2 * torch.randn(channels, generator=generator) - 1) * scale
    return (2 * torch.rand(channels, generator=generator) - 1) * scale / 2


def fold_noise(linear: Linear, noise: Tensor) -> Tensor:
    """Return the bias that takes the noise back: bias - W N, in the dtype of the weight.

    Args:
        linear: with the weight that is multiplied.
        noise: N, [in].
    """
    weight = linear.weight.detach()
    back = -(weight.double() @ noise.double())
    return (back if linear.bias is None else back + linear.bias.detach().double()).to(weight.dtype)


def noisy_gain(distance: Tensor, n: Tensor, b: Tensor | float) -> Tensor:
    """Return what uniform noise in (-n, n) changes of a value's expected squared error; below 0 it gains.

    Args:
        distance: of the value to the next border between two levels, 0 to b.
        n: the noise, up to 2 b - distance.
        b: half a step.
    """
    crossing = torch.where(distance < n, b / n * (n - distance).square(), torch.zeros_like(n))
    return n.square() / 3 - crossing


def _rounding(linear: Linear) -> RoundedInputs | None:
    """How a layer rounds its inputs; None if it does not."""
    inputs = linear.module.inputs if isinstance(linear.module, ActLinear) else None
    return None if inputs is None or inputs.grid is None else inputs


def _unfit(given: Sequence[RoundedInputs | None]) -> str | None:
    """Why layers that read one tensor cannot share a noise vector, or None."""
    first = given[0]
    if any((each is None) != (first is None) for each in given):
        return "of the layers that read this tensor, some round their inputs and some do not"
    if first is None:
        return None
    if any(each.scale is None or not isinstance(each.grid, IntegerGrid) for each in given if each is not None):
        return "its inputs have a scale for each token, or are no integers"
    if any(each is not None and (each.in_training or each.scale.numel() != 1) for each in given):  # type: ignore[union-attr]
        return "its inputs are in training, or have several scales"
    same = all(each is not None and _same(first, each) for each in given)
    return None if same else "the layers that read this tensor round it differently"


def _same(a: RoundedInputs, b: RoundedInputs) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("scale", "zero", "shift", "divisor")]
    return a.grid == b.grid and all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


def _best(errors: Sequence[float]) -> int:
    """The first of the smallest errors that are finite; 0 if none is."""
    return min(range(len(errors)), key=lambda index: errors[index] if errors[index] == errors[index] else torch.inf)
