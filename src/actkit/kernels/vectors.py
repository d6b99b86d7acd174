"""Vector IR for the inner loops of the kernels: how one block of columns of a few rows is read as vectors.

`vector_products` multiplies and adds them.

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


def vector_type(kind: ir.Type, lanes: int) -> ir.VectorType:
    """Return the type of a vector with `lanes` values of a kind."""
    return ir.VectorType(kind, lanes)


def constant(value: float, lanes: int) -> Any:
    """Make a float vector with the value in every lane."""
    return ir.Constant(vector_type(FLOAT, lanes), [float(value)] * lanes)


def integers(value: int, lanes: int) -> Any:
    """Make a 32-bit integer vector with the value in every lane."""
    return ir.Constant(vector_type(I32, lanes), [value] * lanes)


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """Make a vector with the same float in all lanes."""
    undefined = ir.Constant(vector_type(FLOAT, lanes), ir.Undefined)
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
    halves, mask = vector_type(ir.IntType(16), 32), vector_type(ir.IntType(1), 32)
    address = memory.address(offset, halves)
    odd, zeros = ir.Constant(mask, [lane % 2 for lane in range(32)]), ir.Constant(halves, [0] * 32)
    kind = ir.FunctionType(halves, [address.type, mask, halves])
    load = cgutils.get_or_insert_function(memory.builder.module, kind, "llvm.masked.load.v32i16.p0")
    return memory.builder.bitcast(memory.builder.call(load, [address, odd, zeros]), vector_type(FLOAT, 16))


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
            memory.load(memory.builder.add(offset, I64(place)), vector_type(loaded, lanes), align) for place in places
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
            return self.builder.bitcast(self._shifted(self.words[0], 16), vector_type(FLOAT, lanes))
        if llvm_version_info[0] >= 22 and _has(self.context, "avx512bw", "avx512vl"):
            return _high_halves(self.memory, self.start)
        return self.builder.bitcast(
            self.builder.and_(self.words[0], integers(0xFFFF0000, lanes)), vector_type(FLOAT, lanes)
        )

    def offsets(self, zero: Any) -> tuple[Any, Any]:
        """Return what `codes` needs for a vector of zeros (as floats): the same for all rows and columns of it."""
        lanes = self.format.lanes
        second = self.builder.fadd(zero, constant(2.0 ** (23 - self._second), lanes))
        if self._looks_up:
            table = ir.Constant(vector_type(FLOAT, 16), [float(code) for code in range(16)])
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
        return self.builder.fsub(self.builder.bitcast(bits, vector_type(FLOAT, lanes)), offsets[int(is_second)])

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
