"""Seconds per decoded token from the bytes that it reads: a rate for each kind of kernel, fitted on this machine.

    seconds = constant + sum over kinds of rate_kind * bytes_kind

The rates are those that fit what was timed best, pulled a little towards one rate for all (that of the original), so
that a kind which few recipes have gets no wild rate. No rate and no constant is negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import nnls

TIMED = 0.02  # relative error of a timed speed
RATE, CONSTANT = 0.5, 0.3  # how far a rate may lie from the original's, and the constant from 0, in its seconds


@dataclass(frozen=True)
class Timed:
    """One recipe as it was timed.

    Attributes:
        name: of the candidate.
        reads: bytes per token by kind of kernel.
        seconds: per token.
    """

    name: str
    reads: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class TimeModel:
    """What `fit` found.

    Attributes:
        constant: seconds that every token takes.
        rates: seconds per byte, by kind.
        fallback: the rate of a kind that was never timed.
        errors: by name, (estimate - timed) / timed, each estimated without its own timing.
    """

    constant: float
    rates: Mapping[str, float]
    fallback: float
    errors: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, reads: Mapping[str, float]) -> float:
        """Estimate the seconds per token of a model that reads so many bytes.

        Args:
            reads: bytes per token by kind.
        """
        return self.constant + sum(self.rate(kind) * size for kind, size in reads.items())

    def rate(self, kind: str) -> float:
        """Return the seconds per byte of a kind; of one that was never timed, the original's."""
        return self.rates.get(kind, self.fallback)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return {
            "constant": self.constant,
            "rates": dict(self.rates),
            "fallback": self.fallback,
            "errors": dict(self.errors),
        }


def fit(timed: Sequence[Timed]) -> TimeModel:
    """Fit the model of time.

    Args:
        timed: the original first.

    Returns:
        The model; its errors leave out the original, whose rate the others are pulled to, and are empty if only one
        other was timed.

    Raises:
        ValueError: nothing was timed.
    """
    if not timed:
        raise ValueError("timed: nothing was timed; give the original at least.")
    constant, rates, fallback = _fit(timed)
    errors = {}
    for index, left_out in enumerate(timed[1:] if len(timed) > 2 else (), start=1):
        others = TimeModel(*_fit([each for at, each in enumerate(timed) if at != index]))
        errors[left_out.name] = others.seconds(left_out.reads) / left_out.seconds - 1
    return TimeModel(constant, rates, fallback, errors)


def _fit(timed: Sequence[Timed]) -> tuple[float, dict[str, float], float]:
    kinds = list(dict.fromkeys(kind for each in timed for kind in each.reads))
    scale = timed[0].seconds  # of all unknowns: the original's time, and its time per byte
    rate = scale / max(1.0, sum(timed[0].reads.values()))
    rows = [
        [scale / each.seconds, *(rate * each.reads.get(kind, 0.0) / each.seconds for kind in kinds)] for each in timed
    ]
    fitted = np.array(rows) / TIMED
    wanted = np.ones(len(timed)) / TIMED
    pulled = np.diag([1 / CONSTANT] + [1 / RATE] * len(kinds))
    towards = np.array([0.0] + [1 / RATE] * len(kinds))
    found, _ = nnls(np.vstack([fitted, pulled]), np.concatenate([wanted, towards]))
    return scale * found[0], {kind: rate * each for kind, each in zip(kinds, found[1:], strict=True)}, rate
