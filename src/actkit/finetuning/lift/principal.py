"""Principal weights: the entries of a matrix that are largest in its low-rank approximation.

    W_R = U_R S_R V_R^T,   M = the k entries with the largest |W_R|,   k = r (m + n), as many numbers as a LoRA's

From LIFT (2025, arXiv:2506.00772). Perturbing them raises the spectral norm of a matrix, and the loss of a language
model, more than perturbing the largest entries of W itself, or random ones.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from actkit.core.ground.largest import largest
from actkit.core.layers.low_rank import Algorithm, decompose

Reduce = Literal["largest", "smallest", "random", "hybrid"]


def principal_mask(
    weight: Tensor,
    rank_filter: int,
    k: int | None = None,
    lora_rank: int | None = None,
    *,
    reduce: Reduce = "largest",
    algorithm: Algorithm = "svd",
    seed: int = 0,
) -> Tensor:
    """Choose the entries of a weight that are largest after a reduction of its rank.

    Args:
        weight: [m, n]; a convolution's is read as [out, all others].
        rank_filter: R, of the approximation; more than m or n is clamped with a warning.
        k: how many entries; or give `lora_rank`.
        lora_rank: r; k = r (m + n), at most all.
        reduce: which singular values are kept: the `rank_filter` largest, smallest, some at random, or half of the
            largest and half of the smallest.
        algorithm: of the decomposition (`core/layers/low_rank.py`); 'largest' alone takes another than 'svd'.
        seed: of what is random.

    Returns:
        bool, of the shape of `weight`, with exactly k ones.

    Raises:
        ValueError: k or the ranks are below 1, both or none of k and lora_rank are given, or the weight is no matrix.
    """
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ValueError(f"weight: {weight.dtype} of shape {list(weight.shape)} was given; give a float matrix.")
    rows = weight.detach().flatten(1)
    number = entries(rows.shape[0], rows.shape[1], k, lora_rank)
    if rank_filter < 1:
        raise ValueError(f"rank_filter: {rank_filter} was given; give 1 or more.")
    if rank_filter > min(rows.shape):
        warnings.warn(
            f"rank_filter: {rank_filter} was given, a weight of {list(rows.shape)} has {min(rows.shape)}; nothing is "
            f"reduced, and its largest entries are taken.",
            stacklevel=2,
        )
    whole = rank_filter >= min(rows.shape)
    reduced = rows.double() if whole else _reduced(rows, rank_filter, reduce, algorithm, seed)
    return largest(reduced.abs().flatten(), number).view(weight.shape)


def entries(outputs: int, inputs: int, k: int | None, lora_rank: int | None) -> int:
    """Count the entries that are trained.

    Args:
        outputs: rows of the matrix.
        inputs: columns.
        k: as it was given.
        lora_rank: the same.

    Raises:
        ValueError: both or none are given, or one is below 1.
    """
    if (k is None) == (lora_rank is None):
        raise ValueError(f"k, lora_rank: {k} and {lora_rank} were given; give one of the two.")
    given = k if lora_rank is None else lora_rank
    if given is None or given < 1:
        raise ValueError(f"{'k' if lora_rank is None else 'lora_rank'}: {given} was given; give 1 or more.")
    number = given if lora_rank is None else given * (outputs + inputs)
    if number >= outputs * inputs:
        warnings.warn(
            f"{'k' if lora_rank is None else 'lora_rank'}: {given} takes all {outputs * inputs} entries of a weight of "
            f"[{outputs}, {inputs}]; it is trained whole.",
            stacklevel=3,
        )
    return min(number, outputs * inputs)


def _reduced(rows: Tensor, rank: int, reduce: Reduce, algorithm: Algorithm, seed: int) -> Tensor:
    """The approximation, float64."""
    if reduce == "largest":
        left, values, right = decompose(rows, rank, algorithm, seed)
        return left * values @ right
    left, values, right = decompose(rows, min(rows.shape))
    number = len(values)
    if reduce == "random":
        kept = torch.randperm(number, generator=torch.Generator().manual_seed(seed))[:rank]
    else:
        first = rank // 2 if reduce == "hybrid" else 0
        kept = torch.cat([torch.arange(first), torch.arange(number - (rank - first), number)])
    return left[:, kept] * values[kept] @ right[kept]
