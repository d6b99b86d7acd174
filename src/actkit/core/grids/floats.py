"""Floating-point grids: a sign, E bits of exponent and M of mantissa, times the scale of a group.

With the exponent bias b0 = 2^(E-1) - 1, and u = x / scale clamped to what the grid holds:

    p = max(1, floor(log2|u|) + b0),  step = 2^(p - M - b0),  q = round(u / step) * step,  x' = q * scale

Rounding is half to even; below the first exponent the steps are even (the exponent 0 of IEEE 754), and with M = 0
what lies there is 0 or the first power of two. A real-valued exponent bias b, as LLM-FP4 has it, is the scale
2^(b0 - b) (`scale_of_bias`). The largest value is (2 - 2^-M) 2^(2^E - 1 - b0), unless codes are reserved:

    reserved "none"   every code is a number
    reserved "nan"    the largest code is not (torch.float8_e4m3fn: 448 instead of 480)
    reserved "top"    the largest exponent is not (torch.float8_e5m2, and IEEE 754: 57344 instead of 114688)

A code is sign, exponent and mantissa, from the highest bit down. OCP's formats are settings of the scale:

    mxfp4    E2M1, groups of 32, scales 2^k: k = floor(log2 max|x|) - 2, one more if max|x| >= 1.75 * 2^floor(...)
    nvfp4    E2M1, groups of 16, scales in E4M3, times max|X| / (6 * 448) for the whole tensor
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import floor, log2
from typing import ClassVar, Literal

import torch
from torch import Tensor

from actkit.core.grids.grid import Grid, GroupAxis, Scope, straight_through
from actkit.core.grids.scales import (
    E4M3_LARGEST,
    ScaleDtype,
    check_scale_dtype,
    power_of_two,
    round_scale,
    smallest_scale,
)

EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent + 127

Reserved = Literal["none", "nan", "top"]


@dataclass(frozen=True)
class FloatGrid(Grid):
    """Floats of few bits, each times the scale of its group.

    Attributes:
        exponent_bits: E, 1 to 5.
        mantissa_bits: M, from 0; with the sign 3 to 8 bits in all.
        group_size: values per scale; -1 takes the whole row (or column), 'auto' as in `IntegerGrid`.
        group_axis: the dimension that groups lie along, 'input' or 'output'.
        reserved: codes that are no numbers, see above.
        scope: 'group', or 'tensor' for one scale for all values.
        scale_dtype: what scales are rounded to and stored in: 'float32', 'float16', 'bfloat16', 'e8m0' (MX) or 'e4m3'
            (NVFP4).
    """

    kind: ClassVar[str] = "float"
    exponent_bits: int
    mantissa_bits: int
    group_size: int | Literal["auto"] = -1
    group_axis: GroupAxis = "input"
    reserved: Reserved = "none"
    scope: Scope = field(default="group", kw_only=True)
    scale_dtype: ScaleDtype = field(default="float32", kw_only=True)

    def __post_init__(self) -> None:
        if not (1 <= self.exponent_bits <= 5 and self.mantissa_bits >= 0 and 3 <= self.bits <= 8):
            raise ValueError(
                f"exponent_bits, mantissa_bits: {self.exponent_bits} and {self.mantissa_bits} were given; give an "
                f"exponent of 1 to 5 bits and a mantissa from 0 on, with the sign 3 to 8 bits."
            )
        self._check_groups()
        if self.reserved not in ("none", "nan", "top"):
            raise ValueError(f"reserved: {self.reserved!r} was given, allowed are 'none', 'nan' and 'top'.")
        check_scale_dtype(self.scale_dtype)

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of a code: the sign, the exponent and the mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """The exponent bias at scale 1, 2^(E-1) - 1."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest(self) -> float:
        """The largest value at scale 1."""
        return _positives(self.exponent_bits, self.mantissa_bits, self.reserved)[-1]

    @property
    def name(self) -> str:
        return f"{self.bits}-bit float (E{self.exponent_bits}M{self.mantissa_bits})"

    @property
    def has_zeros(self) -> bool:
        return False

    def scale_of_bias(self, bias: Tensor) -> Tensor:
        """Return the scale that stands for a real-valued exponent bias, 2^(b0 - b)."""
        return torch.exp2(self.bias - bias)

    def from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, None]:
        span = torch.maximum(-low, high)
        if self.scale_dtype == "e8m0":
            mantissa, exponent = torch.frexp(span)  # mantissa of 0.5 to 1
            exponent = exponent - 1 + (mantissa >= 0.875) - floor(log2(self.largest))
            scale = power_of_two(exponent.clamp(-126, 127)).to(span.dtype)
        else:
            scale = (span / self.largest).clamp(min=smallest_scale(span))
        scale = torch.where(span > 0, scale, 1.0)
        return round_scale(scale, self.scale_dtype, self.whole(span.detach())), None

    def whole(self, x: Tensor) -> Tensor | None:
        if self.scale_dtype != "e4m3":
            return None
        top = x.abs().amax().reshape(1) / (self.largest * E4M3_LARGEST)
        return torch.where(top > 0, top.clamp(min=smallest_scale(x)), 1.0)

    def round(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return self._unit(x, scale) * scale

    def _unit(self, x: Tensor, scale: Tensor) -> Tensor:
        """The value at scale 1."""
        unit = (x / scale).clamp(-self.largest, self.largest)
        fixed = unit.detach()
        first = 1 - self.bias  # the exponent of the first binade, whose steps those below share
        # the exponent of a float32 is in its bits: 10 times as fast as torch.frexp
        exponent = ((fixed.float().view(torch.int32) & EXPONENT) >> 23).clamp_(min=first + 127) - self.mantissa_bits
        step = (exponent << 23).view(torch.float32).to(fixed.dtype)
        return straight_through(torch.round(fixed / step) * step, unit)

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        unit = self._unit(x, scale)
        places = torch.bucketize(unit.abs().contiguous(), self._table(unit))
        return places.to(torch.uint8) | (torch.signbit(unit).to(torch.uint8) << (self.bits - 1))

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        positive = self._table(scale)
        table = torch.cat((positive, positive.new_zeros(2 ** (self.bits - 1) - len(positive))))
        values = torch.cat((table, -table)).index_select(0, codes.flatten().int())  # far faster than indexing
        return values.view(codes.shape) * scale

    def _table(self, like: Tensor) -> Tensor:
        return like.new_tensor(_positives(self.exponent_bits, self.mantissa_bits, self.reserved))


@cache
def _positives(exponent_bits: int, mantissa_bits: int, reserved: Reserved) -> tuple[float, ...]:
    """The values of the codes without a sign, in order, as far as they are numbers."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    values = [
        (mantissa + (steps if exponent else 0)) * 2.0 ** (max(exponent, 1) - bias - mantissa_bits)
        for exponent in range(2**exponent_bits)
        for mantissa in range(steps)
    ]
    return tuple(values[: len(values) - {"none": 0, "nan": 1, "top": steps}[reserved]])


def fp4(group_size: int | Literal["auto"] = -1) -> FloatGrid:
    """E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    return FloatGrid(2, 1, group_size)


def fp8(group_size: int | Literal["auto"] = -1) -> FloatGrid:
    """E4M3 as torch.float8_e4m3fn has it, up to 448."""
    return FloatGrid(4, 3, group_size, reserved="nan")


def mxfp4() -> FloatGrid:
    """OCP's MXFP4: E2M1, a power of two for each 32."""
    return FloatGrid(2, 1, 32, scale_dtype="e8m0")


def nvfp4() -> FloatGrid:
    """NVFP4: E2M1, an E4M3 for each 16, and one float32."""
    return FloatGrid(2, 1, 16, scale_dtype="e4m3")
