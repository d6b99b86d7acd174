"""Dot products of chosen rows on the CPU: what `output_rows` computes, in Numba.

    out[i] = sum over c of x[c] * float32(buffer[rows[i], c])

Four rows share the loads of x, and the next four are asked for meanwhile. Threads take contiguous parts of the list.
The order of a sum is fixed.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.numba_cpu import array
from actkit.kernels.process import LOCK, compiled, follow_torch_threads
from actkit.kernels.vectors import dot_rows, prefetch_once

TOGETHER = 4
PARTS = 16  # of the list, over threads
BLOCK_BYTES = 64


@compiled()
def _offsets(rows, i, last, stride):  # type: ignore[no-untyped-def]
    return (
        np.int64(rows[min(i, last)]) * stride,
        np.int64(rows[min(i + 1, last)]) * stride,
        np.int64(rows[min(i + 2, last)]) * stride,
        np.int64(rows[min(i + 3, last)]) * stride,
    )


@compiled()
def chosen_dots(weight, x, rows, first, last, out):  # type: ignore[no-untyped-def]
    """out[i] for i from first to last, on the calling thread. weight: uint16 (bf16) or float32 [rows, width]; x:
    float32 [width]; rows: int32."""
    width, stride = weight.shape[1], weight.shape[1] * weight.itemsize
    for i in range(first, last, TOGETHER):
        here = _offsets(rows, i, last - 1, stride)
        ahead = _offsets(rows, i + TOGETHER, last - 1, stride)
        for place in range(0, stride, BLOCK_BYTES):
            prefetch_once(weight, ahead, place)
        found = dot_rows(weight, here, x, width)
        for r in range(TOGETHER):
            if i + r < last:
                out[i + r] = found[r]


@compiled(parallel=True)
def _chosen(weight, x, rows, out):  # type: ignore[no-untyped-def]
    for part in prange(PARTS):
        chosen_dots(weight, x, rows, rows.size * part // PARTS, rows.size * (part + 1) // PARTS, out)


def output_rows(x: Tensor, buffer: Tensor, rows: Tensor) -> Tensor:
    """As `reference.output_rows`."""
    weight, given, chosen = array(buffer), x.float().contiguous().numpy(), rows.contiguous().numpy()
    out = np.empty((len(given), len(chosen)), np.float32)
    with LOCK:
        follow_torch_threads(len(chosen) * weight.shape[1] * weight.itemsize)
        for one, found in zip(given, out):
            _chosen(weight, one, chosen, found)
    return torch.from_numpy(out)
