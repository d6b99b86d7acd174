"""Values and slopes of fixed bases in Numba, float32: what `core/univariate` evaluates in plain torch, in one pass.

    values:  [n] -> [n, size]          pulled:  gradient [n, size] -> sum_m gradient_m f_m'(x), [n]

A piece of the inputs at a time: each function of the piece is one row in the cache, and the rows are written out as
columns. Nothing is summed over pieces, so that any number of threads gives the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.bases import BELLS, CLAMPED, POLYNOMIALS, SPLINES, SQUASHED, TANH_BELLS
from actkit.kernels.decode_math import exponential
from actkit.kernels.numba_polynomials import SUMS
from actkit.kernels.process import LOCK, compiled, follow_torch_threads

PIECE = 256
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)


@compiled(inline=True)
def _tanh(x):  # type: ignore[no-untyped-def]
    small = exponential(-TWO * abs(x))
    found = (ONE - small) / (ONE + small)
    return found if x >= ZERO else -found


@compiled(fastmath=SUMS)
def _inside(outside, low, high, x, u):  # type: ignore[no-untyped-def]
    """Write into u what the functions read."""
    half = (high - low) / TWO
    if outside == CLAMPED:
        for j in range(x.size):
            u[j] = min(max(x[j], low), high)
    elif outside == SQUASHED:
        for j in range(x.size):
            u[j] = low + half * (_tanh(x[j]) + ONE)
    else:
        u[:] = x


@compiled(fastmath=SUMS)
def _bends(outside, low, high, x, dx):  # type: ignore[no-untyped-def]
    """Multiply dx by the slope of `_inside`."""
    half = (high - low) / TWO
    if outside == CLAMPED:
        for j in range(x.size):
            dx[j] = dx[j] if low <= x[j] <= high else ZERO
    elif outside == SQUASHED:
        for j in range(x.size):
            t = _tanh(x[j])
            dx[j] *= half * (ONE - t * t)


@compiled(fastmath=SUMS)
def _cardinal_spline(order, u, out, half, power):  # type: ignore[no-untyped-def]
    """The B-spline of whole knots 0 to order + 1, by truncated powers on its left half, the right mirrored."""
    if order == 0:
        for j in range(u.size):
            out[j] = ONE if ZERO <= u[j] < ONE else ZERO
        return
    end, factorial, choices = np.float32(order + 1), ONE, ONE
    for j in range(u.size):
        half[j] = max(min(u[j], end - u[j]), ZERO)
    out[:] = ONE
    for i in range(order):
        factorial *= np.float32(i + 1)
        for j in range(u.size):
            out[j] *= half[j]
    for knot in range(1, (order + 1) // 2 + 1):
        choices *= -np.float32(order + 2 - knot) / np.float32(knot)
        below = np.float32(knot)
        power[:] = choices
        for _ in range(order):
            for j in range(u.size):
                power[j] *= max(half[j] - below, ZERO)
        for j in range(u.size):
            out[j] += power[j]
    for j in range(u.size):
        out[j] /= factorial


@compiled(fastmath=SUMS)
def _functions(code, numbers, x, found, room):  # type: ignore[no-untyped-def]
    """found [size, piece] gets the functions of x, which is inside; numbers are those of the kind."""
    size = len(found)
    u, half, power = room[0, : x.size], room[1, : x.size], room[2, : x.size]
    if code == POLYNOMIALS:
        found[0] = ONE
        for n in range(1, size):
            scale, shift, before = numbers[3 * n], numbers[3 * n + 1], numbers[3 * n + 2]
            now, last, last_but_one = found[n], found[n - 1], found[max(n - 2, 0)]
            for j in range(x.size):
                now[j] = (scale * x[j] + shift) * last[j] - before * last_but_one[j]
        return
    first, per_unit = numbers[0], numbers[1]  # u = (x - first) * per_unit - m * numbers[2]
    for m in range(size):
        out, offset = found[m], np.float32(m) * numbers[2]
        for j in range(x.size):
            u[j] = (x[j] - first) * per_unit - offset
        if code == BELLS:
            for j in range(x.size):
                out[j] = exponential(-(u[j] * u[j]))
        elif code == TANH_BELLS:
            for j in range(x.size):
                small = exponential(-TWO * abs(u[j]))
                out[j] = np.float32(4) * small / ((ONE + small) * (ONE + small))
        elif code == SPLINES:
            _cardinal_spline(np.int64(numbers[3]), u, out, half, power)
        else:
            for j in range(x.size):
                bump = np.float32(4) * max(u[j], ZERO) * max(ONE - u[j], ZERO)
                out[j] = bump * bump


@compiled(fastmath=SUMS)
def _slopes(code, numbers, x, found, room):  # type: ignore[no-untyped-def]
    """found [size, piece] gets the derivatives at x."""
    size = len(found)
    u, half, power, other = room[0, : x.size], room[1, : x.size], room[2, : x.size], room[3, : x.size]
    if code == POLYNOMIALS:  # u: P_(n - 1), half: P_(n - 2)
        found[0], u[:], half[:] = ZERO, ONE, ZERO
        for n in range(1, size):
            scale, shift, before = numbers[3 * n], numbers[3 * n + 1], numbers[3 * n + 2]
            now, last, last_but_one = found[n], found[n - 1], found[max(n - 2, 0)]
            for j in range(x.size):
                factor = scale * x[j] + shift
                now[j] = scale * u[j] + factor * last[j] - before * last_but_one[j]
                value = factor * u[j] - before * half[j]
                half[j] = u[j]
                u[j] = value
        return
    first, per_unit = numbers[0], numbers[1]
    for m in range(size):
        out, offset = found[m], np.float32(m) * numbers[2]
        for j in range(x.size):
            u[j] = (x[j] - first) * per_unit - offset
        if code == BELLS:
            for j in range(x.size):
                out[j] = -TWO * per_unit * u[j] * exponential(-(u[j] * u[j]))
        elif code == TANH_BELLS:
            for j in range(x.size):
                small = exponential(-TWO * abs(u[j]))
                t = (ONE - small) / (ONE + small)
                bell = np.float32(4) * small / ((ONE + small) * (ONE + small))
                out[j] = -TWO * per_unit * bell * (t if u[j] >= ZERO else -t)
        elif code == SPLINES:
            order = np.int64(numbers[3])
            if order == 0:
                out[:] = ZERO
                continue
            _cardinal_spline(order - 1, u, out, half, power)
            for j in range(x.size):
                u[j] -= ONE
            _cardinal_spline(order - 1, u, other, half, power)
            for j in range(x.size):
                out[j] = (out[j] - other[j]) * per_unit
        else:
            for j in range(x.size):
                within = max(u[j], ZERO) * max(ONE - u[j], ZERO)
                out[j] = np.float32(32) * within * (ONE - TWO * u[j]) * per_unit


@compiled(parallel=True, fastmath=SUMS)
def _values(code, outside, domain, numbers, x, out):  # type: ignore[no-untyped-def]
    """out [n x size]."""
    size = out.size // x.size
    for piece in prange(-(-x.size // PIECE)):
        given = x[piece * PIECE : (piece + 1) * PIECE]
        columns = out[piece * PIECE * size : (piece + 1) * PIECE * size]
        room, found = np.empty((4, PIECE), np.float32), np.empty((size, given.size), np.float32)
        inside = np.empty(given.size, np.float32)
        _inside(outside, domain[0], domain[1], given, inside)
        _functions(code, numbers, inside, found, room)
        for m in range(size):
            row, places = found[m], columns[m:]
            for j in range(given.size):
                places[j * size] = row[j]
        for j in range(given.size):
            if given[j] != given[j]:
                columns[j * size : (j + 1) * size] = given[j]


@compiled(parallel=True, fastmath=SUMS)
def _pulled(code, outside, domain, numbers, gradient, x, dx):  # type: ignore[no-untyped-def]
    """gradient [n x size]."""
    size = gradient.size // x.size
    for piece in prange(-(-x.size // PIECE)):
        given, total = x[piece * PIECE : (piece + 1) * PIECE], dx[piece * PIECE : (piece + 1) * PIECE]
        columns = gradient[piece * PIECE * size : (piece + 1) * PIECE * size]
        room, found = np.empty((4, PIECE), np.float32), np.empty((size, given.size), np.float32)
        inside = np.empty(given.size, np.float32)
        _inside(outside, domain[0], domain[1], given, inside)
        _slopes(code, numbers, inside, found, room)
        total[:] = ZERO
        for m in range(size):
            row, places = found[m], columns[m:]
            for j in range(given.size):
                total[j] += places[j * size] * row[j]
        _bends(outside, domain[0], domain[1], given, total)
        for j in range(given.size):
            if given[j] != given[j]:
                total[j] = given[j]


def values(code: int, outside: int, domain: np.ndarray, numbers: np.ndarray, size: int, x: Tensor) -> Tensor:
    """Compute the functions of x [n], float32 and contiguous: [n, size]."""
    out = x.new_empty(x.numel(), size)
    if out.numel():
        with LOCK:
            follow_torch_threads(out.nbytes)
            _values(code, outside, domain, numbers, x.numpy().reshape(-1), out.numpy().reshape(-1))
    return out


def pulled(code: int, outside: int, domain: np.ndarray, numbers: np.ndarray, gradient: Tensor, x: Tensor) -> Tensor:
    """Compute sum_m gradient[n, m] f_m'(x [n]): [n]."""
    dx = torch.empty_like(x)
    if dx.numel():
        with LOCK:
            follow_torch_threads(gradient.nbytes)
            arrays = (gradient.numpy().reshape(-1), x.numpy().reshape(-1), dx.numpy().reshape(-1))
            _pulled(code, outside, domain, numbers, *arrays)
    return dx
