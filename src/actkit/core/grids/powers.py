"""Powers of two: a grid of them, and the factors of a scale that are powers of two.

The grid (log2) is for values of at least 0 that crowd near 0, such as attention weights:

    k = round(-log2(x / scale)),   x' = scale 2^-max(k, 0)   if k <= last,   else 0

    zero "last"      last = 2^b - 2, and the code 2^b - 1 stands for 0: b bits
    zero "beyond"    last = 2^b - 1, and the code 2^b stands for 0: as FQ-ViT computes it. These are 2^b + 1 values,
                     one more than b bits can tell apart

Rounding is half to even in the exponent. Values of 0 and less become 0, values above the scale become the scale.

The factors (TRIP; FQ-ViT's "power-of-two factor") give each channel a scale of its own that an integer product can
bear: s 2^a, with one s and one zero point for all, and a from 0 to K by the least squared error (`power_factors`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from actkit.core.grids.grid import Grid, GroupAxis, Scope, straight_through
from actkit.core.grids.scales import ScaleDtype, check_scale_dtype, power_of_two, round_scale, smallest_scale

Zero = Literal["last", "beyond"]


@dataclass(frozen=True)
class PowerGrid(Grid):
    """Powers of two from the scale down, and 0.

    Attributes:
        bits: 2 to 6.
        group_size: values per scale; -1 takes the whole row (or column), 'auto' as in `IntegerGrid`.
        group_axis: the dimension that groups lie along, 'input' or 'output'.
        zero: the code of 0: the 'last' of 2^bits, or one 'beyond' them.
        scope: 'group', or 'tensor' for one scale for all values.
        scale_dtype: what scales are rounded to and stored in: 'float32', 'float16' or 'bfloat16'.
    """

    kind: ClassVar[str] = "powers"
    bits: int
    group_size: int | Literal["auto"] = -1
    group_axis: GroupAxis = "input"
    zero: Zero = "last"
    scope: Scope = field(default="group", kw_only=True)
    scale_dtype: ScaleDtype = field(default="float32", kw_only=True)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 6:
            raise ValueError(f"bits: {self.bits} was given, allowed are 2 to 6 for powers of two.")
        if self.zero not in ("last", "beyond"):
            raise ValueError(f"zero: {self.zero!r} was given, allowed are 'last' and 'beyond'.")
        self._check_groups()
        check_scale_dtype(self.scale_dtype, ("float32", "float16", "bfloat16"))

    @property
    def last(self) -> int:
        """The largest exponent, below which there is 0."""
        return 2**self.bits - (2 if self.zero == "last" else 1)

    @property
    def name(self) -> str:
        return f"{self.bits}-bit powers of two"

    @property
    def has_zeros(self) -> bool:
        return False

    def from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, None]:
        scale = torch.where(high > 0, high.clamp(min=smallest_scale(high)), 1.0)
        return round_scale(scale, self.scale_dtype), None

    def round(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        unit = x / scale
        fixed = unit.detach()
        power = self._power(self._codes(fixed)).to(fixed.dtype)
        power = torch.where(fixed.isnan(), fixed, power)  # which a comparison would make a 0
        return straight_through(power, unit) * scale

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return self._codes(x / scale).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return self._power(codes.to(torch.int32)).to(scale.dtype) * scale

    def _codes(self, unit: Tensor) -> Tensor:
        """Exponents, and last + 1 for 0: int32."""
        exponent = torch.round(-torch.log2(unit.clamp(min=smallest_scale(unit))))
        return exponent.nan_to_num(self.last + 1).clamp(0, self.last + 1).to(torch.int32)

    def _power(self, codes: Tensor) -> Tensor:
        return torch.where(codes > self.last, 0.0, power_of_two(-codes))


def power_factors(rows: Tensor, low: Tensor, high: Tensor, grid: Grid, powers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find a scale for each channel that is one scale times a power of two.

    Args:
        rows: a sample of values, [rows, channels].
        low: the smallest value of each channel, [channels].
        high: the largest.
        grid: of integers with zero points; its zero point is that of the range of all channels.
        powers: K. The largest scale is that of the range of all channels, the smallest 2^-K times that.

    Returns:
        Scales, float32 [channels]; the zero point of all, uint8 [1]; the exponents a of 2, 0 to K, int64 [channels].

    Raises:
        ValueError: powers is below 0, or the grid has no zero points.
    """
    if powers < 0 or not grid.has_zeros:
        raise ValueError(f"powers, grid: {powers} and {grid.describe()} were given; give 0 or more, and zero points.")
    whole, zero = grid.from_range(low.float().min()[None], high.float().max()[None])
    assert zero is not None
    zero = zero.to(torch.uint8)
    rows = rows.float()
    scales = torch.cat([whole * 2.0 ** (a - powers) for a in range(powers + 1)])
    errors = torch.stack([(grid.fake(rows, each[None], zero) - rows).double().square().sum(0) for each in scales])
    exponents = errors.argmin(0)
    return scales[exponents], zero, exponents
