"""The largest entries of a tensor, and a budget shared out by scores: of equals the first, each time the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def largest(scores: Tensor, k: int) -> Tensor:
    """Mark the k largest entries of each row; of equal ones, the first. NaN counts as largest, so that it is seen.

    Args:
        scores: [..., channels].
        k: how many to mark; all if there are fewer.

    Returns:
        bool, of the shape of `scores`.

    Raises:
        ValueError: k is below 0.
    """
    if k < 0:
        raise ValueError(f"k: {k} was given; give 0 or more.")
    channels = scores.shape[-1]
    if k == 0 or k >= channels:
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    scores = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    least = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)  # far cheaper than a sort
    larger, equal = scores > least, scores == least
    room = k - larger.sum(-1, keepdim=True, dtype=torch.int32)
    return larger | equal & (equal.cumsum(-1, dtype=torch.int32) <= room)


def allocate(
    scores: Sequence[float] | Tensor,
    budget: float,
    low: float = 0.0,
    high: float = 1.0,
    sizes: Sequence[float] | None = None,
) -> Tensor:
    """Share out a budget in proportion to scores, within bounds.

        share_i = min(max(c score_i, low), high),   with c such that the mean of the shares is the budget

    Args:
        scores: one for each part, 0 or more.
        budget: the mean of the shares.
        low: the least share of a part.
        high: the largest.
        sizes: of the parts, by which shares are weighed in the mean; None for equal ones.

    Returns:
        Float64 [parts].

    Raises:
        ValueError: the budget is outside of the bounds, or scores or sizes are negative, not finite or none.
    """
    values = torch.as_tensor(scores, dtype=torch.float64)
    weights = torch.ones_like(values) if sizes is None else torch.as_tensor(sizes, dtype=torch.float64)
    for name, given in (("scores", values), ("sizes", weights)):
        if given.shape != values.shape or not len(given) or not bool((given.isfinite() & (given >= 0)).all()):
            raise ValueError(f"{name}: {given.tolist()} were given; give one for each part, finite and 0 or more.")
    if not 0 <= low <= budget <= high:
        raise ValueError(f"budget: {budget} was given with low={low} and high={high}; give 0 <= low <= budget <= high.")
    weights = weights / weights.sum() if bool(weights.any()) else torch.full_like(weights, 1 / len(weights))
    positive = values > 0
    if float(weights[positive].sum()) * high + float(weights[~positive].sum()) * low < budget:
        values = torch.where(positive, values, 0.0) + values.max().clamp(min=1.0) * 1e-12  # parts without a score too
    values = values / values.max()
    small, large = 0.0, max(high, budget) / float(values[values > 0].min())
    for _ in range(200):  # the mean rises with c, so halving finds it
        middle = (small + large) / 2
        if float((weights * (middle * values).clamp(low, high)).sum()) < budget:
            small = middle
        else:
            large = middle
    shares = (large * values).clamp(low, high)
    assert math.isclose(float((weights * shares).sum()), budget, abs_tol=1e-9)
    return shares
