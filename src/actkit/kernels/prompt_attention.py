"""Attention of a prompt's tokens in bfloat16, with the processor's products of bfloat16 pairs (vdpbf16ps).

    out_i = sum over t of p_it v_t,   p_it = exp(scaling (q_i . k_t - the largest)) / their sum,   t <= i

Some queries of a head are taken at a time: the scores of all keys that one of them sees are written to a buffer that
stays in the cache, each row of it becomes probabilities, and these meet the values. Keys that none of them sees are not
touched. torch's own kernel is far from what the processor does: its products are of small matrices.

Queries, keys, values and probabilities are rounded to bfloat16, as torch does; scores and sums are float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from actkit.kernels.decode_math import LOOSE, exponential, from_bits
from actkit.kernels.integer_dots import FLOATS, WIDE, WORDS, everywhere
from actkit.kernels.numba_cpu import array, as_stored
from actkit.kernels.process import LOCK, compiled, follow_torch_threads
from actkit.kernels.vectors import I32, I64, Memory, constant

ROWS, PART = 4, 4  # of a tile: queries, and vectors of keys or of features
COLUMNS = PART * WIDE
QUERIES = 16  # taken at a time


class _BFloat(ir.Type):
    """The type of IR that llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS = ir.VectorType(_BFloat(), 2 * WIDE)


@cache
def available() -> bool:
    """Return whether Numba compiles for a processor with these instructions."""
    features = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    return {"+avx512bf16", "+avx512bw", "+avx512vl"} <= features


