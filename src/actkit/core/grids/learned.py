"""Learned steps (LSQ, 2020, arXiv:1902.08153): where they begin, and how large their gradient is.

A step that is a parameter gets the gradient of `Grid.fake` times 1 / sqrt(largest code * values that share it), which
makes its updates, relative to its size, about as large as those of the values. It counts by its magnitude, so that one
that training has moved past 0 is still a step.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.scales import smallest_scale


def largest_code(grid: IntegerGrid) -> int:
    """The largest code above that of 0: 2^(b-1) - 1, of a grid without a sign 2^b - 1."""
    return grid.middle - 1 if grid.symmetric else grid.levels


def first_step(mean_magnitude: Tensor, grid: IntegerGrid) -> Tensor:
    """Return where a step begins: 2 mean|x| / sqrt(largest code), twice that if codes have no sign.

    Args:
        mean_magnitude: of the values that share it, any shape.
        grid: symmetric, or without a sign (its zero point 0).
    """
    return mean_magnitude * (2 if grid.symmetric else 4) / sqrt(largest_code(grid))


def learned_step(step: Tensor, grid: IntegerGrid, count: int) -> Tensor:
    """Return the step that a parameter stands for, with its gradient scaled.

    Args:
        step: the parameter, any shape.
        grid: whose steps it is.
        count: how many values share a step.
    """
    held = step.abs().clamp(min=smallest_scale(step))
    if not (held.requires_grad and torch.is_grad_enabled()):
        return held
    part = held / sqrt(largest_code(grid) * max(1, count))
    return part + (held - part).detach()
