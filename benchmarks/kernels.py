"""The kernels against the memory: bf16, int8 and int4 weights, half and 70 % of the inputs dropped at random.

    python benchmarks/kernels.py [--quick] [--json PATH|-]

Three ratios, all measured interleaved in one run, over more weights than the caches hold:
- to the *pure read*: the fastest way found to read the same rows of the same buffer and to do nothing with them
  (`pure_read`). Where nothing is dropped it is itself held against a plain stream;
- to our own kernel with nothing dropped: this one is the effect of sparsity;
- for bf16, to torch's best path over the same bytes, of which the layout is a large part.
Each timed call follows an untimed plain stream, which leaves caches and hardware prefetchers in one state for all: a
call right after a reader with another prefetch distance takes up to 20 % longer.

Kernels and the pure read are timed alike, as compiled functions over a list of rows, four layers per call, as a decoder
crosses them. Integer weights have a scale per input and group of 128 outputs, and meet activations in fixed point, as
in the decoder. The operator (bf16) is what a user calls for one layer: compaction, checks and casts included.

Inputs that are kept in runs of 2, 4 and 8 neighbours, as units would be after a permutation by co-activation, are timed
beside the same number at random (`runs`): what such a permutation could gain, before any quality is paid for it.

The crossover: a sparse product of several rows of x reads each row's inputs apart, a dense one serves all rows with one
pass. It is printed how many rows, of the two that the operator takes, are still faster sparse.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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
import pure_read
import torch
from numba import njit, prange
from torch.nn import functional as F

from actkit import kernels
from actkit.kernels import integer_dots
from actkit.kernels.numba_cpu import multiply
from actkit.kernels.numba_integer import multiply_record_dots, scratch
from actkit.kernels.packing import aligned, allocate
from actkit.kernels.quantized import BLOCK

KINDS = {"bf16": 16, "int8": 8, "int4": 4}
SPARSITIES = (0.0, 0.5, 0.7)
LAYERS = 4  # that one call of a compiled function crosses
RUNS = (2, 4, 8)  # neighbours that are kept or dropped together
BATCHES = (1, 2)  # rows of x that the sparse operator takes; with more, masks leave little to skip
FULL = {"shape": (4096, 11008), "repeats": 40, "of_read": 0.85, "of_dense": {0.5: 1.15, 0.7: 1.7}}
QUICK = {"shape": (2048, 5632), "repeats": 10, "of_read": 0.75, "of_dense": {0.5: 1.1, 0.7: 1.5}}


# -- the kernels, over some layers -------------------------------------------------------------------------------------


@njit(error_model="numpy", boundscheck=False)
def _multiply_layers(weights, first, indices, values, count, sums):  # type: ignore[no-untyped-def]
    """weights: uint16 [layers, n_tiles, in, tile]."""
    for layer in range(first, first + LAYERS):
        multiply(weights[layer], indices, values, count, sums)


@njit(error_model="numpy", boundscheck=False)
def _dot_layers(weights, first, indices, values, count, out, shape, middle, factors, maxima, units, taken, sums):  # type: ignore[no-untyped-def]
    """weights: uint8 or int8 [layers, n_tiles, in, record bytes]."""
    for layer in range(first, first + LAYERS):
        multiply_record_dots(
            weights[layer], indices, values, count, out, shape, middle, (), factors, maxima, units, taken, sums
        )


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


class Weights:
    """Copies of one random weight, more than the caches hold, and the kernel over LAYERS of them.

    layers: uint8 [copies, n_tiles, in, row bytes].
    """

    def __init__(self, kind: str, n_in: int, n_out: int) -> None:
        self.kind, self.n_in, self.n_out = kind, n_in, n_out
        if kind == "bf16":
            buffer = kernels.pack(torch.randn(n_out, n_in).bfloat16()).buffer.view(torch.uint8)
        else:
            bits = KINDS[kind]
            codes = torch.randint(0, 256, (n_out, n_in * bits // 8), dtype=torch.uint8)
            scale = torch.rand(n_out // BLOCK, n_in) * 0.01
            packed = kernels.pack_quantized(codes, scale, bits=bits, group_axis="output", in_features=n_in)
            buffer, self.layout = packed.buffer, packed.layout
        self.n_tiles, _, self.row_bytes = buffer.shape
        self.nbytes = buffer.nbytes
        least = 1.5 * common.last_level_cache() / (self.nbytes * (1 - max(SPARSITIES)) * LAYERS)
        self.copies = ceil(least) * LAYERS + LAYERS
        if self.copies * self.nbytes > 0.5 * psutil.virtual_memory().available:
            raise SystemExit(f"{self.copies} copies of {self.nbytes:,} bytes do not fit into half of the memory.")
        whole = allocate((self.copies * self.n_tiles, n_in, self.row_bytes), torch.uint8)
        self.tensor = whole.view(self.copies, self.n_tiles, n_in, self.row_bytes)
        self.tensor.copy_(buffer.expand_as(self.tensor))
        self.layers = self.tensor.numpy()
        self.turns = cycle(range(0, self.copies, LAYERS))
        if kind == "bf16":
            self.sums = aligned(self.n_tiles * self.row_bytes // 2, np.float32)
        else:
            self.out = aligned((1, self.n_tiles * self.layout.tile), np.float32)
            self.memory = [aligned((self.n_tiles, part.size), part.dtype) for part in scratch()]

    def kernel(self, indices: np.ndarray, values: np.ndarray, count: int) -> Callable[[], None]:
        if self.kind == "bf16":
            words = self.layers.view(np.uint16)
            return lambda: _multiply_layers(words, next(self.turns), indices, values, count, self.sums)
        layout, stored = self.layout, self.layers.view(np.uint8 if self.kind == "int4" else np.int8)
        shape = (layout.tile, BLOCK * layout.stored_bits // 8, layout.code_bytes, layout.zeros_at)
        x, middle = values.reshape(1, -1), np.int32(layout.middle)
        return lambda: _dot_layers(stored, next(self.turns), indices, x, count, self.out, shape, middle, *self.memory)

    def reads(self, indices: np.ndarray, threads: int) -> dict[str, Callable[[], None]]:
        """The ways to read these rows of LAYERS layers."""
        tables = []
        for first in range(0, self.copies, LAYERS):
            pieces = [
                [self.layers[layer, tile].ctypes.data, self.row_bytes, self.row_bytes, 0, len(indices), tile % threads]
                for layer in range(first, first + LAYERS)
                for tile in range(self.n_tiles)
            ]
            tables.append(np.array(pieces, np.int64))
        return {f"read {name}": read for name, read in pure_read.ways(cycle(tables), indices, threads)}


def measure(kind: str, shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """One row per sparsity. shape: inputs, outputs."""
    n_in, n_out = shape
    threads = torch.get_num_threads()
    numba.set_num_threads(threads)
    generator, weights = np.random.default_rng(0), Weights(kind, n_in, n_out)
    turn = cycle(range(weights.copies))  # every call reads the weight that was not read for longest
    sinks = np.zeros((threads, 32), np.uint16)
    everything = (np.arange(n_in, dtype=np.int32), generator.standard_normal(n_in, np.float32), n_in)
    rows: list[dict[str, Any]] = []
    for sparsity in SPARSITIES:
        kept = round(n_in * (1 - sparsity)) // 8 * 8
        indices, values = np.zeros(n_in, np.int32), np.zeros(n_in, np.float32)
        indices[:kept] = np.sort(generator.permutation(n_in)[:kept])
        values[:kept] = np.abs(generator.standard_normal(kept)) + 0.1
        stream = lambda: _stream(weights.layers[next(turn)].reshape(-1).view(np.uint64), threads, sinks)  # noqa: E731
        variants: dict[str, Any] = {
            "kernel": weights.kernel(indices, values, kept),
            "own dense": weights.kernel(*everything),
            "stream": stream,
            **weights.reads(indices[:kept].copy(), threads),
        }
        if sparsity:
            variants |= {f"runs of {n}": weights.kernel(_in_runs(n_in, kept, n, generator), values, kept) for n in RUNS}
        if kind == "bf16":
            variants |= _of_torch(weights, indices, values, kept, turn)
        seconds = common.interleaved(variants, repeats, between=stream)
        for name in seconds:
            if name.startswith(("read", "kernel", "own dense", "runs")):
                seconds[name] = [value / LAYERS for value in seconds[name]]
        yardstick, kernel = _fastest(seconds, "read"), seconds["kernel"]
        gigabytes = kept * weights.n_tiles * weights.row_bytes / 1e9
        of_read, of_dense = common.ratio(seconds[yardstick], kernel), common.ratio(seconds["own dense"], kernel)
        row = {
            "kernel": f"{kind}, {f'{sparsity:.0%} dropped' if sparsity else 'dense'}",
            "ms": median(kernel) * 1e3,
            "GB/s": gigabytes / median(kernel),
            "of the pure read": of_read["ratio"],
            "deciles": of_read["deciles"],
            "x own dense": of_dense["ratio"],
            "x own dense, deciles": of_dense["deciles"],
            "pure read GB/s": gigabytes / median(seconds[yardstick]),
            "stream GB/s": weights.nbytes / median(seconds["stream"]) / 1e9,
            "pure read": yardstick.removeprefix("read "),
            "sparsity": sparsity,
            "copies": weights.copies,
        }
        if sparsity:
            row["runs"] = {n: common.ratio(seconds["kernel"], seconds[f"runs of {n}"])["ratio"] for n in RUNS}
        if kind == "bf16":
            best = _fastest(seconds, ("F.linear", "mv"))
            row["x torch"] = common.ratio(seconds[best], kernel)["ratio"]
            row["torch"] = f"{best}, {n_in * n_out * 2 / median(seconds[best]) / 1e9:.1f} GB/s"
            row["operator ms"] = median(seconds["operator"]) * 1e3
        rows.append(row)
    return rows


def _in_runs(n_in: int, kept: int, length: int, generator: np.random.Generator) -> np.ndarray:
    """int32 [n_in], of which the first `kept` are whole runs of neighbours, in order."""
    indices = np.zeros(n_in, np.int32)
    starts = np.sort(generator.permutation(n_in // length)[: kept // length]) * length
    indices[:kept] = (starts[:, None] + np.arange(length)).reshape(-1)
    return indices


def _of_torch(weights: Weights, indices: np.ndarray, values: np.ndarray, kept: int, turn: Any) -> dict[str, Any]:
    """torch's dense products over the same bytes, and our operator."""
    n_in, n_out = weights.n_in, weights.n_out
    x = torch.zeros(1, n_in)
    x[0, torch.from_numpy(indices[:kept]).long()] = torch.from_numpy(values[:kept])
    x = x.bfloat16()
    buffers = weights.tensor.view(torch.bfloat16)
    plain = [buffer.reshape(-1)[: n_in * n_out] for buffer in buffers]
    packed = [kernels.PackedWeight(buffer, n_out) for buffer in buffers]
    return {
        "operator": lambda: kernels.sparse_linear(x, packed[next(turn)], threshold=0.0),
        "F.linear, out x in": lambda: F.linear(x, plain[next(turn)].view(n_out, n_in)),
        "F.linear, in x out": lambda: F.linear(x, plain[next(turn)].view(n_in, n_out).t()),
        "mv, out x in": lambda: torch.mv(plain[next(turn)].view(n_out, n_in), x[0]),
        "mv, in x out": lambda: torch.mv(plain[next(turn)].view(n_in, n_out).t(), x[0]),
    }


