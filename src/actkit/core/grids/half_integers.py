"""Half-integers: 2^b levels without a zero, as many on either side (StatsQ, 2023, arXiv:2302.02210).

With b bits, n = 2^(b-1) and the scale of a group, which is a step:

    code = clamp(round(x / scale - 0.5), -n, n - 1) + n,    x' = (code - n + 0.5) * scale

so that 2 bits are {-1.5, -0.5, 0.5, 1.5} times the scale. Rounding is half to even. A range (-s, s) has the scale
s / n; by default s is twice the mean magnitude of the group (`ranges.twice_mean`). A group of zeros comes back as
numbers next to 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from actkit.core.grids.grid import Choose, Grid, GroupAxis, Scope, straight_through
from actkit.core.grids.ranges import twice_mean
from actkit.core.grids.scales import ScaleDtype, check_scale_dtype, round_scale, smallest_scale


@dataclass(frozen=True)
class HalfIntegerGrid(Grid):
    """Half-integers, each times the scale of its group.

    Attributes:
        bits: 1 to 7; 8 bits of them would not fit into bytes as the odd integers that other programs read.
        group_size: values per scale; -1 takes the whole row (or column), 'auto' as in `IntegerGrid`.
        group_axis: the dimension that groups lie along, 'input' or 'output'.
        scope: 'group', or 'tensor' for one scale for all values.
        scale_dtype: what scales are rounded to and stored in: 'float32', 'float16' or 'bfloat16'.
    """

    kind: ClassVar[str] = "half_integer"
    bits: int
    group_size: int | Literal["auto"] = -1
    group_axis: GroupAxis = "input"
    scope: Scope = field(default="group", kw_only=True)
    scale_dtype: ScaleDtype = field(default="float32", kw_only=True)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 7:
            raise ValueError(f"bits: {self.bits} was given, allowed are 1 to 7 for half-integers.")
        self._check_groups()
        check_scale_dtype(self.scale_dtype, ("float32", "float16", "bfloat16"))

    @property
    def half(self) -> int:
        """How many levels lie on either side of 0, 2^(bits - 1)."""
        return 2 ** (self.bits - 1)

    @property
    def name(self) -> str:
        return f"{self.bits}-bit half-integer"

    @property
    def has_zeros(self) -> bool:
        return False

    @property
    def choice(self) -> Choose:
        return twice_mean

    def from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, None]:
        span = torch.maximum(-low, high)
        return round_scale((span / self.half).clamp(min=smallest_scale(span)), self.scale_dtype), None

    def round(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return self.decode(self._codes(x, scale), scale, zero)

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return self._codes(x, scale).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return (codes.to(scale.dtype) - (self.half - 0.5)) * scale

    @property
    def levels(self) -> int:
        """The largest code, 2^bits - 1."""
        return 2 * self.half - 1

    def _places(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return x / scale + (self.half - 0.5)

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        steps = x / scale - 0.5
        return (straight_through(torch.round(steps), steps) + self.half).clamp(0, self.levels)
