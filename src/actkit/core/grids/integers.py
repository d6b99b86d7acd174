"""Integer grids, with the conventions stated.

One scale (and, if asymmetric, one zero point) serves a group of values, or all (`grid`). With b bits:

    asymmetric   scale = (max(w, 0) - min(w, 0)) / (2^b - 1),  zero = -round(min(w, 0) / scale)
    symmetric    scale = max|w| / (2^(b-1) - 1),               zero = 2^(b-1)
    code = clamp(round(w / scale) + zero, 0, 2^b - 1),         w' = (code - zero) * scale

Rounding is half to even. 0 lies in the range of every group, so that it is exact and no weight moves by more than half
a step, whatever the signs and the size of the group; the scale of a group of zeros is 1.

`half_step` divides the symmetric range by 2^(b-1) - 0.5 instead, as compressed-tensors, and so transformers, do (127.5
for 8 bits; vLLM divides by 127): the largest value of a group may then move by half a step more.

The convention "llm-awq" is that of the release of AWQ, for comparisons with it: the range is [min(w), max(w)] and no
smaller than 1e-5 (max|w| in the symmetric form), and the zero point is clamped to the codes. Groups of one sign far
from 0, and groups below 1e-5, lose what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from actkit.core.grids.grid import Grid, GroupAxis, Scope, straight_through
from actkit.core.grids.scales import ScaleDtype, check_scale_dtype, round_scale, smallest_scale

RELEASE_RANGE = 1e-5  # the smallest range of a group in llm-awq

Convention = Literal["zero_in_range", "llm-awq"]


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Integers, each times the scale of its group.

    Attributes:
        bits: 2 to 8.
        group_size: values per scale; -1 takes the whole row (or column); 'auto' is the largest of 128, 64, 32 and 16
            that divides it, the whole row if none does.
        group_axis: the dimension that groups lie along, 'input' or 'output'.
        symmetric: whether the range is as large below 0 as above, so that there is no zero point.
        convention: how a range becomes a scale, see above; what codes and parameters stand for is the same in both.
        scope: 'group', or 'tensor' for one scale for all values.
        scale_dtype: what scales are rounded to and stored in: 'float32', 'float16' or 'bfloat16'.
        half_step: whether a symmetric range is divided by 2^(bits-1) - 0.5 instead of 2^(bits-1) - 1.
    """

    kind: ClassVar[str] = "integer"
    bits: int
    group_size: int | Literal["auto"] = -1
    group_axis: GroupAxis = "input"
    symmetric: bool = False
    convention: Convention = "zero_in_range"
    scope: Scope = field(default="group", kw_only=True)
    scale_dtype: ScaleDtype = field(default="float32", kw_only=True)
    half_step: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: {self.bits} was given, allowed are 2 to 8.")
        self._check_groups()
        if self.convention not in ("zero_in_range", "llm-awq"):
            raise ValueError(f"convention: {self.convention!r} was given, allowed are 'zero_in_range' and 'llm-awq'.")
        check_scale_dtype(self.scale_dtype, ("float32", "float16", "bfloat16"))

    @property
    def levels(self) -> int:
        """The largest code, 2^bits - 1."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of 0 if there are no zero points, 2^(bits - 1)."""
        return 2 ** (self.bits - 1)

    @property
    def name(self) -> str:
        return f"{self.bits}-bit"

    @property
    def has_zeros(self) -> bool:
        return not self.symmetric

    def from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.symmetric:
            return self._scale(torch.maximum(-low, high), self.middle - (0.5 if self.half_step else 1)), None
        if self.convention == "zero_in_range":
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = self._scale(high - low, self.levels)
        zero = -low / scale
        return scale, straight_through(torch.round(zero), zero).clamp(0, self.levels)

    def _scale(self, span: Tensor, steps: float) -> Tensor:
        """The scale of groups whose range takes `steps` steps."""
        if self.convention == "llm-awq":
            return round_scale(span.clamp(min=RELEASE_RANGE) / steps, self.scale_dtype)
        scale = (span / steps).clamp(min=smallest_scale(span))
        return round_scale(torch.where(span > 0, scale, 1.0), self.scale_dtype)

    def round(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self.decode(self._codes(x, scale, zero), scale, zero)

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self._codes(x, scale, zero).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        if codes.dtype == torch.uint8 and not scale.requires_grad:  # one buffer, as memory that is new is slow
            return codes.to(scale.dtype).sub_(self._offset(zero)).mul_(scale)
        return (codes - self._offset(zero)) * scale

    def _places(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return x / scale + self._offset(zero)

    def _codes(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        steps = x / scale
        return (straight_through(torch.round(steps), steps) + self._offset(zero)).clamp(0, self.levels)

    def _offset(self, zero: Tensor | None) -> Tensor | float:
        """The code of 0; a learned one is rounded."""
        if zero is None:
            return float(self.middle)
        return straight_through(torch.round(zero), zero) if zero.requires_grad else zero
