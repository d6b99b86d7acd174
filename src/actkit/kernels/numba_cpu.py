"""The kernels on the CPU, compiled by Numba for the machine that they run on.

    out[t * tile + c] = sum over active j of x_j * float32(buffer[t, j, c])

A thread owns a tile and keeps its float32 outputs in the L1 cache. It takes eight active rows at once, so an
accumulator is loaded and stored once per eight rows. What decides the speed is how many cache lines are on their way at
a time, and the processor's window of instructions bounds that: few instructions per line (one masked load for the upper
halves), and a prefetch of the next few lines of the same rows. Prefetching other rows instead keeps the hardware's own
prefetchers from learning the rows at hand. The order of the sum is fixed: same bits in every run, for any number of
threads.

With more than one row of x the product is dense and each row of the weight serves all of them. Eight rows of x have
eight times the accumulators, so a tile is then taken in runs of columns whose accumulators still fit the L1 cache.

Cost: the bytes of the active rows. Imported on first use, as is everything that imports Numba.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from actkit.kernels.packing import COLUMNS, WIDEST_TILE
from actkit.kernels.process import LOCK, compiled, follow_torch_threads
from actkit.kernels.vector_products import add_rows
from actkit.kernels.vectors import prefetch_once, row_offsets, row_values, rows_at_once

NOTHING = np.empty(0, np.float32)
AHEAD = 256  # bytes of each row that are asked for early; the processor's own prefetchers do the rest
BATCHES = (1, 2, 4, 8)  # rows of x that a kernel is compiled for; others are filled up with zeros


# -- compaction --------------------------------------------------------------------------------------------------------


@intrinsic
def widen(typingctx, stored):  # type: ignore[no-untyped-def]
    """Return a float32 as it is, or the one whose upper half is a bfloat16."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if signature.args[0] == types.float32:
            return args[0]
        word = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.IntType(32)(16)), ir.FloatType())

    return types.float32(stored), generate


@compiled()
def select(x, score, cut, ties, indices, values):  # type: ignore[no-untyped-def]
    """Write the inputs with |x| * score > cut, and the first `ties` of those equal to it.

    A NaN is above any cut, and equal to a cut of NaN.

    Args:
        x: float32 [in].
        score: float32 [in], or empty.
        cut: the threshold.
        ties: how many of the equal ones to take.
        indices: int32 [in], written.
        values: float32 [in], written.

    Returns:
        How many there are.
    """
    n = 0
    ranked = cut == cut
    for j in range(x.size):
        value = widen(x[j])
        scored = abs(value) * score[j] if score.size else abs(value)
        tie = ties > 0 and (scored == cut or (scored != scored and not ranked))
        ties -= tie
        indices[n] = j  # without a branch: an input that is not kept is overwritten by the next
        values[n] = value
        n += tie or (ranked and not scored <= cut)
    indices[n:] = 0
    values[n:] = 0
    return n


def cut_of(x: np.ndarray, score: np.ndarray, threshold: float, k: int) -> tuple[np.float32, int]:
    """Return the cut and the ties with which `select` makes the selection of a row."""
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
    """Compute what `reference.compact` does; x and score contiguous."""
    inputs, scores = array(x), array(score)
    indices = np.empty(inputs.shape, np.int32)
    values = np.empty(inputs.shape, np.float32)
    counts = np.zeros(len(inputs), np.int32)
    for row, given in enumerate(inputs):
        counts[row] = select(given, scores, *cut_of(given, scores, threshold, k), indices[row], values[row])
    return torch.from_numpy(indices), torch.from_numpy(values), torch.from_numpy(counts)


def array(tensor: Tensor | None) -> np.ndarray:
    """Return the tensor's memory: float32, or the words of a bfloat16. Float16 is widened, None is empty."""
    if tensor is None:
        return NOTHING
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.float().numpy()


# -- the product -------------------------------------------------------------------------------------------------------


@compiled(inner=True)
def multiply_tile(weight, t, indices, values, count, out, batch, run):  # type: ignore[no-untyped-def]
    """Multiply one tile of `multiply_batch`, on the thread that calls it."""
    _, n_in, tile = weight.shape
    width, size, stride = out.shape[1], weight.itemsize, tile * weight.itemsize
    together = rows_at_once(weight, batch)
    grouped = count // together * together
    first = np.int64(t) * tile
    start = np.int64(t) * n_in * stride
    for low in range(0, tile, run):
        high = min(low + run, tile)
        out[:, first + low : first + high] = 0
        for i in range(0, grouped, together):
            rows = row_offsets(weight, batch, indices, i, count, start, stride)
            x = row_values(weight, batch, values, i, count)
            for column in range(low, high, COLUMNS):
                add_rows(out, first + column, width, weight, rows, x, column * size)
                prefetch_once(weight, rows, column * size + AHEAD)
        for i in range(grouped, count):  # one by one: a zero instead of a row would make NaN of an Inf
            last = (start + np.int64(indices[i]) * stride,)
            for b in range(len(batch)):
                for column in range(low, high, COLUMNS):
                    place = b * width + first + column
                    add_rows(out, place, width, weight, last, (values[b, i],), column * size)


