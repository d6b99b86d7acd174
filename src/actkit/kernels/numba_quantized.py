"""The products with integer weights on the CPU: dense and sparse, scales per input or per output.

Groups of outputs: the scale multiplies the input once per group, then a weight is one look-up and one multiply-add.

    out[c] += sum over active j of (x_j * scale[j, c // group]) * (code[j, c] - zero[j, c // group])

Groups of inputs: the inputs of a group are summed unscaled, beside the output; the scale comes at the group's end.

    out[c] += scale[g, c] * sum over active j in g of x_j * (code[j, c] - zero[g, c])

Threads, tiles, order of the sum and prefetch are those of `numba_cpu`. Four rows are read at once; prefetches run a
fixed number of bytes ahead, as a row of codes is short.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.numba_cpu import array, as_stored, batched, cut_of, run_of, select, widen
from actkit.kernels.process import LOCK, compiled, follow_torch_threads
from actkit.kernels.quantized import BLOCK, Layout, QuantizedWeight
from actkit.kernels.vector_products import add_codes, add_scaled_rows
from actkit.kernels.vectors import prefetch_ahead, row_offsets, row_values, rows_at_once

LINE = 64
PARTS = 16  # of the inputs, over threads
AHEAD = 24 << 10  # bytes between the rows at hand and those that are prefetched
EMPTY = np.empty((0, 0, 0), np.uint8)


@compiled(inner=True)
def _distance(together, stride):  # type: ignore[no-untyped-def]
    """Rows between those at hand and those to prefetch: whole groups of rows that make AHEAD bytes."""
    return together * max(1, AHEAD // (together * stride))


@compiled(inner=True)
def records_tile(weight, t, indices, values, count, out, shape, zero, batch, pieces, stored):  # type: ignore[no-untyped-def]
    """Multiply one tile of `multiply_records`, on the thread that calls it."""
    _, n_in, stride = weight.shape
    tile, run, block_bytes, scales, zeros = shape
    width = out.shape[1]
    together = rows_at_once(weight, batch)
    distance = _distance(together, stride)
    first = np.int64(t) * tile
    start = np.int64(t) * n_in * stride
    for low in range(0, tile, run):
        high = min(low + run, tile)
        out[:, first + low : first + high] = 0
        for i in range(0, count, together):
            rows = row_offsets(weight, batch, indices, i, count, start, stride)
            ahead = row_offsets(weight, batch, indices, i + distance, count, start, stride)
            x = row_values(weight, batch, values, i, count)
            for block in range(low // BLOCK, high // BLOCK):
                place, piece = block * block_bytes, block * len(pieces)
                column, scale_at, zero_at = first + block * BLOCK, scales + 4 * piece, zeros + piece
                add_scaled_rows(out, column, width, weight, rows, x, place, scale_at, zero_at, zero, pieces, stored)
                prefetch_ahead(weight, ahead, place)
            for place in range(scales // LINE * LINE, stride, block_bytes):
                prefetch_ahead(weight, ahead, place)


@compiled(parallel=True)
def multiply_records(weight, indices, values, count, out, shape, zero, batch, pieces, stored):  # type: ignore[no-untyped-def]
    """Multiply with integers whose scales are in the records.

    Args:
        weight: uint8 (4 bits) or int8 (8 bits) [n_tiles, in, record bytes].
        indices: int32 [in].
        values: float32 [batch, in].
        count: how many are active.
        out: float32 [batch, n_tiles * tile], written.
        shape: (tile, columns at once, bytes of a block, first byte of the scales, of the zeros).
        zero: of all, if none are stored.
        batch: a tuple with an entry per row of values.
        pieces: a tuple with an entry per scale of a block.
        stored: a tuple with one entry if zeros are stored, else empty.
    """
    for t in prange(weight.shape[0]):
        records_tile(weight, t, indices, values, count, out, shape, zero, batch, pieces, stored)


@compiled(inner=True)
def groups_tile(weight, scale, zeros, t, indices, values, count, out, sums, shape, zero, batch, stored):  # type: ignore[no-untyped-def]
    """Multiply one tile of `multiply_groups`, on the thread that calls it. sums: float32 [batch * columns at once]."""
    _, n_in, stride = weight.shape
    tile, run, block_bytes, group = shape
    groups = scale.shape[1]
    together = rows_at_once(weight, batch)
    distance = _distance(together, stride)
    first = np.int64(t) * tile
    start = np.int64(t) * n_in * stride
    for low in range(0, tile, run):
        high = min(low + run, tile)
        span = high - low
        out[:, first + low : first + high] = 0
        end = 0
        for g in range(groups):
            begin = end
            while end < count and indices[end] < (g + 1) * group:
                end += 1
            if end == begin:
                continue
            sums[:] = 0
            zeros_at = (np.int64(t) * groups + g) * stride
            for i in range(begin, end, together):
                rows = row_offsets(weight, batch, indices, i, count, start, stride)
                ahead = row_offsets(weight, batch, indices, i + distance, count, start, stride)
                x = row_values(weight, batch, values, i, end)
                for block in range(low // BLOCK, high // BLOCK):
                    place = block * block_bytes
                    column, zero_at = block * BLOCK - low, zeros_at + place
                    add_codes(sums, column, run, weight, rows, x, place, zeros, zero_at, zero, stored)
                    prefetch_ahead(weight, ahead, place)
            factors = scale[t, g, low:high]
            for b in range(len(batch)):
                total = out[b, first + low : first + high]
                added = sums[b * run : b * run + span]
                for c in range(span):
                    total[c] += factors[c] * added[c]


@compiled(parallel=True)
def multiply_groups(weight, scale, zeros, indices, values, count, out, shape, zero, batch, stored):  # type: ignore[no-untyped-def]
    """Multiply with integers whose scales lie beside the codes.

    Args:
        weight: as in `multiply_records`.
        scale: float32 [n_tiles, groups, tile].
        zeros: like weight [n_tiles, groups, record bytes], or empty.
        indices: int32 [in].
        values: float32 [batch, in].
        count: how many are active.
        out: float32 [batch, n_tiles * tile], written.
        shape: (tile, columns at once, bytes of a block, inputs of a group).
        zero: as in `multiply_records`.
        batch: as in `multiply_records`.
        stored: as in `multiply_records`.
    """
    sums = np.empty((weight.shape[0], len(batch) * shape[1]), np.float32)
    for t in prange(weight.shape[0]):
        groups_tile(weight, scale, zeros, t, indices, values, count, out, sums[t], shape, zero, batch, stored)


# -- widened for dense products of many rows ---------------------------------------------------------------------------


@compiled(parallel=True)
def _widen_records(weight, t, low, out, shape, zero, pieces, stored):  # type: ignore[no-untyped-def]
    """Compute out[i, c], the weight of input i and column low + c of a tile; out: float32 [in, whole blocks]."""
    _, n_in, stride = weight.shape
    block_bytes, scales, zeros = shape
    width = out.shape[1]
    flat = out.reshape(-1)
    for part in prange(PARTS):
        for i in range(n_in * part // PARTS, n_in * (part + 1) // PARTS):
            flat[i * width : (i + 1) * width] = 0
            row = ((np.int64(t) * n_in + i) * stride,)
            for block in range(width // BLOCK):
                place, piece = (low // BLOCK + block) * block_bytes, (low // BLOCK + block) * len(pieces)
                add_scaled_rows(
                    flat, i * width + block * BLOCK, width, weight, row, (np.float32(1.0),), place,
                    scales + 4 * piece, zeros + piece, zero, pieces, stored,
                )  # fmt: skip


@compiled(parallel=True)
def _widen_groups(weight, scale, zeros, t, low, out, shape, zero, stored):  # type: ignore[no-untyped-def]
    _, n_in, stride = weight.shape
    block_bytes, group = shape
    width, groups = out.shape[1], scale.shape[1]
    flat = out.reshape(-1)
    for part in prange(PARTS):
        for i in range(n_in * part // PARTS, n_in * (part + 1) // PARTS):
            row_of = flat[i * width : (i + 1) * width]
            row_of[:] = 0
            row = ((np.int64(t) * n_in + i) * stride,)
            zeros_at = (np.int64(t) * groups + i // group) * stride
            for block in range(width // BLOCK):
                place = (low // BLOCK + block) * block_bytes
                add_codes(
                    flat, i * width + block * BLOCK, width, weight, row, (np.float32(1.0),), place, zeros,
                    zeros_at + place, zero, stored,
                )  # fmt: skip
            factors = scale[t, i // group, low : low + width]
            for c in range(width):
                row_of[c] *= factors[c]


def widened_columns(packed: QuantizedWeight, columns: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the weight [in, at most `columns`] piece by piece, over all columns of all tiles, padding included."""
    layout = packed.layout
    given = _Arguments(packed.buffer, packed.scale, packed.zero, layout)
    common = given.shape(1)
    step = max(BLOCK, columns // BLOCK * BLOCK)
    memory = torch.empty(layout.in_features * min(step, layout.tile))
    for t in range(layout.n_tiles):
        for low in range(0, layout.tile, step):
            part = memory[: layout.in_features * (min(low + step, layout.tile) - low)].view(layout.in_features, -1)
            with LOCK:
                follow_torch_threads(packed.nbytes)
                if layout.by_input:
                    grouped = (common[2], layout.group)
                    _widen_groups(
                        given.weight, given.scale, given.zeros, t, low, part.numpy(), grouped, given.zero, given.stored
                    )
                else:
                    shape = (common[2], layout.code_bytes, layout.zeros_at)
                    _widen_records(given.weight, t, low, part.numpy(), shape, given.zero, given.pieces, given.stored)
            yield part.to(dtype)


# -- from tensors ------------------------------------------------------------------------------------------------------


@compiled()
def _finish(sums, bias, group, padded, y):  # type: ignore[no-untyped-def]
    """Compute y = sums + bias, without the padding of groups and rounded. y: float32 or uint16 (bf16) [out]."""
    for first in range(0, y.size, group):
        shift = first // group * (padded - group)
        for i in range(first, min(first + group, y.size)):
            y[i] = as_stored(sums[i + shift] + widen(bias[i]) if bias.size else sums[i + shift], y)


@compiled()
def _row_records(x, score, cut, ties, weight, shape, zero, pieces, stored, bias, group, padded, y):  # type: ignore[no-untyped-def]
    """Selection, product, bias and rounding of one row: one call from Python."""
    indices, values = np.empty(x.size, np.int32), np.empty((1, x.size), np.float32)
    sums = np.empty((1, weight.shape[0] * shape[0]), np.float32)
    count = select(x, score, cut, ties, indices, values[0])
    multiply_records(weight, indices, values, count, sums, shape, zero, (0,), pieces, stored)
    _finish(sums[0], bias, group, padded, y)


@compiled()
def _row_groups(x, score, cut, ties, weight, scale, zeros, shape, zero, stored, bias, group, padded, y):  # type: ignore[no-untyped-def]
    indices, values = np.empty(x.size, np.int32), np.empty((1, x.size), np.float32)
    sums = np.empty((1, weight.shape[0] * shape[0]), np.float32)
    count = select(x, score, cut, ties, indices, values[0])
    multiply_groups(weight, scale, zeros, indices, values, count, sums, shape, zero, (0,), stored)
    _finish(sums[0], bias, group, padded, y)


class _Arguments:
    """A packed weight as the kernels take it."""

    def __init__(self, buffer: Tensor, scale: Tensor | None, zero: Tensor | None, layout: Layout) -> None:
        self.layout = layout
        self.dtype = np.uint8 if layout.stored_bits == 4 else np.int8
        self.weight = buffer.numpy().view(self.dtype)
        self.zero = np.float32(layout.middle)
        self.stored = (0,) * layout.zeros
        self.width = self.weight.shape[0] * layout.tile
        if layout.by_input:
            assert scale is not None
            self.scale = scale.numpy()
            self.zeros = EMPTY.view(self.dtype) if zero is None else zero.numpy().view(self.dtype)

    def shape(self, batch: int) -> tuple[int, ...]:
        layout = self.layout
        common = (layout.tile, run_of(layout.tile, batch, BLOCK), BLOCK * layout.stored_bits // 8)
        return (*common, layout.group) if layout.by_input else (*common, layout.code_bytes, layout.zeros_at)

    @property
    def pieces(self) -> tuple[int, ...]:
        return (0,) * (BLOCK // self.layout.piece)

    def multiply(self, indices: np.ndarray, values: np.ndarray, count: int, out: np.ndarray) -> None:
        """Write out float32 [batch, n_tiles * tile] of values float32 [batch, in]."""
        batch, shape = (0,) * len(values), self.shape(len(values))
        shared = (indices, values, count, out, shape, self.zero, batch)
        if self.layout.by_input:
            multiply_groups(self.weight, self.scale, self.zeros, *shared, self.stored)
        else:
            multiply_records(self.weight, *shared, self.pieces, self.stored)

    def row(self, selection: tuple, bias: np.ndarray, y: np.ndarray) -> None:
        shape, end = self.shape(1), (bias, *self._groups(), y)
        if self.layout.by_input:
            _row_groups(*selection, self.weight, self.scale, self.zeros, shape, self.zero, self.stored, *end)
        else:
            _row_records(*selection, self.weight, shape, self.zero, self.pieces, self.stored, *end)

    def _groups(self) -> tuple[int, int]:
        if self.layout.by_input:
            return self.layout.out_features, self.layout.out_features
        return self.layout.group, self.layout.padded


def quantized_active_linear(
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    buffer: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    layout: Layout,
) -> Tensor:
    """Compute what `reference.quantized_active_linear` does."""
    chosen, x = indices.contiguous().numpy(), array(values.contiguous())
    packed = _Arguments(buffer, scale, zero, layout)
    out = np.empty((len(counts), packed.width), np.float32)
    with LOCK:
        follow_torch_threads(buffer.nbytes)
        for row, count in enumerate(counts.tolist()):
            packed.multiply(chosen[row], x[row : row + 1], count, out[row : row + 1])
    return torch.from_numpy(out)


def quantized_dense_linear(
    x: Tensor, buffer: Tensor, scale: Tensor | None, zero: Tensor | None, layout: Layout
) -> Tensor:
    """Compute what `reference.quantized_dense_linear` does."""
    values, packed = batched(x), _Arguments(buffer, scale, zero, layout)
    out = np.empty((len(values), packed.width), np.float32)
    with LOCK:
        follow_torch_threads(buffer.nbytes)
        packed.multiply(np.arange(layout.in_features, dtype=np.int32), values, layout.in_features, out)
    return torch.from_numpy(out[: len(x)])


def quantized_linear(
    x: Tensor,
    score: Tensor | None,
    threshold: float,
    k: int,
    buffer: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    layout: Layout,
    bias: Tensor | None,
) -> Tensor:
    """Compute what `reference.quantized_linear` does; everything contiguous."""
    y = torch.empty(len(x), layout.out_features, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
    inputs, scores, added, outputs = array(x), array(score), array(bias), array(y)
    packed = _Arguments(buffer, scale, zero, layout)
    with LOCK:
        follow_torch_threads(buffer.nbytes)
        for row, given in enumerate(inputs):
            packed.row((given, scores, *cut_of(given, scores, threshold, k)), added, outputs[row])
    return y
