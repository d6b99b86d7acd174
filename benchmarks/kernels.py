"""The sparse kernel against the memory: bf16, one token, half and 70 % of the inputs dropped at random.

    python benchmarks/kernels.py [--quick] [--json PATH|-]

Three ratios, all measured interleaved in one run, over more weights than the caches hold:
- to the *pure read*: the fastest way found to read the same rows of the same buffer and to do nothing with them, over
  rows one by one or eight side by side, prefetch distances of 0, 8, 16 and 32 rows into the L1 or L2 cache, and both
  ways of splitting the rows over the threads. Where nothing is dropped it is itself held against a plain stream;
- to our own kernel with nothing dropped: this one is the effect of sparsity;
- to torch's best path over the same bytes, of which the layout is a large part.
Each timed call follows an untimed plain stream, which leaves caches and hardware prefetchers in one state for all: a
call right after a reader with another prefetch distance takes up to 20 % longer.

The kernel and the pure read are timed alike, as compiled functions over a list of rows, four layers per call, as a
decoder crosses them. The operator is what a user calls for one layer: compaction, checks and casts included. Its Python
side takes 20 microseconds when warm, but some 400 behind 90 MB that have just swept the caches.
"""

from __future__ import annotations

import sys
from itertools import cycle
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common  # isort: skip  (before torch: it sets how idle threads wait)
import numba
import numpy as np
import psutil
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch.nn import functional as F

from actkit import kernels
from actkit.kernels.numba_cpu import multiply
from actkit.kernels.packing import allocate

SPARSITIES = (0.0, 0.5, 0.7)
LANES = 32  # bf16 values in a cache line
LAYERS = 4  # that one call of a compiled function crosses
FULL = {"shape": (4096, 11008), "repeats": 60, "of_read": 0.85, "of_dense": {0.5: 1.15, 0.7: 1.7}}
QUICK = {"shape": (2048, 5504), "repeats": 15, "of_read": 0.75, "of_dense": {0.5: 1.1, 0.7: 1.5}}


# -- the yardstick: read rows, do nothing ------------------------------------------------------------------------------


def _toucher(locality: int) -> Any:
    """Reads one cache line of each row into a running exclusive or, and prefetches the same line of the rows ahead."""

    @intrinsic
    def touch(typingctx, sink, weight, rows, ahead, column):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            sink, weight, rows, ahead, column = args
            i8, i32, line = ir.IntType(8), ir.IntType(32), ir.VectorType(ir.IntType(16), LANES)

            def address(kind, array, offset, pointee):  # type: ignore[no-untyped-def]
                data = context.make_array(kind)(context, builder, array).data
                return builder.bitcast(builder.gep(data, [offset]), pointee.as_pointer())

            if locality:
                kind = ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
                prefetch = builder.module.declare_intrinsic("llvm.prefetch", [i8.as_pointer()], kind)
                for row in cgutils.unpack_tuple(builder, ahead):
                    place = address(signature.args[1], weight, builder.add(row, column), i8)
                    builder.call(prefetch, [place, i32(0), i32(locality), i32(1)])
            total_at = address(signature.args[0], sink, ir.IntType(64)(0), line)
            total = builder.load(total_at, align=2)
            for row in cgutils.unpack_tuple(builder, rows):
                place = address(signature.args[1], weight, builder.add(row, column), line)
                total = builder.xor(total, builder.load(place, align=2))
            builder.store(total, total_at, align=2)
            return context.get_dummy_value()

        return types.void(sink, weight, rows, ahead, types.int64), generate

    return touch


@njit(inline="always")
def _one(indices, i, last, start, tile):  # type: ignore[no-untyped-def]
    return (start + np.int64(indices[min(i, last)]) * tile,)


@njit(inline="always")
def _eight(indices, i, last, start, tile):  # type: ignore[no-untyped-def]
    return (
        start + np.int64(indices[min(i, last)]) * tile,
        start + np.int64(indices[min(i + 1, last)]) * tile,
        start + np.int64(indices[min(i + 2, last)]) * tile,
        start + np.int64(indices[min(i + 3, last)]) * tile,
        start + np.int64(indices[min(i + 4, last)]) * tile,
        start + np.int64(indices[min(i + 5, last)]) * tile,
        start + np.int64(indices[min(i + 6, last)]) * tile,
        start + np.int64(indices[min(i + 7, last)]) * tile,
    )


