"""Widths at which all arms of a comparison have as many parameters as the baseline, within 1 %."""

from __future__ import annotations

from collections.abc import Callable, Sequence

NEAR = 0.01  # of the baseline's parameters
BESIDE = 8  # widths on either side that are looked at: counts need not rise with every width
WIDEST = 1 << 20

Count = Callable[[int], int | None]


def nearest(count: Count, wanted: int) -> tuple[int, int]:
    """Find the width whose number of parameters is nearest to a wanted one.

    Args:
        count: width -> parameters, rising on the whole; None for a width that cannot be.
        wanted: parameters.

    Returns:
        The width and its parameters; of two that are as near, the narrower.

    Raises:
        ValueError: no width can be.
    """
    low, high = 1, 1
    while high < WIDEST and (_from(count, high)[1] or wanted) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (_from(count, middle)[1] or wanted) < wanted else (low, middle)
    tried = {*range(max(1, low - BESIDE), high + BESIDE + 1), _from(count, low)[0], _from(count, high)[0]}
    found = [(abs(parameters - wanted), width, parameters) for width in sorted(tried) if (parameters := count(width))]
    if not found:
        raise ValueError(f"width: none near {low} can be made; give another baseline width.")
    return min(found)[1:]


def _from(count: Count, width: int) -> tuple[int, int | None]:
    """The first width from here on that can be, with its parameters."""
    for each in range(width, width + 64):
        found = count(each)
        if found is not None:
            return each, found
    return width, None


def fits(parameters: int, wanted: int) -> bool:
    """Whether a number of parameters is within 1 % of the wanted one."""
    return abs(parameters - wanted) <= NEAR * wanted


def width_for_all(baseline: Count, others: Sequence[Count], start: int) -> int | None:
    """Find a width of the baseline at which all others have a width that fits.

    Args:
        baseline: width -> parameters.
        others: the same, of the other arms.
        start: the first width that is tried; up to four times it, in at most 100 steps.

    Returns:
        The width, or None.
    """
    for width in range(start, 4 * start + 1, max(1, 3 * start // 100)):
        wanted = baseline(width)
        if wanted is not None and all(fits(nearest(count, wanted)[1], wanted) for count in others):
            return width
    return None
