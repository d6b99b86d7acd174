"""The inner loops of the kernels, written as vector IR: the code for one block of columns of a few rows at once.

Written by hand because LLVM would have to prove that output and weight do not overlap before it vectorises by itself.
The vectors have 8 or 16 floats; a machine with narrower ones gets two or four instructions for each. The stored type
of a weight says how it is read, and which of its outputs lie in one block:

    float32         32 columns, in order
    uint16 (bf16)   32 columns in 16 words: columns c (low half) and c + 16 (high half) share a word
    int8 (8 bits)   128 columns in two times 16 words: columns c, c + 16, c + 32 and c + 48 of each half share a word
    uint8 (4 bits)  128 columns in 16 words: columns c, c + 16, ... c + 112 share a word, the first in the lowest bits

A code becomes the float of code - zero *exactly*, so that a column of zeros gives zero next to any other. With AVX-512
the low four bits of a lane pick it from a table of 16 floats, in which the zero is taken off already (vpermps).
Elsewhere the bits of the code are set into those of a power of two, and that goes together with the zero; this is done
without a shift for codes of 4 bits at bit 16 (in 2^7), and of 8 bits at bits 0 and 8 (in 2^23 and 2^15). Taking the
power out of whole sums instead costs no less, and loses three digits if large terms cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I8, I32, I64, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
LINE = 64  # bytes
INTO_L2, ONCE = 2, 0  # the locality argument of llvm.prefetch: prefetcht1, prefetchnta


@dataclass(frozen=True)
class Format:
    """How a stored type is read.

    Attributes:
        lanes: of a vector.
        columns: of a block.
        nbytes: of a block.
        unroll: rows at once.
    """

    lanes: int
    columns: int
    nbytes: int
    unroll: int


FORMATS = {
    types.float32: Format(8, 32, 128, 8),
    types.uint16: Format(16, 32, 64, 8),
    types.int8: Format(16, 128, 128, 4),
    types.uint8: Format(16, 128, 64, 4),
}


# -- building blocks ---------------------------------------------------------------------------------------------------


def _vector(kind: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(kind, lanes)


def constant(value: float, lanes: int) -> Any:
    """Make a float vector with the value in every lane."""
    return ir.Constant(_vector(FLOAT, lanes), [float(value)] * lanes)


def integers(value: int, lanes: int) -> Any:
    """Make a 32-bit integer vector with the value in every lane."""
    return ir.Constant(_vector(I32, lanes), [value] * lanes)


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """Make a vector with the same float in all lanes."""
    undefined = ir.Constant(_vector(FLOAT, lanes), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, value, I32(0)), undefined, integers(0, lanes))


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Compute a * b + c, lane by lane, rounded once if the processor can."""
    lanes = a.type.count
    kind = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{lanes}f32"), [a, b, c])


