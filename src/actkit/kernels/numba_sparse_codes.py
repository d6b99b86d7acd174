"""The operators of sparse codes in Numba: rows of a weight are read where they lie, and nothing dense is formed.

The sum over rows (`chosen_outer`) first sorts the entries by the row of the weight that they name, by counting; each
row is then summed by one thread, in the order of the entries. The largest values of a row are kept in a heap of k: most
values are smaller than its least, which is one comparison.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.process import LOCK, compiled, follow_torch_threads

PARTS = 64  # of rows, over threads
SUMS = {"reassoc", "contract", "nsz"}  # a sum in vectors; NaN and Inf stay what they are


@compiled(parallel=True, fastmath=SUMS)
def _sum(indices, values, weight, y):  # type: ignore[no-untyped-def]
    rows, k = indices.shape
    for part in prange(PARTS):
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            out = y[row]
            out[:] = 0
            for j in range(k):
                value, other = values[row, j], weight[indices[row, j]]
                for c in range(out.size):
                    out[c] += value * other[c]


@compiled(parallel=True, fastmath=SUMS)
def _products(indices, x, weight, y):  # type: ignore[no-untyped-def]
    rows, k = indices.shape
    for part in prange(PARTS):
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            own = x[row]
            for j in range(k):
                other, total = weight[indices[row, j]], x.dtype.type(0)
                for c in range(own.size):
                    total += own[c] * other[c]
                y[row, j] = total


@compiled(parallel=True, fastmath=SUMS)
def _outer(indices, values, x, starts, order, y):  # type: ignore[no-untyped-def]
    """starts: int64 [n + 1] of zeros, order: int64 [entries]; both are written."""
    n, k, entries = y.shape[0], indices.shape[1], indices.size
    flat, held = indices.reshape(entries), values.reshape(entries)
    for entry in range(entries):
        starts[flat[entry] + 1] += 1
    for latent in range(n):
        starts[latent + 1] += starts[latent]
    for entry in range(entries):
        latent = flat[entry]
        order[starts[latent]] = entry
        starts[latent] += 1  # becomes the start of the next one
    for part in prange(PARTS):
        for latent in range(n * part // PARTS, n * (part + 1) // PARTS):
            out = y[latent]
            out[:] = 0
            for place in range(starts[latent - 1] if latent else 0, starts[latent]):
                value, other = held[order[place]], x[order[place] // k]
                for c in range(out.size):
                    out[c] += value * other[c]


@compiled(parallel=True)
def _largest(x, found):  # type: ignore[no-untyped-def]
    rows, n = x.shape
    k = found.shape[1]
    for part in prange(PARTS):
        heap = np.empty(k, x.dtype)  # the least first
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            values, places = x[row], found[row]
            for j in range(k):  # put in at the end, and up
                value, at = values[j], j
                while at > 0 and heap[(at - 1) // 2] > value:
                    above = (at - 1) // 2
                    heap[at], places[at] = heap[above], places[above]
                    at = above
                heap[at], places[at] = value, j
            for j in range(k, n):
                value = values[j]
                if value > heap[0]:  # in the place of the least, and down
                    at = 0
                    while True:
                        below = 2 * at + 1
                        if below >= k:
                            break
                        if below + 1 < k and heap[below + 1] < heap[below]:
                            below += 1
                        if heap[below] >= value:
                            break
                        heap[at], places[at] = heap[below], places[below]
                        at = below
                    heap[at], places[at] = value, j


def chosen_sum(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Compute `chosen_sum`.

    Args:
        indices: contiguous, as all that follows, and inside of the weight.
        values: float32 or float64, as the weight is.
        weight: [n, channels].
    """
    y = weight.new_empty(len(indices), weight.shape[1])
    with LOCK:
        follow_torch_threads(y.nbytes, indices.shape[1])
        _sum(indices.numpy(), values.numpy(), weight.numpy(), y.numpy())
    return y


def chosen_products(indices: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Compute `chosen_products`, with the indices first; arguments as in `chosen_sum`."""
    y = x.new_empty(indices.shape)
    with LOCK:
        follow_torch_threads(x.nbytes, indices.shape[1])
        _products(indices.numpy(), x.numpy(), weight.numpy(), y.numpy())
    return y


def chosen_outer(indices: Tensor, values: Tensor, x: Tensor, n: int) -> Tensor:
    """Compute `chosen_outer`; arguments as in `chosen_sum`."""
    y = x.new_empty(n, x.shape[1])
    starts, order = np.zeros(n + 1, np.int64), np.empty(indices.numel(), np.int64)
    with LOCK:
        follow_torch_threads(x.nbytes, indices.shape[1])
        _outer(indices.numpy(), values.numpy(), x.numpy(), starts, order, y.numpy())
    return y


def largest_of_rows(x: Tensor, k: int) -> Tensor:
    """Compute `largest_of_rows` of a contiguous x."""
    found = torch.empty(len(x), k, dtype=torch.int64)
    with LOCK:
        follow_torch_threads(x.nbytes)
        _largest(x.numpy(), found.numpy())
    return found
