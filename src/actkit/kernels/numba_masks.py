"""Inputs that are not selected become 0, in Numba: one pass over the values, rows over the threads.

|x| * score is never negative, so its bits as an integer are ordered as its values are. The smallest of the k largest is
found by bisection over these bits: each of at most 31 steps counts, without a branch, how many are at least as large,
and a row of some thousand values is counted in some hundred nanoseconds.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.numba_cpu import NOTHING, array, widen
from actkit.kernels.process import LOCK, compiled, follow_torch_threads

PARTS = 64  # of the rows, over threads
INFINITE = np.int32(0x7F800000)


@compiled(inner=True)
def _keys(x, score, scored, keys):  # type: ignore[no-untyped-def]
    """Write |x| * score as ordered integers; what is NaN counts as Inf. scored: the memory of `keys`, as floats."""
    for j in range(x.size):
        scored[j] = abs(widen(x[j]))
    for j in range(score.size):
        scored[j] *= score[j]
    for j in range(x.size):
        keys[j] = keys[j] if keys[j] < INFINITE else INFINITE


@compiled(inner=True)
def _at_least(keys, least):  # type: ignore[no-untyped-def]
    count = np.int32(0)
    for j in range(keys.size):
        count += np.int32(1) if keys[j] >= least else np.int32(0)
    return count


@compiled(inner=True)
def _least_of(keys, k):  # type: ignore[no-untyped-def]
    """Return the largest key that at least k keys reach."""
    low, count = np.int32(0), np.int32(keys.size)
    for bit in range(30, -1, -1):
        tried = np.int32(low | np.int32(1 << bit))
        found = _at_least(keys, tried)
        if found >= k:
            low, count = tried, found
        if count == k:
            break
    return low, count


@compiled(parallel=True)
def _top_k(x, score, k, y):  # type: ignore[no-untyped-def]
    for part in prange(PARTS):
        scored = np.empty(x.shape[1], np.float32)
        keys = scored.view(np.int32)
        for i in range(len(x) * part // PARTS, len(x) * (part + 1) // PARTS):
            _keys(x[i], score, scored, keys)
            least, count = _least_of(keys, k)
            for j in range(x.shape[1]):
                y[i, j] = x[i, j] if keys[j] >= least else y.dtype.type(0)
            if count > k:  # of those that are equal to the smallest, the last ones go
                for j in range(x.shape[1] - 1, -1, -1):
                    if keys[j] == least and count > k:
                        y[i, j] = y.dtype.type(0)
                        count -= 1


@compiled(parallel=True)
def _above(x, score, threshold, y):  # type: ignore[no-untyped-def]
    for part in prange(PARTS):
        for i in range(len(x) * part // PARTS, len(x) * (part + 1) // PARTS):
            if score.size:
                for j in range(x.shape[1]):
                    dropped = abs(widen(x[i, j])) * score[j] <= threshold
                    y[i, j] = y.dtype.type(0) if dropped else x[i, j]
            else:
                for j in range(x.shape[1]):
                    dropped = abs(widen(x[i, j])) <= threshold
                    y[i, j] = y.dtype.type(0) if dropped else x[i, j]


def masked(x: Tensor, score: Tensor | None, threshold: float, k: int) -> Tensor:
    """Return x [rows, in], float32 or bfloat16 and contiguous, with zeros as `masked_inputs` says."""
    y = torch.empty_like(x)
    scores = NOTHING if score is None else score.numpy()
    with LOCK:
        follow_torch_threads(x.nbytes)
        if k >= 0:
            _top_k(array(x), scores, np.int32(k), array(y))
        else:
            _above(array(x), scores, np.float32(threshold), array(y))
    return y