@intrinsic
def _tile(typingctx, out, at, width, left, row, stride, right, column, step, count):  # type: ignore[no-untyped-def]
    """Multiply four rows of pairs with 64 columns of pairs: out[r, c] = sum over n of left[r, n] . right[n, c].

    Args:
        out: float32, written.
        at: where, in bytes.
        width: bytes from one row of out to the next.
        left: words of two bfloat16.
        row: byte at which the first of the four rows begins.
        stride: bytes from one row to the next.
        right: the same.
        column: byte at which the columns begin.
        step: bytes from one n to the next.
        count: how many n.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        out, at, width, left, row, stride, right, column, step, count = args
        written = Memory(context, builder, signature.args[0], out)
        rows = Memory(context, builder, signature.args[3], left)
        columns = Memory(context, builder, signature.args[6], right)
        kind = ir.FunctionType(FLOATS, [FLOATS, PAIRS, PAIRS])
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        totals = [cgutils.alloca_once_value(builder, constant(0.0, WIDE)) for _ in range(ROWS * PART)]
        for total in totals:
            builder.store(constant(0.0, WIDE), total)
        begins = [builder.add(row, builder.mul(stride, I64(r))) for r in range(ROWS)]
        with cgutils.for_range(builder, count, intp=I64) as loop:
            place = builder.add(column, builder.mul(loop.index, step))
            blocks = [columns.load(builder.add(place, I64(64 * k)), WORDS) for k in range(PART)]
            for r, begin in enumerate(begins):
                word = everywhere(builder, rows.load(builder.add(begin, builder.mul(loop.index, I64(4))), I32))
                for k, block in enumerate(blocks):
                    total = totals[r * PART + k]
                    pairs = [builder.bitcast(each, PAIRS) for each in (word, block)]
                    builder.store(builder.call(dot, [builder.load(total), *pairs]), total)
        for r in range(ROWS):
            for k in range(PART):
                place = builder.add(builder.add(at, builder.mul(width, I64(r))), I64(64 * k))
                written.store(builder.load(totals[r * PART + k]), place)
        return context.get_dummy_value()

    number = types.int64
    return types.void(out, number, number, left, number, number, right, number, number, number), generate


@compiled(inner=True)
def _largest(scores):  # type: ignore[no-untyped-def]
    """Return the largest; NaN if there is one. Integers in the order of floats are compared, which becomes vectors."""
    words = scores.view(np.int32)
    found = np.int32(-2147483648)
    for t in range(words.size):
        word = np.int32(words[t] ^ ((words[t] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        found = word if word > found else found
    return from_bits(np.int32(found ^ ((found >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@compiled(fastmath=LOOSE, inner=True)
def _exponentials(scores, largest, scaling, chances):  # type: ignore[no-untyped-def]
    """Write exp(scaling (score - largest)) into chances, uint16 (bf16); return their sum."""
    total = np.float32(0.0)
    for t in range(scores.size):
        chance = exponential((scores[t] - largest) * scaling)
        chances[t] = as_stored(chance, chances)
        total += chance
    return total


@compiled(parallel=True)
def _attend(queries, keys, values, begin, window, scaling, out):  # type: ignore[no-untyped-def]
    """Write out, uint16 (bf16) [tokens, heads * size].

    Args:
        queries: int32 [heads, whole tiles of tokens, size / 2], pairs of features.
        keys: int32 [key-value heads, size / 2, whole tiles of keys], pairs of features.
        values: int32 [key-value heads, whole tiles of keys / 2, whole tiles of features], pairs of keys.
        begin: the position of the first query.
        window: keys that a query sees, 0 for all before it.
        scaling: of the scores.
        out: written.
    """
    heads, padded, half = queries.shape
    tokens, size, every, features = len(out), 2 * half, keys.shape[2], values.shape[2]
    shared_by = heads // len(keys)
    blocks = padded // QUERIES
    for job in prange(heads * blocks):
        head, turn = job % heads, job // heads
        # Later queries see more keys: an early block and a late one in turns, so that threads have equal shares.
        first = (turn // 2 if turn % 2 == 0 else blocks - 1 - turn // 2) * QUERIES
        own, last = head // shared_by, min(first + QUERIES, tokens)
        low = max(0, begin + first + 1 - window) // COLUMNS * COLUMNS if window > 0 else 0
        high = -(-(begin + last) // COLUMNS) * COLUMNS
        width = high - low
        scores = np.empty(QUERIES * width, np.float32)
        chances = np.zeros(QUERIES * width, np.uint16)
        sums = np.empty(QUERIES * features, np.float32)
        totals = np.empty(QUERIES, np.float32)
        for r in range(0, QUERIES, ROWS):
            row = ((head * padded) + first + r) * half * 4
            for t in range(0, width, COLUMNS):
                place = (own * half * every + low + t) * 4
                _tile(scores, (r * width + t) * 4, width * 4, queries, row, half * 4, keys, place, every * 4, half)
        for r in range(last - first):
            after = begin + first + r + 1 - low
            before = max(0, after - window) if window > 0 else 0
            seen = scores[r * width + before : r * width + after]
            totals[r] = _exponentials(seen, _largest(seen), scaling, chances[r * width + before : r * width + after])
        for r in range(0, QUERIES, ROWS):
            for c in range(0, features, COLUMNS):
                place = ((own * (every // 2) + low // 2) * features + c) * 4
                _tile(
                    sums, (r * features + c) * 4, features * 4, chances, r * width * 2, width * 2, values, place,
                    features * 4, width // 2,
                )  # fmt: skip
        for r in range(last - first):
            found, written = sums[r * features : r * features + size], out[first + r, head * size : (head + 1) * size]
            for j in range(size):
                written[j] = as_stored(found[j] / totals[r], out)


def attend(query: Tensor, keys: Tensor, values: Tensor, begin: int, window: int, scaling: Any) -> Tensor:
    """Attend with the queries of some tokens.

    Args:
        query: bfloat16 [heads, tokens, size], of an even size.
        keys: bfloat16 [key-value heads, begin + tokens, size].
        values: the same.
        begin: the position of the first query.
        window: keys that a query sees, itself among them; 0 for all.
        scaling: of the scores, float32.

    Returns:
        bfloat16 [tokens, heads * size].
    """
    heads, tokens, size = query.shape
    features, more = -size % COLUMNS, -keys.shape[1] % COLUMNS
    query = F.pad(query, (0, 0, 0, -tokens % QUERIES)).contiguous().view(torch.int32)
    by_feature = F.pad(keys, (0, 0, 0, more)).contiguous().view(torch.int32).transpose(1, 2).contiguous()
    values = F.pad(values, (0, features, 0, more)).unflatten(1, (-1, 2))
    pairs = values.transpose(2, 3).contiguous().view(torch.int32)
    out = torch.empty(tokens, heads * size, dtype=torch.bfloat16)
    with LOCK:
        follow_torch_threads(query.nbytes, keys.shape[1])
        _attend(query.numpy(), by_feature.numpy(), pairs.squeeze(-1).numpy(), begin, window, scaling, array(out))
    return out
