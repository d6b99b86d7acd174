"""How often sparse binary patterns are mistaken for one another: exact error rates (2016, arXiv:1601.00720).

A code has `active` ones among `cells` (the paper's a and n). A segment holds `synapses` (s) of the ones of a stored
code and matches any code in which at least `threshold` (theta) of them are on. All ones are taken as uniform.

    false positive, random code:  sum over b >= theta of C(s, b) C(n - s, a - b) / C(n, a)
    false negative, v replaced:   sum over b >  s - theta of C(s, b) C(a - s, v - b) / C(a, v)
    any of M segments:            1 - (1 - P)^M, at most M P
    union of M codes:             the mean of the first formula over the size |X| of the union

Both tails are those of one hypergeometric law: how many of the `drawn` are among the `marked`. They are summed as
logarithms, upwards from their first term, so that 1e-250 is as exact as 0.1; nothing is taken from 1.
Cost: one pass over min(s, a) terms for all entries of the arrays at once.
Left open by the paper: the size of a union, whose expectation it puts into the formula (`method="plugin"`; the authors'
notebook rounds it down, here it goes to the nearest). "exact" averages over the sizes that a union can have.
Our reading: replaced ones go to cells that were off, so the number of ones stays. The median of `threshold_curve` is
over all combinations of a grid, as the paper names its ranges and not its points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actkit.core.ground.figures import plotly
from actkit.sparsity.active_dendrites.hypergeometric import (
    Form,
    entrywise,
    exact_share,
    exact_tail,
    formed,
    log_any,
    log_hazard,
    log_share,
    log_tail,
    tail,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


DENSE = 0.01  # a segment with more false positives than this says little


# -- error rates -------------------------------------------------------------------------------------------------------


def false_positive(
    cells: ArrayLike, active: ArrayLike, synapses: ArrayLike, threshold: ArrayLike, *, form: Form = "float"
) -> Any:
    """Return the probability that a random code matches a segment that holds part of one stored code.

    Args:
        cells: (n) the length of a code; an integer or an array, as the next three; arrays broadcast.
        active: (a) the ones of a code.
        synapses: (s) the cells that the segment holds.
        threshold: (theta) how many of them make a match.
        form: 'float', 'log10' (of the probability) or 'fraction' (exact; arrays of dtype object).

    Returns:
        A number, or an array.

    Raises:
        ValueError: 1 <= threshold <= synapses <= active <= cells does not hold.
    """
    _require("threshold", threshold, "synapses", synapses, least=1)
    _require("synapses", synapses, "active", active)
    return overlap_probability(cells, active, synapses, threshold, form=form)


def overlap_probability(
    cells: ArrayLike, active: ArrayLike, size: ArrayLike, threshold: ArrayLike, *, form: Form = "float"
) -> Any:
    """Return the same as `false_positive` for a segment of any size, such as a union.

    A union may hold more cells than a code has ones.

    Args:
        cells: (n) the length of a code.
        active: (a) the ones of a code.
        size: the cells that the segment holds.
        threshold: (theta) how many of them make a match.
        form: as in `false_positive`.

    Returns:
        A number, or an array.

    Raises:
        ValueError: 1 <= threshold <= size <= cells and 0 <= active <= cells does not hold.
    """
    _require("threshold", threshold, "size", size, least=1)
    _require("size", size, "cells", cells)
    _require("active", active, "cells", cells, least=0)
    return tail(cells, size, active, threshold, form)


def false_negative(
    active: ArrayLike, synapses: ArrayLike, threshold: ArrayLike, replaced: ArrayLike, *, form: Form = "float"
) -> Any:
    """Return the probability that a segment misses its own code after `replaced` (v) of its ones moved to other cells.

    The number of cells does not matter.

    Args:
        active: (a) the ones of a code.
        synapses: (s) the cells that the segment holds.
        threshold: (theta) how many of them make a match.
        replaced: (v) how many ones moved.
        form: as in `false_positive`.

    Returns:
        A number, or an array.

    Raises:
        ValueError: 1 <= threshold <= synapses <= active and 0 <= replaced <= active does not hold.
    """
    _require("threshold", threshold, "synapses", synapses, least=1)
    _require("synapses", synapses, "active", active)
    _require("replaced", replaced, "active", active, least=0)
    lost = np.asarray(synapses) - np.asarray(threshold) + 1  # so many lost ones are too many
    return tail(active, synapses, replaced, lost, form)


def population_false_positive(
    segments: ArrayLike,
    cells: ArrayLike,
    active: ArrayLike,
    synapses: ArrayLike,
    threshold: ArrayLike,
    *,
    form: Form = "float",
) -> Any:
    """Return the probability that a random code matches any of `segments` (M) segments that hold independent codes.

    Args:
        segments: (M) how many there are.
        cells: as in `false_positive`.
        active: as in `false_positive`.
        synapses: as in `false_positive`.
        threshold: as in `false_positive`.
        form: as in `false_positive`; a fraction has `segments` times the digits of a single one's.

    Returns:
        A number, or an array.
    """
    _require("segments", segments, least=1)
    if form == "fraction":
        single = false_positive(cells, active, synapses, threshold, form="fraction")
        return entrywise(lambda p, count: 1 - (1 - p) ** int(count), single, segments)
    single = math.log(10) * false_positive(cells, active, synapses, threshold, form="log10")
    return formed(log_any(single, np.log(np.asarray(segments, dtype=np.float64))), form)


# -- unions ------------------------------------------------------------------------------------------------------------


def union_size(cells: ArrayLike, synapses: ArrayLike, patterns: ArrayLike, *, fraction: bool = False) -> Any:
    """Return the expected size of the union of `patterns` (M) random sets of `synapses` cells: n (1 - (1 - s/n)^M).

    Args:
        cells: (n) the length of a code.
        synapses: (s) the size of a set.
        patterns: (M) how many sets.
        fraction: give it exactly.

    Returns:
        A number, or an array.

    Raises:
        ValueError: 1 <= synapses <= cells and patterns >= 1 does not hold.
    """
    _require("synapses", synapses, "cells", cells, least=1)
    _require("patterns", patterns, least=1)
    if fraction:
        return entrywise(lambda n, s, m: n * (1 - (1 - Fraction(int(s), int(n))) ** int(m)), cells, synapses, patterns)
    n, s, m = (np.asarray(each, dtype=np.float64) for each in (cells, synapses, patterns))
    with np.errstate(divide="ignore"):  # a pattern of all cells
        return (-n * np.expm1(m * np.log1p(-s / n)))[()]


def union_false_positive(
    cells: ArrayLike,
    active: ArrayLike,
    synapses: ArrayLike,
    threshold: ArrayLike,
    patterns: ArrayLike,
    *,
    method: Literal["exact", "plugin"] = "exact",
    form: Form = "float",
) -> Any:
    """Return the probability that a random code matches a segment that holds the union of several codes' synapses.

    A pattern is still found with up to synapses - threshold of its ones lost, whatever joined it.

    Args:
        cells: as in `false_positive`.
        active: as in `false_positive`.
        synapses: (s) the cells that the segment took from each code.
        threshold: as in `false_positive`.
        patterns: (M) how many codes.
        method: 'exact' averages over the size of the union, 'plugin' takes its expectation, rounded.
        form: as in `false_positive`.

    Returns:
        A number, or an array.

    Raises:
        ValueError: as `false_positive`, or the method is unknown.
    """
    _require("threshold", threshold, "synapses", synapses, least=1)
    _require("synapses", synapses, "active", active)
    if method == "plugin":
        size = np.rint(union_size(cells, synapses, patterns)).astype(np.int64)
        return overlap_probability(cells, active, size, threshold, form=form)
    if method != "exact":
        raise ValueError(f"method: {method!r} was given; allowed are 'exact' and 'plugin'.")
    _require("synapses", synapses, "cells", cells)
    _require("active", active, "cells", cells)
    _require("patterns", patterns, least=1)

    def average(n: int, a: int, s: int, theta: int, m: int) -> Any:
        sizes, shares = _union_sizes(int(n), int(s), int(m), form == "fraction")
        if form == "fraction":
            return sum(share * exact_tail(n, size, a, theta) for size, share in zip(sizes, shares, strict=True))
        terms = np.log(shares) + log_tail(n, sizes, np.asarray(a), np.asarray(theta))
        return np.logaddexp.reduce(terms)

    found = entrywise(average, cells, active, synapses, threshold, patterns)
    return found if form == "fraction" else formed(np.asarray(found, dtype=np.float64), form)


@lru_cache(maxsize=64)
def _union_sizes(cells: int, synapses: int, patterns: int, exact: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """The sizes that a union of random sets can have, and their probabilities: one set after another joins."""
    largest = min(cells, patterns * synapses)
    sizes, joining = np.arange(largest + 1), np.arange(synapses + 1)
    # joins[x, k]: the probability that a set brings k new cells to a union of x
    if exact:
        joins = entrywise(lambda x, k: exact_share(cells, cells - x, synapses, k), sizes[:, None], joining)
    else:
        joins = np.exp(log_share(cells, cells - sizes[:, None], np.asarray(synapses), joining))
    shares = np.zeros(largest + 1, dtype=object if exact else np.float64)
    shares[0] = Fraction(1) if exact else 1.0
    for _ in range(patterns):
        grown = np.zeros_like(shares)
        for new in range(min(synapses, largest) + 1):
            grown[new:] += shares[: len(shares) - new] * joins[: len(shares) - new, new]
        shares = grown
    possible = shares > 0
    return sizes[possible], shares[possible]


# -- choices -----------------------------------------------------------------------------------------------------------


def capacity(cells: int, active: int, synapses: int, threshold: int, max_error: float) -> int:
    """Return how many segments a random code may meet until one of them matches it with more than `max_error`.

    Args:
        cells: as in `false_positive`.
        active: as in `false_positive`.
        synapses: as in `false_positive`.
        threshold: as in `false_positive`.
        max_error: the probability that is allowed.

    Returns:
        The count; 0 if a single one is already too many. Above 2^53 only the leading digits hold.

    Raises:
        ValueError: max_error is outside (0, 1), or what `false_positive` raises.
    """
    if not 0 < max_error < 1:
        raise ValueError(f"max_error: {max_error} was given; it is a probability, give more than 0 and less than 1.")
    single = math.log(10) * float(false_positive(cells, active, synapses, threshold, form="log10"))
    if single >= 0:
        return 0
    log_count = math.log(-math.log1p(-max_error)) - float(log_hazard(np.asarray(single)))
    if log_count >= math.log(2**53):
        return int(Decimal(log_count).exp())
    count = int(math.exp(log_count)) + 1  # or one less, if the exponential was rounded up
    while count and population_false_positive(count, cells, active, synapses, threshold) > max_error:
        count -= 1
    return count


def choose_threshold(
    cells: int,
    active: int,
    synapses: int,
    max_false_positive: float,
    replaced: int = 0,
    max_false_negative: float = 0.0,
) -> range:
    """Return the thresholds with at most these error rates.

    Args:
        cells: as in `false_positive`.
        active: as in `false_positive`.
        synapses: as in `false_positive`.
        max_false_positive: the rate for random codes.
        replaced: how many ones of a stored code have moved.
        max_false_negative: the rate for stored codes after that; 0 allows none to be missed.

    Returns:
        The thresholds.

    Raises:
        ValueError: no threshold satisfies both, or what `false_positive` and `false_negative` raise.
    """
    thresholds = np.arange(1, synapses + 1)
    positive = false_positive(cells, active, synapses, thresholds) <= max_false_positive
    negative = false_negative(active, synapses, thresholds, replaced) <= max_false_negative
    if not (positive & negative).any():
        needs = f"at least {thresholds[positive].min()}" if positive.any() else "more than synapses allow"
        allows = f"at most {thresholds[negative].max()}" if negative.any() else "no threshold at all"
        raise ValueError(
            f"threshold: none satisfies both. max_false_positive={max_false_positive:g} needs {needs}, "
            f"max_false_negative={max_false_negative:g} with replaced={replaced} allows {allows} "
            f"(synapses={synapses}); give more synapses, sparser codes or larger error rates."
        )
    both = thresholds[positive & negative]
    return range(int(both.min()), int(both.max()) + 1)


@dataclass(frozen=True)
class ThresholdCurve:
    """The median over a grid of log10 of the false positive rate, for each threshold.

    Attributes:
        thresholds: of the grid.
        log10_errors: the median at each.
        combinations: how many the median is over.
    """

    thresholds: tuple[int, ...]
    log10_errors: tuple[float, ...]
    combinations: int

    def smallest(self, max_error: float) -> int | None:
        """Return the smallest threshold whose median error is at most `max_error`; None if there is none."""
        pairs = zip(self.thresholds, self.log10_errors, strict=True)
        return next((threshold for threshold, error in pairs if error <= math.log10(max_error)), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        errors = {"thresholds": list(self.thresholds), "log10_errors": list(self.log10_errors)}
        return {**errors, "combinations": self.combinations}

    def table(self) -> Table:
        """A row per threshold."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Median false positive rate of {self.combinations:,} combinations"
        table = PlainTable("threshold", "log10 of the rate", title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for threshold, error in zip(self.thresholds, self.log10_errors, strict=True):
            table.add_row(str(threshold), f"{error:.2f}")
        return table

    def figure(self) -> Figure:
        """Draw log10 of the rate against the threshold.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        go = plotly().graph_objects

        figure = go.Figure(go.Scatter(x=self.thresholds, y=self.log10_errors, mode="lines+markers"))
        return figure.update_layout(xaxis_title="threshold", yaxis_title="log10 of the median false positive rate")


def threshold_curve(
    cells: Sequence[int] = range(10_000, 200_001, 10_000),
    densities: Sequence[float] = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03),
    synapses: Sequence[int] = range(20, 51, 5),
    thresholds: Sequence[int] = range(8, 21),
) -> ThresholdCurve:
    """Compute the median false positive rate over all combinations, at each threshold.

    The defaults are the paper's ranges.

    Args:
        cells: as in `false_positive`.
        densities: shares of the cells that are active.
        synapses: as in `false_positive`.
        thresholds: where to compute the median.

    Returns:
        The curve.

    Raises:
        ValueError: what `false_positive` raises.
    """
    n, density, s = np.meshgrid(cells, densities, synapses, indexing="ij")
    active = np.rint(n * density).astype(np.int64)
    medians = [float(np.median(false_positive(n, active, s, each, form="log10"))) for each in thresholds]
    return ThresholdCurve(tuple(thresholds), tuple(medians), n.size)


# -- checks ----------------------------------------------------------------------------------------------------------


def _require(name: str, value: Any, limit_name: str = "", limit: Any = None, least: int | None = None) -> None:
    """Raise ValueError, with the inequality that does not hold, unless least <= value <= limit, in whole numbers."""
    for each, given in ((name, value), (limit_name, limit)):
        if given is not None and not np.issubdtype(np.asarray(given).dtype, np.integer):
            raise ValueError(f"{each}: {given!r} was given; it is a count, give whole numbers.")
    if least is not None and np.any(np.less(value, least)):
        raise ValueError(f"{name} >= {least} does not hold: {name}={np.min(value)} was given; give {least} or more.")
    if limit is not None and np.any(np.greater(value, limit)):
        values, limits = np.broadcast_arrays(value, limit)
        first = np.argmax(values > limits)
        raise ValueError(
            f"{name} <= {limit_name} does not hold: {name}={values.flat[first]} and "
            f"{limit_name}={limits.flat[first]} were given; lower {name} or raise {limit_name}."
        )
