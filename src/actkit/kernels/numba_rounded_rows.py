"""Products of many rows with integer weights, in integers: inputs are rounded to 8 bits per row and span of inputs.

    q[r, j] = round(x[r, j] / step[r, s])          step[r, s] = max over j in s of |x[r, j]| / 127
    y[r, c] = sum over s of step[r, s] * scale[g, c] * sum over j in s of q[r, j] * (code[j, c] - zero[g, c])

A span is a group of inputs that share a scale, or a part of it, of at most 128. The weight stays packed as the decoding
step reads it: a job unpacks a block of 128 columns, a span at a time, for some rows. Sums are exact; what is lost is
the rounding of the inputs, at most half a step, 0.4 % of the largest of its span.

It needs the byte products of AVX-512 (`integer_dots.available`), and groups of inputs.
"""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels import integer_dots
from actkit.kernels.integer_tiles import BLOCK_BYTES, PART, ROWS, add_tile, bring_in_order, order, unpack_four
from actkit.kernels.numba_cpu import array, as_stored, widen
from actkit.kernels.numba_int8 import NAN, largest, words_of
from actkit.kernels.process import LOCK, PER_BYTE, compiled, follow_torch_threads
from actkit.kernels.quantized import BLOCK, QuantizedWeight

LONGEST = 128  # inputs of a span
TOGETHER = 64  # rows of a job: their sums are 32 KB
SMALLEST = np.float32(1e-30)  # of a span's largest input; below, its reciprocal would not be a float
HUGE = np.float32(np.finfo(np.float32).max)
LINE = 64


def takes(weight: object) -> TypeGuard[QuantizedWeight]:
    """Return whether a packed weight can be multiplied so on this processor."""
    if not isinstance(weight, QuantizedWeight) or not weight.layout.by_input or not integer_dots.available():
        return False
    return span_of(weight) % 4 == 0 and weight.in_features % 4 == 0


def span_of(weight: QuantizedWeight) -> int:
    """Return how many inputs are rounded with one step."""
    group = weight.layout.group
    if group <= LONGEST:
        return group
    return max((span for span in (128, 64, 32, 16, 8, 4) if group % span == 0), default=1)


@compiled(inner=True)
def _codes_of(x, inverse, codes):  # type: ignore[no-untyped-def]
    """Write the codes of some inputs, and return their sum: a loop from 0, as only such become vectors."""
    total = np.int32(0)
    for j in range(x.size):
        code = np.int32(np.rint(widen(x[j]) * inverse))
        codes[j] = np.int8(code)
        total += code
    return total


@compiled(parallel=True)
def _round(x, words, shift, span, codes, steps, taken):  # type: ignore[no-untyped-def]
    """Round rows of inputs.

    Args:
        x: float32 or uint16 (bf16) [rows, in].
        words: the same memory, int32 or uint16, as `numba_int8.largest` takes it.
        shift: see words.
        span: inputs that share a step.
        codes: int8 [whole tiles of rows, in], zero behind the last row.
        steps: float32 [spans, whole tiles of rows], zero behind the last row; NaN if an input is not finite.
        taken: float32, the same shape: the step times the sum of the codes.
    """
    for r in prange(len(x)):
        for s in range(len(steps)):
            begin, end = s * span, min((s + 1) * span, x.shape[1])
            found = largest(words[r, begin:end], shift)
            if not found <= HUGE:
                steps[s, r] = taken[s, r] = NAN
                continue
            if found < SMALLEST:
                continue
            total = _codes_of(x[r, begin:end], np.float32(127.0) / found, codes[r, begin:end])
            steps[s, r] = found / np.float32(127.0)
            taken[s, r] = steps[s, r] * np.float32(total)


