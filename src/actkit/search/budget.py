"""What candidates cost: an estimate for each before it starts, and how many of them a number of minutes pays for.

The unit that carries over to other models is the plain forward pass over the test split; it is timed once. An estimate
adds up what was seen so far on this model:

- the seconds of both splits and of the rest (saving, cost, the reload proof), of the newest candidate that was measured
  whole, else of the original;
- for calibration, the passes that the transforms declare.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from actkit.core.ground.errors import ActkitError
from actkit.core.recipe.transform import Transform
from actkit.search.measured import Candidate
from actkit.search.splits import Splits

FRESH = 8.0  # seconds of a fresh process that imports torch and transformers, before one was seen
HEADS = 1.15  # of the original's own measurement: the other model's head runs too
SPEED = 2.0  # of the seconds of a reload proof: a process of its own, one round to warm up and those that count


class OutOfTime(Exception):
    """The minutes were over in the middle of a candidate; the text says so."""


@dataclass
class Budget:
    """The time of a search: what is spent, what is left, and what the next step is thought to take.

    Attributes:
        splits: the data.
        minutes: of the whole search; None for no end.
        started: when the search began.
        pass_seconds: of one plain pass over the test split.
        search: seconds that the search split is thought to take.
        test: seconds that the test split is thought to take.
        rest: seconds that saving, cost and the reload proof are thought to take.
        measured: how many candidates were measured, stopped ones included.
    """

    splits: Splits
    minutes: float | None = None
    started: float = field(default_factory=time.perf_counter)
    pass_seconds: float = 0.0
    search: float = 0.0
    test: float = 0.0
    rest: float = FRESH
    measured: int = 0  # candidates, stopped ones included

    def original(self, original: Candidate) -> None:
        """Note what the original tells of the candidates."""
        parts = original.parts
        self.pass_seconds = parts.get("pass", 0.0)
        self.search, self.test = HEADS * parts.get("search", 0.0), HEADS * parts.get("test", 0.0)
        self.rest = FRESH + 2 * parts.get("rest", 0.0)

    def seen(self, candidate: Candidate) -> None:
        """Note what a measured candidate tells of the next ones."""
        self.measured += 1
        if {"search", "test", "rest"} <= candidate.parts.keys():
            self.search, self.test, self.rest = (candidate.parts[name] for name in ("search", "test", "rest"))

    def estimate(self, transforms: Sequence[Transform] | None) -> float:
        """Estimate the seconds of a candidate if nothing stops it early.

        Args:
            transforms: those left to compute; None for a candidate that is not made.

        Returns:
            Seconds.
        """
        if transforms is None:
            return 0.0
        tokens, rows = self.splits.calibration.tokens, self.splits.calibration.rows
        needy = [transform for transform in transforms if transform.needs_data]
        passes = sum(transform.passes(tokens, rows) for transform in needy)
        if needy:
            passes += 2 + len({transform.tags.stream for transform in needy} - {"none"})
        calibration = self.pass_seconds * tokens / max(1, self.splits.test.tokens) * passes
        return calibration + self.search + self.test + self.rest

    def speeds(self, count: int) -> float:
        """Estimate the seconds until the speeds of so many candidates are measured, and the best is saved."""
        return (SPEED * (count + 1) + 1) * self.rest if count else self.rest

    @property
    def spent(self) -> float:
        """Seconds of this run so far."""
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return float("inf") if self.minutes is None else 60 * self.minutes - self.spent

    def interrupt(self, *_: Any) -> None:
        """Raise OutOfTime once the minutes are over.

        Args:
            *_: what a hook is called with; it is dropped.

        Raises:
            OutOfTime: they are.
        """
        if self.left <= 0:
            raise OutOfTime(f"minutes={self.minutes:g}: they were over before it was measured")

    def over(self, seconds: float, what: str) -> str | None:
        """Say why a step of so many seconds is left out; None if there is time for it."""
        if seconds <= self.left:
            return None
        return (
            f"{what} needs about {seconds:.0f} s, and of {self.minutes:g} minutes {max(0.0, self.left):.0f} s are left"
        )


def check_minutes(minutes: float | None) -> None:
    """Raise ValueError for a number of minutes in which nothing can be done."""
    if minutes is not None and not 0 < minutes < float("inf"):
        raise ValueError(f"minutes: {minutes:g} was given; give more than 0, such as 5, or None for no limit.")


def out_of_time(minutes: float, journal: str, why: str) -> ActkitError:
    """Make the error of a search that ended before one candidate did."""
    return ActkitError(
        f"minutes: {minutes:g} were over before one candidate was measured ({why}). What is done is in {journal}: go "
        f"on with resume=True (--resume) and more minutes."
    )
