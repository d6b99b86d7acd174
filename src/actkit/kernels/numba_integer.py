"""Products with integer weights in integer arithmetic: activations in fixed point, blocks of 128 active inputs.

    groups of outputs:  out[c] += unit[block, g] * sum over j of q_jg * (code[j, c] - zero[j, g])
                        q_jg = round(x_j * scale[j, g] / unit[block, g])
    groups of inputs:   out[c] += unit[block] * scale[g, c] * sum over j of q_j * (code[j, c] - zero[g, c])
                        q_j = round(x_j / unit[block])

`unit` is the largest |x_j * scale| of the block over 32512: activations have 16 bits. Sums are exact, so what is lost
is their rounding: at most half a unit each, 1.5e-5 of the block's largest. That is finer than bfloat16 by 8 bits if
activations are alike; what is far smaller than the largest of its block is rounded more coarsely. Sums stay below
2^31: 128 rows, codes below 2^8 (of which 16 times the upper of a byte's two codes is less too).

Rows, tiles and order are those of `numba_quantized`. It needs the byte products of AVX-512 (`integer_dots.available`),
and groups of outputs that fill whole blocks of 128.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from actkit.kernels.integer_dots import (
    LIMIT,
    SMALLEST,
    WIDE,
    add_dots,
    finish_groups,
    finish_records,
    fix_points,
    largest,
)
from actkit.kernels.process import compiled
from actkit.kernels.quantized import BLOCK
from actkit.kernels.vectors import prefetch_once, row_offsets, row_values

ROWS = 128  # active inputs that share a unit
TOGETHER = 8  # rows at once
FOURS = ROWS // 4
LINE = 64
AHEAD = 24 << 10  # bytes between the rows at hand and those that are prefetched
COLUMNS = 6144  # of a tile that are taken at once: 24 KB of sums
WIDEST = 48  # blocks of the most columns, in whole vectors


class Scratch(NamedTuple):
    """Memory of one thread.

    Attributes:
        factors: int32 [2 * FOURS * WIDEST].
        maxima: float32 [WIDEST].
        units: float32 [WIDEST].
        taken: int32 [WIDEST].
        sums: int32 [COLUMNS], zero between calls.
    """

    factors: np.ndarray
    maxima: np.ndarray
    units: np.ndarray
    taken: np.ndarray
    sums: np.ndarray


def scratch() -> Scratch:
    """Allocate memory for the products of one thread."""
    return Scratch(
        np.zeros(2 * FOURS * WIDEST, np.int32),
        np.zeros(WIDEST, np.float32),
        np.zeros(WIDEST, np.float32),
        np.zeros(WIDEST, np.int32),
        np.zeros(COLUMNS, np.int32),
    )


@compiled(inner=True)
def _eight(weight, indices, i, count, start, stride):  # type: ignore[no-untyped-def]
    first = row_offsets(weight, (0,), indices, i, count, start, stride)
    return first + row_offsets(weight, (0,), indices, i + 4, count, start, stride)


@compiled(inner=True)
def _values(weight, values, i, end):  # type: ignore[no-untyped-def]
    return row_values(weight, (0,), values, i, end) + row_values(weight, (0,), values, i + 4, end)


@compiled(inner=True)
def _set_units(maxima, units, number, limit, broken):  # type: ignore[no-untyped-def]
    """Units of the largest activations, and in their place what an activation is multiplied by."""
    for p in range(number):
        found = maxima[p]
        if found > SMALLEST:
            units[p] = found / limit + broken
            maxima[p] = limit / found
        else:
            units[p] = broken
            maxima[p] = 0


@compiled(inner=True)
def _broken(values, count):  # type: ignore[no-untyped-def]
    """Return 0, or NaN if an activation is not finite, which fixed point cannot say."""
    total = np.float32(0.0)
    for i in range(count):
        total += values[i] * np.float32(0.0)
    return total


@compiled()
def record_dots(weight, t, indices, values, count, out, shape, middle, stored, scratch):  # type: ignore[no-untyped-def]
    """Multiply one tile of `numba_quantized.multiply_records` for one row of x, pieces being whole blocks.

    Args:
        weight: as in `multiply_records`, and so are the others.
        t: the tile.
        indices: int32 [in].
        values: float32 [in].
        count: how many are active.
        out: float32, updated.
        shape: of the records.
        middle: int32, the zero of all if none are stored.
        stored: a tuple, empty if no zeros are stored.
        scratch: `Scratch`.
    """
    _, n_in, stride = weight.shape
    tile, block_bytes, scales, zeros = shape
    factors, maxima, units, taken, sums = scratch
    limit = np.float32(LIMIT)
    distance = TOGETHER * max(1, AHEAD // (TOGETHER * stride))
    broken = _broken(values[0], count)
    first, start = np.int64(t) * tile, np.int64(t) * n_in * stride
    runs = -(-tile // COLUMNS)
    run = -(-tile // (runs * BLOCK)) * BLOCK
    for low in range(0, tile, run):
        blocks = (min(low + run, tile) - low) // BLOCK
        piece = low // BLOCK
        code_at, scale_at, zero_at = piece * block_bytes, scales + 4 * piece, zeros + piece
        out[:, first + low : first + low + blocks * BLOCK] = 0
        for begin in range(0, count, ROWS):
            end = min(begin + ROWS, count)
            maxima[:] = 0
            taken[:] = 0
            for i in range(begin, end, TOGETHER):
                rows, x = _eight(weight, indices, i, count, start, stride), _values(weight, values, i, end)
                for p in range(0, blocks, WIDE):
                    largest(maxima, p, weight, rows, x, scale_at + 4 * p)
            _set_units(maxima, units, blocks, limit, broken)
            for i in range(begin, end, TOGETHER):
                rows, x = _eight(weight, indices, i, count, start, stride), _values(weight, values, i, end)
                at = (i - begin) // 4 * WIDEST
                for p in range(0, blocks, WIDE):
                    fix_points(
                        factors, at + p, WIDEST, FOURS * WIDEST, taken, maxima, p, weight, rows, x,
                        scale_at + 4 * p, zero_at + p, stored,
                    )  # fmt: skip
            for i in range(begin, end, TOGETHER):
                rows = _eight(weight, indices, i, count, start, stride)
                ahead = _eight(weight, indices, i + distance, count, start, stride)
                at = (i - begin) // 4 * WIDEST
                for block in range(blocks):
                    place = code_at + block * block_bytes
                    add_dots(
                        sums, block * BLOCK, weight, rows, place, factors, at + block, WIDEST, FOURS * WIDEST,
                    )  # fmt: skip
                    prefetch_once(weight, ahead, place)
                next_block = _eight(weight, indices, i + ROWS, count, start, stride)
                for place in range(scale_at // LINE * LINE, min(stride, scale_at + 4 * blocks), block_bytes):
                    prefetch_once(weight, next_block, place)
            for block in range(blocks):
                zero = taken[block] if len(stored) else taken[block] * middle
                column = first + low + block * BLOCK
                finish_records(out, column, weight, sums, block * BLOCK, units[block], zero)


@compiled(inner=True)
def _fix_one(values, begin, end, factors):  # type: ignore[no-untyped-def]
    """Activations begin to end in fixed point, the same for all columns; their unit and their sum."""
    largest_one = np.float32(0.0)
    for i in range(begin, end):
        largest_one = max(largest_one, abs(values[i]))
    limit = np.float32(LIMIT)
    inverse = limit / largest_one if largest_one > SMALLEST else np.float32(0.0)
    unit = largest_one / limit if largest_one > SMALLEST else np.float32(0.0)
    total = np.int32(0)
    for n in range(-(-(end - begin) // TOGETHER) * 2):
        high, low = np.int32(0), np.int32(0)
        for place in range(4):
            i = begin + 4 * n + place
            q = np.int32(np.rint(values[i] * inverse)) if i < end else np.int32(0)
            total += q
            high |= ((q + 128) >> 8 & 255) << (8 * place)
            low |= (q & 255) << (8 * place)
        factors[n * WIDEST] = high
        factors[(FOURS + n) * WIDEST] = low
    return unit, total


@compiled()
def group_dots(weight, scale, zeros, t, indices, values, count, out, shape, zero, stored, scratch):  # type: ignore[no-untyped-def]
    """Multiply one tile of `numba_quantized.multiply_groups` for one row of x; the rest as in `record_dots`."""
    _, n_in, stride = weight.shape
    tile, block_bytes, group = shape
    factors, _, _, _, sums = scratch
    groups = scale.shape[1]
    distance = TOGETHER * max(1, AHEAD // (TOGETHER * stride))
    broken = _broken(values[0], count)
    first, start = np.int64(t) * tile, np.int64(t) * n_in * stride
    scales = scale.reshape(-1)
    runs = -(-tile // COLUMNS)
    run = -(-tile // (runs * BLOCK)) * BLOCK
    for low in range(0, tile, run):
        blocks = (min(low + run, tile) - low) // BLOCK
        code_at = low // BLOCK * block_bytes
        out[:, first + low : first + low + blocks * BLOCK] = 0
        end = 0
        while end < count:
            begin = end
            g = indices[begin] // group
            while end < count and end < begin + ROWS and indices[end] < (g + 1) * group:
                end += 1
            unit, total = _fix_one(values[0], begin, end, factors)
            for i in range(begin, end, TOGETHER):
                rows = _eight(weight, indices, i, count, start, stride)
                ahead = _eight(weight, indices, i + distance, count, start, stride)
                at = (i - begin) // 4 * WIDEST
                for block in range(blocks):
                    place = code_at + block * block_bytes
                    add_dots(sums, block * BLOCK, weight, rows, place, factors, at, WIDEST, FOURS * WIDEST)
                    prefetch_once(weight, ahead, place)
            parameters = np.int64(t) * groups + g
            for block in range(blocks):
                column = low + block * BLOCK
                finish_groups(
                    out, first + column, weight, sums, block * BLOCK, unit + broken, total, scales,
                    parameters * tile + column, zeros, parameters * stride + code_at + block * block_bytes, zero,
                    stored,
                )  # fmt: skip


@compiled(parallel=True)
def multiply_record_dots(
    weight, indices, values, count, out, shape, middle, stored, factors, maxima, units, taken, sums
):  # type: ignore[no-untyped-def]
    """Multiply all tiles of a matrix, over threads. factors ... sums: the arrays of `Scratch`, one row per tile."""
    for t in prange(weight.shape[0]):
        memory = (factors[t], maxima[t], units[t], taken[t], sums[t])
        record_dots(weight, t, indices, values, count, out, shape, middle, stored, memory)
