"""Weights in the order in which the sparse kernel reads them: input-major column tiles.

A skipped input is a skipped row, so the row of an input must be one contiguous run, and a long one: on the machine that
this was tuned on (two Xeon cores, 4096 -> 11008, half of the rows, at random) rows of 1376 outputs are read at 26, of
2752 at 29 and of 5504 at 31 GB/s. So a thread gets one tile as wide as its share of the outputs, up to the width
whose float32 accumulators still stay in the L1 cache beside the rows. A tile has one owner: no atomics, no reduction.

    buffer[t, i, c] = weight[t * tile + c, i]      zero if t * tile + c >= out_features

In bfloat16, outputs c and c + 16 of each block of 32 share a 32-bit word. One shift makes float32 of the first 16
outputs, and one mask of the others, both in order: 5 % faster than widening 16-bit words, whose extra instructions keep
later loads out of the processor's window.

Cost: a second copy of the weight. Rows start on cache lines, and never at multiples of 4 KB from each other: there the
eight rows that are read at once and the accumulators would fall into one set of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHT_DTYPES = (torch.bfloat16, torch.float32)
HALF = 16
COLUMNS = 2 * HALF  # a tile is a whole number of such blocks: one cache line of bf16, two of float32
WIDEST_TILE = 6144  # 24 KB of float32 accumulators
LINE = 64  # bytes
PAGE = 4096  # bytes; rows at this distance share their cache sets


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in column tiles.

    Attributes:
        buffer: float32 or bfloat16 [n_tiles, in_features, tile], on the CPU.
        out_features: rows of the weight.
    """

    buffer: Tensor
    out_features: int

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.buffer.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight."""
        return self.buffer.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, padding included."""
        return self.buffer.nbytes

    def dense(self) -> Tensor:
        """Return the weight [out_features, in_features], as it was given to `pack`."""
        return in_order(self.buffer).transpose(1, 2).reshape(-1, self.in_features)[: self.out_features]


def pack(weight: Tensor, threads: int | None = None) -> PackedWeight:
    """Copy a weight into column tiles.

    Args:
        weight: float32 or bfloat16 [out_features, in_features], on the CPU.
        threads: how many threads will read it, by default torch.get_num_threads(); it sets the tile's width. Any number
            of threads gives the same result, bit for bit.

    Returns:
        The copy.

    Raises:
        ValueError: the kernel cannot read the weight.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight: shape {tuple(weight.shape)} was given; give a non-empty [out, in].")
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight: {weight.dtype} was given; convert it to torch.bfloat16 or torch.float32.")
    if weight.device.type != "cpu":
        raise ValueError(f"weight: it is on {weight.device}; the kernel runs on the CPU, use weight.cpu().")
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads: {threads} was given; give 1 or more.")
    out_features, in_features = weight.shape
    n_tiles, tile = tiling(out_features, threads, weight.element_size())
    buffer = allocate((n_tiles, in_features, tile), weight.dtype)
    for stored, outputs in zip(buffer, weight.detach().split(tile)):
        rows = F.pad(outputs.t(), (0, tile - outputs.shape[0]))
        if weight.dtype == torch.bfloat16:
            stored.unflatten(1, (-1, HALF, 2)).copy_(rows.unflatten(1, (-1, 2, HALF)).transpose(2, 3))
        else:
            stored.copy_(rows)
    return PackedWeight(buffer, out_features)


def in_order(stored: Tensor) -> Tensor:
    """Return rows of a packed buffer [..., tile] with their outputs in order."""
    if stored.dtype != torch.bfloat16:
        return stored
    return stored.unflatten(-1, (-1, HALF, 2)).transpose(-1, -2).flatten(-3)


def tiling(out_features: int, threads: int, itemsize: int) -> tuple[int, int]:
    """Return the number of tiles (a multiple of the threads, unless there are too few outputs) and their width."""
    shares = threads * ceil(out_features / (threads * WIDEST_TILE))
    tile = ceil(ceil(out_features / shares) / COLUMNS) * COLUMNS
    if tile * itemsize % PAGE == 0:
        tile += COLUMNS
    return ceil(out_features / tile), tile


def allocate(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialised tensor on huge pages that starts on a cache line.

    Two more lines behind it may be read. NumPy asks the system for huge pages for every large array, torch does not;
    without them each skipped row costs a page walk.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
    """
    nbytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
    memory = np.empty(nbytes + 192, np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + nbytes]).view(dtype).view(shape)


def aligned(shape: tuple[int, ...] | int, dtype: Any) -> np.ndarray:
    """Make zeros that begin on a cache line: a vector that crosses two of them costs two accesses."""
    count = int(np.prod(shape))
    whole = np.zeros(count * np.dtype(dtype).itemsize + LINE, np.uint8)
    start = -whole.ctypes.data % LINE
    return whole[start : start + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
