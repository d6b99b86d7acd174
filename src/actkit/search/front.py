"""The front: the candidates that no other beats on quality, speed and memory at once.

One beats another where it is nowhere worse and somewhere better. Losses and bytes are compared as they are; speeds
count as different only where their intervals do not overlap, so that noise puts nobody on the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actkit.core.quality import Estimate
from actkit.search.measured import Candidate


@dataclass(frozen=True)
class Point:
    """Where a candidate stands. loss, held, read: bytes of weights held in memory and read per token; less is better.
    ratio: of the speed to the original's, more is better; None where no speed was measured."""

    loss: float
    ratio: Estimate | None
    held: float
    read: float


def point(candidate: Candidate) -> Point | None:
    """Where a measured candidate stands; None for one that failed."""
    if candidate.failed is not None or candidate.loss is None:
        return None
    held = float(candidate.weight_bytes or 0)
    read = candidate.bytes_per_token
    ratio = None
    if candidate.speed is not None:
        ratio = candidate.speed.ratio or Estimate(1.0, 1.0, 1.0)  # the original is what the others are compared with
    return Point(candidate.loss.value, ratio, held, held if read is None else read)


def beats(one: Point, other: Point) -> bool:
    """Whether `one` is nowhere worse than `other` and somewhere better."""
    faster, slower = _faster(one, other), _faster(other, one)
    if slower or one.loss > other.loss or one.held > other.held or one.read > other.read:
        return False
    return faster or one.loss < other.loss or one.held < other.held or one.read < other.read


def _faster(one: Point, other: Point) -> bool:
    return one.ratio is not None and other.ratio is not None and one.ratio.low > other.ratio.high


def front(points: Sequence[Point | None]) -> list[int]:
    """Indices of the points that none of the others beats."""
    return [
        index
        for index, mine in enumerate(points)
        if mine is not None and not any(other is not None and beats(other, mine) for other in points)
    ]
