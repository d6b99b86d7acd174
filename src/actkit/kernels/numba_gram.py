"""`gram.add_products` of bfloat16 in Numba: tiles of sums that stay in registers.

Two rows of X are packed into one, so that a 32-bit word holds two values of a channel. One instruction (vdpbf16ps)
multiplies a word with 16 others, adds the two products of each, and adds that to 16 sums: 8 words by 3 times 16 fill 24
of 32 registers. Both sides of a product come from the same packed X, whose channels lie in panels of 48.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor

from actkit.kernels.process import LOCK, compiled, follow_torch_threads
from actkit.kernels.vectors import FLOAT, I32, I64, Memory

LANES = 16  # 32-bit lanes of a vector
VECTORS, ROWS = 3, 8  # of a tile
PANEL = LANES * VECTORS
CHUNK = 512  # packed rows whose sums are added up before they are added to the matrix: two panels of them are 200 KB
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)


def available() -> bool:
    """Return whether Numba compiles for a processor with this instruction."""
    features = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    return {"+avx512bf16", "+avx512f"} <= features


class _Pairs(ir.Type):
    """32 bfloat16, a type that llvmlite has no class for."""

    def _to_string(self) -> str:
        return f"<{2 * LANES} x bfloat>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pairs)

    def __hash__(self) -> int:
        return hash(_Pairs)


PAIRS = _Pairs()


def _dot(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """Return total + the sum of two products of bfloat16, per 32-bit lane."""
    kind = ir.FunctionType(FLOATS, [FLOATS, PAIRS, PAIRS])
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(dot, [total, builder.bitcast(a, PAIRS), builder.bitcast(b, PAIRS)])


@intrinsic
def _add_tile(typingctx, out, at, stride, words, left, right, count):  # type: ignore[no-untyped-def]
    """Add the products of 8 channels with 48 others to a tile of sums.

    Args:
        out: float32, flat; updated.
        at: the first sum.
        stride: from row to row of the sums.
        words: the packed X, flat.
        left: the first word of the 8 channels.
        right: the first word of the 48.
        count: packed rows.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        out, at, stride, words, left, right, count = args
        sums = Memory(context, builder, signature.args[0], out)
        packed = Memory(context, builder, signature.args[3], words)
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(VECTORS)] for _ in range(ROWS)]
        undefined, everywhere = ir.Constant(WORDS, ir.Undefined), ir.Constant(WORDS, [0] * LANES)
        with cgutils.for_range(builder, count) as loop:
            row = builder.mul(loop.index, I64(PANEL))
            others = [
                packed.load(_bytes(builder, builder.add(builder.add(right, row), I64(v * LANES))), WORDS)
                for v in range(VECTORS)
            ]
            for r in range(ROWS):
                word = packed.load(_bytes(builder, builder.add(builder.add(left, row), I64(r))), I32)
                word = builder.insert_element(undefined, word, I32(0))
                word = builder.shuffle_vector(word, undefined, everywhere)
                for total, other in zip(totals[r], others, strict=True):
                    builder.store(_dot(builder, builder.load(total), word, other), total)
        for r in range(ROWS):
            first = builder.add(at, builder.mul(stride, I64(r)))
            for v in range(VECTORS):
                place = _bytes(builder, builder.add(first, I64(v * LANES)))
                sums.store(builder.fadd(sums.load(place, FLOATS), builder.load(totals[r][v])), place)
        return context.get_dummy_value()

    number = types.int64
    return types.void(out, number, number, words, number, number, number), generate


def _bytes(builder: Any, index: Any) -> Any:
    return builder.mul(index, I64(4))


@compiled(parallel=True)
def _pack(x, words):  # type: ignore[no-untyped-def]
    """x: uint16 [n, channels] -> words: uint32 [panels, half of n, 48], zeros past the ends."""
    rows, channels = x.shape
    for panel in prange(len(words)):
        for k in range(words.shape[1]):
            for j in range(PANEL):
                channel = panel * PANEL + j
                word = np.uint32(0)
                if channel < channels:
                    word = np.uint32(x[2 * k, channel])
                    if 2 * k + 1 < rows:
                        word |= np.uint32(x[2 * k + 1, channel]) << np.uint32(16)
                words[panel, k, j] = word


@compiled(parallel=True)
def _add(words, out, panels, packed):  # type: ignore[no-untyped-def]
    """Add to out, float32, flat, of panels * 48 rows and columns."""
    stride = panels * PANEL
    for pair in prange(panels * panels):
        a, b = pair // panels, pair % panels
        if a <= b:
            for start in range(0, packed, CHUNK):
                count = min(CHUNK, packed - start)
                for r in range(0, PANEL, ROWS):
                    at = (a * PANEL + r) * stride + b * PANEL
                    left, right = (a * packed + start) * PANEL + r, (b * packed + start) * PANEL
                    _add_tile(out, at, stride, words, left, right, count)


def add_products(gram: Tensor, x: Tensor) -> None:
    """Compute it; arguments are those of `gram.add_products`, x bfloat16 and the matrix float32."""
    panels, packed = -(-x.shape[1] // PANEL), -(-len(x) // 2)
    words = torch.empty(panels, packed, PANEL, dtype=torch.uint32)
    whole = panels * PANEL == x.shape[1] and gram.is_contiguous()
    out = gram if whole else gram.new_zeros(panels * PANEL, panels * PANEL)
    with LOCK:
        follow_torch_threads(x.nbytes)
        _pack(x.contiguous().view(torch.uint16).numpy(), words.numpy())
        _add(words.numpy().reshape(-1), out.view(-1).numpy(), panels, packed)
    if not whole:
        gram += out[: len(gram), : len(gram)]
