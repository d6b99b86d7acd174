"""Which inputs of a vector are worth reading: made once, shared by all layers with the same input.

    active = { j : |x_j| * score_j > threshold }      or the k largest |x_j| * score_j, of equal ones the first

Cost: one pass over the vector, and for top-k a partition, against a row of the weight for each input.
Products are taken in float32 (16-bit ones under- and overflow). A NaN is always active, so that it reaches the output;
top-k ranks it above everything, as torch does.
"""

from __future__ import annotations

from math import isnan
from typing import NamedTuple

import torch
from torch import Tensor

UNUSED = -1  # a threshold or k that is not given; with both unused every input is active
MOST_ROWS = 2  # two independent masks at 50 % already need 75 % of the weight; above, a dense product wins
MOST_DENSE_ROWS = 8  # a dense kernel keeps the sums of all rows in the L1 cache
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ActiveSet(NamedTuple):
    """The active inputs of x [..., in], one set per row.

    Of row r the first counts[r] entries are the set, the others are zero.

    Attributes:
        indices: int32 [rows, in], ascending.
        values: float32 [rows, in].
        counts: int32 [rows].
        shape: that of x.
        dtype: that of x.
    """

    indices: Tensor
    values: Tensor
    counts: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def density(self) -> float:
        """Share of the inputs that is active, over all rows; 0 for no rows."""
        return float(self.counts.sum()) / max(self.indices.numel(), 1)


def compact(x: Tensor, threshold: float | None = None, k: int | None = None, score: Tensor | None = None) -> ActiveSet:
    """Find the active inputs; every input if neither threshold nor k is given.

    Args:
        x: [..., in], with at most 2 rows.
        threshold: 0 or more, compared as float32 with |x| * score.
        k: 0 or more; above `in` it means all.
        score: [in]; None for 1.

    Returns:
        One set per row.

    Raises:
        ValueError: an argument is outside of this.
    """
    threshold, k = selection(threshold, k, score)
    indices, values, counts = torch.ops.actkit.compact(x, score, threshold, k)
    return ActiveSet(indices, values, counts, tuple(x.shape), x.dtype)


def selection(threshold: float | None, k: int | None, score: Tensor | None) -> tuple[float, int]:
    """Check threshold and k, and return them as the operators take them."""
    if threshold is not None and k is not None:
        raise ValueError(f"threshold and k: {threshold} and {k} were given; give at most one of them.")
    if threshold is not None and (threshold < 0 or isnan(threshold)):
        raise ValueError(f"threshold: {threshold} was given; it is a magnitude, give 0 or more.")
    if k is not None and k < 0:
        raise ValueError(f"k: {k} was given; give 0 or more.")
    if score is not None and threshold is None and k is None:
        raise ValueError("score: it was given without a threshold or k, so nothing would be selected by it; give one.")
    return (UNUSED if threshold is None else float(threshold)), (UNUSED if k is None else k)


def check_input(x: Tensor, score: Tensor | None, dense: bool = False) -> None:
    """Raise ValueError if x [..., in] or score [in] cannot be compacted, or x cannot enter a dense product."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)} was given; give [..., in_features], not empty.")
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x: {x.dtype} was given; allowed are float32, bfloat16 and float16.")
    rows = x.shape[:-1].numel()
    if dense and rows > MOST_DENSE_ROWS:
        raise ValueError(f"x: it has {rows} rows, the kernel takes at most {MOST_DENSE_ROWS}; use a matrix product.")
    if not dense and rows > MOST_ROWS:
        raise ValueError(f"x: it has {rows} rows, the sparse kernel takes at most {MOST_ROWS}; use a dense product.")
    if score is not None and score.shape != x.shape[-1:]:
        raise ValueError(f"score: shape {tuple(score.shape)} was given; give [{x.shape[-1]}], as x has.")