def crossover(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """How many rows of x are still faster sparse than dense, by the operators on bf16 weights."""
    n_in, n_out = shape
    copies = max(2, ceil(3 * common.last_level_cache() / (2 * n_in * n_out)))
    packed = [kernels.pack(torch.randn(n_out, n_in).bfloat16()) for _ in range(copies)]
    turn, found = cycle(range(copies)), []
    for sparsity in SPARSITIES[1:]:
        times = {}
        for batch in BATCHES:
            x = torch.randn(batch, n_in)
            x = torch.where(torch.rand(batch, n_in) < sparsity, 0.0, x).bfloat16()
            variants = {
                "sparse": lambda x=x: kernels.sparse_linear(x, packed[next(turn)], threshold=0.0),
                "dense": lambda x=x: kernels.dense_linear(x, packed[next(turn)]),
            }
            seconds = common.interleaved(variants, repeats)
            times[batch] = common.ratio(seconds["dense"], seconds["sparse"])["ratio"]
        faster = [batch for batch, value in times.items() if value > 1]
        ratios = ", ".join(f"{batch}: {value:.2f}x" for batch, value in times.items())
        found.append(
            {"dropped": sparsity, "faster sparse up to rows": max(faster, default=0), "dense over sparse": ratios}
        )
    return found


def _fastest(seconds: dict[str, list[float]], start: str | tuple[str, ...]) -> str:
    """The variant with the smallest median among those whose name starts so."""
    return min((name for name in seconds if name.startswith(start)), key=lambda name: median(seconds[name]))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    chosen = common.options(__doc__.splitlines()[0], arguments)  # type: ignore[union-attr]
    setting: dict[str, Any] = QUICK if chosen.quick else FULL
    kinds = [kind for kind in KINDS if kind == "bf16" or integer_dots.available()]
    with torch.no_grad():
        rows = [row for kind in kinds for row in measure(kind, setting["shape"], setting["repeats"])]
        crossings = crossover(setting["shape"], setting["repeats"] // 2)
    targets = []
    for row in rows:
        name = row["kernel"]
        targets.append(common.target(f"{name}: of the pure read", row["of the pure read"], at_least=setting["of_read"]))
        if row["sparsity"] in setting["of_dense"]:
            bound = setting["of_dense"][row["sparsity"]]
            targets.append(common.target(f"{name}: times our own dense", row["x own dense"], at_least=bound))
    checked = rows[0]["pure read GB/s"] / rows[0]["stream GB/s"]
    targets.append(common.target("bf16: the pure read of all rows, of a plain stream", checked, at_least=0.9))
    shape = " -> ".join(str(size) for size in setting["shape"])
    result = common.report("kernels", rows, targets, chosen, show=show, shape=shape, crossover=crossings)
    for found in crossings:
        print(
            f"crossover, bf16, {found['dropped']:.0%} dropped: sparse is faster up to "
            f"{found['faster sparse up to rows']} rows of x (dense over sparse, {found['dense over sparse']})",
            file=sys.stderr,
        )
    return result


def show(console: Any, rows: list[dict[str, Any]]) -> None:
    """The main columns."""
    from rich.table import Table

    names = ("kernel", "ms", "GB/s", "of the pure read", "deciles", "x own dense", "pure read GB/s", "x torch")
    table = Table(*names)
    for row in rows:
        table.add_row(*(common.cell(row.get(name)) for name in names))
    console.print(table)


if __name__ == "__main__":
    main()
