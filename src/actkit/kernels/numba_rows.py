"""Chosen units on the CPU, in Numba: dot products of their rows, and what they add to the outputs of an MLP.

    out[i] = sum over c of x[c] * float32(buffer[rows[i], c])

Four rows share the loads of x, and the next four are asked for meanwhile. Threads take contiguous parts of the list.
The order of a sum is fixed.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.numba_cpu import array
from actkit.kernels.packing import COLUMNS
from actkit.kernels.process import LOCK, compiled, follow_torch_threads
from actkit.kernels.quantized import BLOCK
from actkit.kernels.quantized_rows import RowLayout
from actkit.kernels.vector_products import add_rows, dot_codes, dot_rows
from actkit.kernels.vectors import prefetch_once, row_offsets, row_values, rows_at_once

TOGETHER = 4
PARTS = 16  # of the list, over threads
BLOCK_BYTES = 64


@compiled(inner=True)
def _offsets(rows, i, last, stride):  # type: ignore[no-untyped-def]
    return (
        np.int64(rows[min(i, last)]) * stride,
        np.int64(rows[min(i + 1, last)]) * stride,
        np.int64(rows[min(i + 2, last)]) * stride,
        np.int64(rows[min(i + 3, last)]) * stride,
    )


@compiled(inner=True)
def chosen_dots(weight, x, rows, first, last, out):  # type: ignore[no-untyped-def]
    """Compute out[i] for i from first to last, on the calling thread.

    Args:
        weight: uint16 (bf16) or float32 [rows, width].
        x: float32 [width].
        rows: int32, the chosen rows.
        first: the first entry to compute.
        last: the one after the last.
        out: float32, written.
    """
    width, stride = weight.shape[1], weight.shape[1] * weight.itemsize
    for i in range(first, last, TOGETHER):
        here = _offsets(rows, i, last - 1, stride)
        ahead = _offsets(rows, i + TOGETHER, last - 1, stride)
        for place in range(0, stride, BLOCK_BYTES):
            prefetch_once(weight, ahead, place)
        found = dot_rows(weight, here, x, width)
        for r in range(TOGETHER):
            if i + r < last:
                out[i + r] = found[r]


@compiled(inner=True)
def chosen_codes(weight, x, rows, first, last, out, shape, zero, pieces, stored):  # type: ignore[no-untyped-def]
    """Compute what `chosen_dots` does, of integer rows as `quantized_rows` stores them.

    Args:
        weight: uint8 (4 bits) or int8 (8 bits) [rows, row bytes].
        x: float32 in whole blocks.
        rows: int32, the chosen rows.
        first: the first entry to compute.
        last: the one after the last.
        out: float32, written.
        shape: (bytes of a block, first byte of the scales, of the zeros).
        zero: of all, if none are stored.
        pieces: as in `numba_quantized.multiply_records`.
        stored: as in `numba_quantized.multiply_records`.
    """
    stride, (block_bytes, scales, zeros) = weight.shape[1], shape
    blocks = scales // block_bytes
    for i in range(first, last, TOGETHER):
        here = _offsets(rows, i, last - 1, stride)
        ahead = _offsets(rows, i + TOGETHER, last - 1, stride)
        for place in range(0, stride, block_bytes):
            prefetch_once(weight, ahead, place)
        found = dot_codes(weight, here, x, blocks, scales, zeros, zero, pieces, stored)
        for r in range(TOGETHER):
            if i + r < last:
                out[i + r] = found[r]


@compiled()
def bundled_units(weight, x, units, values, count, out):  # type: ignore[no-untyped-def]
    """Compute out = sum over i < count of values[i] * (row . x) * column, on the calling thread.

    Args:
        weight: uint16 (bf16) or float32 [all units, width]: a unit's row of the up projection, [x.size], then its
            column of the down projection, [out.size], each in whole blocks.
        x: float32, the inputs.
        units: int32, the chosen units.
        values: float32, changed.
        count: how many are chosen.
        out: float32, written.
    """
    stride, down = weight.shape[1] * weight.itemsize, x.size * weight.itemsize
    size, batch = weight.itemsize, (0,)
    together = rows_at_once(weight, batch)
    out[:] = 0
    for i in range(0, count, together):
        for j in range(i, min(i + together, count), TOGETHER):
            here = _offsets(units, j, count - 1, stride)
            for place in range(0, stride - down, BLOCK_BYTES):
                prefetch_once(weight, here, down + place)
            found = dot_rows(weight, here, x, x.size)
            for r in range(TOGETHER):
                if j + r < count:
                    values[j + r] *= found[r]
        if i + together <= count:
            rows = row_offsets(weight, batch, units, i, count, np.int64(down), np.int64(stride))
            following = row_offsets(weight, batch, units, i + together, count, np.int64(0), np.int64(stride))
            factors = row_values(weight, batch, values.reshape(1, -1), i, count)
            for column in range(0, out.size, COLUMNS):
                add_rows(out, column, out.size, weight, rows, factors, column * size)
                prefetch_once(weight, following, column * size)
        else:  # one by one: a zero instead of a row would make NaN of an Inf
            for j in range(i, count):
                last = (np.int64(units[j]) * stride + down,)
                for column in range(0, out.size, COLUMNS):
                    add_rows(out, column, out.size, weight, last, (values[j],), column * size)


@compiled(parallel=True)
def _chosen(weight, x, rows, out):  # type: ignore[no-untyped-def]
    for part in prange(PARTS):
        chosen_dots(weight, x, rows, rows.size * part // PARTS, rows.size * (part + 1) // PARTS, out)


@compiled(parallel=True)
def _chosen_codes(weight, x, rows, out, shape, zero, pieces, stored):  # type: ignore[no-untyped-def]
    for part in prange(PARTS):
        first, last = rows.size * part // PARTS, rows.size * (part + 1) // PARTS
        chosen_codes(weight, x, rows, first, last, out, shape, zero, pieces, stored)


def output_rows(x: Tensor, buffer: Tensor, rows: Tensor) -> Tensor:
    """Compute what `reference.output_rows` does."""
    weight, given, chosen = array(buffer), x.float().contiguous().numpy(), rows.contiguous().numpy()
    out = np.empty((len(given), len(chosen)), np.float32)
    with LOCK:
        follow_torch_threads(len(chosen) * weight.shape[1] * weight.itemsize)
        for one, found in zip(given, out):
            _chosen(weight, one, chosen, found)
    return torch.from_numpy(out)


def quantized_output_rows(x: Tensor, buffer: Tensor, rows: Tensor, layout: RowLayout) -> Tensor:
    """Compute what `reference.quantized_output_rows` does."""
    weight = buffer.numpy().view(np.uint8 if layout.stored_bits == 4 else np.int8)
    padded = torch.nn.functional.pad(x.float(), (0, layout.blocks * BLOCK - layout.in_features))
    given, chosen = padded.contiguous().numpy(), rows.contiguous().numpy()
    out = np.empty((len(given), len(chosen)), np.float32)
    shape = (BLOCK * layout.stored_bits // 8, layout.scales_at, layout.zeros_at)
    settings = (shape, np.float32(layout.middle), (0,) * (BLOCK // layout.piece), (0,) * layout.zeros)
    with LOCK:
        follow_torch_threads(len(chosen) * layout.row_bytes)
        for one, found in zip(given, out):
            _chosen_codes(weight, one, chosen, found, *settings)
    return torch.from_numpy(out)
