"""Rounding inputs to 8 bits and scaling integer sums, in Numba: one pass each over the values, rows over the threads.

The largest magnitude of a row is found among the bits of the values without their signs: they are ordered as the
magnitudes are, NaN above Inf above all numbers, and integers are compared ten times faster than floats.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.decode_math import from_bits
from actkit.kernels.int8_products import MIDDLE, TINY
from actkit.kernels.numba_cpu import array, as_stored, widen
from actkit.kernels.process import LOCK, compiled, follow_torch_threads

PARTS = 64  # of the rows, over threads
LOW, HIGH, NAN, INF = np.float32(-MIDDLE), np.float32(MIDDLE - 1), np.float32(np.nan), np.float32(np.inf)


@compiled(inner=True)
def largest(words, shift):  # type: ignore[no-untyped-def]
    """Return the largest magnitude; NaN if there is one. words: int32, or uint16 (bf16) with shift 16."""
    found = np.int32(0)
    sign = np.int32(0x7FFFFFFF) >> np.int32(shift)
    for j in range(words.size):
        word = np.int32(words[j]) & sign
        found = np.int32(word) if word > found else found
    return from_bits(np.int32(found << np.int32(shift)))


@compiled(parallel=True)
def _round(x, words, shift, dynamic, fixed, half_range, codes, steps):  # type: ignore[no-untyped-def]
    for part in prange(PARTS):
        for i in range(len(x) * part // PARTS, len(x) * (part + 1) // PARTS):
            found, step = largest(words[i], shift), fixed
            if dynamic:
                step = max(found / half_range, np.float32(TINY)) if found > 0 else np.float32(1)
            bad = found != found or (dynamic and found == INF)
            steps[i] = NAN if bad else step
            for j in range(x.shape[1]):
                value = np.rint(widen(x[i, j]) / step)
                value = value if value > LOW else LOW
                value = value if value < HIGH else HIGH
                codes[i, j] = np.int8(np.int32(value))


@compiled(parallel=True)
def _scale(sums, steps, factors, bias, y):  # type: ignore[no-untyped-def]
    for part in prange(PARTS):
        for i in range(len(y) * part // PARTS, len(y) * (part + 1) // PARTS):
            step = steps[i]
            for j in range(y.shape[1]):
                y[i, j] = as_stored(np.float32(sums[i, j]) * (step * factors[j]) + bias[j], y)


def words_of(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return values, float32 or uint16 (bf16), as the words and the shift that `largest` takes."""
    return (values, 16) if values.dtype == np.uint16 else (values.view(np.int32), 0)


def rounded(x: Tensor, fixed: float | None, half_range: float) -> tuple[Tensor, Tensor]:
    """Compute what `int8_products.rounded_reference` does; x is contiguous."""
    codes, steps = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    settings = (fixed is None, np.float32(fixed or 0.0), np.float32(half_range))
    values = array(x)
    with LOCK:
        follow_torch_threads(x.nbytes)
        _round(values, *words_of(values), *settings, codes.numpy(), steps.numpy())
    return codes, steps


def scaled(sums: Tensor, steps: Tensor, factors: Tensor, bias: Tensor, y: Tensor) -> None:
    """Compute what `int8_products.scaled_reference` does; everything contiguous."""
    with LOCK:
        follow_torch_threads(y.nbytes)
        _scale(sums.numpy(), steps.numpy(), factors.numpy(), bias.numpy(), array(y))
