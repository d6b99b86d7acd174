"""What a decoding step computes besides products and attention: activations, norms, rotary embedding.

One thread, float32. Sums run in vector lanes, and still give the same bits in every run.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from actkit.kernels.process import compiled

SILU, RELU, GELU, GELU_TANH, RELU2 = range(5)
# with coefficients, as `core/layers/curve.py` lists them
RATIONAL_A, RATIONAL_B, CRRELU, POLY_RELU, SERIES_SILU, SERIES_RELU, SERIES_GELU, SERIES_GELU_TANH, SERIES_RELU2 = (
    range(5, 14)
)
POLY_NORM = 14  # of this one the mean squares of powers over all units make a polynomial first, for each token
FACTOR, TERMS = 8, 9  # where a series has its last two
POWERS, EPSILON = 8, 9  # how many a PolyNorm has, and where its epsilon is
PIECE = 512  # values whose powers stay in the cache
_ORDERLESS = {"reassoc"}
LOOSE = {"reassoc", "contract", "nsz"}


# -- element by element ------------------------------------------------------------------------------------------------


@intrinsic
def from_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    """Return the float32 with these bits, an int32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@compiled(inline=True)
def exponential(x):  # type: ignore[no-untyped-def]
    """Compute e^x in float32 to two units in the last place, in operations that vectorise."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))  # math.floor goes through 64-bit integers
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@compiled()
def _curve(code, c, x):  # type: ignore[no-untyped-def]
    """Compute f(x) of a group with the coefficients c [10], in place."""
    zero, one = np.float32(0.0), np.float32(1.0)
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9]
    if code == CRRELU:
        for i in range(x.size):
            v = x[i]
            x[i] = (v if v > zero else zero) + c0 * v * exponential(-(v * v) / np.float32(2.0))
    elif code == POLY_RELU:
        for i in range(x.size):
            r = zero if x[i] <= zero else x[i]
            high = (((c9 * r + c8) * r + c7) * r + c6) * r + c5
            x[i] = ((((high * r + c4) * r + c3) * r + c2) * r + c1) * r + c0
    elif code == POLY_NORM:  # c are the coefficients of the polynomial that it is for this token
        for i in range(x.size):
            v = x[i]
            high = (((c8 * v + c7) * v + c6) * v + c5) * v + c4
            x[i] = (((high * v + c3) * v + c2) * v + c1) * v + c0
    elif code == RATIONAL_A:
        c6, c7, c8, c9 = abs(c6), abs(c7), abs(c8), abs(c9)
        for i in range(x.size):
            v, u = x[i], abs(x[i])
            top = ((((c5 * v + c4) * v + c3) * v + c2) * v + c1) * v + c0
            x[i] = top / ((((c9 * u + c8) * u + c7) * u + c6) * u + one)
    else:
        for i in range(x.size):
            v = x[i]
            top = ((((c5 * v + c4) * v + c3) * v + c2) * v + c1) * v + c0
            x[i] = top / (one + abs((((c9 * v + c8) * v + c7) * v + c6) * v))


@compiled()
def _known(code, x):  # type: ignore[no-untyped-def]
    """Compute f(x) of a function without coefficients, in place."""
    one, half = np.float32(1.0), np.float32(0.5)
    if code == SILU:
        for i in range(x.size):
            x[i] = x[i] / (one + exponential(-x[i]))
    elif code == RELU:
        for i in range(x.size):
            x[i] = max(x[i], np.float32(0.0))
    elif code == RELU2:
        for i in range(x.size):
            positive = max(x[i], np.float32(0.0))
            x[i] = positive * positive
    elif code == GELU:
        for i in range(x.size):
            x[i] = half * x[i] * (one + np.float32(math.erf(x[i] * np.float32(0.7071067811865476))))
    else:
        for i in range(x.size):
            g = x[i]  # half * (1 + tanh(y)) is 1 / (1 + exp(-2 y))
            twice = np.float32(1.5957691216057308) * (g + np.float32(0.044715) * g * g * g)
            x[i] = g / (one + exponential(-twice))


@compiled()
def _series(code, x, curves, width, first):  # type: ignore[no-untyped-def]
    """Compute a sum of shifted and scaled f(x), in place; a pair may be of each unit."""
    total, term = np.zeros(x.size, np.float32), np.empty(x.size, np.float32)
    for at in range(int(curves[0, TERMS])):
        for i in range(x.size):
            pair = curves[(first + i) // width]
            term[i] = pair[2 * at] * x[i] + pair[2 * at + 1]
        _known(code, term)
        for i in range(x.size):
            total[i] += term[i]
    for i in range(x.size):
        x[i] = total[i] * curves[0, FACTOR]


@compiled()
def activate(code, x, curves, width, first):  # type: ignore[no-untyped-def]
    """Compute f(x), in place.

    Args:
        code: of f.
        x: float32, some units.
        curves: float32 [groups, 10], coefficients of functions that have some; of a PolyNorm `normed_powers`.
        width: units of a group.
        first: the unit at which x begins.
    """
    if SERIES_SILU <= code < POLY_NORM:
        _series(code - SERIES_SILU + SILU, x, curves, width, first)
    elif code >= RATIONAL_A:
        at = 0
        while at < x.size:
            group = (first + at) // width
            end = min(x.size, (group + 1) * width - first)
            _curve(code, curves[group], x[at:end])
            at = end
    else:
        _known(code, x)


@compiled()
def drop_below(threshold, x):  # type: ignore[no-untyped-def]
    """Put 0 in place of what is smaller in magnitude; NaN is kept."""
    for i in range(x.size):
        x[i] = np.float32(0.0) if abs(x[i]) < threshold else x[i]


@compiled()
def active_ones(x, indices):  # type: ignore[no-untyped-def]
    """Write the indices at which x is not 0; return how many there are."""
    count = 0
    for i in range(x.size):
        indices[count] = i  # without a branch: overwritten by the next if x is 0
        count += x[i] != 0  # NaN too
    return count


@compiled(inline=True)
def capped(limit, x):  # type: ignore[no-untyped-def]
    """Compute limit * tanh(x / limit)."""
    return limit - np.float32(2.0) * limit / (exponential(np.float32(2.0) * x / limit) + np.float32(1.0))


@compiled(inner=True)
def cap(limit, x):  # type: ignore[no-untyped-def]
    """Compute limit * tanh(x / limit), in place; NaN is kept."""
    for i in range(x.size):
        y = capped(limit, x[i])
        x[i] = y if x[i] == x[i] else x[i]


@compiled(fastmath=LOOSE, inner=True)
def square_sum(x):  # type: ignore[no-untyped-def]
    """Return the sum of squares."""
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@compiled(fastmath=_ORDERLESS, inner=True)
def nothing(x):  # type: ignore[no-untyped-def]
    """Return 0, or NaN if an entry is not finite."""
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * np.float32(0.0)
    return total


@compiled(inner=True)
def rms_norm(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """Divide x by its root mean square, times weight."""
    scale = np.float32(1.0) / np.sqrt(square_sum(x) / np.float32(x.size) + epsilon)
    for i in range(x.size):
        out[i] = x[i] * scale * weight[i]


@compiled(fastmath=LOOSE, inner=True)
def _sum(x):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i]
    return total


@compiled(inner=True)
def layer_norm(x, weight, bias, epsilon, out):  # type: ignore[no-untyped-def]
    """Compute x less its mean, over its standard deviation, times weight, plus bias (empty for none). out may be x."""
    mean = _sum(x) / np.float32(x.size)
    for i in range(x.size):
        out[i] = x[i] - mean
    scale = np.float32(1.0) / np.sqrt(square_sum(out) / np.float32(x.size) + epsilon)
    for i in range(x.size):
        out[i] = out[i] * scale * weight[i]
    if bias.size:
        for i in range(x.size):
            out[i] += bias[i]


@compiled(inner=True)
def clamp(limit, x):  # type: ignore[no-untyped-def]
    """Clamp to between -limit and limit, in place; NaN is kept."""
    for i in range(x.size):
        x[i] = limit if x[i] > limit else -limit if x[i] < -limit else x[i]


@compiled(inner=True)
def rotate_neighbours(x, cos, sin):  # type: ignore[no-untyped-def]
    """Apply the rotary embedding of one head, in place: entry 2i is paired with 2i + 1. cos, sin: as for `rotate`."""
    for i in range(cos.size // 2):
        a, b = x[2 * i], x[2 * i + 1]
        x[2 * i] = a * cos[i] - b * sin[i]
        x[2 * i + 1] = b * cos[i] + a * sin[i]


@compiled(inner=True)
def rotate(x, cos, sin):  # type: ignore[no-untyped-def]
    """Apply the rotary embedding of one head, in place: entry i is paired with i + half."""
    half = cos.size // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] - b * sin[i]
        x[i + half] = b * cos[i + half] + a * sin[i + half]


# -- normalised powers -------------------------------------------------------------------------------------------------


@compiled(fastmath=LOOSE, inner=True)
def power_sums(x, row, out):  # type: ignore[no-untyped-def]
    """Write the sums of squares of x, x^2 ... into out, float64 [8]; 0 of powers that have no coefficient in row."""
    order, room = POWERS, np.empty(PIECE, np.float32)
    while order > 0 and row[order] == 0:
        order -= 1
    out[:] = 0
    for start in range(0, x.size, PIECE):
        values = x[start : min(start + PIECE, x.size)]
        power = room[: values.size]
        power[:] = 1
        for i in range(order):
            total = np.float32(0.0)
            for j in range(values.size):
                power[j] *= values[j]
                total += power[j] * power[j]
            out[i] += total


@compiled(inner=True)
def normed_powers(row, sums, count, out):  # type: ignore[no-untyped-def]
    """Write the polynomial that a PolyNorm is for one token.

    Args:
        row: float32 [10], its coefficients and its epsilon.
        sums: float64 [threads, 8], of squares of powers, over each thread's units.
        count: of all units.
        out: float32 [10], written.
    """
    out[:] = row
    out[EPSILON] = 0
    for i in range(POWERS):
        total = 0.0
        for thread in range(len(sums)):
            total += sums[thread, i]
        if row[i + 1] != 0:
            out[i + 1] *= np.float32(1 / np.sqrt(total / count + row[EPSILON]))


# -- statistical top-k -------------------------------------------------------------------------------------------------


@compiled()
def normal_quantile(p):  # type: ignore[no-untyped-def]
    """Return where the standard normal distribution reaches p, 0 < p < 1, in float64.

    It is the rational approximation of Acklam (2003), of relative error 1e-9, and one step of Halley's method.

    Args:
        p: the probability.
    """
    low = 0.02425
    if p < low or p > 1 - low:
        q = math.sqrt(-2 * math.log(min(p, 1 - p)))
        x = (
            ((((-7.784894002430293e-03 * q - 3.223964580411365e-01) * q - 2.400758277161838e00) * q
              - 2.549732539343734e00) * q + 4.374664141464968e00) * q + 2.938163982698783e00
        ) / (
            (((7.784695709041462e-03 * q + 3.224671290700398e-01) * q + 2.445134137142996e00) * q
             + 3.754408661907416e00) * q + 1.0
        )  # fmt: skip
        x = x if p < low else -x
    else:
        q = p - 0.5
        r = q * q
        x = (
            (((((-3.969683028665376e01 * r + 2.209460984245205e02) * r - 2.759285104469687e02) * r
               + 1.383577518672690e02) * r - 3.066479806614716e01) * r + 2.506628277459239e00) * q
        ) / (
            ((((-5.447609879822406e01 * r + 1.615858368580409e02) * r - 1.556989798598866e02) * r
              + 6.680131188771972e01) * r - 1.328068155288572e01) * r + 1.0
        )  # fmt: skip
    error = 0.5 * math.erfc(-x / math.sqrt(2.0)) - p
    step = error * math.sqrt(2 * math.pi) * math.exp(x * x / 2)
    return x - step / (1 + x * step / 2)


@compiled(inner=True)
def sums(x, out):  # type: ignore[no-untyped-def]
    """Write the sum and the sum of squares of x, in float64, into out [2]."""
    total, squares = 0.0, 0.0
    for i in range(x.size):
        value = np.float64(x[i])
        total += value
        squares += value * value
    out[0], out[1] = total, squares


@compiled(inner=True)
def statistical_cut(total, squares, count, quantile):  # type: ignore[no-untyped-def]
    """Return mean + deviation * quantile of `count` values, and whether they are all alike to rounding."""
    mean = total / count
    deviation = math.sqrt(max(0.0, squares / count - mean * mean))
    return mean + deviation * quantile, deviation <= 5e-7 * abs(mean)


@compiled(inner=True)
def shift_down(cut, x):  # type: ignore[no-untyped-def]
    """Compute max(x - cut, 0), in place; NaN is kept."""
    for i in range(x.size):
        x[i] = np.float32(0.0) if x[i] <= cut else x[i] - cut
