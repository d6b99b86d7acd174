"""Products in integers, written as vector IR: codes of 4 or 8 bits times activations in fixed point.

    x_j * scale_j = unit * (256 * high_j + low_j)      high and low: int8

Four rows are multiplied at once by an instruction that adds four products of bytes (vpdpbusd): the bytes of four rows
are interleaved with unpack instructions, four at a time side by side, and meet four bytes of activations. That
takes 7 instructions per cache line of 4-bit codes, while widening them to floats takes 27, so that memory decides. The
products and sums are exact; what is rounded is the activation, once, to 16 bits of the largest in its block. (8 bits
would take half of the byte products, and no less time: those do not decide.)

Unpacking permutes the outputs of a block of 128: vector k of a half has output 4 * lane + k + 16 * (place in the lane),
with lanes of four words. The sums stay in that order until the block of inputs ends; `finish` brings them back.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from actkit.kernels.vectors import FLOAT, I8, I32, I64, Block, Memory, constant, integers, multiply_add, splat

WIDE = 16  # 32-bit lanes of a vector
VECTORS = 8  # of a block of 128 columns
SMALLEST = 1e-30  # of a block's largest activation; below, its reciprocal would not be a float
LIMIT = 127.0 * 256  # the largest fixed-point activation: its high byte is signed, and so is the low one


@cache
def available() -> bool:
    """Return whether Numba compiles for a processor with these instructions."""
    features = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    return {"+avx512vnni", "+avx512bw", "+avx512vl"} <= features


WORDS, BYTES = ir.VectorType(I32, WIDE), ir.VectorType(I8, 4 * WIDE)
FLOATS = ir.VectorType(FLOAT, WIDE)


def _unpack(builder: Any, a: Any, b: Any, size: int, high: bool) -> Any:
    """The lower or upper halves of each 16 bytes of two vectors, elements of `size` bytes taken in turns."""
    count, per_lane = 64 // size, 16 // size
    kind = ir.VectorType(ir.IntType(8 * size), count)
    order = []
    for lane in range(4):
        begin = lane * per_lane + (per_lane // 2 if high else 0)
        order += [place + of for place in range(begin, begin + per_lane // 2) for of in (0, count)]
    mask = ir.Constant(ir.VectorType(I32, count), order)
    return builder.bitcast(builder.shuffle_vector(builder.bitcast(a, kind), builder.bitcast(b, kind), mask), WORDS)


def _side_by_side(builder: Any, rows: list[Any]) -> list[Any]:
    """Four rows of 64 bytes as four vectors whose words hold one byte of each row."""
    a, b, c, d = rows
    pairs = [(_unpack(builder, a, b, 1, high), _unpack(builder, c, d, 1, high)) for high in (False, True)]
    return [_unpack(builder, ab, cd, 2, high) for ab, cd in pairs for high in (False, True)]


def _transposed(builder: Any, u: list[Any]) -> list[Any]:
    """Vector i of the result holds place i of each lane of the four vectors: the inverse of what unpacking did."""
    found = []
    for high in (False, True):
        ab, cd = _unpack(builder, u[0], u[1], 4, high), _unpack(builder, u[2], u[3], 4, high)
        found += [_unpack(builder, ab, cd, 8, False), _unpack(builder, ab, cd, 8, True)]
    return found


def dot(builder: Any, total: Any, codes: Any, activations: Any) -> Any:
    """Return total + the sum of four products of unsigned and signed bytes, per word."""
    kind = ir.FunctionType(WORDS, [WORDS, BYTES, BYTES])
    add_four = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(add_four, [total, builder.bitcast(codes, BYTES), builder.bitcast(activations, BYTES)])


def everywhere(builder: Any, value: Any) -> Any:
    """Return a vector with the word in every lane."""
    undefined = ir.Constant(WORDS, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, value, I32(0)), undefined, integers(0, WIDE))


def _unary(builder: Any, name: str, value: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v16f32"), [value])


def _words(builder: Any, offset: Any) -> Any:
    return builder.mul(offset, I64(4))


# -- activations -------------------------------------------------------------------------------------------------------


@intrinsic
def largest(typingctx, maxima, at, weight, rows, values, scales):  # type: ignore[no-untyped-def]
    """Take the largest magnitudes: maxima[at + p] = max over rows r of |values[r] * scale[rows[r], p]| and itself.

    p runs over 16 pieces.

    Args:
        maxima: float32, updated.
        at: its first entry.
        weight: the records.
        rows: bytes at which the rows begin.
        values: one per row.
        scales: bytes from the beginning of a row to the scale of the first piece.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        maxima, at, weight, rows, values, scales = args
        found = Memory(context, builder, signature.args[0], maxima)
        memory = Memory(context, builder, signature.args[2], weight)
        place = _words(builder, at)
        total = found.load(place, FLOATS)
        for row, value in zip(cgutils.unpack_tuple(builder, rows), cgutils.unpack_tuple(builder, values)):
            scaled = builder.fmul(memory.load(builder.add(row, scales), FLOATS), splat(builder, value, WIDE))
            scaled = _unary(builder, "fabs", scaled)
            total = builder.select(builder.fcmp_ordered(">", scaled, total), scaled, total)
        found.store(total, place)
        return context.get_dummy_value()

    number = types.int64
    return types.void(maxima, number, weight, rows, values, number), generate


