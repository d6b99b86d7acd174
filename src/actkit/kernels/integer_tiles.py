"""Tiles of integer products of many rows, written as vector IR: codes of 4 or 8 bits times inputs of 8 bits.

The codes of a group of inputs are unpacked once, a byte each, in the order in which `integer_dots` interleaves four
rows; each of them then meets many rows of inputs. A tile is four rows of inputs and 64 columns: its 16 sums stay in
registers while four inputs at a time are added to them (vpdpbusd), and are scaled when the group ends. The sums are
exact. Outputs stay in the order of unpacking until the last group is done.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from actkit.kernels.integer_dots import FLOATS, VECTORS, WIDE, WORDS, codes_of_four, dot, everywhere, in_order
from actkit.kernels.vectors import FLOAT, I32, I64, Memory, integers, multiply_add, splat

ROWS, PART = 4, 4  # of a tile: rows of inputs, and vectors of columns
BLOCK_BYTES = 64 * VECTORS  # of the unpacked codes of four inputs


@cache
def order(kind: Any) -> np.ndarray:
    """Which column of a block each place of unpacked codes holds: int64 [128]. kind: np.uint8 (4 bits) or np.int8."""
    vector, word = np.divmod(np.arange(VECTORS * WIDE), WIDE)
    lane, place = np.divmod(word, 4)
    if kind == np.uint8:
        return 4 * lane + vector % 4 + 16 * (2 * place + vector // 4)
    return 64 * (vector // 4) + 4 * lane + vector % 4 + 16 * place


@intrinsic
def unpack_four(typingctx, unpacked, at, weight, row, stride, place):  # type: ignore[no-untyped-def]
    """Unpack one block of four inputs.

    Args:
        unpacked: uint8, written from byte `at` on: eight vectors of 64 bytes.
        at: see `unpacked`.
        weight: the records.
        row: byte at which the first input's record begins.
        stride: bytes from one record to the next.
        place: bytes from the beginning of a record to the block.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        unpacked, at, weight, row, stride, place = args
        written = Memory(context, builder, signature.args[0], unpacked)
        memory = Memory(context, builder, signature.args[2], weight)
        kind = signature.args[2].dtype
        rows = [builder.add(row, builder.mul(stride, I64(r))) for r in range(4)]
        for k, words in enumerate(codes_of_four(builder, kind, rows, place, memory)):
            if kind == types.uint8 and k >= 4:  # the upper codes of each byte
                words = builder.lshr(words, integers(4, WIDE))
            written.store(words, builder.add(at, I64(64 * k)))
        return context.get_dummy_value()

    number = types.int64
    return types.void(unpacked, number, weight, number, number, number), generate


@intrinsic
def add_tile(typingctx, sums, row, unpacked, first, fours, codes, at, width, steps, taken, factors):  # type: ignore[no-untyped-def]
    """Add one group of inputs to a tile of four rows and 64 columns.

        sums[r, c] += step[r] * (scale[c] * sum over j of code[j, c] * q[r, j]) - taken[r] * (scale * zero)[c]

    Args:
        sums: float32 [rows, 128], in the order of unpacking.
        row: the first of the four rows.
        unpacked: as `unpack_four` writes it, for each four inputs.
        first: 0 or 4, the first of the four vectors of columns.
        fours: how many times four inputs.
        codes: int8, the inputs.
        at: byte at which those of the first row begin.
        width: bytes from one row to the next.
        steps: float32, from `row` on.
        taken: float32, from `row` on: the step times the sum of the row's codes.
        factors: float32 [2 * 128]: scales, and scales times zeros, in the order of unpacking.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        sums, row, unpacked, first, fours, codes, at, width, steps, taken, factors = args
        kinds = signature.args
        written = Memory(context, builder, kinds[0], sums)
        weights = Memory(context, builder, kinds[2], unpacked)
        inputs = Memory(context, builder, kinds[5], codes)
        totals = [cgutils.alloca_once_value(builder, integers(0, WIDE)) for _ in range(ROWS * PART)]
        for total in totals:
            builder.store(integers(0, WIDE), total)
        begins = [builder.add(at, builder.mul(width, I64(r))) for r in range(ROWS)]
        start = builder.mul(first, I64(64))
        with cgutils.for_range(builder, fours, intp=I64) as loop:
            place = builder.add(start, builder.mul(loop.index, I64(BLOCK_BYTES)))
            blocks = [weights.load(builder.add(place, I64(64 * k)), WORDS, 64) for k in range(PART)]
            for r, begin in enumerate(begins):
                offset = builder.add(begin, builder.mul(loop.index, I64(4)))
                word = everywhere(builder, inputs.load(offset, I32))
                for k, block in enumerate(blocks):
                    total = totals[r * PART + k]
                    builder.store(dot(builder, builder.load(total), block, word), total)
        scales = Memory(context, builder, kinds[10], factors)
        step, offset = Memory(context, builder, kinds[8], steps), Memory(context, builder, kinds[9], taken)
        columns = [builder.mul(builder.add(first, I64(k)), I64(64)) for k in range(PART)]  # bytes
        scaled = [scales.load(column, FLOATS) for column in columns]
        zeros = [scales.load(builder.add(column, I64(4 * VECTORS * WIDE)), FLOATS) for column in columns]
        for r in range(ROWS):
            own = builder.add(row, I64(r))
            factor = splat(builder, step.load(builder.mul(own, I64(4)), FLOAT), WIDE)
            less = splat(builder, builder.fneg(offset.load(builder.mul(own, I64(4)), FLOAT)), WIDE)
            for k, column in enumerate(columns):
                value = builder.sitofp(builder.load(totals[r * PART + k]), FLOATS)
                place = builder.add(builder.mul(own, I64(4 * VECTORS * WIDE)), column)
                found = multiply_add(builder, less, zeros[k], written.load(place, FLOATS))
                found = multiply_add(builder, value, builder.fmul(factor, scaled[k]), found)
                written.store(found, place)
        return context.get_dummy_value()

    number = types.int64
    signature = types.void(sums, number, unpacked, number, number, codes, number, number, steps, taken, factors)
    return signature, generate


@intrinsic
def bring_in_order(typingctx, sums, row, weight):  # type: ignore[no-untyped-def]
    """Bring a row of sums, float32 [rows, 128], from the order of unpacking into that of the columns, in place."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        sums, row, _ = args
        memory = Memory(context, builder, signature.args[0], sums)
        kind = signature.args[2].dtype
        start = builder.mul(row, I64(4 * VECTORS * WIDE))
        places = [builder.add(start, I64(64 * k)) for k in range(VECTORS)]
        found = [memory.load(place, WORDS) for place in places]
        for place, words in zip(places, in_order(builder, kind, found)):
            memory.store(words, place)
        return context.get_dummy_value()

    return types.void(sums, types.int64, weight), generate
