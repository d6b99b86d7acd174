"""Rounding inputs to 8 bits and scaling integer sums, in Numba: one pass each over the values, rows over the threads.

The largest value of a row is found with NaN left out of account, which lets the compiler use vectors; whether there is
one is told by a second sum in the same loop.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.int8_products import MIDDLE, TINY
from actkit.kernels.numba_cpu import array, as_stored, widen
from actkit.kernels.process import LOCK, compiled, follow_torch_threads

PARTS = 64  # of the rows, over threads
LOW, HIGH, NAN = np.float32(-MIDDLE), np.float32(MIDDLE - 1), np.float32(np.nan)


@compiled(inner=True, fastmath={"nnan", "nsz"})
def _largest(x):  # type: ignore[no-untyped-def]
    largest = np.float32(0)
    for j in range(x.size):
        largest = max(largest, abs(widen(x[j])))
    return largest


@compiled(inner=True, fastmath={"reassoc"})
def _times_zero(x):  # type: ignore[no-untyped-def]
    """Zero, or NaN if a value is not finite."""
    total = np.float32(0)
    for j in range(x.size):
        total += widen(x[j]) * np.float32(0)
    return total


@compiled(inner=True, fastmath={"reassoc"})
def _nans(x):  # type: ignore[no-untyped-def]
    """How many values are NaN."""
    count = 0
    for j in range(x.size):
        value = widen(x[j])
        count += value != value
    return count


@compiled(parallel=True)
def _round(x, dynamic, fixed, half_range, codes, steps):  # type: ignore[no-untyped-def]
    for part in prange(PARTS):
        for i in range(len(x) * part // PARTS, len(x) * (part + 1) // PARTS):
            step = fixed
            if dynamic:
                largest = _largest(x[i])
                step = max(largest / half_range, np.float32(TINY)) if largest > 0 else np.float32(1)
                seen = _times_zero(x[i])
                steps[i] = step if seen == seen else NAN
            else:
                steps[i] = NAN if _nans(x[i]) else step
            for j in range(x.shape[1]):
                value = np.rint(widen(x[i, j]) / step)
                value = value if value > LOW else LOW
                value = value if value < HIGH else HIGH
                codes[i, j] = np.int8(value)


@compiled(parallel=True)
def _scale(sums, steps, factors, bias, y):  # type: ignore[no-untyped-def]
    for part in prange(PARTS):
        for i in range(len(y) * part // PARTS, len(y) * (part + 1) // PARTS):
            step = steps[i]
            for j in range(y.shape[1]):
                y[i, j] = as_stored(np.float32(sums[i, j]) * (step * factors[j]) + bias[j], y)


def rounded(x: Tensor, fixed: float | None, half_range: float) -> tuple[Tensor, Tensor]:
    """Compute what `int8_products.rounded_reference` does; x is contiguous."""
    codes, steps = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    settings = (fixed is None, np.float32(fixed or 0.0), np.float32(half_range))
    with LOCK:
        follow_torch_threads(x.nbytes)
        _round(array(x), *settings, codes.numpy(), steps.numpy())
    return codes, steps


def scaled(sums: Tensor, steps: Tensor, factors: Tensor, bias: Tensor, y: Tensor) -> None:
    """Compute what `int8_products.scaled_reference` does; everything contiguous."""
    with LOCK:
        follow_torch_threads(y.nbytes)
        _scale(sums.numpy(), steps.numpy(), factors.numpy(), bias.numpy(), array(y))
