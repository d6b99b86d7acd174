"""LLM-FP4: weights and activations in 4-bit floats, format and clipping searched (2023, arXiv:2310.16836).

    E exponent and M mantissa bits and a real exponent bias b: the largest value is (2 - 2^-M) 2^(2^E - 1 - b)
    weights        b for each output, by which the layer's output errs least
    inputs         one b = rho for the tensor, and for each channel j an integer k_j = clamp(round(b_j), round(rho),
                   round(rho) + 2^E - 1) - round(rho), b_j being the bias by which max |x_j| is the largest value:
                   x_j is rounded as Q(2^k_j x_j) 2^-k_j, and 2^-k_j is in the exponents of the weight's column j
    search         weights, then inputs, three times: of each format (E, M) 100 biases, mean (y - y')^2 of the layer's
                   output on calibration tokens; the best format of the layer for its weights, and one for its inputs

When to use it: for 4-bit inputs if their channels differ much in size; rounding to integers with one scale for the
tensor loses nearly all then. It saves memory and no time: the codes are widened where they are multiplied.
Cost: one pass over the calibration tokens, then per layer and round 600 products of the weight's size; with `tokens`
and `candidates` fewer. No gradients.
As in the paper: every layer alone, on the original model's hidden states; `search="bias"` scales the bias, as the
release does, `search="range"` the range. No code stands for Inf or NaN.
Settled here: errors are those of the triangular factor of the tokens (or of the weight), where that is smaller, and
differ from those of the outputs by a constant; a channel of zeros takes the largest k. With `fold` the layers that read
one norm share their inputs' format and shifts, and the norm multiplies by 2^k, so that a plain quantizer of the tensor
is left; without it every layer has its own. Output layer and embedding stay as they are. A layer that no calibration
token reached is rounded by its own range, and its inputs are not.
Our own reading: E = bits - 1 - M also for 8 bits, where the release stores another number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log2
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.edit.folding import divide_norm
from actkit.core.grids.floats import FloatGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import FloatWeight
from actkit.core.model.anatomy import Block, Linear, Norm, Site, equalization_sets
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Slot, Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import AbsMax, Sample, Statistic

SMALLEST, LARGEST = 0.01, 1.2  # between them lie the factors that are tried

Search = Literal["range", "bias", "none"]


class LlmFp4(Transform):
    """Round weights and inputs of linear layers to floats of few bits.

    Attributes:
        bits: of a weight, 4 to 8.
        input_bits: of an input, 4 to 8; None to leave inputs as they are.
        exponent_bits: of the weights' format; None tries all.
        input_exponent_bits: of the inputs' format; None tries all.
        preshift: whether each input channel has an exponent of its own.
        fold: whether that exponent goes into the norm before the layer, if there is one.
        search: what the factors that are tried multiply: the 'range', the 'bias', or 'none' for the whole range.
        rounds: how often weights and inputs are searched.
        candidates: factors tried for each format.
        tokens: that the search runs on.
        seed: of the sample of these tokens.

    Raises:
        ValueError: a value is out of bounds.
    """

    bits: int = Field(4, ge=4, le=8)
    input_bits: int | None = Field(4, ge=4, le=8)
    exponent_bits: int | None = Field(None, ge=1, le=5)
    input_exponent_bits: int | None = Field(None, ge=1, le=5)
    preshift: bool = True
    fold: bool = False
    search: Search = "range"
    rounds: int = Field(3, ge=1, le=10)
    candidates: int = Field(100, ge=1, le=1000)
    tokens: int = Field(2048, ge=1)
    seed: int = 0

    tags: ClassVar[Tags] = Tags(slot=("weight", "inputs"), needs_data=True, stream="original")
    not_proposed: ClassVar[str] = "floats are widened where they are multiplied; integers of as many bits have a kernel"

    @property
    def slots(self) -> tuple[Slot, ...]:
        return ("weight", "inputs") if self.input_bits else ("weight",)

    def conflicts(self, earlier: Transform) -> str | None:
        if {"select", "correction"} & set(earlier.slots):
            return "it changes the inputs that thresholds, scores and corrections were made for; put it first"
        return super().conflicts(earlier)

    def passes(self, tokens: int, rows: int) -> float:
        formats = len(_formats(self.bits, self.exponent_bits))
        if self.input_bits:
            formats += len(_formats(self.input_bits, self.input_exponent_bits))
        searched = formats * len(self._factors()) * (self.rounds if self.input_bits else 1)
        return 1 + searched * min(self.tokens, tokens) / max(1, tokens)

    def observe(self, block: Block) -> Mapping[Site, Sequence[Statistic]]:
        return {inputs.site: [AbsMax(), Sample(self.tokens, self.seed)] for inputs in block.linear_inputs()}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        norms = self._norms(block)
        for inputs in block.linear_inputs():
            reach, sample = seen[inputs.site]
            norm = norms.get(frozenset(linear.path for linear in inputs.linears))
            for linears in [(one,) for one in inputs.linears] if norm is None else [inputs.linears]:
                yield from self._edit(linears, reach, sample, norm)

    def _norms(self, block: Block) -> dict[frozenset[str], Norm]:
        """The norms that can take the exponents of their readers, by the paths of all of these."""
        if not (self.fold and self.preshift and self.input_bits):
            return {}
        return {
            frozenset(linear.path for linear in each.consumers): each.producer
            for each in equalization_sets(block)
            if isinstance(each.producer, Norm) and not each.refused and not each.rescaled
        }

    def _edit(
        self, linears: Sequence[Linear], reach: AbsMax, sample: Sample, norm: Norm | None
    ) -> Iterator[Edit | Skip | Note]:
        weights = [linear.weight.detach().float() for linear in linears]
        if not sample.count:
            for linear, weight in zip(linears, weights, strict=True):
                first = _formats(self.bits, self.exponent_bits)[0]
                stored = FloatWeight.quantize(weight.to(linear.weight.dtype), first)
                yield Note(linear.path, "weights rounded by their range, inputs not: no calibration token reached it")
                yield Replace(linear.path, ActLinear.of(linear, weight=stored))
            return
        x = sample.rows.to(weights[0])
        found, inputs, before, after = self.searched(x, weights, reach.value.to(x))
        for linear, (grid, scale) in zip(linears, found, strict=True):
            codes, scale, _ = grid.quantize(linear.weight.detach().float(), scale)
            stored = FloatWeight.of_codes(codes, scale, None, grid, linear.weight.dtype)
            rounded = None
            formats = grid.name
            if inputs is not None:
                stored = stored.shifted(inputs.shift)
                divisor = None if norm is not None or not inputs.shift.any() else torch.exp2(-inputs.shift.float())
                rounded = RoundedInputs(inputs.grid, inputs.scale, divisor=divisor)
                formats = f"{formats}, inputs {inputs.grid.name} by up to 2^{int(inputs.shift.max())}"
            yield Note(linear.path, f"{formats}; relative error {before:.3g} -> {after:.3g}")
            yield Replace(linear.path, ActLinear.of(linear, weight=stored, inputs=rounded))
        if norm is not None and inputs is not None:
            yield from divide_norm(norm, torch.exp2(-inputs.shift.double()))

    def searched(
        self, x: Tensor, weights: Sequence[Tensor], reach: Tensor
    ) -> tuple[list[tuple[FloatGrid, Tensor]], Inputs | None, float, float]:
        """Search the formats and ranges of layers that share their inputs' format.

        Args:
            x: float32 [tokens, in].
            weights: float32 [out, in], of each layer.
            reach: the largest |x| of each channel, [in].

        Returns:
            Format and scale [out, 1] of each weight; the inputs' format, None if they are not rounded; the mean squared
            error of the outputs over their mean square, of E2M1 (or the first format) with whole ranges, and found.
        """
        formats = _formats(self.bits, self.exponent_bits)
        rounded = [(formats[0], _whole(weight, formats[0])) for weight in weights]
        of_inputs = _formats(self.input_bits, self.input_exponent_bits) if self.input_bits else []
        inputs = self._inputs(of_inputs[0], reach, 1.0) if of_inputs else None
        y = x @ torch.cat(list(weights)).t()
        power = float(y.square().mean())

        def error() -> float:
            both = torch.cat([grid.fake(weight, scale) for weight, (grid, scale) in zip(weights, rounded, strict=True)])
            return float((_seen(x, inputs) @ both.t() - y).square().mean()) / max(power, torch.finfo(x.dtype).tiny)

        before = error()
        for _ in range(self.rounds if self.search != "none" or len(formats) + len(of_inputs) > 2 else 0):
            read = _seen(x, inputs)
            rounded = [self._best_weight(weight, read, x @ weight.t(), formats) for weight in weights]
            if inputs is None:
                break  # nothing that a second round would see
            both = torch.cat([grid.fake(weight, scale) for weight, (grid, scale) in zip(weights, rounded, strict=True)])
            inputs = self._best_inputs(x, both, y, reach, of_inputs)
        return rounded, inputs, before, error()

    def _factors(self) -> list[float]:
        """The factors that are tried; the largest is left out, as in the release."""
        if self.search == "none":
            return [1.0]
        return [SMALLEST + i * (LARGEST - SMALLEST) / self.candidates for i in range(self.candidates)]

    def _scales(self, grid: FloatGrid, whole: Tensor) -> Iterator[Tensor]:
        """The scales that are tried for those of the whole range."""
        for factor in self._factors():
            if self.search == "bias":
                yield grid.scale_of_bias(factor * (grid.bias - torch.log2(whole)))
            else:
                yield factor * whole

    def _best_weight(
        self, weight: Tensor, read: Tensor, y: Tensor, formats: Sequence[FloatGrid]
    ) -> tuple[FloatGrid, Tensor]:
        """The format with the smallest error of all outputs y [tokens, out], each with its best scale."""
        read, y = shorter(read, y)
        found: list[tuple[float, FloatGrid, Tensor]] = []
        for grid in formats:
            whole = _whole(weight, grid)
            best, least = whole, torch.full_like(whole, inf)
            for scale in self._scales(grid, whole):
                error = (read @ grid.fake(weight, scale).t() - y).square().sum(0)[:, None]
                best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
            found.append((float(least.sum()), grid, best))
        _, grid, scale = min(found, key=lambda each: each[0])
        return grid, scale

    def _best_inputs(self, x: Tensor, weight: Tensor, y: Tensor, reach: Tensor, formats: Sequence[FloatGrid]) -> Inputs:
        weight, outputs = shorter(weight, y.t())
        found: list[tuple[float, Inputs]] = []
        for grid in formats:
            for factor in self._factors():
                inputs = self._inputs(grid, reach, factor)
                found.append((float((weight @ inputs.round(x).t() - outputs).square().sum()), inputs))
        return min(found, key=lambda each: each[0])[1]

    def _inputs(self, grid: FloatGrid, reach: Tensor, factor: float) -> Inputs:
        """Inputs whose tensor-wise bias is that of the whole range, changed by a factor."""
        whole = (reach.amax() / grid.largest).clamp(min=torch.finfo(reach.dtype).tiny).reshape(1)
        bias = grid.bias - torch.log2(whole)
        rho = factor * bias if self.search == "bias" else bias - log2(factor)
        shift = torch.zeros_like(reach)
        if self.preshift:
            own = grid.bias - torch.log2(reach / grid.largest)  # of a channel; infinite for zeros
            low = torch.round(rho)
            shift = torch.minimum(torch.maximum(torch.round(own), low), low + 2**grid.exponent_bits - 1) - low
        return Inputs(replace(grid, scope="tensor"), grid.scale_of_bias(rho), shift.to(torch.int8))


@dataclass(frozen=True)
class Inputs:
    """How inputs are rounded: as Q(2^shift x), in units of 2^-shift.

    Attributes:
        grid: with one scale for the tensor.
        scale: [1].
        shift: int8 [in].
    """

    grid: FloatGrid
    scale: Tensor
    shift: Tensor

    def round(self, x: Tensor) -> Tensor:
        """Return x [..., in] rounded."""
        return self.grid.fake(x, self.scale * torch.exp2(-self.shift.float()))


def shorter(a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and y with fewer rows and the same |a z - y|^2 for every z, but for a constant.

    Args:
        a: [n, k].
        y: [n, m].

    Returns:
        R and Q^T y of a = Q R, [k, k] and [k, m], if n is larger than k; else a and y.
    """
    if a.shape[0] <= a.shape[1]:
        return a, y
    q, r = torch.linalg.qr(a)
    return r, q.t() @ y


def _formats(bits: int, exponent_bits: int | None) -> list[FloatGrid]:
    """The formats of so many bits, E2 first, from which the search starts."""
    if exponent_bits is not None:
        return [FloatGrid(exponent_bits, bits - 1 - exponent_bits)]
    sizes = sorted(range(1, min(5, bits - 1) + 1), key=lambda size: (size != 2, size))
    return [FloatGrid(size, bits - 1 - size) for size in sizes]


def _whole(weight: Tensor, grid: FloatGrid) -> Tensor:
    """The scales [out, 1] by which the largest weight of each row is the largest value."""
    return grid.parameters(weight)[0]


def _seen(x: Tensor, inputs: Inputs | None) -> Tensor:
    return x if inputs is None else inputs.round(x)
