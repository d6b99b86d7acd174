"""`poly_norm` and `poly_relu` in Numba, forward and backward: a piece of a row at a time, which stays in the cache.

Powers are formed one after the other in place, so that any order is one loop over pieces. Rows are dealt out to a fixed
number of parts; a part adds up its own sums for the coefficients, and the parts are added in their order: no atomics,
and the same bits for any number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.process import LOCK, compiled, follow_torch_threads

PIECE = 512  # values: with their powers 4 KB of float32
PARTS = 64  # of the rows, over threads
SUMS = {"reassoc", "contract", "nsz"}  # a sum in vectors; NaN and Inf stay what they are


@compiled(parallel=True, fastmath=SUMS)
def _norm(x, weight, bias, eps, y, scales):  # type: ignore[no-untyped-def]
    """weight: lowest power first. scales [rows, order] is written."""
    rows, channels = x.shape
    order = weight.size
    for part in prange(PARTS):
        power, factor, squares = np.empty(PIECE, x.dtype), np.empty(order, x.dtype), np.empty(order)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            squares[:] = 0
            for start in range(0, channels, PIECE):
                count = min(PIECE, channels - start)
                power[:count] = 1
                for i in range(order):
                    total = x.dtype.type(0)
                    for j in range(count):
                        power[j] *= x[row, start + j]
                        total += power[j] * power[j]
                    squares[i] += total
            for i in range(order):
                scale = 1 / np.sqrt(squares[i] / channels + eps)
                scales[row, i] = scale
                factor[i] = weight[i] * scale
            for start in range(0, channels, PIECE):
                count = min(PIECE, channels - start)
                power[:count] = factor[order - 1]
                for i in range(order - 1, -1, -1):
                    added = factor[i - 1] if i else bias
                    for j in range(count):
                        power[j] = power[j] * x[row, start + j] + added
                y[row, start : start + count] = power[:count]


@compiled(parallel=True, fastmath=SUMS)
def _norm_backward(grad, x, scales, weight, dx, sums):  # type: ignore[no-untyped-def]
    """dx = g P'(x) - x Q(x^2), with P = sum_i w_i s_i x^i, and Q from the means of g x^i. sums: [parts, 1 + order]."""
    rows, channels = x.shape
    order = weight.size
    for part in prange(PARTS):
        power, rest = np.empty(PIECE, x.dtype), np.empty(PIECE, x.dtype)
        slope, pull, along = np.empty(order, x.dtype), np.empty(order, x.dtype), np.empty(order + 1)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            along[:] = 0
            for start in range(0, channels, PIECE):
                count = min(PIECE, channels - start)
                power[:count] = grad[row, start : start + count]
                for i in range(order + 1):
                    total = x.dtype.type(0)
                    for j in range(count):
                        total += power[j]
                        power[j] *= x[row, start + j]
                    along[i] += total
            sums[part, 0] += along[0]
            for i in range(order):
                scale = np.float64(scales[row, i])
                sums[part, i + 1] += scale * along[i + 1]
                slope[i] = (i + 1) * weight[i] * scale
                pull[i] = (i + 1) * weight[i] * scale * scale * scale * along[i + 1] / channels
            for start in range(0, channels, PIECE):
                count = min(PIECE, channels - start)
                power[:count] = slope[order - 1]
                rest[:count] = pull[order - 1]
                for i in range(order - 2, -1, -1):
                    for j in range(count):
                        value = x[row, start + j]
                        power[j] = power[j] * value + slope[i]
                        rest[j] = rest[j] * (value * value) + pull[i]
                for j in range(count):
                    dx[row, start + j] = grad[row, start + j] * power[j] - x[row, start + j] * rest[j]


@compiled(parallel=True, fastmath=SUMS)
def _relu(x, weight, bias, y):  # type: ignore[no-untyped-def]
    order, pieces, zero = weight.size, -(-x.size // PIECE), x.dtype.type(0)
    for part in prange(PARTS):
        for piece in range(pieces * part // PARTS, pieces * (part + 1) // PARTS):
            start, stop = piece * PIECE, min((piece + 1) * PIECE, x.size)
            y[start:stop] = weight[order - 1]
            for i in range(order - 1, -1, -1):
                added = weight[i - 1] if i else bias
                for j in range(start, stop):
                    y[j] = y[j] * (zero if x[j] <= 0 else x[j]) + added  # NaN is kept


@compiled(parallel=True, fastmath=SUMS)
def _relu_backward(grad, x, weight, dx, sums):  # type: ignore[no-untyped-def]
    """sums: [parts, 1 + order]."""
    order, pieces, zero = weight.size, -(-x.size // PIECE), x.dtype.type(0)
    for part in prange(PARTS):
        power = np.empty(PIECE, x.dtype)
        for piece in range(pieces * part // PARTS, pieces * (part + 1) // PARTS):
            start, stop = piece * PIECE, min((piece + 1) * PIECE, x.size)
            power[: stop - start] = grad[start:stop]
            for i in range(order + 1):
                total = zero
                for j in range(start, stop):
                    total += power[j - start]
                    power[j - start] *= zero if x[j] <= 0 else x[j]
                sums[part, i] += total
            power[: stop - start] = order * weight[order - 1]
            for i in range(order - 2, -1, -1):
                added = x.dtype.type((i + 1) * weight[i])
                for j in range(start, stop):
                    power[j - start] = power[j - start] * x[j] + added
            for j in range(start, stop):
                dx[j] = zero if x[j] <= 0 else grad[j] * power[j - start]


def norm(x: Tensor, weight: Tensor, bias: float, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `poly_norm` of x [rows, channels].

    Args:
        x: float32 or float64, contiguous, as all that follows.
        weight: lowest power first.
        bias: added.
        eps: as in `poly_norm`.

    Returns:
        What is like x, and the scales [rows, order].
    """
    y, scales = torch.empty_like(x), x.new_empty(len(x), len(weight))
    with LOCK:
        follow_torch_threads(x.nbytes)
        _norm(x.numpy(), weight.numpy(), _number(bias, x), eps, y.numpy(), scales.numpy())
    return y, scales


def norm_backward(grad: Tensor, x: Tensor, scales: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradient of x, and those of bias and weight, float64 [1 + order], lowest power first."""
    dx, sums = torch.empty_like(x), np.zeros((PARTS, len(weight) + 1))
    with LOCK:
        follow_torch_threads(x.nbytes)
        _norm_backward(grad.numpy(), x.numpy(), scales.numpy(), weight.numpy(), dx.numpy(), sums)
    return dx, torch.from_numpy(sums.sum(0))


def relu(x: Tensor, weight: Tensor, bias: float) -> Tensor:
    """Compute `poly_relu` of x [values]."""
    y = torch.empty_like(x)
    with LOCK:
        follow_torch_threads(x.nbytes)
        _relu(x.numpy(), weight.numpy(), _number(bias, x), y.numpy())
    return y


def relu_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute as `norm_backward` does."""
    dx, sums = torch.empty_like(x), np.zeros((PARTS, len(weight) + 1))
    with LOCK:
        follow_torch_threads(x.nbytes)
        _relu_backward(grad.numpy(), x.numpy(), weight.numpy(), dx.numpy(), sums)
    return dx, torch.from_numpy(sums.sum(0))


def _number(value: float, x: Tensor) -> np.floating:
    return np.float64(value) if x.dtype == torch.float64 else np.float32(value)
