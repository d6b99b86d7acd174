"""Paired intervals and Holm's procedure, against scipy's test and a step-down procedure written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from actkit.comparison.judging import judge


def holm(p: list[float], alpha: float = 0.05) -> tuple[list[bool], list[float]]:
    """Holm (1979), step by step."""
    order = np.argsort(p)
    rejected, adjusted, going, most = [False] * len(p), [0.0] * len(p), True, 0.0
    for step, index in enumerate(order):
        going = going and p[index] <= alpha / (len(p) - step)
        rejected[index] = going
        most = max(most, min(1.0, (len(p) - step) * p[index]))
        adjusted[index] = most
    return rejected, adjusted


@pytest.mark.parametrize("seed", range(20))
def test_intervals_and_decisions(seed: int) -> None:
    draw = np.random.default_rng(seed)
    scale = draw.choice([0.0, 0.5, 2.0, 6.0], size=5)
    given = {f"arm {index}": list(draw.normal(scale[index], 1, 5)) for index in range(5)}
    found = judge(given)
    p = [float(stats.ttest_1samp(values, 0).pvalue) for values in given.values()]
    rejected, adjusted = holm(p)
    assert [each.differs for each in found.values()] == rejected
    assert [each.p for each in found.values()] == pytest.approx(adjusted)
    for name, each in found.items():
        interval = stats.ttest_1samp(given[name], 0).confidence_interval(each.level)
        assert (each.low, each.high) == pytest.approx((interval.low, interval.high))
        assert each.differs == (not each.low <= 0 <= each.high)  # the interval says what the word says
        assert each.level >= 0.95


def test_a_single_arm_has_the_usual_interval() -> None:
    values = [1.0, 2.0, 4.0]
    found = judge({"only": values})["only"]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert found.level == 0.95 and (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half))


def test_differences_that_are_all_the_same() -> None:
    found = judge({"none": [0.0, 0.0], "always": [0.5, 0.5]})
    assert not found["none"].differs and found["none"].p == 1
    assert found["always"].differs and found["always"].low == found["always"].high == 0.5
    assert judge({}) == {}
