"""The front against brute force over all pairs, written out anew; and noise in the speed, which decides nothing."""

from __future__ import annotations

import itertools
import random

import pytest

from actkit.core.quality import Estimate
from actkit.search.front import Point, beats, front


def at(loss: float, held: float, read: float, ratio: tuple[float, float] | None = None) -> Point:
    speed = None if ratio is None else Estimate(sum(ratio) / 2, *ratio)
    return Point(loss, speed, held, read)


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


def test_the_front_is_never_empty_with_overlapping_intervals():
    draw = random.Random(1)
    for _ in range(300):
        points = []
        for _ in range(draw.randint(1, 8)):
            low = draw.random()
            points.append(at(draw.randint(0, 1), draw.randint(0, 1), draw.randint(0, 1), (low, low + draw.random())))
        chosen = front(points)
        assert chosen
        for a, b in itertools.permutations(chosen, 2):
            assert not beats(points[a], points[b])


def test_noise_in_the_speed_puts_nobody_on_the_front():
    better, noisy = at(0.01, 5, 5, (0.9, 1.1)), at(0.02, 5, 5, (0.95, 1.2))
    assert front([better, noisy]) == [0]
    assert front([better, at(0.02, 5, 5, (1.3, 1.5))]) == [0, 1]


def test_equal_points_stay_and_failed_ones_never_do():
    assert front([at(0, 1, 1), at(0, 1, 1), None]) == [0, 1]
    assert front([None]) == []


@pytest.mark.parametrize("other", [at(0.02, 1, 1), at(0.01, 2, 1), at(0.01, 1, 2)])
def test_worse_in_one_is_beaten(other):
    assert beats(at(0.01, 1, 1), other) and not beats(other, at(0.01, 1, 1))
