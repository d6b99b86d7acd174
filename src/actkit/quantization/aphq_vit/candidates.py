"""The ranges that APHQ-ViT tries (2025, arXiv:2504.02508): between quantiles, each with zero points around its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.ranges import Percentile

RANGES = 16  # from the quantiles 0.1 and 0.9 to all values
ZEROS = range(-4, 4)  # steps that a zero point is moved by: 128 pairs, as many as the release tries


def candidates(values: Tensor, grid: IntegerGrid) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pairs of scale and zero that are tried, [rows, 1] each; a row without negative values keeps zero at 0.

    Args:
        values: [rows, n].
        grid: with zero points.
    """
    below = values.amin(-1, keepdim=True) < 0
    for step in range(RANGES):
        share = 0.8 + 0.2 * step / (RANGES - 1)  # half of what it leaves lies on each side
        scale, zero = grid.from_range(*Percentile(share)(values, grid))
        assert zero is not None
        for offset in ZEROS:
            yield scale, torch.where(below, (zero + offset).clamp(0, grid.levels), zero)
