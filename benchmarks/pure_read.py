"""The yardstick of the kernels: read the same rows and do nothing with them, in the fastest way found.

A table lists what is to be read: pieces of memory with rows at equal distances, of which some are active. The rows are
read one by one or eight side by side, with prefetch distances of 0, 8, 16 and 32 rows into the L1 or L2 cache, each
thread its own pieces or its share of the rows of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from actkit.kernels.team import address_of

ADDRESS, STRIDE, BYTES, FIRST, COUNT, OWNER = range(6)  # fields of a piece; FIRST and COUNT: in the list of rows
FIELDS = 6
LINE = 64  # bytes
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
INTO = {0: "no prefetch", 2: "into L2", 3: "into L1"}  # the locality argument of llvm.prefetch


def _toucher(locality: int) -> Any:
    """Reads one cache line of each row into a running exclusive or, and prefetches the same line of the rows ahead."""

    @intrinsic
    def touch(typingctx, sink, memory, rows, ahead, place):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            sink, memory, rows, ahead, place = args
            line = ir.VectorType(I64, LINE // 8)

            def at(kind, array, offset, pointee):  # type: ignore[no-untyped-def]
                data = builder.bitcast(context.make_array(kind)(context, builder, array).data, I8.as_pointer())
                return builder.bitcast(builder.gep(data, [offset]), pointee.as_pointer())

            if locality:
                kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
                prefetch = builder.module.declare_intrinsic("llvm.prefetch", [I8.as_pointer()], kind)
                for row in cgutils.unpack_tuple(builder, ahead):
                    where = at(signature.args[1], memory, builder.add(row, place), I8)
                    builder.call(prefetch, [where, I32(0), I32(locality), I32(1)])
            total_at = at(signature.args[0], sink, I64(0), line)
            total = builder.load(total_at, align=8)
            for row in cgutils.unpack_tuple(builder, rows):
                where = at(signature.args[1], memory, builder.add(row, place), line)
                total = builder.xor(total, builder.load(where, align=8))
            builder.store(total, total_at, align=8)
            return context.get_dummy_value()

        return types.void(sink, memory, rows, ahead, types.int64), generate

    return touch


@njit(inline="always")
def _one(listed, i, last, stride):  # type: ignore[no-untyped-def]
    return (np.int64(listed[min(i, last)]) * stride,)


@njit(inline="always")
def _eight(listed, i, last, stride):  # type: ignore[no-untyped-def]
    return (
        np.int64(listed[min(i, last)]) * stride,
        np.int64(listed[min(i + 1, last)]) * stride,
        np.int64(listed[min(i + 2, last)]) * stride,
        np.int64(listed[min(i + 3, last)]) * stride,
        np.int64(listed[min(i + 4, last)]) * stride,
        np.int64(listed[min(i + 5, last)]) * stride,
        np.int64(listed[min(i + 6, last)]) * stride,
        np.int64(listed[min(i + 7, last)]) * stride,
    )


@cache
def reader(group: int, locality: int) -> Any:
    """A compiled function that reads all pieces. group: rows side by side, 1 or 8."""
    touch, rows_from = _toucher(locality), _one if group == 1 else _eight

    @njit(parallel=True, error_model="numpy", boundscheck=False)
    def read(table, listed, distance, threads, share_rows, sinks):  # type: ignore[no-untyped-def]
        for thread in prange(threads):
            sink = sinks[thread]
            for piece in table:
                if not share_rows and piece[OWNER] != thread:
                    continue
                groups = (piece[COUNT] + group - 1) // group
                low, high = (
                    (groups * thread // threads, groups * (thread + 1) // threads) if share_rows else (0, groups)
                )
                memory = carray(address_of(piece[ADDRESS]), (np.int64(1),), np.uint8)
                rows = listed[piece[FIRST] : piece[FIRST] + piece[COUNT]]
                for i in range(low * group, high * group, group):
                    here = rows_from(rows, i, rows.size - 1, piece[STRIDE])
                    ahead = rows_from(rows, i + distance, rows.size - 1, piece[STRIDE])
                    for place in range(0, piece[BYTES], LINE):
                        touch(sink, memory, here, ahead, place)

    return read


def ways(
    tables: np.ndarray | Iterator[np.ndarray], listed: np.ndarray, threads: int
) -> Iterator[tuple[str, Callable[[], None]]]:
    """All ways to read the pieces of a table int64 [pieces, FIELDS] with row numbers `listed` int32: name, function.

    tables: one, or an iterator that gives each call its own.
    """
    sinks = np.zeros((threads, LINE // 8), np.uint64)
    turns = cycle([tables]) if isinstance(tables, np.ndarray) else tables
    for group in (1, 8):
        for locality in INTO:
            read = reader(group, locality)
            for distance in (8, 16, 32) if locality else (0,):
                for share_rows in (False, True) if threads > 1 else (False,):
                    name = f"{group} at a time, {'rows' if share_rows else 'columns'} shared, "
                    name += f"{distance} ahead {INTO[locality]}" if locality else INTO[locality]
                    yield name, lambda r=read, d=distance, s=share_rows: r(next(turns), listed, d, threads, s, sinks)


class Yardstick:
    """How fast a decoder's reads of its weights can be: rows drawn at random, as many of each piece as it reads.

    decoder: `actkit.runtime.decoder.Decoder`, after some steps. kept: ways that stay in the race after a first look.
    """

    def __init__(self, decoder: Any, kept: int = 3) -> None:
        generator = np.random.default_rng(0)
        pieces, listed, at = [], [], 0
        for read in decoder.reads():
            count = round(read.mean)
            listed.append(np.sort(generator.permutation(read.rows)[:count]).astype(np.int32))
            pieces.append([read.address, read.row_bytes, read.row_bytes, at, count, read.thread])
            at += count
        table = np.array(pieces, np.int64)
        self.nbytes = float((table[:, BYTES] * table[:, COUNT]).sum())
        timed = []
        for name, function in ways(table, np.concatenate(listed), decoder.threads):
            function()
            timed.append((_seconds(function, 2), name, function))
        self.ways = [(name, function) for _, name, function in sorted(timed, key=lambda found: found[0])[:kept]]

    def measure(self, repeats: int = 5) -> dict[str, Any]:
        """Seconds of the fastest way now (the median of the repeats), gigabytes per second, and its name."""
        seconds, name = min((_seconds(function, repeats), name) for name, function in self.ways)
        return {"seconds": seconds, "way": name, "gigabytes_per_second": self.nbytes / seconds / 1e9}


def _seconds(function: Callable[[], None], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return median(found)
