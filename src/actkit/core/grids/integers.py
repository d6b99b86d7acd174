"""Round-to-nearest integer grids for weight matrices, with the conventions stated.

One scale (and, if asymmetric, one zero point) serves a group of `group_size` consecutive weights, counted along the
inputs of a row (`group_axis="input"`, the usual choice) or along the outputs of a column (`"output"`). With b bits:

    asymmetric   scale = (max(w, 0) - min(w, 0)) / (2^b - 1),  zero = -round(min(w, 0) / scale)
    symmetric    scale = max|w| / (2^(b-1) - 1),               zero = 2^(b-1)
    code = clamp(round(w / scale) + zero, 0, 2^b - 1),         w' = (code - zero) * scale

Rounding is half to even. 0 lies in the range of every group, so that it is exact and no weight moves by more than half
a step, whatever the signs and the size of the group; the scale of a group of zeros is 1.

The convention "llm-awq" is that of the release of AWQ, for comparisons with it: the range is [min(w), max(w)] and no
smaller than 1e-5 (max|w| in the symmetric form), and the zero point is clamped to the codes. Groups of one sign far
from 0, and groups below 1e-5, lose what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from actkit.core.grids.parcels import parcels

RELEASE_RANGE = 1e-5  # the smallest range of a group in llm-awq

GroupAxis = Literal["input", "output"]
Convention = Literal["zero_in_range", "llm-awq"]
AUTO = (128, 64, 32, 16)  # the group sizes of "auto", the first that divides the layer


@dataclass(frozen=True)
class IntegerGrid:
    """Bits, groups and symmetry of an integer grid.

    Attributes:
        bits: 2 to 8.
        group_size: weights per scale; -1 takes the whole row (or column); 'auto' is the largest of 128, 64, 32 and 16
            that divides it, the whole row if none does.
        group_axis: the dimension that groups lie along, 'input' or 'output'.
        symmetric: whether the range is as large below 0 as above, so that there is no zero point.
        convention: how a group's range is found, see above; what codes and parameters stand for is the same in both.
    """

    bits: int
    group_size: int | Literal["auto"] = -1
    group_axis: GroupAxis = "input"
    symmetric: bool = False
    convention: Convention = "zero_in_range"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: {self.bits} was given, allowed are 2 to 8.")
        if isinstance(self.group_size, int) and self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                f"group_size: {self.group_size} was given; give a positive number, -1 for a whole row, or 'auto'."
            )
        if self.group_axis not in ("input", "output"):
            raise ValueError(f"group_axis: {self.group_axis!r} was given, allowed are 'input' and 'output'.")
        if self.convention not in ("zero_in_range", "llm-awq"):
            raise ValueError(f"convention: {self.convention!r} was given, allowed are 'zero_in_range' and 'llm-awq'.")

    @property
    def levels(self) -> int:
        """The largest code, 2^bits - 1."""
        return 2**self.bits - 1

    def size(self, length: int) -> int:
        """Return how many weights of a row (or column) of this length share a scale."""
        if self.group_size == "auto":
            return next((size for size in AUTO if length % size == 0), length)
        return length if self.group_size == -1 else self.group_size

    def of(self, out_features: int, in_features: int) -> IntegerGrid:
        """Return the grid of a weight [out_features, in_features], its group size as a number."""
        if self.group_size != "auto":
            return self
        length = in_features if self.group_axis == "input" else out_features
        size = self.size(length)
        return replace(self, group_size=-1 if size == length else size)

    def fits(self, out_features: int, in_features: int) -> str | None:
        """Why a weight [out_features, in_features] cannot be cut into these groups, or None."""
        length = in_features if self.group_axis == "input" else out_features
        if length % self.size(length):
            return (
                f"group_size: {self.group_size} does not divide the {length} {self.group_axis}s; "
                f"choose a divisor of {length}, or -1 for whole rows"
            )
        return None

    def parameter_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the shape of scale and zero for a weight [out, in].

        Args:
            out_features: rows of the weight.
            in_features: columns of the weight.

        Raises:
            ValueError: the groups do not fit.
        """
        reason = self.fits(out_features, in_features)
        if reason:
            raise ValueError(reason + ".")
        if self.group_axis == "input":
            return out_features, in_features // self.size(in_features)
        return out_features // self.size(out_features), in_features

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Find codes and parameters of a weight.

        Args:
            weight: [out, in].

        Returns:
            Codes, uint8 [out, in]; scale, float32, and zero, uint8 (None if symmetric), both [out, groups] for groups
            along the input and [groups, in] along the output.

        Raises:
            ValueError: the groups do not fit.
        """
        parts = [self._quantize(rows.float()) for rows in parcels(self._grouped(weight))]
        codes, scale, zero = (torch.cat(each) for each in zip(*parts, strict=True))
        if self.group_axis == "output":
            codes, scale, zero = codes.t().contiguous(), scale.t().contiguous(), zero.t().contiguous()
        return codes, scale, None if self.symmetric else zero

    def _quantize(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [rows, groups * group_size], scale and zero [rows, groups] of float32 [rows, groups, group_size]."""
        if self.symmetric:
            scale = self._scale(groups.abs().amax(-1, keepdim=True), 2 ** (self.bits - 1) - 1)
            zero = torch.full_like(scale, 2 ** (self.bits - 1))
        else:
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            if self.convention == "zero_in_range":
                low, high = low.clamp(max=0), high.clamp(min=0)
            scale = self._scale(high - low, self.levels)
            zero = (-torch.round(low / scale)).clamp(0, self.levels)
        codes = (torch.round(groups / scale) + zero).clamp(0, self.levels)
        return codes.flatten(1).to(torch.uint8), scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8)

    def _scale(self, span: Tensor, steps: int) -> Tensor:
        """The scale of groups whose range takes `steps` steps."""
        if self.convention == "llm-awq":
            return span.clamp(min=RELEASE_RANGE) / steps
        scale = (span / steps).clamp(min=torch.finfo(torch.float32).tiny)  # below it divisions lose their accuracy
        return torch.where(span > 0, scale, 1.0)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The weight float32 [out, in] that codes and parameters stand for."""
        dim = 1 if self.group_axis == "input" else 0
        groups = codes.float().unflatten(dim, (scale.shape[dim], -1))
        offset = float(2 ** (self.bits - 1)) if zero is None else zero.float().unsqueeze(dim + 1)
        return ((groups - offset) * scale.unsqueeze(dim + 1)).flatten(dim, dim + 1)

    def fake(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize: float32 [out, in]."""
        return self.dequantize(*self.quantize(weight))

    def _grouped(self, weight: Tensor) -> Tensor:
        """The weight [out, in] as [rows, groups, group_size]; rows go along the axis that is not grouped."""
        reason = self.fits(*weight.shape)
        if reason:
            raise ValueError(reason + ".")
        rows = weight if self.group_axis == "input" else weight.t()
        return rows.reshape(rows.shape[0], -1, self.size(rows.shape[1]))