def _reader(group: int, locality: int) -> Any:
    """Reads the active rows of all tiles; `parts` > 1 splits the rows over the threads, otherwise the tiles."""
    touch, rows_from = _toucher(locality), _one if group == 1 else _eight

    @njit(parallel=True, error_model="numpy", boundscheck=False)
    def read(weight, n_tiles, n_in, tile, indices, n, distance, parts, sinks):  # type: ignore[no-untyped-def]
        jobs = parts if parts > 1 else n_tiles
        for job in prange(jobs):
            sink = sinks[job]
            first_tile, last_tile = (0, n_tiles) if parts > 1 else (job, job + 1)
            groups = n // group
            low, high = (groups * job // parts, groups * (job + 1) // parts) if parts > 1 else (0, groups)
            for t in range(first_tile, last_tile):
                start = np.int64(t) * n_in * tile
                for i in range(low * group, high * group, group):
                    rows = rows_from(indices, i, n - 1, start, tile)
                    ahead = rows_from(indices, i + distance, n - 1, start, tile)
                    for column in range(0, tile, LANES):
                        touch(sink, weight, rows, ahead, column)

    return read


def _layers(read: Any) -> Any:
    """The reader over some layers of weights, in one call."""

    @njit(error_model="numpy", boundscheck=False)
    def read_layers(weights, first, n_tiles, n_in, tile, indices, n, distance, parts, sinks):  # type: ignore[no-untyped-def]
        for layer in range(first, first + LAYERS):
            read(weights[layer], n_tiles, n_in, tile, indices, n, distance, parts, sinks)

    return read_layers


@njit(error_model="numpy", boundscheck=False)
def _multiply_layers(weights, first, indices, values, count, sums):  # type: ignore[no-untyped-def]
    """The kernel over some layers. weights: uint16 [layers, n_tiles, in, tile]."""
    for layer in range(first, first + LAYERS):
        multiply(weights[layer], indices, values, count, sums)


@njit(parallel=True, error_model="numpy", boundscheck=False)
def _stream(words, parts, sinks):  # type: ignore[no-untyped-def]
    """Read everything from one end to the other. words: uint64 [n]."""
    for job in prange(parts):
        part = words[words.size * job // parts : words.size * (job + 1) // parts]
        total = np.uint64(0)
        for i in range(part.size):
            total ^= part[i]
        sinks[job, 0] = np.uint16(total)


# -- the measurement ---------------------------------------------------------------------------------------------------


def measure(shape: tuple[int, int], repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per sparsity, and what was rotated over. shape: inputs, outputs."""
    n_in, n_out = shape
    threads = torch.get_num_threads()
    numba.set_num_threads(threads)
    generator = np.random.default_rng(0)
    first = kernels.pack(torch.randn(n_out, n_in).bfloat16())
    n_tiles, _, tile = first.buffer.shape
    cache = common.last_level_cache()
    copies = ceil(1.5 * cache / (first.nbytes * (1 - max(SPARSITIES)) * LAYERS)) * LAYERS + LAYERS
    if copies * first.nbytes > 0.5 * psutil.virtual_memory().available:
        raise SystemExit(f"{copies} copies of a weight of {first.nbytes:,} bytes do not fit into half of the memory.")
    buffers = allocate((copies * n_tiles, n_in, tile), torch.bfloat16).view(copies, n_tiles, n_in, tile)
    buffers.copy_(first.buffer.expand_as(buffers))
    weights = [kernels.PackedWeight(buffer, n_out) for buffer in buffers]
    turn = cycle(range(copies))  # every call reads the weight that was not read for longest
    turns = cycle(range(0, copies, LAYERS))
    layers = buffers.view(torch.uint16).numpy()
    plain = [buffer.view(-1)[: n_in * n_out] for buffer in buffers]  # the same bytes, as torch lays them out
    sinks = np.zeros((max(n_tiles, threads), LANES), np.uint16)
    sums = np.zeros(n_tiles * tile, np.float32)
    everything = (np.arange(n_in, dtype=np.int32), generator.standard_normal(n_in, np.float32), n_in)
    readers = {(group, level): _layers(_reader(group, level)) for group in (1, 8) for level in (0, 2, 3)}
    rows: list[dict[str, Any]] = []
    for sparsity in SPARSITIES:
        kept = round(n_in * (1 - sparsity)) // 8 * 8
        state: dict[str, Any] = {}

        def draw(state: dict[str, Any] = state, kept: int = kept) -> None:
            state["indices"] = np.sort(generator.permutation(n_in)[:kept]).astype(np.int32)
            x = torch.zeros(1, n_in)
            x[0, torch.from_numpy(state["indices"]).long()] = torch.randn(kept).abs() + 0.1
            state["x"] = x.bfloat16()
            active = kernels.compact(state["x"], threshold=0.0)
            state["active"] = (active.indices[0].numpy(), active.values[0].numpy(), kept)

        def read(
            key: tuple[int, int], distance: int, parts: int, state: dict[str, Any] = state, kept: int = kept
        ) -> Any:
            run = readers[key]
            return lambda: run(layers, next(turns), n_tiles, n_in, tile, state["indices"], kept, distance, parts, sinks)

        variants: dict[str, Any] = {
            "kernel": lambda s=state: _multiply_layers(layers, next(turns), *s["active"], sums),
            "own dense": lambda: _multiply_layers(layers, next(turns), *everything, sums),
            "operator": lambda s=state: kernels.sparse_linear(s["x"], weights[next(turn)], threshold=0.0),
            "dense operator": lambda s=state: kernels.sparse_linear(s["x"], weights[next(turn)]),
            "stream": lambda: _stream(layers[next(turn)].reshape(-1).view(np.uint64), threads, sinks),
            "F.linear, out x in": lambda s=state: F.linear(s["x"], plain[next(turn)].view(n_out, n_in)),
            "F.linear, in x out": lambda s=state: F.linear(s["x"], plain[next(turn)].view(n_in, n_out).t()),
            "mv, out x in": lambda s=state: torch.mv(plain[next(turn)].view(n_out, n_in), s["x"][0]),
            "mv, in x out": lambda s=state: torch.mv(plain[next(turn)].view(n_in, n_out).t(), s["x"][0]),
        }
        for group in (1, 8):
            for parts in (1, threads) if threads > 1 else (1,):
                split = "rows" if parts > 1 else "tiles"
                variants[f"read {group}, {split}, no prefetch"] = read((group, 0), 0, parts)
                for distance in (8, 16, 32):
                    for level in (2, 3):
                        name = f"read {group}, {split}, {distance} ahead into L{4 - level}"
                        variants[name] = read((group, level), distance, parts)
        seconds = common.interleaved(variants, repeats, draw, between=variants["stream"])
        for name in seconds:
            if name.startswith(("read", "kernel", "own dense")):
                seconds[name] = [value / LAYERS for value in seconds[name]]
        yardstick, torchs = _fastest(seconds, "read"), _fastest(seconds, ("F.linear", "mv"))
        kernel, dense, operator = seconds["kernel"], seconds["own dense"], seconds["operator"]
        of_read = common.ratio(seconds[yardstick], kernel)
        of_dense = common.ratio(dense, kernel)
        of_torch = common.ratio(seconds[torchs], kernel)
        gigabytes = kept * n_out * 2 / 1e9
        rows.append(
            {
                "sparsity": sparsity,
                "kernel ms": median(kernel) * 1e3,
                "kernel GB/s": gigabytes / median(kernel),
                "of pure read": of_read["ratio"],
                "of pure read, deciles": of_read["deciles"],
                "x own dense": of_dense["ratio"],
                "x own dense, deciles": of_dense["deciles"],
                "x torch": of_torch["ratio"],
                "x torch, deciles": of_torch["deciles"],
                "operator ms": median(operator) * 1e3,
                "operator, of pure read": common.ratio(seconds[yardstick], operator)["ratio"],
                "operator, x its dense": common.ratio(seconds["dense operator"], operator)["ratio"],
                "operator, x torch": common.ratio(seconds[torchs], operator)["ratio"],
                "pure read GB/s": gigabytes / median(seconds[yardstick]),
                "stream GB/s": first.nbytes / median(seconds["stream"]) / 1e9,
                "pure read": yardstick,
                "torch": f"{torchs}, {n_in * n_out * 2 / median(seconds[torchs]) / 1e9:.1f} GB/s",
            }
        )
    rotated = {"copies": copies, "rotated_bytes": copies * first.nbytes, "last_level_cache": cache}
    return rows, {"shape": f"{n_in} -> {n_out}", "tile": tile, **rotated}


def _fastest(seconds: dict[str, list[float]], start: str | tuple[str, ...]) -> str:
    """The variant with the smallest median among those whose name starts so."""
    return min((name for name in seconds if name.startswith(start)), key=lambda name: median(seconds[name]))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    chosen = common.options(__doc__.splitlines()[0], arguments)  # type: ignore[union-attr]
    setting: dict[str, Any] = QUICK if chosen.quick else FULL
    with torch.no_grad():
        rows, rotated = measure(setting["shape"], setting["repeats"])
    targets = []
    for row in rows:
        share = f"{row['sparsity']:.0%} dropped"
        targets.append(common.target(f"{share}: of the pure read", row["of pure read"], at_least=setting["of_read"]))
        if row["sparsity"] in setting["of_dense"]:
            bound = setting["of_dense"][row["sparsity"]]
            targets.append(common.target(f"{share}: times our own dense", row["x own dense"], at_least=bound))
    checked = rows[0]["pure read GB/s"] / rows[0]["stream GB/s"]
    targets.append(common.target("the pure read of all rows, of a plain stream", checked, at_least=0.9))
    return common.report("kernels", rows, targets, chosen, **rotated)


if __name__ == "__main__":
    main()