class Memory:
    """An array argument of an intrinsic, read and written at byte offsets."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        self.builder = builder
        data = context.make_array(kind)(context, builder, array).data
        self.start = builder.bitcast(data, I8.as_pointer())

    def address(self, offset: Any, pointee: ir.Type) -> Any:
        """Return the address at an offset in elements, as a pointer to `pointee`."""
        return self.builder.bitcast(self.builder.gep(self.start, [offset]), pointee.as_pointer())

    def load(self, offset: Any, kind: ir.Type, align: int = 4) -> Any:
        """Read the value of this kind at an offset in elements."""
        return self.builder.load(self.address(offset, kind), align=align)

    def store(self, value: Any, offset: Any) -> None:
        """Write the value at an offset in elements."""
        self.builder.store(value, self.address(offset, value.type), align=4)


def _has(context: Any, *features: str) -> bool:
    """Return whether the code is compiled for a processor with these features."""
    return {f"+{feature}" for feature in features} <= set(context.codegen().magic_tuple()[2].split(","))


def _high_halves(memory: Memory, offset: Any) -> Any:
    """Read 32 bfloat16 from memory with the even ones set to zero: one masked load instead of loading and masking."""
    halves, mask = _vector(ir.IntType(16), 32), _vector(ir.IntType(1), 32)
    address = memory.address(offset, halves)
    odd, zeros = ir.Constant(mask, [lane % 2 for lane in range(32)]), ir.Constant(halves, [0] * 32)
    kind = ir.FunctionType(halves, [address.type, mask, halves])
    load = cgutils.get_or_insert_function(memory.builder.module, kind, "llvm.masked.load.v32i16.p0")
    return memory.builder.bitcast(memory.builder.call(load, [address, odd, zeros]), _vector(FLOAT, 16))


class Block:
    """The stored words of one block of one row, and the float vectors that they stand for, column by column."""

    def __init__(self, context: Any, memory: Memory, kind: Any, offset: Any) -> None:
        self.context, self.builder, self.kind = context, memory.builder, kind
        self.memory, self.start = memory, offset
        self.format = FORMATS[kind]
        lanes, align = self.format.lanes, 2 if kind == types.uint16 else 4
        loaded = FLOAT if kind == types.float32 else I32
        places = range(0, self.format.nbytes, 4 * lanes)
        self.words = [
            memory.load(memory.builder.add(offset, I64(place)), _vector(loaded, lanes), align) for place in places
        ]

    def _shifted(self, word: Any, left: int) -> Any:
        if left == 0:
            return word
        shift = self.builder.shl if left > 0 else self.builder.lshr
        return shift(word, integers(abs(left), self.format.lanes))

    def floats(self, k: int) -> Any:
        """Return columns k * lanes to (k + 1) * lanes of a bf16 or float32 row."""
        if self.kind == types.float32:
            return self.words[k]
        lanes = self.format.lanes
        if k == 0:
            return self.builder.bitcast(self._shifted(self.words[0], 16), _vector(FLOAT, lanes))
        if llvm_version_info[0] >= 22 and _has(self.context, "avx512bw", "avx512vl"):
            return _high_halves(self.memory, self.start)
        return self.builder.bitcast(
            self.builder.and_(self.words[0], integers(0xFFFF0000, lanes)), _vector(FLOAT, lanes)
        )

    def offsets(self, zero: Any) -> tuple[Any, Any]:
        """Return what `codes` needs for a vector of zeros (as floats): the same for all rows and columns of it."""
        lanes = self.format.lanes
        second = self.builder.fadd(zero, constant(2.0 ** (23 - self._second), lanes))
        if self._looks_up:
            table = ir.Constant(_vector(FLOAT, 16), [float(code) for code in range(16)])
            return self.builder.fsub(table, zero), second
        return self.builder.fadd(zero, constant(2.0**23, lanes)), second

    def codes(self, k: int, offsets: tuple[Any, Any]) -> Any:
        """Return the codes of columns k * 16 to (k + 1) * 16, less the zero that went into `offsets`."""
        if self.kind == types.uint8:  # columns k and k + 4 share a shift
            is_second, word, right = k >= 4, self.words[0], 4 * (k % 4)
        else:
            is_second, word, right = k % 2 == 1, self.words[k // 4], 16 * (k % 4 // 2)
        word = self._shifted(word, -right)
        if self._looks_up and not is_second:
            kind = ir.FunctionType(offsets[0].type, [offsets[0].type, word.type])
            permute = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
            return self.builder.call(permute, [offsets[0], word])
        place, lanes = self._second if is_second else 0, self.format.lanes
        mask, power = (0xF if self.kind == types.uint8 else 0xFF) << place, (127 + 23 - place) << 23
        bits = self.builder.or_(self.builder.and_(word, integers(mask, lanes)), integers(power, lanes))
        return self.builder.fsub(self.builder.bitcast(bits, _vector(FLOAT, lanes)), offsets[int(is_second)])

    @property
    def _second(self) -> int:
        """The bit of a word at which a second code is read without a shift."""
        return 16 if self.kind == types.uint8 else 8

    @property
    def _looks_up(self) -> bool:
        return self.kind == types.uint8 and _has(self.context, "avx512f")


# -- rows and values of a group of active inputs -----------------------------------------------------------------------


def unroll(kind: Any, batch: int) -> int:
    """Return the rows that are read at once for a batch: all their values stay in registers."""
    return min(FORMATS[kind].unroll, 8 if batch == 1 else 4)


@intrinsic
def rows_at_once(typingctx, weight, batch):  # type: ignore[no-untyped-def]
    """Return how many rows `row_offsets` gives for this weight and batch (a tuple with one entry per row of x)."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return I64(unroll(signature.args[0].dtype, signature.args[1].count))

    return types.int64(weight, batch), generate