@compiled(inner=True)
def _factors(scale, zeros, t, g, block, block_bytes, zero, stored, places, factors):  # type: ignore[no-untyped-def]
    """Write the scales of a block of columns, and scales times zeros, in the order of unpacking."""
    for i in range(BLOCK):
        column = places[i]
        factor = scale[t, g, block * BLOCK + column]
        found = np.float32(zero)
        if len(stored):
            lane, of = column % 16, column // 16
            if block_bytes < BLOCK:
                byte = zeros[t, g, block * block_bytes + 4 * lane + of // 2]
                found = np.float32(byte >> 4 if of % 2 else byte & 15)
            else:
                byte = zeros[t, g, block * block_bytes + 64 * (of // 4) + 4 * lane + of % 4]
                found = np.float32(byte & 255)
        factors[i] = factor
        factors[BLOCK + i] = factor * found


@compiled(inner=True)
def _aligned(nbytes):  # type: ignore[no-untyped-def]
    """Return memory that begins with a cache line."""
    memory = np.empty(nbytes + LINE, np.uint8)
    begin = (-memory.ctypes.data) % LINE
    return memory[begin : begin + nbytes]


@compiled(parallel=True)
def _multiply(weight, scale, zeros, codes, steps, taken, bias, y, shape, zero, stored, places):  # type: ignore[no-untyped-def]
    """Write y, float32 or uint16 (bf16) [rows, out].

    Args:
        weight: uint8 (4 bits) or int8 (8 bits) [n_tiles, in, record bytes].
        scale: float32 [n_tiles, groups, tile].
        zeros: like weight [n_tiles, groups, record bytes], or empty.
        codes: as `_round` writes them, and so are steps and taken.
        steps: see codes.
        taken: see codes.
        bias: float32 [out], or empty.
        y: written.
        shape: (tile, bytes of a block, inputs of a group, inputs of a span, rows of a job).
        zero: of all, if none are stored.
        stored: a tuple with one entry if zeros are stored, else empty.
        places: int64 [128], the column of each place.
    """
    _, n_in, stride = weight.shape
    tile, block_bytes, group, span, together = shape
    rows, outputs = y.shape
    blocks = -(-outputs // BLOCK)
    chunks = -(-rows // together)
    for job in prange(blocks * chunks):
        at, chunk = job % blocks, job // blocks
        t, block = at * BLOCK // tile, at * BLOCK % tile // BLOCK
        first, last = chunk * together, min((chunk + 1) * together, rows)
        padded = -(-(last - first) // ROWS) * ROWS
        unpacked = _aligned(span // 4 * BLOCK_BYTES)
        sums = _aligned(padded * BLOCK * 4).view(np.float32)
        factors = _aligned(2 * BLOCK * 4).view(np.float32)
        sums[:] = 0
        for s in range(len(steps)):
            begin, end = s * span, min((s + 1) * span, n_in)
            row = (np.int64(t) * n_in + begin) * stride
            fours = (end - begin) // 4
            for n in range(fours):
                unpack_four(unpacked, n * BLOCK_BYTES, weight, row + 4 * n * stride, stride, block * block_bytes)
            _factors(scale, zeros, t, begin // group, block, block_bytes, zero, stored, places, factors)
            step, less = steps[s, first:], taken[s, first:]
            for r in range(0, padded, ROWS):
                for part in range(0, 2 * PART, PART):
                    add_tile(
                        sums, r, unpacked, part, fours, codes, (first + r) * n_in + begin, n_in, step, less, factors
                    )
        low, high = at * BLOCK, min((at + 1) * BLOCK, outputs)
        for r in range(last - first):
            bring_in_order(sums, r, weight)
            for c in range(high - low):
                value = sums[r * BLOCK + c]
                if bias.size:
                    value += bias[low + c]
                y[first + r, low + c] = as_stored(value, y)


class RoundedRows:
    """Rows of inputs, rounded once for all weights that read them with the same spans.

    Args:
        x: float32 or bfloat16 [rows, in].
        span: inputs that share a step.
    """

    def __init__(self, x: Tensor, span: int) -> None:
        given = array(x.contiguous())
        rows, self.span = -(-len(given) // ROWS) * ROWS, span
        spans = -(-given.shape[1] // span)
        self.rows, self.codes = len(given), np.zeros((rows, given.shape[1]), np.int8)
        self.steps, self.taken = np.zeros((spans, rows), np.float32), np.zeros((spans, rows), np.float32)
        with LOCK:
            follow_torch_threads(given.nbytes, PER_BYTE)
            _round(given, *words_of(given), span, self.codes, self.steps, self.taken)


def multiply_rounded(x: RoundedRows, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute y = W q(x) + bias.

    Args:
        x: rounded rows.
        weight: a weight that `takes` says yes to.
        bias: float32 [out or more], or None.
        dtype: float32 or bfloat16, of the result.

    Returns:
        [rows, out].
    """
    layout = weight.layout
    y = torch.empty(x.rows, layout.out_features, dtype=dtype)
    kind = np.uint8 if layout.stored_bits == 4 else np.int8
    packed = weight.buffer.numpy().view(kind)
    assert weight.scale is not None
    zeros = np.empty((0, 0, 0), kind) if weight.zero is None else weight.zero.numpy().view(kind)
    shape = (layout.tile, BLOCK * layout.stored_bits // 8, layout.group, x.span, TOGETHER)
    added = np.empty(0, np.float32) if bias is None else bias.numpy()
    with LOCK:
        follow_torch_threads(weight.nbytes, x.rows)
        _multiply(
            packed, weight.scale.numpy(), zeros, x.codes, x.steps, x.taken, added, array(y), shape,
            np.float32(layout.middle), (0,) * layout.zeros, order(kind),
        )  # fmt: skip
    return y
