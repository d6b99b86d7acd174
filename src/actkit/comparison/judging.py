"""Which differences count: paired t intervals over the seeds, corrected for the number of arms by Holm's procedure.

Sorted by their p values p_1 <= p_2 <= ..., arm i of m differs if p_j <= 0.05 / (m - j + 1) for all j <= i. The
interval that is printed is that of the level at which an arm was judged, so that it excludes 0 exactly if the arm
differs; for a single arm it is the usual 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """A paired difference to the baseline.

    Attributes:
        value: the mean over the seeds.
        low: lower end of its interval.
        high: upper end.
        level: of the interval, 0.95 or above.
        p: Holm's adjusted p value.
        differs: whether it is another one than 0.
    """

    value: float
    low: float
    high: float
    level: float
    p: float
    differs: bool


def judge(differences: Mapping[str, Sequence[float]]) -> dict[str, Difference]:
    """Judge the differences of all arms together.

    Args:
        differences: by arm, a difference for each seed, two at least.

    Returns:
        By arm, in the same order.

    Raises:
        ValueError: an arm has fewer than two differences.
    """
    from scipy.stats import t as student

    for name, values in differences.items():
        if len(values) < 2:
            raise ValueError(f"differences: {len(values)} of {name} was given; an interval needs two seeds or more.")
    order = sorted(differences, key=lambda name: _p(differences[name]))
    found: dict[str, Difference] = {}
    adjusted, going, level = 0.0, True, 1 - ALPHA
    for place, name in enumerate(order):
        values, left = differences[name], len(order) - place
        adjusted = max(adjusted, min(1.0, left * _p(values)))
        level = 1 - ALPHA / left if going else level
        going = going and adjusted <= ALPHA
        spread = stdev(values) / math.sqrt(len(values))
        half = float(student.ppf((1 + level) / 2, len(values) - 1)) * spread
        middle = mean(values)
        found[name] = Difference(middle, middle - half, middle + half, level, adjusted, going)
    return {name: found[name] for name in differences}


def _p(values: Sequence[float]) -> float:
    """Of the paired t test, two-sided; differences that are all the same number are certain."""
    from scipy.stats import t as student

    spread = stdev(values) / math.sqrt(len(values))
    if spread == 0:
        return 1.0 if mean(values) == 0 else 0.0
    return float(2 * student.sf(abs(mean(values)) / spread, len(values) - 1))
