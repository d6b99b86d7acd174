"""The kernels on the CPU, compiled by Numba for the machine that they run on.

    out[t * tile + c] = sum over active j of x_j * float32(buffer[t, j, c])

A thread owns a tile and keeps its float32 outputs in the L1 cache. It takes eight active rows at once, so an
accumulator is loaded and stored once per eight rows, and while it multiplies them column block by column block it
prefetches the same columns of the next eight rows into the L2 cache. That is what decides the speed: prefetching whole
rows at once fills the line buffers and stalls (22 instead of 32 GB/s where nothing is skipped), and without prefetch
the hardware follows the skipped rows. The order of the sum is fixed: same bits in every run, for any number of threads.

Cost: the bytes of the active rows. The inner loop is written as vector IR: to vectorise it by itself, LLVM would have
to prove that the output and the weight do not overlap. Only this module imports Numba; it is imported on first use.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from actkit.kernels.packing import COLUMNS, HALF

_CONFIG: Any = numba.config  # untyped in Numba
LINE = 64  # bytes
LANES = 8  # of a vector: 256 bits are a few percent faster here than 512
SMALL = 1 << 18  # bytes of weight; below, waking a second thread takes longer than its half of the work
_NOTHING = np.empty(0, np.float32)
INTO_L2 = 2  # the locality argument of llvm.prefetch (prefetcht1)


# -- the process: compile cache, threads -------------------------------------------------------------------------------


def _cache_folder() -> Path:
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "actkit" / "numba"


def _choose_cache() -> bool:
    """Point Numba's compile cache at a fixed folder, unless the user chose one; False where none can be written."""
    if _CONFIG.CACHE_DIR:
        return True
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or a read-only one: compile in memory, every time
        return False
    _CONFIG.CACHE_DIR = str(folder)
    return os.access(folder, os.W_OK)


_USER_CACHE = _CONFIG.CACHE_DIR
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "cache": _choose_cache()}
_LOCK = threading.Lock()  # one kernel at a time: they share the cores anyway, and not every Numba layer is thread-safe
_THREADS = threading.local()
_started_in: int | None = None


def _start() -> None:
    """Start Numba's threads: the layer `omp`, which shares torch's OpenMP pool where torch was imported first."""
    global _started_in
    threads = torch.get_num_threads()
    if _CONFIG.THREADING_LAYER == "default":
        try:
            importlib.import_module("numba.np.ufunc.omppool")
            _CONFIG.THREADING_LAYER = "omp"
        except ImportError:
            warnings.warn("Numba's OpenMP threads are missing here; its tbb or workqueue layer is used.", stacklevel=2)
    numba.set_num_threads(1)
    torch.set_num_threads(threads)  # starting Numba's OpenMP layer overwrites torch's number of threads
    _started_in = os.getpid()


def _follow_torch_threads(nbytes: int) -> None:
    """As many threads as torch has; one for a small weight."""
    if _started_in is None:
        _start()
    elif _started_in != os.getpid():
        raise RuntimeError(
            "sparse_linear: this process was forked after the kernels ran, and OpenMP does not survive a fork; "
            "start processes with multiprocessing's 'spawn' method."
        )
    threads = 1 if nbytes < SMALL else min(torch.get_num_threads(), _CONFIG.NUMBA_NUM_THREADS)
    if (
        getattr(_THREADS, "count", None) != threads
    ):  # Numba keeps the number per thread, and so do we: it is slow to set
        numba.set_num_threads(threads)
        _THREADS.count = threads


# -- compaction --------------------------------------------------------------------------------------------------------


