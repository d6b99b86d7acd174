"""The operator `actkit::masked_inputs`: inputs that are not selected become 0, for many rows at a time.

    keep[r, i] = not (|x[r, i]| * score[i] <= threshold),  or the k largest of a row, of equal ones the first

In plain torch the float32 copies of |x| * score and the search for the k largest take longer than the product that
reads the result; here they are one pass over a row that stays in a cache. NaN counts as the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actkit.kernels import reference
from actkit.kernels.operators import check_gradient, has_numba, plain, register

MASKED = (torch.float32, torch.bfloat16, torch.float16)


def masked_inputs(x: Tensor, score: Tensor | None = None, *, threshold: float = -1.0, k: int = -1) -> Tensor:
    """Set the inputs that are not selected to 0.

    Args:
        x: float32, bfloat16 or float16 [..., in], on the CPU.
        score: float32 [in]; None for 1.
        threshold: keeps |x| * score above it.
        k: keeps so many of each row; give this or a threshold.

    Returns:
        A tensor like x.

    Raises:
        ValueError: an argument is outside of this.
        RuntimeError: a gradient would be needed.
    """
    if (threshold >= 0) == (k >= 0):
        raise ValueError(f"threshold, k: {threshold} and {k} were given; give one of the two, from 0 on.")
    return torch.ops.actkit.masked_inputs.default(x, score, threshold, k)


def _check(x: Tensor, score: Tensor | None) -> None:
    if x.dtype not in MASKED or x.dim() == 0:
        raise ValueError(f"x: {x.dtype} {tuple(x.shape)} was given; give float32, bfloat16 or float16 [..., in].")
    if score is not None and (score.dtype != torch.float32 or score.shape != x.shape[-1:]):
        raise ValueError(f"score: {score.dtype} {tuple(score.shape)} was given; give float32 ({x.shape[-1]},).")


def _masked_inputs(x: Tensor, score: Tensor | None, threshold: float, k: int) -> Tensor:
    _check(x, score)
    check_gradient(x, score)
    rows = plain(x).view(-1, x.shape[-1])
    score = None if score is None else plain(score)
    if not has_numba():
        keep = reference.mask(rows.float().nan_to_num(nan=torch.inf), score, threshold, k)
        return torch.where(keep, rows, torch.zeros((), dtype=x.dtype)).view(x.shape)
    from actkit.kernels.numba_masks import masked

    given = plain(rows.float()) if x.dtype == torch.float16 else rows
    return masked(given, score, threshold, k).to(x.dtype).view(x.shape)


def _fake_masked_inputs(x: Tensor, score: Tensor | None, threshold: float, k: int) -> Tensor:
    _check(x, score)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register(
    "masked_inputs(Tensor x, Tensor? score, float threshold, int k) -> Tensor", _masked_inputs, _fake_masked_inputs
)
