"""What a decoding step computes beside products: activations, norms, rotary embedding, attention; one thread, float32.

Sums run in vector lanes; still the same bits in every run.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from actkit.kernels.process import compiled

SILU, RELU, GELU, GELU_TANH, RELU2 = range(5)
_ORDERLESS = {"reassoc"}
_LOOSE = {"reassoc", "contract", "nsz"}


# -- element by element ------------------------------------------------------------------------------------------------


@intrinsic
def _from_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@compiled(inline=True)
def exponential(x):  # type: ignore[no-untyped-def]
    """e^x in float32 to two units in the last place, in operations that vectorise."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.float32(math.floor(x * np.float32(1.4426950408889634) + np.float32(0.5)))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1.0)) * _from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@compiled()
def activate(code, x):  # type: ignore[no-untyped-def]
    """f(x), in place."""
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
            g = x[i]
            inner = np.float32(0.7978845608028654) * (g + np.float32(0.044715) * g * g * g)
            x[i] = half * g * (one + np.float32(math.tanh(inner)))


@compiled()
def drop_below(threshold, x):  # type: ignore[no-untyped-def]
    """0 in place of what is smaller in magnitude; NaN is kept."""
    for i in range(x.size):
        x[i] = np.float32(0.0) if abs(x[i]) < threshold else x[i]


@compiled()
def active_ones(x, indices):  # type: ignore[no-untyped-def]
    """Write where x is not 0; returns how many there are."""
    count = 0
    for i in range(x.size):
        indices[count] = i  # without a branch: overwritten by the next where x is 0
        count += x[i] != 0  # NaN too
    return count


@compiled(fastmath=_LOOSE)
def _squares(x):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@compiled(fastmath=_ORDERLESS)
def nothing(x):  # type: ignore[no-untyped-def]
    """0, or NaN where an entry is not finite."""
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * np.float32(0.0)
    return total


@compiled()
def rms_norm(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """x over its root mean square, times weight."""
    scale = np.float32(1.0) / np.sqrt(_squares(x) / np.float32(x.size) + epsilon)
    for i in range(x.size):
        out[i] = x[i] * scale * weight[i]


@compiled()
def rotate(x, cos, sin):  # type: ignore[no-untyped-def]
    """Rotary embedding of one head, in place: entry i is paired with i + half."""
    half = cos.size // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] - b * sin[i]
        x[i + half] = b * cos[i + half] + a * sin[i + half]


# -- attention ---------------------------------------------------------------------------------------------------------


@compiled(fastmath=_LOOSE)
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@compiled(fastmath=_LOOSE)
def _softmax(scores):  # type: ignore[no-untyped-def]
    """In place, not divided by the sum, which is returned."""
    largest = scores[0]
    for i in range(scores.size):
        largest = max(largest, scores[i])
    total = np.float32(0.0)
    for i in range(scores.size):
        scores[i] = exponential(scores[i] - largest)
        total += scores[i]
    return total


@compiled()
def attend(query, keys, values, scaling, scores, out):  # type: ignore[no-untyped-def]
    """One head: query [size]; keys, values [tokens, size]; scores [tokens]; out [size]."""
    for t in range(len(keys)):
        scores[t] = _dot(query, keys[t]) * scaling
    total = _softmax(scores)
    out[:] = 0
    for t in range(len(values)):
        chance, row = scores[t] / total, values[t]
        for i in range(out.size):
            out[i] += chance * row[i]