@intrinsic
def _float32(typingctx, stored):  # type: ignore[no-untyped-def]
    """A float32 as it is, or the one whose upper half is a bfloat16."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if signature.args[0] == types.float32:
            return args[0]
        word = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.IntType(32)(16)), ir.FloatType())

    return types.float32(stored), generate


@njit(**_OPTIONS)
def _select(x, score, cut, ties, indices, values):  # type: ignore[no-untyped-def]
    """Write the inputs with |x| * score > cut, and the first `ties` of those equal to it; returns how many.

    A NaN is above any cut, and equal to a cut of NaN.
    """
    n = 0
    ranked = cut == cut
    for j in range(x.size):
        value = _float32(x[j])
        scored = abs(value) * score[j] if score.size else abs(value)
        tie = ties > 0 and (scored == cut or (scored != scored and not ranked))
        ties -= tie
        indices[n] = j  # without a branch: an input that is not kept is overwritten by the next
        values[n] = value
        n += tie or (ranked and not scored <= cut)
    indices[n:] = 0
    values[n:] = 0
    return n


def _cut(x: np.ndarray, score: np.ndarray, threshold: float, k: int) -> tuple[np.float32, int]:
    """The cut and the ties with which `_select` makes the selection of a row."""
    if k < 0:
        return np.float32(threshold if threshold >= 0 else -np.inf), 0
    if k == 0:
        return np.float32(np.nan), 0  # nothing is above it, and no ties are taken
    if k >= x.size:
        return np.float32(-np.inf), 0
    value = x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        scored = np.abs(value) * score if score.size else np.abs(value)
    cut = np.partition(scored, x.size - k)[x.size - k]  # NaN sorts last, so it ranks above everything
    return cut, k if np.isnan(cut) else k - int(np.count_nonzero(~(scored <= cut)))


def compact(x: Tensor, score: Tensor | None, threshold: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.compact`; x and score contiguous."""
    inputs, scores = _array(x), _array(score)
    indices = np.empty(inputs.shape, np.int32)
    values = np.empty(inputs.shape, np.float32)
    counts = np.zeros(len(inputs), np.int32)
    for row, given in enumerate(inputs):
        counts[row] = _select(given, scores, *_cut(given, scores, threshold, k), indices[row], values[row])
    return torch.from_numpy(indices), torch.from_numpy(values), torch.from_numpy(counts)


def _array(tensor: Tensor | None) -> np.ndarray:
    """The tensor's memory: float32, or the words of a bfloat16. Float16 is widened, None is empty."""
    if tensor is None:
        return _NOTHING
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.float().numpy()


# -- the product -------------------------------------------------------------------------------------------------------


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, pointee: Any) -> Any:
    """The address of element `offset` of an array, as a pointer to `pointee`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), pointee.as_pointer())


@intrinsic
def _prefetch(typingctx, weight, rows, column):  # type: ignore[no-untyped-def]
    """Ask for the cache lines of one column block of some rows (a tuple of offsets)."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i8, i32 = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [i8.as_pointer()], kind)
        per_line = LINE * 8 // signature.args[0].dtype.bitwidth
        for row in cgutils.unpack_tuple(builder, args[1]):
            for line in range(0, COLUMNS, per_line):
                offset = builder.add(builder.add(row, args[2]), ir.IntType(64)(line))
                address = _pointer(context, builder, signature.args[0], args[0], offset, i8)
                builder.call(prefetch, [address, i32(0), i32(INTO_L2), i32(1)])
        return context.get_dummy_value()

    return types.void(weight, rows, types.int64), generate


@intrinsic
def _multiply_add(typingctx, out, start, weight, rows, values, column):  # type: ignore[no-untyped-def]
    """out[start + column + c] += sum over r of values[r] * weight[rows[r] + column + c], for one column block."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        out, start, weight, rows, values, column = args
        i32, i64 = ir.IntType(32), ir.IntType(64)
        floats, words = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(i32, LANES)
        undefined = ir.Constant(floats, ir.Undefined)
        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fmuladd.v{LANES}f32"
        )

        def address(number, array, offset, pointee):  # type: ignore[no-untyped-def]
            return _pointer(context, builder, signature.args[number], array, offset, pointee)

        def blocks(row):  # type: ignore[no-untyped-def]
            """The row's outputs at this column as float32 vectors, in order."""
            place = builder.add(row, column)
            if signature.args[2].dtype == types.float32:
                offsets = [builder.add(place, i64(lane)) for lane in range(0, COLUMNS, LANES)]
                return [builder.load(address(2, weight, offset, floats), align=4) for offset in offsets]
            offsets = [builder.add(place, i64(2 * lane)) for lane in range(0, HALF, LANES)]
            pairs = [builder.load(address(2, weight, offset, words), align=2) for offset in offsets]
            lower = [builder.shl(pair, ir.Constant(words, [16] * LANES)) for pair in pairs]
            upper = [builder.and_(pair, ir.Constant(words, [0xFFFF0000] * LANES)) for pair in pairs]
            return [builder.bitcast(block, floats) for block in lower + upper]

        first = builder.add(start, column)
        targets = [address(0, out, builder.add(first, i64(lane)), floats) for lane in range(0, COLUMNS, LANES)]
        totals = [builder.load(target, align=4) for target in targets]
        for row, value in zip(cgutils.unpack_tuple(builder, rows), cgutils.unpack_tuple(builder, values)):
            value = builder.insert_element(undefined, value, i32(0))
            value = builder.shuffle_vector(value, undefined, ir.Constant(words, [0] * LANES))
            totals = [builder.call(multiply_add, [block, value, total]) for block, total in zip(blocks(row), totals)]
        for total, target in zip(totals, targets):
            builder.store(total, target, align=4)
        return context.get_dummy_value()

    return types.void(out, types.int64, weight, rows, values, types.int64), generate


