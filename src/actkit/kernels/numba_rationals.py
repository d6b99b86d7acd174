"""`rational` in Numba, forward and backward: a piece of a group's channels at a time, which stays in the cache.

Polynomials go by Horner's rule: those of usual degrees in registers, longer ones in one pass over a piece for each
coefficient. As in `numba_polynomials`, rows are dealt
out to a fixed number of parts, a part adds up its own sums for the coefficients, and the parts are added in their
order: the same bits for any number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.numba_polynomials import PARTS, PIECE, SUMS
from actkit.kernels.process import LOCK, compiled, follow_torch_threads

TOP, BOTTOM = 6, 5  # coefficients that are held in registers: degrees up to 5 over 4, the usual ones


@compiled(fastmath=SUMS)
def _short(values, a, b, absolute, out):  # type: ignore[no-untyped-def]
    """A piece, with a [6] and b [5] in registers."""
    a0, a1, a2, a3, a4, a5 = a[0], a[1], a[2], a[3], a[4], a[5]
    b0, b1, b2, b3, b4 = b[0], b[1], b[2], b[3], b[4]
    one = values.dtype.type(1)
    for j in range(values.size):
        v = values[j]
        u = abs(v) if absolute else v
        below = (((b4 * u + b3) * u + b2) * u + b1) * u + b0
        below = below if absolute else one + abs(below)
        out[j] = (((((a5 * v + a4) * v + a3) * v + a2) * v + a1) * v + a0) / below


@compiled(fastmath=SUMS)
def _short_backward(g, values, a, b, absolute, dx, tops, bottoms):  # type: ignore[no-untyped-def]
    """A piece, with all coefficients and sums in registers; tops [6] and bottoms [4] are added to."""
    a0, a1, a2, a3, a4, a5 = a[0], a[1], a[2], a[3], a[4], a[5]
    b0, b1, b2, b3, b4 = b[0], b[1], b[2], b[3], b[4]
    one, zero = values.dtype.type(1), values.dtype.type(0)
    s0 = s1 = s2 = s3 = s4 = s5 = t1 = t2 = t3 = t4 = zero
    two, three, four, five = one + one, one + one + one, one + one + one + one, one + one + one + one + one
    for j in range(values.size):
        v = values[j]
        u = abs(v) if absolute else v
        inside = (((b4 * u + b3) * u + b2) * u + b1) * u + b0
        bent = ((four * b4 * u + three * b3) * u + two * b2) * u + b1
        sign = one if inside >= zero else -one
        below = inside if absolute else one + abs(inside)
        if absolute:
            bent = bent if v > zero else (-bent if v < zero else zero)
        else:
            bent = bent * sign
        inverse = one / below
        share = g[j] * inverse
        value = (((((a5 * v + a4) * v + a3) * v + a2) * v + a1) * v + a0) * inverse
        slope = (((five * a5 * v + four * a4) * v + three * a3) * v + two * a2) * v + a1
        dx[j] = share * (slope - value * bent)
        pull = -share * value if absolute else -share * value * sign
        s0 += share
        share *= v
        s1 += share
        share *= v
        s2 += share
        share *= v
        s3 += share
        share *= v
        s4 += share
        s5 += share * v
        pull *= u
        t1 += pull
        pull *= u
        t2 += pull
        pull *= u
        t3 += pull
        t4 += pull * u
    tops[0] += s0
    tops[1] += s1
    tops[2] += s2
    tops[3] += s3
    tops[4] += s4
    tops[5] += s5
    bottoms[0] += t1
    bottoms[1] += t2
    bottoms[2] += t3
    bottoms[3] += t4


@compiled(parallel=True, fastmath=SUMS)
def _rational(x, numerator, below, absolute, y):  # type: ignore[no-untyped-def]
    """below [groups or 1, n + 1]: of kind A 1 and the |b|, of kind B 0 and the b. x, y: [rows, groups, width]."""
    rows, groups, width = x.shape
    one = x.dtype.type(1)
    for part in prange(PARTS):
        room = np.empty(PIECE, x.dtype)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            for group in range(groups):
                top, bottom = numerator[group % len(numerator)], below[group % len(below)]
                for start in range(0, width, PIECE):
                    values = x[row, group, start : min(start + PIECE, width)]
                    out, under = y[row, group, start : min(start + PIECE, width)], room[: values.size]
                    if top.size == TOP and bottom.size == BOTTOM:
                        _short(values, top, bottom, absolute, out)
                        continue
                    out[:] = top[top.size - 1]
                    for i in range(top.size - 2, -1, -1):
                        added = top[i]
                        for j in range(values.size):
                            out[j] = out[j] * values[j] + added
                    under[:] = bottom[bottom.size - 1]
                    for i in range(bottom.size - 2, -1, -1):
                        added = bottom[i]
                        if absolute:
                            for j in range(values.size):
                                under[j] = under[j] * abs(values[j]) + added
                        else:
                            for j in range(values.size):
                                under[j] = under[j] * values[j] + added
                    if absolute:
                        for j in range(values.size):
                            out[j] /= under[j]
                    else:
                        for j in range(values.size):
                            out[j] /= one + abs(under[j])


@compiled(parallel=True, fastmath=SUMS)
def _rational_backward(grad, x, numerator, below, absolute, dx, tops, bottoms):  # type: ignore[no-untyped-def]
    """tops [parts, groups, m + 1] and bottoms [parts, groups, n] get the sums of each part."""
    rows, groups, width = x.shape
    one, zero = x.dtype.type(1), x.dtype.type(0)
    for part in prange(PARTS):
        room = np.empty((5, PIECE), x.dtype)
        for row in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            for group in range(groups):
                above, under = numerator[group % len(numerator)], below[group % len(below)]
                for start in range(0, width, PIECE):
                    values = x[row, group, start : min(start + PIECE, width)]
                    g = grad[row, group, start : min(start + PIECE, width)]
                    slope = dx[row, group, start : min(start + PIECE, width)]
                    if above.size == TOP and under.size == BOTTOM:
                        _short_backward(
                            g, values, above, under, absolute, slope, tops[part, group], bottoms[part, group]
                        )
                        continue
                    base, top, bottom = room[0, : values.size], room[1, : values.size], room[2, : values.size]
                    bent, share = room[3, : values.size], room[4, : values.size]
                    if absolute:
                        for j in range(values.size):
                            base[j] = abs(values[j])
                    else:
                        base[:] = values
                    top[:] = above[above.size - 1]
                    slope[:] = zero
                    for i in range(above.size - 2, -1, -1):
                        added = above[i]
                        for j in range(values.size):
                            slope[j] = slope[j] * values[j] + top[j]
                            top[j] = top[j] * values[j] + added
                    bottom[:] = under[under.size - 1]
                    bent[:] = zero
                    for i in range(under.size - 2, -1, -1):
                        added = under[i]
                        for j in range(values.size):
                            bent[j] = bent[j] * base[j] + bottom[j]
                            bottom[j] = bottom[j] * base[j] + added
                    for j in range(values.size):
                        if absolute:  # |x| has the slope 0 at 0
                            sign = one
                            bent[j] *= one if values[j] > zero else (-one if values[j] < zero else zero)
                            share[j] = g[j] / bottom[j]
                            top[j] /= bottom[j]
                        else:
                            sign = one if bottom[j] >= zero else -one
                            bent[j] *= sign
                            share[j] = g[j] / (one + abs(bottom[j]))
                            top[j] /= one + abs(bottom[j])
                        slope[j] = share[j] * (slope[j] - top[j] * bent[j])
                        bottom[j] = -share[j] * top[j] * sign
                    for i in range(above.size):
                        total = zero
                        for j in range(values.size):
                            total += share[j]
                            share[j] *= values[j]
                        tops[part, group, i] += total
                    for i in range(under.size - 1):
                        total = zero
                        for j in range(values.size):
                            bottom[j] *= base[j]
                            total += bottom[j]
                        bottoms[part, group, i] += total


def rational(x: Tensor, numerator: Tensor, below: Tensor, absolute: bool) -> Tensor:
    """Compute F.

    Args:
        x: float32 or float64 [rows, groups, width], contiguous, as all that follows.
        numerator: [groups or 1, m + 1].
        below: [groups or 1, n + 1], the denominator with what stands before it: 1 and |b|, or 0 and b.
        absolute: whether its powers are of |x|, which is kind A.

    Returns:
        What is like x.
    """
    y, numerator, below = torch.empty_like(x), _filled(numerator, TOP), _filled(below, BOTTOM)
    with LOCK:
        follow_torch_threads(x.nbytes)
        _rational(x.numpy(), numerator.numpy(), below.numpy(), absolute, y.numpy())
    return y


def rational_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, below: Tensor, absolute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient of x, and by group, float64, those of the numerator and of b (of |b| if `absolute`)."""
    dx, groups, (over, under) = torch.empty_like(x), x.shape[1], (numerator.shape[1], below.shape[1] - 1)
    numerator, below = _filled(numerator, TOP), _filled(below, BOTTOM)
    tops, bottoms = np.zeros((PARTS, groups, numerator.shape[1])), np.zeros((PARTS, groups, below.shape[1] - 1))
    with LOCK:
        follow_torch_threads(x.nbytes)
        given = (grad.numpy(), x.numpy(), numerator.numpy(), below.numpy(), absolute)
        _rational_backward(*given, dx.numpy(), tops, bottoms)
    return dx, torch.from_numpy(tops.sum(0)[:, :over]), torch.from_numpy(bottoms.sum(0)[:, :under])


def _filled(coefficients: Tensor, length: int) -> Tensor:
    """With zeros behind them, if there are fewer."""
    return torch.nn.functional.pad(coefficients, (0, max(0, length - coefficients.shape[1])))
