"""The front: the candidates that no other beats on quality, speed, peak memory and disk at once.

One beats another if it is nowhere worse and somewhere better, by what was measured.

- Bytes read per token are no axis: they are a cause of speed, and count through the speed that they give.
- Losses are compared to 0.01 %, memory and disk in whole percent of the original's, as they are shown.
- A speed counts as worse if it lies below the other's interval, and as better if the intervals do not overlap. So noise
  alone puts no candidate on the front.
- The front is never empty: among those that are equal in all but speed, beating means being surely faster, and the
  other costs are compared without intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from actkit.core.ground.estimate import Estimate
from actkit.search.measured import Candidate


@dataclass(frozen=True)
class Point:
    """What a candidate gives and costs; None for what was not measured.

    Attributes:
        loss: on the test split.
        ratio: of the speed to the original's; more is better.
        memory: peak memory over the original's; less is better.
        disk: bytes on disk over the original's; less is better.
    """

    loss: float
    ratio: Estimate | None = None
    memory: float | None = None
    disk: float | None = None

    @property
    def costs(self) -> tuple[float | None, ...]:
        """What is better if it is less, as precise as it is shown."""
        return tuple(
            None if value is None else round(value, digits)
            for value, digits in ((self.loss, 4), (self.memory, 2), (self.disk, 2))
        )


def point(candidate: Candidate, original: Candidate) -> Point | None:
    """Return the point of a measured candidate.

    Args:
        candidate: measured.
        original: what it is compared with.

    Returns:
        The point; None for a candidate that cannot be used: it failed, it does not reload, or it does not write.
    """
    if candidate.failed is not None or candidate.loss is None or not math.isfinite(candidate.loss.value):
        return None
    if candidate.writes or (candidate.proof is not None and not candidate.proof.passed):
        return None
    ratio = None
    if candidate.speed is not None:
        ratio = candidate.speed.ratio or Estimate(1.0, 1.0, 1.0)  # the original is what the others are compared with
    return Point(candidate.loss.value, ratio, candidate.peak_share, candidate.disk_share(original))


def beats(one: Point, other: Point) -> bool:
    """Say whether a point is nowhere worse than another and somewhere better.

    What is unknown of one cannot beat what is known of the other.

    Args:
        one: the point.
        other: what it is compared with.

    Returns:
        Whether it is.
    """
    better = False
    for mine, theirs in zip(one.costs, other.costs, strict=True):
        if theirs is None:
            continue
        if mine is None or mine > theirs:
            return False
        better = better or mine < theirs
    if other.ratio is not None:
        if one.ratio is None or one.ratio.value < other.ratio.low:
            return False
        better = better or one.ratio.low > other.ratio.high
    return better


def front(points: Sequence[Point | None]) -> list[int]:
    """Return the indices of the points that none of the others beats."""
    return [
        index
        for index, mine in enumerate(points)
        if mine is not None and not any(other is not None and beats(other, mine) for other in points)
    ]