@compiled(parallel=True)
def multiply_batch(weight, indices, values, count, out, batch, run):  # type: ignore[no-untyped-def]
    """Multiply the active rows of a weight with the values of a batch.

    Args:
        weight: uint16 (bf16) or float32 [n_tiles, in, tile].
        indices: int32 [in].
        values: float32 [batch, in].
        count: how many are active.
        out: float32 [batch, n_tiles * tile], written.
        batch: a tuple with an entry per row of values.
        run: columns taken at once.
    """
    for t in prange(weight.shape[0]):
        multiply_tile(weight, t, indices, values, count, out, batch, run)


@compiled()
def multiply(weight, indices, values, count, out):  # type: ignore[no-untyped-def]
    """Multiply one row: indices, values: [in]; out: float32 [n_tiles * tile]."""
    multiply_batch(weight, indices, values.reshape(1, -1), count, out.reshape(1, -1), (0,), weight.shape[2])


@intrinsic
def as_stored(typingctx, value, y):  # type: ignore[no-untyped-def]
    """Return the float32 as it is, or the words of y's bfloat16, rounded to the nearest even."""

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


@compiled()
def _row_linear(x, score, cut, ties, weight, bias, y):  # type: ignore[no-untyped-def]
    """Selection, product, bias and rounding of one row: one call from Python. y: float32 or uint16 (bf16) [out]."""
    indices = np.empty(x.size, np.int32)
    values = np.empty(x.size, np.float32)
    sums = np.empty(weight.shape[0] * weight.shape[2], np.float32)
    multiply(weight, indices, values, select(x, score, cut, ties, indices, values), sums)
    for i in range(y.size):
        y[i] = as_stored(sums[i] + widen(bias[i]) if bias.size else sums[i], y)


def active_linear(indices: Tensor, values: Tensor, counts: Tensor, packed: Tensor) -> Tensor:
    """Compute what `reference.active_linear` does."""
    weight, chosen, x = array(packed), indices.contiguous().numpy(), array(values.contiguous())
    out = np.empty((len(counts), weight.shape[0] * weight.shape[2]), np.float32)
    with LOCK:
        follow_torch_threads(weight.nbytes)
        for row, count in enumerate(counts.tolist()):
            multiply(weight, chosen[row], x[row], count, out[row])
    return torch.from_numpy(out)


def sparse_linear(
    x: Tensor, score: Tensor | None, threshold: float, k: int, packed: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Compute what `reference.sparse_linear` does; everything contiguous.

    Few calls on purpose: behind a weight that has just swept the caches, each call into torch or NumPy takes some 10
    microseconds.

    Args:
        x: as in `reference.sparse_linear`, and so are the others.
        score: [in], or None.
        threshold: negative if unused.
        k: negative if unused.
        packed: the buffer.
        bias: [out], or None.
        out_features: of the layer.
    """
    y = torch.empty(len(x), out_features, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
    inputs, scores, weight, added, outputs = array(x), array(score), array(packed), array(bias), array(y)
    with LOCK:
        follow_torch_threads(weight.nbytes)
        for row, given in enumerate(inputs):
            _row_linear(given, scores, *cut_of(given, scores, threshold, k), weight, added, outputs[row])
    return y


def batched(x: Tensor) -> np.ndarray:
    """Return x [rows, in] as float32, filled up with zero rows to one of BATCHES."""
    rows = len(x)
    batch = next(batch for batch in BATCHES if batch >= rows)
    return torch.nn.functional.pad(x.float(), (0, 0, 0, batch - rows)).contiguous().numpy()


def run_of(tile: int, batch: int, columns: int) -> int:
    """Return how many columns of a tile, in whole blocks, to take at once: their accumulators must fit the L1 cache."""
    runs = -(-tile * batch // WIDEST_TILE)
    return -(-tile // (runs * columns)) * columns


def dense_linear(x: Tensor, packed: Tensor) -> Tensor:
    """Compute what `reference.dense_linear` does; everything contiguous."""
    values, weight = batched(x), array(packed)
    n_tiles, n_in, tile = weight.shape
    out = np.empty((len(values), n_tiles * tile), np.float32)
    with LOCK:
        follow_torch_threads(weight.nbytes)
        run = run_of(tile, len(values), COLUMNS)
        multiply_batch(weight, np.arange(n_in, dtype=np.int32), values, n_in, out, (0,) * len(values), run)
    return torch.from_numpy(out[: len(x)])
