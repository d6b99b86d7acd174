"""What models that predict one of many classes share: scores of predictions, for a slice of logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from actkit.core.forward.outputs import Output
from actkit.core.ground.estimate import Estimate
from actkit.core.measure.tasks.task import Estimating, Sums, check_finite

SLICE = 1 << 23  # logits that a head gives at a time: 16 MiB in bf16, and still a product at full speed
CHUNK = 1 << 20  # logits turned to float32 at a time: 4 MiB and as much for each intermediate, which stay in a cache
METRICS = {
    "kl": (".5f", "Kullback-Leibler divergence, original || changed, in nats per prediction; 0 is unchanged"),
    "agreement": (".2%", "share of predictions whose first choice is the original's"),
}


def predictions(
    logits: Output, other: Output | None, position: Tensor, targets: Tensor, owners: Tensor, likelihood: bool
) -> Sums:
    """Score predictions, for a chunk of rows at a time; log-probabilities are float32.

    Args:
        logits: of the model.
        other: of the original, None without one; the same object as `logits` if the model is the original.
        position: int64 [n], the rows of the logits that are wanted.
        targets: int64 [n], the right class of each.
        owners: int64 [n], the document of each.
        likelihood: score by the negative log-likelihood of the targets, else by whether they are the first choice.

    Returns:
        Sums, float64 [n] each.

    Raises:
        NonFiniteError: a logit is NaN or Inf.
    """
    classes = logits.shape[-1]
    rows, some = max(1, SLICE // classes), max(1, CHUNK // classes)
    found: Sums = {}  # of all rows at once: small tensors kept between large ones keep the allocator from reusing these
    for first in range(0, max(1, len(position)), rows):
        where = position[first : first + rows]
        mine = logits.rows(where)
        others = None if other is None else mine if other is logits else other.rows(where).to(mine.device)
        for at in range(0, max(1, len(where)), some):
            part, whole = slice(at, at + some), slice(first + at, first + min(at + some, len(where)))
            scores = _scores(
                mine[part], None if others is None else others[part], targets[whole], owners[whole], likelihood
            )
            for name, value in scores.items():
                found.setdefault(name, torch.empty(len(position), dtype=torch.float64))[whole] = value
    return found


def _scores(logits: Tensor, other: Tensor | None, target: Tensor, owner: Tensor, likelihood: bool) -> Sums:
    """As `predictions`, of logits [n, classes]."""
    logits, target = logits.float(), target.to(logits.device)
    check_finite(logits, owner, "the model's logits")
    first = logits.argmax(-1)
    log = logits.log_softmax(-1)
    found = {"count": torch.ones(len(target))}
    if likelihood:
        found["nll"] = -log.gather(1, target[:, None])[:, 0]
    else:
        found["hits"] = first == target
    if other is not None:
        other = other.float()
        check_finite(other, owner, "the reference's logits")
        other_first = other.argmax(-1)
        other_log = other.log_softmax(-1)
        found["kl"] = _divergence(other_log, log)
        found["agree"] = first == other_first
        if likelihood:
            found["other_nll"] = -other_log.gather(1, target[:, None])[:, 0]
        else:
            found["other_hits"] = other_first == target
    return {name: value.cpu().double() for name, value in found.items()}


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Kullback-Leibler divergence of log-probabilities [rows, classes], first || second, in nats: [rows].

    Summed as p (r - 1 - log r) with r = q / p, which is the same because both sum to 1. No term is negative, and the
    rounding of the two normalisations cancels; the usual p (log p - log q) drowns small divergences in it.
    """
    p, difference = first.exp(), second - first
    near = p * (difference.expm1() - difference)
    if bool((difference < 1).all()):
        return near.sum(-1)
    far = second.exp() - p * (1 + difference)  # expm1 overflows if q is many times p
    return torch.where(difference < 1, near, far).sum(-1)


def compared(estimate: Estimating, names: frozenset[str]) -> dict[str, Estimate]:
    """Return divergence and agreement, if there was an original."""
    if "kl" not in names:
        return {}
    return {
        "kl": estimate(lambda s: s["kl"] / s["count"], compares=True),
        "agreement": estimate(lambda s: s["agree"] / s["count"], compares=True),
    }
