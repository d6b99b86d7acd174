"""The hypergeometric law: how many of the `drawn` cells are among the `marked` ones.

    P(hits) = C(marked, hits) C(cells - marked, drawn - hits) / C(cells, drawn)

Its upper tail as a logarithm, which is summed upwards from its first term and never taken from 1, so that 1e-250 has as
many digits as 0.1; or exact, as a Fraction. Arrays broadcast. Cost: one step per term, for all entries at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Form = Literal["float", "log10", "fraction"]


def tail(cells: ArrayLike, marked: ArrayLike, drawn: ArrayLike, least: ArrayLike, form: Form) -> Any:
    """P(at least `least` of the `drawn` cells are among the `marked` ones)."""
    if form == "fraction":
        return entrywise(exact_tail, cells, marked, drawn, least)
    return formed(log_tail(*(np.asarray(each) for each in (cells, marked, drawn, least))), form)


def log_tail(cells: Any, marked: Any, drawn: Any, least: Any) -> NDArray[np.float64]:
    """Return log P(hits >= least), for arrays that broadcast."""
    drawn, marked = np.minimum(drawn, marked), np.maximum(drawn, marked)  # the law is symmetric: fewer terms
    cells, marked, drawn, least = np.broadcast_arrays(cells, marked, drawn, least)
    first = np.maximum(least, marked + drawn - cells)
    log_term = log_share(cells, marked, drawn, first)
    log_sum = log_term
    hits = first
    for _ in range(int((drawn - first).max(initial=0))):
        ratio = (drawn - hits) * (marked - hits) / ((hits + 1.0) * (cells - drawn - marked + hits + 1.0))
        log_term = log_term + _log(ratio)
        log_sum = np.logaddexp(log_sum, log_term)
        hits = np.minimum(hits + 1, drawn)
    return np.minimum(log_sum, 0.0)


def log_share(cells: Any, marked: Any, drawn: Any, hits: Any) -> NDArray[np.float64]:
    """Return log P(exactly `hits` of the `drawn` cells are among the `marked` ones), as sums of logarithms of factors.

    C(drawn, hits) marked! / (marked - hits)! ... : the factorials themselves are far larger than their quotient, and
    differences of their logarithms would lose digits.

    Args:
        cells: how many there are.
        marked: how many of them are marked.
        drawn: how many are drawn.
        hits: how many of the drawn ones are marked.

    Returns:
        float64, of the shape that the arguments broadcast to.
    """
    cells, marked, drawn, hits = np.broadcast_arrays(cells, marked, drawn, hits)
    total = np.zeros(cells.shape)
    for i in range(int(drawn.max(initial=0))):
        of_hits = (marked - i) * ((drawn - i) / (i + 1.0))
        total = total + np.where(i < hits, _log(of_hits), 0.0)
        total = total + np.where(i < drawn - hits, _log(cells - marked - i), 0.0)
        total = total - np.where(i < drawn, _log(cells - i), 0.0)
    return np.where((hits < 0) | (hits > drawn), -np.inf, total)


def _log(x: Any) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(x, 0.0))


def exact_share(cells: int, marked: int, drawn: int, hits: int) -> Fraction:
    """P(hits), exact."""
    cells, marked, drawn, hits = int(cells), int(marked), int(drawn), int(hits)
    if hits < 0 or hits > drawn:
        return Fraction(0)
    return Fraction(math.comb(marked, hits) * math.comb(cells - marked, drawn - hits), math.comb(cells, drawn))


def exact_tail(cells: int, marked: int, drawn: int, least: int) -> Fraction:
    """P(hits >= least), exact."""
    marked, drawn = max(marked, drawn), min(marked, drawn)
    hits = range(int(least), int(drawn) + 1)
    return sum((exact_share(cells, marked, drawn, each) for each in hits), Fraction(0))


def log_hazard(log_p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log(-log(1 - p)); for small p that is log p."""
    with np.errstate(divide="ignore"):
        return np.where(log_p < -40, log_p, np.log(-np.log1p(-np.exp(log_p))))


def log_any(log_p: Any, log_count: Any) -> NDArray[np.float64]:
    """Return log(1 - (1 - p)^count); for small count * p that is log(count p)."""
    log_rate = log_count + log_hazard(np.asarray(log_p))
    with np.errstate(divide="ignore"):
        return np.where(log_rate < -40, log_rate, np.log(-np.expm1(-np.exp(log_rate))))


def formed(log_p: NDArray[np.float64], form: Form) -> Any:
    """A probability, given as its natural logarithm, as 'float' or 'log10'. Raises ValueError."""
    if form == "float":
        return np.exp(log_p)[()]
    if form == "log10":
        return (log_p / math.log(10))[()]
    raise ValueError(f"form: {form!r} was given; allowed are 'float', 'log10' and 'fraction'.")


def entrywise(function: Callable[..., Any], *arguments: ArrayLike) -> Any:
    """The function of each entry of broadcast arrays: one result, or an array of dtype object."""
    return np.frompyfunc(function, len(arguments), 1)(*(np.asarray(each) for each in arguments))