@njit(inline="always")
def _row(indices, i, count, start, tile):  # type: ignore[no-untyped-def]
    return start + np.int64(indices[min(i, count - 1)]) * tile


@njit(inline="always")
def _rows(indices, i, count, start, tile):  # type: ignore[no-untyped-def]
    """Where the eight active rows from i on begin; past the last one, that one again."""
    return (
        _row(indices, i, count, start, tile),
        _row(indices, i + 1, count, start, tile),
        _row(indices, i + 2, count, start, tile),
        _row(indices, i + 3, count, start, tile),
        _row(indices, i + 4, count, start, tile),
        _row(indices, i + 5, count, start, tile),
        _row(indices, i + 6, count, start, tile),
        _row(indices, i + 7, count, start, tile),
    )


@njit(parallel=True, **_OPTIONS)
def multiply(weight, indices, values, count, out):  # type: ignore[no-untyped-def]
    """weight: uint16 (bf16) or float32 [n_tiles, in, tile]; indices, values: [in]; out: float32 [n_tiles * tile]."""
    n_tiles, n_in, tile = weight.shape
    for t in prange(n_tiles):
        first = np.int64(t) * tile
        start = first * n_in
        out[first : first + tile] = 0
        grouped = count // 8 * 8
        for i in range(0, grouped, 8):
            rows = _rows(indices, i, count, start, tile)
            ahead = _rows(indices, i + 8, count, start, tile)
            x = (
                values[i],
                values[i + 1],
                values[i + 2],
                values[i + 3],
                values[i + 4],
                values[i + 5],
                values[i + 6],
                values[i + 7],
            )
            for column in range(0, tile, COLUMNS):
                _multiply_add(out, first, weight, rows, x, column)
                _prefetch(weight, ahead, column)  # after, so that the rows at hand get their line buffers first
        for i in range(grouped, count):
            rest = (_row(indices, i, count, start, tile),)
            for column in range(0, tile, COLUMNS):
                _multiply_add(out, first, weight, rest, (values[i],), column)


@intrinsic
def _as_stored(typingctx, value, y):  # type: ignore[no-untyped-def]
    """The float32 as it is, or the words of y's bfloat16, rounded to the nearest even."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, i16, i32 = args[0], ir.IntType(16), ir.IntType(32)
        if signature.return_type == types.float32:
            return value
        bits = builder.bitcast(value, i32)
        odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, i32(0x7FFF))), i32(16))
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(is_nan, i32(0x7FC0), rounded), i16)

    return y.dtype(types.float32, y), generate


@njit(**_OPTIONS)
def _row_linear(x, score, cut, ties, weight, bias, y):  # type: ignore[no-untyped-def]
    """Selection, product, bias and rounding of one row: one call from Python. y: float32 or uint16 (bf16) [out]."""
    indices = np.empty(x.size, np.int32)
    values = np.empty(x.size, np.float32)
    sums = np.empty(weight.shape[0] * weight.shape[2], np.float32)
    multiply(weight, indices, values, _select(x, score, cut, ties, indices, values), sums)
    for i in range(y.size):
        y[i] = _as_stored(sums[i] + _float32(bias[i]) if bias.size else sums[i], y)


def active_linear(indices: Tensor, values: Tensor, counts: Tensor, packed: Tensor) -> Tensor:
    """As `reference.active_linear`."""
    weight, chosen, x = _array(packed), indices.contiguous().numpy(), _array(values.contiguous())
    out = np.empty((len(counts), weight.shape[0] * weight.shape[2]), np.float32)
    with _LOCK:
        _follow_torch_threads(weight.nbytes)
        for row, count in enumerate(counts.tolist()):
            multiply(weight, chosen[row], x[row], count, out[row])
    return torch.from_numpy(out)


def sparse_linear(
    x: Tensor, score: Tensor | None, threshold: float, k: int, packed: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """As `reference.sparse_linear`; everything contiguous.

    Few calls on purpose: behind a weight that has just swept the caches, each call into torch or NumPy takes some 10
    microseconds.
    """
    y = torch.empty(len(x), out_features, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
    inputs, scores, weight, added, outputs = _array(x), _array(score), _array(packed), _array(bias), _array(y)
    with _LOCK:
        _follow_torch_threads(weight.nbytes)
        for row, given in enumerate(inputs):
            _row_linear(given, scores, *_cut(given, scores, threshold, k), weight, added, outputs[row])
    return y


_CONFIG.CACHE_DIR = _USER_CACHE  # the folder above is for these kernels only
