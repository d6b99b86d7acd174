"""The front against brute force over all pairs, written out anew; and noise in the speed, which decides nothing."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
from made_up import a_proof, candidate, the_original

from actkit.core.ground.estimate import Estimate
from actkit.search.front import Point, beats, front, point
from actkit.search.measured import Candidate


def at(loss: float, memory: float | None, disk: float | None, ratio: tuple[float, float] | None = None) -> Point:
    speed = None if ratio is None else Estimate(sum(ratio) / 2, *ratio)
    return Point(loss, speed, memory, disk)


def test_against_brute_force_with_exact_speeds():
    draw = random.Random(0)
    for _ in range(300):
        rows = [tuple(draw.randint(0, 3) for _ in range(4)) for _ in range(draw.randint(1, 9))]
        points = [at(a, b, c, (d, d)) for a, b, c, d in rows]
        costs = [(a, b, c, -d) for a, b, c, d in rows]
        expected = [
            i
            for i, mine in enumerate(costs)
            if not any(other != mine and all(o <= m for o, m in zip(other, mine)) for other in costs)
        ]
        assert front(points) == expected


def test_the_front_is_never_empty_with_overlapping_intervals_and_gaps():
    draw = random.Random(1)
    for _ in range(1000):
        points = []
        for _ in range(draw.randint(1, 8)):
            low = draw.random()
            ratio = None if draw.random() < 0.2 else (low, low + draw.random())
            known = [draw.randint(0, 1) if draw.random() < 0.8 else None for _ in range(2)]
            points.append(at(draw.randint(0, 1), *known, ratio))
        chosen = front(points)
        assert chosen
        for a, b in itertools.permutations(chosen, 2):
            assert not beats(points[a], points[b])


def test_noise_in_the_speed_puts_nobody_on_the_front():
    better, noisy = at(0.01, 5, 5, (0.9, 1.1)), at(0.02, 5, 5, (0.95, 1.2))
    assert front([better, noisy]) == [0]
    assert front([better, at(0.02, 5, 5, (1.3, 1.5))]) == [0, 1]


def test_what_is_hardly_known_beats_nothing_that_is():
    """A measurement of 0.29 to 1.99 overlaps every interval; slower by all that is known, it is as fast as nobody."""
    sure, wide = at(0.02, 1, 1, (1.5, 1.6)), at(0.01, 1, 1, (0.29, 1.99))
    assert front([sure, wide]) == [0, 1]
    assert front([sure, at(0.01, 1, 1)]) == [0, 1] and front([sure, at(0.01, None, 1, (1.5, 1.6))]) == [0, 1]
    assert front([at(0.02, 1, 1), at(0.01, 1, 1, (0.5, 0.6))]) == [1]


def test_differences_that_no_table_shows_put_nobody_on_the_front():
    assert front([at(0.00401, 0.971, 0.374), at(0.00404, 0.969, 0.371)]) == [0, 1]
    assert front([at(0.00401, 0.971, 0.374, (2, 2.1)), at(0.00398, 0.969, 0.371, (1, 1.1))]) == [0]


def test_equal_points_stay_and_failed_ones_never_do():
    assert front([at(0, 1, 1), at(0, 1, 1), None]) == [0, 1]
    assert front([None]) == []


@pytest.mark.parametrize("other", [at(0.02, 1, 1), at(0.01, 2, 1), at(0.01, 1, 2)])
def test_worse_in_one_is_beaten(other):
    assert beats(at(0.01, 1, 1), other) and not beats(other, at(0.01, 1, 1))


def test_points_are_what_a_user_has():
    """Quality, speed, memory and disk; bytes read per token move nobody."""
    original = the_original()
    one = candidate(ratio=(1.5, 1.7), disk=0.4, memory=0.8, read=0.9)
    assert point(one, original) == Point(0.001, Estimate(1.6, 1.5, 1.7), 0.8, 0.4)
    assert point(one, original) == point(replace(one, bytes_per_token=1.0, weight_bytes=1), original)
    assert point(original, original) == Point(0.0, Estimate(1.0, 1.0, 1.0), 1.0, 1.0)
    assert point(replace(one, speed=None, peak_share=None), original) == Point(0.001, None, None, 0.4)


@pytest.mark.parametrize(
    "useless",
    [
        Candidate("broken", failed="NaN"),
        replace(candidate(), loss=None),
        replace(candidate(), loss=Estimate(math.nan, math.nan, math.nan)),
        candidate(writes="stuck"),
        candidate(proof=a_proof(False)),
    ],
)
def test_what_nobody_can_use_has_no_point(useless):
    assert point(useless, the_original()) is None
