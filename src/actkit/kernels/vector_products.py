"""The inner loops of the kernels, written as vector IR: sums over a few rows for one block of columns at once.

How rows and blocks are read is in `vectors`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from actkit.kernels.vectors import (
    FLOAT,
    FORMATS,
    I8,
    I64,
    Block,
    Memory,
    constant,
    multiply_add,
    splat,
    vector_type,
)


class Accumulators:
    """Sums of one block, float32 [batch, width]: vector k of batch row b."""

    def __init__(self, memory: Memory, first: Any, width: Any, lanes: int) -> None:
        self.memory, self.first, self.width, self.lanes = memory, first, width, lanes

    def _place(self, b: int, k: int) -> Any:
        builder = self.memory.builder
        column = builder.add(self.first, I64(k * self.lanes))
        return builder.mul(builder.add(column, builder.mul(self.width, I64(b))), I64(4))

    def load(self, b: int, k: int) -> Any:
        """Read the sums of row b, column block k."""
        return self.memory.load(self._place(b, k), vector_type(FLOAT, self.lanes))

    def store(self, b: int, k: int, value: Any) -> None:
        """Write the sums of row b, column block k."""
        self.memory.store(value, self._place(b, k))


def _add(builder: Any, sums: Accumulators, k: int, weights: list[Any], x: list[list[Any]]) -> None:
    """Add sums[b, k] += sum over r of weights[r] * x[b][r], in this order."""
    for b, values in enumerate(x):
        total = sums.load(b, k)
        for weight, value in zip(weights, values):
            total = multiply_add(builder, weight, value, total)
        sums.store(b, k, total)


def _per_batch(values: list[Any], rows: int) -> list[list[Any]]:
    return [values[start : start + rows] for start in range(0, len(values), rows)]


@intrinsic
def add_rows(typingctx, out, first, width, weight, rows, values, place):  # type: ignore[no-untyped-def]
    """Add out[first + b * width + c] += sum over r of values[b, r] * weight[rows[r], c], for one block.

    Args:
        out: float32, updated.
        first: its first entry.
        width: of a batch row.
        weight: bf16 or float32.
        rows: bytes at which the rows begin.
        values: by batch row and row.
        place: bytes from the beginning of a row to the block.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        out, first, width, weight, rows, values, place = args
        kind = signature.args[3].dtype
        form, rows = FORMATS[kind], cgutils.unpack_tuple(builder, rows)
        memory = Memory(context, builder, signature.args[3], weight)
        blocks = [Block(context, memory, kind, builder.add(row, place)) for row in rows]
        x = [splat(builder, value, form.lanes) for value in cgutils.unpack_tuple(builder, values)]
        sums = Accumulators(Memory(context, builder, signature.args[0], out), first, width, form.lanes)
        for k in range(form.columns // form.lanes):
            _add(builder, sums, k, [block.floats(k) for block in blocks], _per_batch(x, len(rows)))
        return context.get_dummy_value()

    number = types.int64
    return types.void(out, number, number, weight, rows, values, number), generate


@intrinsic
def add_scaled_rows(typingctx, out, first, width, weight, rows, values, place, scales, zeros, zero, pieces, stored):  # type: ignore[no-untyped-def]
    """Add out[first + b * width + c] += sum over r of values[b, r] * (code[rows[r], c] - zero) * scale, for one block.

    Args:
        out: float32, updated.
        first: its first entry.
        width: of a batch row.
        weight: uint8 or int8.
        rows: bytes at which the rows begin.
        values: by batch row and row.
        place: bytes from the beginning of a row to the block's codes.
        scales: the same to its scales (float32).
        zeros: the same to its zeros (uint8).
        zero: serves all if the rows hold no zeros.
        pieces: a tuple with one entry per scale of a block.
        stored: a tuple, not empty if the rows hold zeros.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        out, first, width, weight, rows, values, place, scales, zeros, zero, *_ = args
        kind = signature.args[3].dtype
        form, rows = FORMATS[kind], cgutils.unpack_tuple(builder, rows)
        memory = Memory(context, builder, signature.args[3], weight)
        blocks = [Block(context, memory, kind, builder.add(row, place)) for row in rows]
        x = _per_batch(cgutils.unpack_tuple(builder, values), len(rows))
        sums = Accumulators(Memory(context, builder, signature.args[0], out), first, width, form.lanes)
        per_piece = form.columns // form.lanes // signature.args[10].count
        shared = None if signature.args[11].count else blocks[0].offsets(splat(builder, zero, form.lanes))
        # One row of x: its value times the scale, once per row and piece. More: the scaled weight serves all of them.
        splats = [[splat(builder, value, form.lanes) for value in of_one] for of_one in x] if len(x) > 1 else []
        for piece in range(signature.args[10].count):
            scale = [memory.load(builder.add(builder.add(row, scales), I64(4 * piece)), FLOAT) for row in rows]
            if len(x) == 1:
                factors = [[splat(builder, builder.fmul(v, s), form.lanes) for v, s in zip(x[0], scale)]]
            else:
                factors = splats
            scale = [splat(builder, s, form.lanes) for s in scale]
            if shared is None:
                at = builder.add(zeros, I64(piece))
                found = [memory.load(builder.add(row, at), I8, 1) for row in rows]
                floats = [builder.uitofp(byte, FLOAT) for byte in found]
                offsets = [block.offsets(splat(builder, z, form.lanes)) for block, z in zip(blocks, floats)]
            else:
                offsets = [shared] * len(rows)
            for k in range(piece * per_piece, (piece + 1) * per_piece):
                weights = [block.codes(k, offset) for block, offset in zip(blocks, offsets)]
                if len(x) > 1:
                    weights = [builder.fmul(w, s) for w, s in zip(weights, scale)]
                _add(builder, sums, k, weights, factors)
        return context.get_dummy_value()

    number = types.int64
    signature = types.void(
        out, number, number, weight, rows, values, number, number, number, types.float32, pieces, stored
    )
    return signature, generate


@intrinsic
def add_codes(typingctx, out, first, width, weight, rows, values, place, zeros, zeros_at, zero, stored):  # type: ignore[no-untyped-def]
    """Add out[first + b * width + c] += sum over r of values[b, r] * (code[rows[r], c] - zero[c]), for one block.

    Args:
        out: float32, updated.
        first: its first entry.
        width: of a batch row.
        weight: uint8 or int8.
        rows: bytes at which the rows begin.
        values: by batch row and row.
        place: bytes from the beginning of a row to the block's codes.
        zeros: an array like weight, whose block at byte zeros_at holds the zeros of these columns, if they are stored.
        zeros_at: see `zeros`.
        zero: serves all if no zeros are stored.
        stored: a tuple, empty if no zeros are stored.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        out, first, width, weight, rows, values, place, zeros, zeros_at, zero, _ = args
        kind = signature.args[3].dtype
        form, rows = FORMATS[kind], cgutils.unpack_tuple(builder, rows)
        memory = Memory(context, builder, signature.args[3], weight)
        blocks = [Block(context, memory, kind, builder.add(row, place)) for row in rows]
        x = [splat(builder, value, form.lanes) for value in cgutils.unpack_tuple(builder, values)]
        sums = Accumulators(Memory(context, builder, signature.args[0], out), first, width, form.lanes)
        shared = own = None
        if signature.args[10].count:
            own = Block(context, Memory(context, builder, signature.args[7], zeros), kind, zeros_at)
        else:
            shared = blocks[0].offsets(splat(builder, zero, form.lanes))
        plain = blocks[0].offsets(constant(0.0, form.lanes))
        for k in range(form.columns // form.lanes):
            if own is None:
                weights = [block.codes(k, shared) for block in blocks]
            else:
                zero_here = own.codes(k, plain)
                weights = [builder.fsub(block.codes(k, plain), zero_here) for block in blocks]
            _add(builder, sums, k, weights, _per_batch(x, len(rows)))
        return context.get_dummy_value()

    number = types.int64
    signature = types.void(out, number, number, weight, rows, values, number, zeros, number, types.float32, stored)
    return signature, generate


@intrinsic
def dot_rows(typingctx, weight, rows, x, width):  # type: ignore[no-untyped-def]
    """Compute the dot products of some rows with x: one pass over x, sums in the lanes of two vectors.

    Args:
        weight: bf16 or float32.
        rows: bytes at which they begin.
        x: float32 [width].
        width: a whole number of blocks.

    Returns:
        A tuple of floats.
    """
    count = rows.count

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        weight, rows, x, width = args
        kind = signature.args[0].dtype
        form, rows = FORMATS[kind], cgutils.unpack_tuple(builder, rows)
        vector, vectors = vector_type(FLOAT, form.lanes), form.columns // form.lanes
        memory = Memory(context, builder, signature.args[0], weight)
        given = Memory(context, builder, signature.args[2], x)
        # On the stack, which the compiler turns into registers.
        totals = [cgutils.alloca_once_value(builder, constant(0.0, form.lanes)) for _ in range(count * min(2, vectors))]
        blocks = builder.sdiv(width, I64(form.columns))
        with cgutils.for_range(builder, blocks) as loop:
            place = builder.mul(loop.index, I64(form.nbytes))
            column = builder.mul(loop.index, I64(4 * form.columns))
            read = [Block(context, memory, kind, builder.add(row, place)) for row in rows]
            for k in range(vectors):
                values = given.load(builder.add(column, I64(4 * form.lanes * k)), vector)
                for r, block in enumerate(read):
                    total = totals[2 * r + k % 2]
                    builder.store(multiply_add(builder, block.floats(k), values, builder.load(total)), total)
        kind_of_sum = ir.FunctionType(FLOAT, [FLOAT, vector])
        name = f"llvm.vector.reduce.fadd.v{form.lanes}f32"
        reduce = cgutils.get_or_insert_function(builder.module, kind_of_sum, name)
        found = []
        for r in range(count):
            both = builder.fadd(builder.load(totals[2 * r]), builder.load(totals[2 * r + 1]))
            call = builder.call(reduce, [FLOAT(0.0), both], fastmath=("reassoc",))
            found.append(call)
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.float32, count)(weight, rows, x, types.int64), generate


@intrinsic
def dot_codes(typingctx, weight, rows, x, blocks, scales, zeros, zero, pieces, stored):  # type: ignore[no-untyped-def]
    """Compute what `dot_rows` does, of rows of integer codes: the sum of (code - zero) * x of a piece, times its scale.

    Args:
        weight: uint8 or int8.
        rows: bytes at which they begin.
        x: float32, in whole blocks.
        blocks: of 128 inputs.
        scales: bytes from the beginning of a row to its scales (float32).
        zeros: the same to its zeros (uint8).
        zero: as in `add_scaled_rows`.
        pieces: as in `add_scaled_rows`.
        stored: as in `add_scaled_rows`.
    """
    count = rows.count

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        weight, rows, x, blocks, scales, zeros, zero, *_ = args
        kind = signature.args[0].dtype
        form, rows = FORMATS[kind], cgutils.unpack_tuple(builder, rows)
        vector, pieces = vector_type(FLOAT, form.lanes), signature.args[7].count
        per_piece = form.columns // form.lanes // pieces
        memory = Memory(context, builder, signature.args[0], weight)
        given = Memory(context, builder, signature.args[2], x)
        totals = [cgutils.alloca_once_value(builder, constant(0.0, form.lanes)) for _ in rows]
        with cgutils.for_range(builder, blocks) as loop:
            place = builder.mul(loop.index, I64(form.nbytes))
            column = builder.mul(loop.index, I64(4 * form.columns))
            read = [Block(context, memory, kind, builder.add(row, place)) for row in rows]
            shared = None if signature.args[8].count else read[0].offsets(splat(builder, zero, form.lanes))
            for piece in range(pieces):
                number = builder.add(builder.mul(loop.index, I64(pieces)), I64(piece))
                offsets = [shared] * count
                if shared is None:
                    at = builder.add(zeros, number)
                    bytes_ = [memory.load(builder.add(row, at), I8, 1) for row in rows]
                    floats = [splat(builder, builder.uitofp(byte, FLOAT), form.lanes) for byte in bytes_]
                    offsets = [block.offsets(each) for block, each in zip(read, floats)]
                sums = [constant(0.0, form.lanes)] * count
                for k in range(piece * per_piece, (piece + 1) * per_piece):
                    values = given.load(builder.add(column, I64(4 * form.lanes * k)), vector)
                    sums = [
                        multiply_add(builder, block.codes(k, offset), values, total)
                        for block, offset, total in zip(read, offsets, sums)
                    ]
                at = builder.add(scales, builder.mul(number, I64(4)))
                for row, total, found in zip(rows, totals, sums):
                    scale = splat(builder, memory.load(builder.add(row, at), FLOAT), form.lanes)
                    builder.store(multiply_add(builder, scale, found, builder.load(total)), total)
        name = f"llvm.vector.reduce.fadd.v{form.lanes}f32"
        reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOAT, [FLOAT, vector]), name)
        found = [builder.call(reduce, [FLOAT(0.0), builder.load(total)], fastmath=("reassoc",)) for total in totals]
        return context.make_tuple(builder, signature.return_type, found)

    number = types.int64
    signature = types.UniTuple(types.float32, count)(
        weight, rows, x, number, number, number, types.float32, pieces, stored
    )
    return signature, generate
