"""How the range that a grid covers is chosen: one for each group of values.

A choice is a function (groups [..., groups, size], grid) -> (low, high), both [..., groups, 1], and is given to
`Grid.parameters`: `grid.parameters(x, Percentile(0.999))`. What the grid makes of a range (a symmetric one takes the
larger side, zero is put into it) is the grid's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from actkit.core.grids.grid import Choose, Grid


def min_max(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """All values: from the smallest to the largest.

    Args:
        groups: [..., groups, size].
        grid: not used.
    """
    return groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)


def twice_mean(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """To twice the mean magnitude, on both sides: 1.6 standard deviations of normal values.

    Args:
        groups: [..., groups, size].
        grid: not used.
    """
    span = 2 * groups.abs().mean(-1, keepdim=True)
    return -span, span


@dataclass(frozen=True)
class Shrunk:
    """The range that another choice gives, both ends times a factor.

    Attributes:
        factor: above 0, at most 1.
        choose: gives the range.
    """

    factor: float
    choose: Choose = min_max

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor: {self.factor} was given; give a number above 0, at most 1.")

    def __call__(self, groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        low, high = self.choose(groups, grid)
        return low * self.factor, high * self.factor


@dataclass(frozen=True)
class Percentile:
    """All but a share of the values, half of it on each side (linear interpolation, as NumPy's).

    Attributes:
        share: of the values that lie in the range, above 0, at most 1.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: {self.share} was given; give a share of the values above 0, at most 1.")

    def __call__(self, groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        ordered, out = groups.sort(-1).values, (1 - self.share) / 2
        return _at(ordered, out), _at(ordered, 1 - out)


@dataclass(frozen=True)
class LeastSquares:
    """The shrunken range whose rounding errs least: both ends times t, t of `steps` equal steps up to 1.

    Attributes:
        steps: how many ranges are tried.
        smallest: the smallest t.
    """

    steps: int = 40
    smallest: float = 0.3

    def __call__(self, groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        low, high = min_max(groups, grid)
        best, least = torch.ones_like(low), torch.full_like(low, float("inf"))
        for t in torch.linspace(1, self.smallest, self.steps).tolist():  # from 1 on: a draw keeps the wider range
            error = (grid.round(groups, *grid.from_range(low * t, high * t)) - groups).square().sum(-1, keepdim=True)
            best, least = torch.where(error < least, t, best), torch.minimum(error, least)
        return low * best, high * best


def _at(ordered: Tensor, share: float) -> Tensor:
    """The quantile of sorted values: [..., size] -> [..., 1]. torch.quantile takes 16 million at most."""
    place = share * (ordered.shape[-1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[-1] - 1)
    left, right = ordered[..., below : below + 1], ordered[..., above : above + 1]
    return torch.lerp(left, right, place - below)
