"""What a text costs by an engine's logits: one implementation for all engines. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def loss(logits: np.ndarray, ids: Sequence[int], scored: Sequence[int]) -> float:
    """The sum of negative log-likelihoods, in nats.

    Args:
        logits: float32 [length, vocabulary], of the token after each.
        ids: the row's tokens [length].
        scored: places, 1 or more, of the tokens that count.

    Returns:
        The sum over the scored tokens.
    """
    total = 0.0
    for place in scored:
        row = logits[place - 1]
        top = row.max()
        total += float(np.log(np.exp(row - top, dtype=np.float64).sum()) + top - row[ids[place]])
    return total
