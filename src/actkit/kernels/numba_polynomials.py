"""`poly_norm` and `poly_relu` in Numba, forward and backward: a piece of a row at a time, which stays in the cache.

Powers are formed one after the other in place, so that any order is one loop over pieces. Rows are dealt out to a fixed
number of parts; a part adds up its own sums for the coefficients, and the parts are added in their order: no atomics,
and the same bits for any number of threads. Pieces are slices: indices that are counted from another number than 0 keep
Numba from using vectors, and take twelve times as long.
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
        room, factor, squares = np.empty(PIECE, x.dtype), np.empty(order, x.dtype), np.empty(order)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            squares[:] = 0
            for start in range(0, channels, PIECE):
                values = x[row, start : min(start + PIECE, channels)]
                power = room[: values.size]
                power[:] = 1
                for i in range(order):
                    total = x.dtype.type(0)
                    for j in range(values.size):
                        power[j] *= values[j]
                        total += power[j] * power[j]
                    squares[i] += total
            for i in range(order):
                scale = 1 / np.sqrt(squares[i] / channels + eps)
                scales[row, i] = scale
                factor[i] = weight[i] * scale
            for start in range(0, channels, PIECE):
                values, out = x[row, start : min(start + PIECE, channels)], y[row, start : min(start + PIECE, channels)]
                out[:] = factor[order - 1]
                for i in range(order - 1, -1, -1):
                    added = factor[i - 1] if i else bias
                    for j in range(values.size):
                        out[j] = out[j] * values[j] + added


@compiled(parallel=True, fastmath=SUMS)
def _norm_backward(grad, x, scales, weight, dx, sums):  # type: ignore[no-untyped-def]
    """dx = g P'(x) - x Q(x^2), with P = sum_i w_i s_i x^i, and Q from the means of g x^i. sums: [parts, 1 + order]."""
    rows, channels = x.shape
    order = weight.size
    for part in prange(PARTS):
        room, other = np.empty(PIECE, x.dtype), np.empty(PIECE, x.dtype)
        slope, pull, along = np.empty(order, x.dtype), np.empty(order, x.dtype), np.empty(order + 1)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            along[:] = 0
            for start in range(0, channels, PIECE):
                values = x[row, start : min(start + PIECE, channels)]
                power = room[: values.size]
                power[:] = grad[row, start : min(start + PIECE, channels)]
                for i in range(order + 1):
                    total = x.dtype.type(0)
                    for j in range(values.size):
                        total += power[j]
                        power[j] *= values[j]
                    along[i] += total
            sums[part, 0] += along[0]
            for i in range(order):
                scale = np.float64(scales[row, i])
                sums[part, i + 1] += scale * along[i + 1]
                slope[i] = (i + 1) * weight[i] * scale
                pull[i] = (i + 1) * weight[i] * scale * scale * scale * along[i + 1] / channels
            for start in range(0, channels, PIECE):
                values, g = (
                    x[row, start : min(start + PIECE, channels)],
                    grad[row, start : min(start + PIECE, channels)],
                )
                out, rest = dx[row, start : min(start + PIECE, channels)], other[: values.size]
                out[:] = slope[order - 1]
                rest[:] = pull[order - 1]
                for i in range(order - 2, -1, -1):
                    for j in range(values.size):
                        out[j] = out[j] * values[j] + slope[i]
                        rest[j] = rest[j] * (values[j] * values[j]) + pull[i]
                for j in range(values.size):
                    out[j] = g[j] * out[j] - values[j] * rest[j]


@compiled(parallel=True, fastmath=SUMS)
def _relu(x, weight, bias, y):  # type: ignore[no-untyped-def]
    order, pieces, zero = weight.size, -(-x.size // PIECE), x.dtype.type(0)
    for part in prange(PARTS):
        for piece in range(pieces * part // PARTS, pieces * (part + 1) // PARTS):
            values, out = x[piece * PIECE : (piece + 1) * PIECE], y[piece * PIECE : (piece + 1) * PIECE]
            out[:] = weight[order - 1]
            for i in range(order - 1, -1, -1):
                added = weight[i - 1] if i else bias
                for j in range(values.size):
                    out[j] = out[j] * (zero if values[j] <= 0 else values[j]) + added  # NaN is kept


@compiled(parallel=True, fastmath=SUMS)
def _relu_backward(grad, x, weight, dx, sums):  # type: ignore[no-untyped-def]
    """sums: [parts, 1 + order]."""
    order, pieces, zero = weight.size, -(-x.size // PIECE), x.dtype.type(0)
    for part in prange(PARTS):
        room = np.empty(PIECE, x.dtype)
        for piece in range(pieces * part // PARTS, pieces * (part + 1) // PARTS):
            values, g = x[piece * PIECE : (piece + 1) * PIECE], grad[piece * PIECE : (piece + 1) * PIECE]
            power, out = room[: values.size], dx[piece * PIECE : (piece + 1) * PIECE]
            power[:] = g
            for i in range(order + 1):
                total = zero
                for j in range(values.size):
                    total += power[j]
                    power[j] *= zero if values[j] <= 0 else values[j]
                sums[part, i] += total
            out[:] = order * weight[order - 1]
            for i in range(order - 2, -1, -1):
                added = x.dtype.type((i + 1) * weight[i])
                for j in range(values.size):
                    out[j] = out[j] * values[j] + added
            for j in range(values.size):
                out[j] = zero if values[j] <= 0 else g[j] * out[j]


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
