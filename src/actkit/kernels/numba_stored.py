"""Dot products of stored codes with few rows of inputs, in Numba: one pass over the codes, their rows over threads.

The codes of two inputs lie in one byte, so the even and the odd inputs are apart: a loop over bytes is then two sums
without a shuffle, which LLVM makes vectors of. The order of a sum is fixed.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.process import LOCK, compiled, follow_torch_threads

PARTS = 64  # of the weight's rows, over threads
REORDERED = {"reassoc", "contract", "nsz"}  # sums may be taken in vectors; NaN and Inf stay what they are
NO_ZEROS = np.empty((0, 0), np.uint8)
LOW = np.int32(15)


@compiled(inner=True, fastmath=REORDERED)
def _bytes_dot(codes, x, zero):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(x.size):
        total += x[j] * np.float32(np.int32(codes[j]) - zero)
    return total


@compiled(inner=True, fastmath=REORDERED)
def _halves_dot(codes, even, odd, zero):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(even.size):
        pair = np.int32(codes[j])
        total += even[j] * np.float32((pair & LOW) - zero) + odd[j] * np.float32((pair >> 4) - zero)
    return total


@compiled(parallel=True)
def _of_bytes(codes, scale, zeros, middle, x, out):  # type: ignore[no-untyped-def]
    groups = scale.shape[1]
    size = codes.shape[1] // groups
    for part in prange(PARTS):
        for o in range(len(codes) * part // PARTS, len(codes) * (part + 1) // PARTS):
            for r in range(len(x)):
                total = np.float32(0)
                for g in range(groups):
                    zero = np.int32(zeros[o, g]) if zeros.size else middle
                    here = codes[o, g * size : (g + 1) * size]
                    total += scale[o, g] * _bytes_dot(here, x[r, g * size : (g + 1) * size], zero)
                out[r, o] = total


@compiled(parallel=True)
def _of_halves(codes, scale, zeros, middle, even, odd, out):  # type: ignore[no-untyped-def]
    groups = scale.shape[1]
    size = codes.shape[1] // groups
    for part in prange(PARTS):
        for o in range(len(codes) * part // PARTS, len(codes) * (part + 1) // PARTS):
            for r in range(len(even)):
                total = np.float32(0)
                for g in range(groups):
                    zero = np.int32(zeros[o, g]) if zeros.size else middle
                    first, last = g * size, (g + 1) * size
                    here = codes[o, first:last]
                    total += scale[o, g] * _halves_dot(here, even[r, first:last], odd[r, first:last], zero)
                out[r, o] = total


def stored_linear(rows: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, middle: int, bits: int) -> Tensor:
    """Compute what `stored_codes.stored_reference` does; everything contiguous."""
    y = torch.empty(len(rows), len(codes))
    zeros = NO_ZEROS if zero is None else zero.numpy()
    weight = (codes.numpy(), scale.numpy(), zeros, np.int32(middle))
    parts = (rows,) if bits == 8 else (rows[:, ::2].contiguous(), rows[:, 1::2].contiguous())
    x = [part.numpy() for part in parts]
    with LOCK:
        follow_torch_threads(codes.nbytes)
        (_of_bytes if bits == 8 else _of_halves)(*weight, *x, y.numpy())
    return y
