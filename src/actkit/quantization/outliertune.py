"""OutlierTune: a static scale for each channel of an activation, free at run time (2024, arXiv:2406.18832).

    z_j = mean over sequences of (max_t x_tj + min_t x_tj) / 2       s_j = max_t |x_tj - z_j| / (2^(b-1) - 1)
    q(x)_j = clamp(round((x_j - z_j) / s_j), -2^(b-1), 2^(b-1) - 1)  y = round(W diag(s)) q(x) + bias + W z

for what query, key, value and the first layers of an MLP read. A scale for each channel cannot be taken out of an
integer product, so it is multiplied into the columns of the weight before that is rounded; centring the channels before
("symmetrization") evens out their scales. The other layers read tokens on a scale of their own (`round_inputs`).
When to use it: 8 or 6-bit activations of a model whose outliers stay in the same channels; the input then has a static
scale of 1, which serving formats can say. Per-token rounding needs no calibration and is the one to beat.
Cost: one pass over the calibration data; nothing at run time if a norm takes 1/s and z, else a subtraction and a
division at the layer: in post-norm models (BERT), whose norms feed the residual stream too.
As in the release: z and s of the original model, s after centring, s not below 1e-5, weights by row, the same bits.
Settled here: codes are clamped (the release lets values beyond calibration take more than b bits); norms without a bias
(RMSNorm) take no shift, and folding their weight into the consumers, as in the release, is part of s; outputs of query,
key and value stay as they are. `round` says what is rounded: [] leaves the exact rewrite alone, [inputs] the weights to
`gptq` behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.edit.folding import fold, why_no_shift
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import DenseWeight, IntegerWeight
from actkit.core.model.anatomy import Block, EqualizationSet, Linear, Norm, Site, equalization_sets
from actkit.core.recipe.scalable import kind_of
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Slot, Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Midpoints, Range, Statistic
from actkit.quantization.smooth import refuse_filled

SMALLEST = 1e-5  # of a scale, as in the release


class OutlierTune(Transform):
    """Round inputs by a static scale for each channel, which the weights take over.

    Attributes:
        bits: of inputs and weights, 2 to 8.
        symmetrize: centre the channels first, if the norm before has a bias, or the layer itself must do it.
        round: what is rounded, of 'weight' and 'inputs'.
        weight_symmetric: no zero points in the weights.
        others: how the inputs of the other layers are rounded: per 'token', or 'none'.
        fold: move scale and shift into the norm before; False leaves them at the layers.
        sequences: of the calibration data that z is a mean over.

    Raises:
        ValueError: a value is out of bounds.
    """

    bits: int = Field(8, ge=2, le=8)
    symmetrize: bool = True
    round: tuple[Literal["weight", "inputs"], ...] = ("weight", "inputs")
    weight_symmetric: bool = True
    others: Literal["token", "none"] = "token"
    fold: bool = True
    sequences: int = Field(512, ge=1)

    tags: ClassVar[Tags] = Tags(slot=("weight", "inputs"), needs_data=True, stream="original")
    not_proposed: ClassVar[str] = "per-token inputs need no calibration and lose less on the embedded models"

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.round

    @property
    def inputs(self) -> RoundedInputs:
        """What the layers behind a norm read: codes, as the scale is in the norm and in the weight."""
        return RoundedInputs(IntegerGrid(self.bits, symmetric=True, scope="tensor"), torch.ones(1))

    def conflicts(self, earlier: Transform) -> str | None:
        return super().conflicts(earlier) or refuse_filled(earlier)

    def targets(self, block: Block) -> Iterable[Linear | str]:
        if self.round:
            yield from block.linears()
        for group in _groups(block):
            if self.fold and not group.refused:
                yield from () if self.round else group.consumers
                if isinstance(group.producer, Norm):
                    yield f"{group.producer.path}.weight"

    def observe(self, block: Block) -> Mapping[Site, Statistic | Sequence[Statistic]]:
        paths = {linear.path for group in _groups(block) for linear in group.consumers}
        return {
            inputs.site: [Range(), Midpoints(self.sequences)]
            for inputs in block.linear_inputs()
            if any(linear.path in paths for linear in inputs.linears)
        }

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        sites = {linear.path: inputs.site for inputs in block.linear_inputs() for linear in inputs.linears}
        done: set[str] = set()
        for group in _groups(block):
            found = [seen[site] for site in dict.fromkeys(sites[linear.path] for linear in group.consumers)]
            found = [pair for pair in found if pair[0].count]
            folds = self.fold and not group.refused
            if not found:
                yield from (Skip(linear.path, "no calibration token reached it") for linear in group.consumers)
            elif folds or "inputs" in self.round:
                yield from self._channels(block, group, Channels.of(found, self._shifts(group, found), self.bits))
            else:
                yield Skip(group.inspect, group.refused or "fold: false was given, and inputs are not rounded")
            done |= {linear.path for linear in group.consumers}
        tokens = IntegerGrid(self.bits, symmetric=True)
        for linear in (linear for linear in block.linears() if linear.path not in done):
            rounded = self.others == "token" and "inputs" in self.round
            yield from self._rounded(linear, RoundedInputs(tokens) if rounded else None)

    def _shifts(self, group: EqualizationSet, found: Sequence[Sequence[Statistic]]) -> bool:
        """Whether the channels of a set are centred: a norm with a bias does it, or the layers themselves."""
        if not self.symmetrize or len(found) > 1:
            return False
        return group.refused is not None or why_no_shift(group) is None

    def _channels(self, block: Block, group: EqualizationSet, channels: Channels) -> Iterator[Edit | Note]:
        """Yield the edits of the layers that read one tensor."""
        weights = [linear.weight.detach() for linear in group.consumers]
        figures = channels.figures(weights, self.bits)
        text = ", ".join(f"{what} {value:.3g}" for what, value in figures.items())
        yield Note(group.inspect, text, figures)
        shift, scale = channels.shift, group.tied(channels.scale)
        if self.fold and not group.refused:
            yield from fold(block, group, scale, shift)
            for linear in group.consumers:
                now = replace(linear, module=get_module(block.root, linear.path))
                yield from self._rounded(now, self.inputs if "inputs" in self.round else None)
            return
        for linear in group.consumers:
            weight = linear.weight.detach()
            bias = None
            if shift is not None:
                moved = weight.double() @ shift
                bias = (moved if linear.bias is None else moved + linear.bias.detach().double()).to(weight.dtype)
            scaled = DenseWeight((weight.double() * scale).to(weight.dtype))
            layer = ActLinear.of(linear, weight=scaled, bias=bias)
            inputs = RoundedInputs(self.inputs.grid, torch.ones(1), None, shift, scale)
            yield from self._rounded(replace(linear, module=layer), inputs)

    def _rounded(self, linear: Linear, inputs: RoundedInputs | None) -> Iterator[Edit]:
        grid = IntegerGrid(self.bits, -1, "input", self.weight_symmetric)
        weight = IntegerWeight.quantize(linear.weight, grid) if "weight" in self.round else None
        if weight is not None or inputs is not None:
            yield Replace(linear.path, ActLinear.of(linear, weight=weight, inputs=inputs))


@dataclass(frozen=True)
class Channels:
    """Shift and scale of the channels of an activation.

    Attributes:
        shift: z, float64 [channels]; None if they are not centred.
        scale: s, float64 [channels].
        largest: max |x|, before the shift, float64 [channels].
    """

    shift: Tensor | None
    scale: Tensor
    largest: Tensor

    @classmethod
    def of(cls, found: Sequence[Sequence[Statistic]], shifts: bool, bits: int) -> Channels:
        """Find them.

        Args:
            found: the range and the midpoints at each site that reads the activation.
            shifts: whether to centre.
            bits: of the codes.
        """
        low = torch.stack([values.low for values, _ in found]).amin(0)  # type: ignore[attr-defined]
        high = torch.stack([values.high for values, _ in found]).amax(0)  # type: ignore[attr-defined]
        shift = found[0][1].value if shifts else None  # type: ignore[attr-defined]
        largest = torch.maximum(-low, high)
        centred = largest if shift is None else torch.maximum(high - shift, shift - low)
        return cls(shift, (centred / (2 ** (bits - 1) - 1)).clamp(min=SMALLEST), largest)

    def figures(self, weights: Sequence[Tensor], bits: int) -> dict[str, float]:
        """Return how far the channels lie apart, and the error of the weights without and with the scales.

        Args:
            weights: of the layers that read the activation, [out, in] each.
            bits: that they are rounded to.
        """
        errors = [
            sum(weight_error(weight, scale, bits) for weight in weights) / len(weights)
            for scale in (torch.ones_like(self.scale), self.scale)
        ]
        return {
            "largest over median channel": _spread(self.largest),
            "largest over median scale": _spread(self.scale),
            "relative error of the weights": errors[0],
            "of the weights with the scales": errors[1],
            "dead channels": int((self.largest == 0).sum()),
        }


def weight_error(weight: Tensor, scale: Tensor, bits: int) -> float:
    """Return |round(W diag(s)) - W diag(s)| / |W diag(s)|, by rows of one scale.

    Args:
        weight: [out, in].
        scale: [in].
        bits: of the codes.
    """
    scaled = (weight.double() * scale).float()
    rounded = IntegerGrid(bits, symmetric=True).fake(scaled)
    return float((rounded - scaled).norm() / scaled.norm())


def _groups(block: Block) -> list[EqualizationSet]:
    """The layers that read one tensor from a norm."""
    return [group for group in equalization_sets(block) if kind_of(group) == "norm" and group.consumers]


def _spread(values: Tensor) -> float:
    return float(values.max() / values.median().clamp(min=1e-30))
