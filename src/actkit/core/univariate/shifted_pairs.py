"""Pairs of shifted activations on a grid, combined: AF-KAN's basis, whose grid is learned (2025, arXiv:2503.06112).

    u_m = s(x - low_m),  v_m = s(high_m - x);   low_m = (m - order) / grid,  high_m = low_m + (order + 1) / grid

A value is a combination of u and v, such as (u v)^2 (`quad1`). With ReLU, `quad1` and a copy of the grid for each
channel it is ReLU-KAN's (2024, arXiv:2406.02075), which `scale` brings to a height of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.core.layers.activations import Activation
from actkit.core.univariate.basis import Basis, Outside

Pair = Callable[[Tensor, Tensor], Tensor]
# name -> the combination of u and v, its derivative by u; that by v is the latter of v and u, as all are symmetric
COMBINATIONS: dict[str, tuple[Pair, Pair]] = {
    "quad1": (lambda u, v: (u * v) ** 2, lambda u, v: 2 * u * v**2),
    "quad2": (lambda u, v: u * v + u**2 + v**2, lambda u, v: v + 2 * u),
    "sum": (lambda u, v: u + v, lambda u, v: torch.ones_like(u)),
    "prod": (lambda u, v: u * v, lambda u, v: v),
    "sum_prod": (lambda u, v: u + v + u * v, lambda u, v: 1 + v),
    "cubic1": (lambda u, v: (u + v) * (u**2 + v**2), lambda u, v: u**2 + v**2 + 2 * u * (u + v)),
    "cubic2": (lambda u, v: (u * v) ** 3, lambda u, v: 3 * u**2 * v**3),
}


class ShiftedPairs(Basis):
    """Combinations of two shifted activations, grid + order of them, with a grid that is learned.

    Args:
        grid: intervals of [0, 1].
        order: how far a pair reaches over its interval.
        act: the name of an element-wise function s.
        combine: one of `COMBINATIONS`.
        channels: give each its own copy of the grid; None for one grid.
        train_grid: whether low and high are learned.
        scale: factor of the values; None for 1.

    Raises:
        ValueError: grid < 1, order < 0, or an unknown function or combination.
    """

    allowed: ClassVar[tuple[Outside, ...]] = ("vanish",)
    keeps: ClassVar[tuple[str, ...]] = ("low", "high")
    low: nn.Parameter
    high: nn.Parameter

    def __init__(
        self,
        grid: int = 3,
        order: int = 3,
        act: str = "silu",
        combine: str = "quad1",
        channels: int | None = None,
        train_grid: bool = True,
        scale: float | None = None,
    ) -> None:
        check_grid(grid, order)
        if combine not in COMBINATIONS:
            raise ValueError(f"combine: {combine!r} was given, allowed are {', '.join(COMBINATIONS)}.")
        super().__init__(grid + order, (0.0, 1.0), "vanish")
        self.activation = Activation(act)
        self.grid, self.order, self.combine = grid, order, combine
        self.channels, self.scale = channels, scale
        low = (torch.arange(grid + order) - order) / grid
        low = low if channels is None else low.repeat(channels, 1)
        self.low = nn.Parameter(low, train_grid)
        self.high = nn.Parameter(low + (order + 1) / grid, train_grid)

    def evaluate(self, x: Tensor) -> Tensor:
        left, right = self._places(x)
        return self._scaled(COMBINATIONS[self.combine][0](self.activation(left), self.activation(right)))

    def slopes(self, x: Tensor) -> Tensor:
        record, (_, slope) = self.activation.record(), COMBINATIONS[self.combine]
        assert record is not None and record.derivative is not None
        left, right = self._places(x)
        u, v = record.function(left), record.function(right)
        return self._scaled(slope(u, v) * record.derivative(left) - slope(v, u) * record.derivative(right))

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x - low and high - x: [..., channels, size] each."""
        wide = x.unsqueeze(-1)
        return wide - self.low.to(x.dtype), self.high.to(x.dtype) - wide

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.scale is None else self.scale * values

    def settings(self) -> dict[str, Any]:
        names = ("grid", "order", "combine", "channels", "scale")
        found = {name: getattr(self, name) for name in names}
        return {**found, "act": self.activation.name, "train_grid": self.low.requires_grad}

    def extra_repr(self) -> str:
        return f"size={self.size}, combine={self.combine!r}, channels={self.channels}"


def check_grid(grid: int, order: int) -> None:
    """Raise ValueError for a grid that is none.

    Args:
        grid: intervals, at least 1.
        order: 0 or more.
    """
    if grid < 1:
        raise ValueError(f"grid: {grid} was given; give at least 1 interval.")
    if order < 0:
        raise ValueError(f"order: {order} was given; give 0 or more.")