@intrinsic
def fix_points(typingctx, factors, at, step, apart, taken, factor, piece, weight, rows, values, scales, zeros, stored):  # type: ignore[no-untyped-def]
    """Bring the activations of some rows into fixed point, for 16 pieces p.

        q = round(values[r] * scale * factor[piece + p])

    Four rows make one word per piece, a byte each.

    Args:
        factors: written: [at + n * step + p] for the high bytes of the n-th four, and `apart` further for the low ones.
        at: see `factors`.
        step: see `factors`.
        apart: see `factors`.
        taken: [piece + p] += sum of q times the zero of the row; of q alone if none are stored.
        factor: what an activation is multiplied by.
        piece: the first piece.
        weight: the records.
        rows: bytes at which the rows begin.
        values: one per row.
        scales: bytes from the beginning of a row to the scale of the first piece.
        zeros: the same to its zero.
        stored: a tuple, empty if no zeros are stored.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        factors, at, step, apart, taken, factor, piece, weight, rows, values, scales, zeros, _ = args
        written = Memory(context, builder, signature.args[0], factors)
        sums = Memory(context, builder, signature.args[4], taken)
        inverse = Memory(context, builder, signature.args[5], factor).load(_words(builder, piece), FLOATS)
        memory = Memory(context, builder, signature.args[7], weight)
        rows, values = cgutils.unpack_tuple(builder, rows), cgutils.unpack_tuple(builder, values)
        total = sums.load(_words(builder, piece), WORDS)
        byte = integers(255, WIDE)
        for first in range(0, len(rows), 4):
            words = [integers(0, WIDE)] * 2
            for place in range(4):
                row, value = rows[first + place], values[first + place]
                scaled = builder.fmul(memory.load(builder.add(row, scales), FLOATS), splat(builder, value, WIDE))
                q = builder.fptosi(_unary(builder, "rint", builder.fmul(scaled, inverse)), WORDS)
                if signature.args[12].count:
                    zero = builder.zext(memory.load(builder.add(row, zeros), ir.VectorType(I8, WIDE), 1), WORDS)
                    total = builder.add(total, builder.mul(q, zero))
                else:
                    total = builder.add(total, q)
                # The low byte is signed too, so what it lacks goes to the high one.
                parts = [builder.ashr(builder.add(q, integers(128, WIDE)), integers(8, WIDE)), q]
                for number, part in enumerate(parts):
                    shifted = builder.shl(builder.and_(part, byte), integers(8 * place, WIDE))
                    words[number] = builder.or_(words[number], shifted)
            for number, word in enumerate(words):
                offset = builder.add(
                    at, builder.add(builder.mul(step, I64(first // 4)), builder.mul(apart, I64(number)))
                )
                written.store(word, _words(builder, offset))
        sums.store(total, _words(builder, piece))
        return context.get_dummy_value()

    number = types.int64
    signature = types.void(
        factors, number, number, number, taken, factor, number, weight, rows, values, number, number, stored
    )
    return signature, generate


# -- products ----------------------------------------------------------------------------------------------------------


def codes_of_four(builder: Any, kind: Any, rows: list[Any], place: Any, memory: Memory) -> list[Any]:
    """Return a block of four rows as eight vectors of words of unsigned bytes; of 4-bit codes the upper times 16."""
    if kind == types.uint8:
        found = _side_by_side(builder, [memory.load(builder.add(row, place), WORDS) for row in rows])
        low, high = integers(0x0F0F0F0F, WIDE), integers(0xF0F0F0F0, WIDE)
        return [builder.and_(words, low) for words in found] + [builder.and_(words, high) for words in found]
    halves = [builder.add(place, I64(half)) for half in (0, 64)]
    return [
        words
        for half in halves
        for words in _side_by_side(builder, [memory.load(builder.add(row, half), WORDS) for row in rows])
    ]


def in_order(builder: Any, kind: Any, totals: list[Any]) -> list[Any]:
    """Return the vectors of a block, 16 columns each, in the order of the columns."""
    first, second = totals[:4], totals[4:]
    if kind == types.uint8:  # columns of the lower and the upper codes take turns
        pairs = zip(_transposed(builder, first), _transposed(builder, second))
        return [vector for pair in pairs for vector in pair]
    return _transposed(builder, first) + _transposed(builder, second)


def _places(builder: Any, first: Any) -> list[Any]:
    return [_words(builder, builder.add(first, I64(WIDE * k))) for k in range(VECTORS)]


@intrinsic
def add_dots(typingctx, sums, first, weight, rows, place, factors, at, step, apart):  # type: ignore[no-untyped-def]
    """Add dot products: sums[first + c] += sum over rows of code * activation, for one block of 128 columns.

    Args:
        sums: int32, in the order of unpacking.
        first: its first entry.
        weight: the records.
        rows: bytes at which the rows begin.
        place: bytes from the beginning of a row to the block.
        factors: as `fix_points` writes them.
        at: the word of the block's piece for the first four rows.
        step: as in `fix_points`.
        apart: as in `fix_points`.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        sums, first, weight, rows, place, factors, at, step, apart = args
        kind = signature.args[2].dtype
        memory = Memory(context, builder, signature.args[2], weight)
        given = Memory(context, builder, signature.args[5], factors)
        written = Memory(context, builder, signature.args[0], sums)
        rows = cgutils.unpack_tuple(builder, rows)
        places = _places(builder, first)
        low = [written.load(offset, WORDS) for offset in places]
        high: list[Any] = [integers(0, WIDE)] * VECTORS
        for n in range(len(rows) // 4):
            codes = codes_of_four(builder, kind, rows[4 * n : 4 * n + 4], place, memory)
            for plane, total in enumerate((high, low)):
                offset = builder.add(builder.mul(apart, I64(plane)), builder.mul(step, I64(n)))
                word = everywhere(builder, given.load(_words(builder, builder.add(at, offset)), I32))
                for k, code in enumerate(codes):
                    total[k] = dot(builder, total[k], code, word)
        for k, offset in enumerate(places):
            written.store(builder.add(builder.shl(high[k], integers(8, WIDE)), low[k]), offset)
        return context.get_dummy_value()

    number = types.int64
    signature = types.void(sums, number, weight, rows, number, factors, number, number, number)
    return signature, generate


def _taken(builder: Any, kind: Any, memory: Memory, places: list[Any]) -> list[Any]:
    """Return the sums of a block, and set them to zero."""
    found = [memory.load(offset, WORDS) for offset in places]
    if kind == types.uint8:  # those of the upper codes are 16 times as large
        found[4:] = [builder.ashr(total, integers(4, WIDE)) for total in found[4:]]
    for offset in places:
        memory.store(integers(0, WIDE), offset)
    return found


@intrinsic
def finish_records(typingctx, out, column, weight, sums, first, unit, taken):  # type: ignore[no-untyped-def]
    """Add out[column + c] += unit * (sums[c] - taken), in the order of the columns of one block; sums become zero."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        out, column, _, sums, first, unit, taken = args
        kind = signature.args[2].dtype
        written = Memory(context, builder, signature.args[0], out)
        memory = Memory(context, builder, signature.args[3], sums)
        totals = _taken(builder, kind, memory, _places(builder, first))
        unit, taken = splat(builder, unit, WIDE), everywhere(builder, taken)
        for k, total in enumerate(in_order(builder, kind, totals)):
            offset = _words(builder, builder.add(column, I64(WIDE * k)))
            value = builder.sitofp(builder.sub(total, taken), FLOATS)
            written.store(multiply_add(builder, value, unit, written.load(offset, FLOATS)), offset)
        return context.get_dummy_value()

    number = types.int64
    signature = types.void(out, number, weight, sums, number, types.float32, types.int32)
    return signature, generate


@intrinsic
def finish_groups(
    typingctx, out, column, weight, sums, first, unit, total, scale, scale_at, zeros, zeros_at, zero, stored
):  # type: ignore[no-untyped-def]
    """Add out[column + c] += unit * scale[scale_at + c] * (sums[c] - total * zero[c]); sums become zero.

    Args:
        out: float32, updated.
        column: the first one.
        weight: the codes, for their type.
        sums: int32, as `add_dots` leaves them.
        first: the first entry of the block.
        unit: of the fixed-point activations.
        total: int32, the sum of the fixed-point activations.
        scale: float32.
        scale_at: its first entry.
        zeros: an array like weight, whose block at byte zeros_at holds the zeros, if they are stored.
        zeros_at: see `zeros`.
        zero: serves all columns if no zeros are stored.
        stored: a tuple, empty if no zeros are stored.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        out, column, _, sums, first, unit, total, scale, scale_at, zeros, zeros_at, zero, _ = args
        kind = signature.args[2].dtype
        written = Memory(context, builder, signature.args[0], out)
        memory = Memory(context, builder, signature.args[3], sums)
        scales = Memory(context, builder, signature.args[7], scale)
        found = _taken(builder, kind, memory, _places(builder, first))
        unit, total = splat(builder, unit, WIDE), everywhere(builder, total)
        own = None
        if signature.args[12].count:
            own = Block(context, Memory(context, builder, signature.args[9], zeros), kind, zeros_at)
            plain = own.offsets(constant(0.0, WIDE))
        else:
            same = builder.mul(total, everywhere(builder, builder.fptosi(zero, I32)))
        for k, value in enumerate(in_order(builder, kind, found)):
            offset = I64(WIDE * k)
            taken = same if own is None else builder.mul(total, builder.fptosi(own.codes(k, plain), WORDS))
            value = builder.sitofp(builder.sub(value, taken), FLOATS)
            factor = builder.fmul(unit, scales.load(_words(builder, builder.add(scale_at, offset)), FLOATS))
            at = _words(builder, builder.add(column, offset))
            written.store(multiply_add(builder, value, factor, written.load(at, FLOATS)), at)
        return context.get_dummy_value()

    number = types.int64
    signature = types.void(
        out, number, weight, sums, number, types.float32, types.int32, scale, number, zeros, number, types.float32,
        stored,
    )  # fmt: skip
    return signature, generate
