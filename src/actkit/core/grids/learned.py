"""Learned steps (LSQ, 2020, arXiv:1902.08153): where they begin, and how large their gradient is.

A step that is a parameter gets the gradient of `Grid.fake` times 1 / sqrt(largest code * values that share it), which
makes its updates, relative to its size, about as large as those of the values. It counts by its magnitude, so that one
that training has moved past 0 is still a step.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

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


def learned_step(step: Tensor) -> Tensor:
    """Return the step that a parameter stands for: its magnitude.

    Args:
        step: the parameter, any shape.
    """
    return step.abs().clamp(min=smallest_scale(step))


def fake_learned(x: Tensor, step: Tensor, grid: IntegerGrid, zero: Tensor | None = None) -> Tensor:
    """Round values to a grid with learned steps, as `Grid.fake` does; the gradient of the steps is scaled.

    Args:
        x: float32 or float64.
        step: broadcastable to x, what `learned_step` gave.
        grid: symmetric, or without a sign.
        zero: 0 for a grid without a sign; None for a symmetric one.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or step.requires_grad)):
        return grid.round(x, step, zero)
    low = -grid.middle if zero is None else 0
    factor = 1 / sqrt(largest_code(grid) * max(1, x.numel() // max(1, step.numel())))
    return _Learned.apply(x, step, low, low + grid.levels, factor)


class _Learned(torch.autograd.Function):
    """The same in three passes over the values, and four back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, factor: float) -> Tensor:
        place = x / step
        ctx.save_for_backward(place, step)
        ctx.settings = low, high, factor
        return place.round().clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        place, step = ctx.saved_tensors
        low, high, factor = ctx.settings
        code = place.round()
        held = code.clamp(low, high)
        inside = code == held
        of_step = (held - place * inside).mul_(gradient).sum_to_size(step.shape).mul_(factor)
        return gradient * inside, of_step, None, None, None