@intrinsic
def row_offsets(typingctx, weight, batch, indices, i, count, start, stride):  # type: ignore[no-untyped-def]
    """Return the bytes at which the active rows from i on begin; past the last, that of the last.

        start + indices[i + r] * stride

    Args:
        weight: for its type.
        batch: a tuple with one entry per row of x.
        indices: int32, the active inputs.
        i: the first of them.
        count: how many are active.
        start: of the tile, in bytes.
        stride: of a row, in bytes.

    Returns:
        A tuple of int64.
    """
    rows = unroll(weight.dtype, batch.count)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, _, indices, i, count, start, stride = args
        listed, last = Memory(context, builder, signature.args[2], indices), builder.sub(count, I64(1))
        offsets = []
        for r in range(rows):
            place = builder.add(i, I64(r))
            place = builder.select(builder.icmp_signed("<", place, last), place, last)
            index = builder.sext(listed.load(builder.mul(place, I64(4)), I32), I64)
            offsets.append(builder.add(start, builder.mul(index, stride)))
        return context.make_tuple(builder, signature.return_type, offsets)

    number = types.int64
    return types.UniTuple(number, rows)(weight, batch, indices, number, number, number, number), generate


@intrinsic
def row_values(typingctx, weight, batch, values, i, end):  # type: ignore[no-untyped-def]
    """Return values[b, i + r] for each b and each row of `row_offsets`, b slowest; 0 at and past end."""
    rows = unroll(weight.dtype, batch.count)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, _, values, i, end = args
        memory, last = Memory(context, builder, signature.args[2], values), builder.sub(end, I64(1))
        width = cgutils.unpack_tuple(builder, context.make_array(signature.args[2])(context, builder, values).shape)[1]
        loaded = []
        for b in range(batch.count):
            for r in range(rows):
                place = builder.add(i, I64(r))
                inside = builder.icmp_signed("<", place, end)
                place = builder.add(builder.select(inside, place, last), builder.mul(width, I64(b)))
                value = memory.load(builder.mul(place, I64(4)), FLOAT)
                loaded.append(builder.select(inside, value, FLOAT(0.0)))
        return context.make_tuple(builder, signature.return_type, loaded)

    return types.UniTuple(types.float32, batch.count * rows)(weight, batch, values, types.int64, types.int64), generate


def _prefetcher(locality: int) -> Any:
    @intrinsic
    def ask_for(typingctx, weight, rows, place):  # type: ignore[no-untyped-def]
        """Ask for the cache lines of one block of some rows, `place` bytes after each begins."""

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
            ask = builder.module.declare_intrinsic("llvm.prefetch", [I8.as_pointer()], kind)
            memory = Memory(context, builder, signature.args[0], args[0])
            for row in cgutils.unpack_tuple(builder, args[1]):
                for line in range(0, FORMATS[signature.args[0].dtype].nbytes, LINE):
                    offset = builder.add(builder.add(row, args[2]), I64(line))
                    builder.call(ask, [memory.address(offset, I8), I32(0), I32(locality), I32(1)])
            return context.get_dummy_value()

        return types.void(weight, rows, types.int64), generate

    return ask_for


prefetch_ahead, prefetch_once = _prefetcher(INTO_L2), _prefetcher(ONCE)


# -- products ----------------------------------------------------------------------------------------------------------


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
        return self.memory.load(self._place(b, k), _vector(FLOAT, self.lanes))

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
        vector, vectors = _vector(FLOAT, form.lanes), form.columns // form.lanes
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
        vector, pieces = _vector(FLOAT, form.lanes), signature.args[7].count
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
