"""Expected calibration error: how far confidence is from accuracy (Guo et al. 2017, arXiv:1706.04599).

sum over bins b of n_b / n * |accuracy_b - confidence_b|,   bins of equal width, (0, 1/bins] to (1 - 1/bins, 1]
"""

from __future__ import annotations

import torch
from torch import Tensor


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error, in [0, 1]; 0 if the mean confidence of every bin is its accuracy.

    It is noisy if there are few items.

    Args:
        logits: [n, classes], before the softmax.
        labels: int64 [n].
        bins: how many, of equal width.

    Returns:
        The error.

    Raises:
        ValueError: shapes do not fit, there is no item, a label is no class, or there is no bin.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits, labels: shapes {list(logits.shape)} and {list(labels.shape)} were given; give [n, classes] and "
            f"[n], n at least 1."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels: {int(labels.min())} to {int(labels.max())} were given for {logits.shape[1]} classes."
        )
    if bins < 1:
        raise ValueError(f"bins: {bins} was given; give 1 or more.")
    confidence, predicted = logits.double().softmax(-1).max(-1)
    correct = (predicted == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, index, correct - confidence)
    return float(gaps.abs().sum() / len(labels))
