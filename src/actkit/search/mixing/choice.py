"""Which option each place gets: Lagrangian relaxation of the cheapest model within a limit on the damage.

    at a price p of damage each place takes   argmin over options of  cost + p * damage

Places do not interact in this sum, so one price serves all, and the choice is optimal for the damage that it has. The
price is found by bisection; what the limit leaves is then spent on the places that gain most per damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 60  # of the bisection


@dataclass(frozen=True)
class Option:
    """One setting of one place.

    Attributes:
        name: of it.
        damage: that it does, at least 0.
        cost: that it has.
    """

    name: str
    damage: float
    cost: float


def choose(places: Sequence[Sequence[Option]], limit: float) -> list[Option]:
    """Choose an option for each place.

    Args:
        places: the options of each.
        limit: on the sum of their damages.

    Returns:
        An option per place, whose damages sum up to at most the limit; the least harmful ones if that is not possible.
    """
    safest = [min(options, key=lambda each: (each.damage, each.cost)) for options in places]
    if _damage(safest) > limit:
        return safest
    cheapest = [min(options, key=lambda each: (each.cost, each.damage)) for options in places]
    if _damage(cheapest) <= limit:
        return cheapest
    low, high = 0.0, _highest_price(places)
    best = _at(places, high)
    for _ in range(STEPS):
        price = (low + high) / 2
        found = _at(places, price)
        if _damage(found) <= limit:
            high, best = price, found
        else:
            low = price
    return _spend(places, best if _damage(best) <= limit else safest, limit)


def _damage(options: Sequence[Option]) -> float:
    return sum(each.damage for each in options)


def _highest_price(places: Sequence[Sequence[Option]]) -> float:
    """One at which no cheaper option is worth its damage."""
    gain = max(max(x.cost for x in options) - min(x.cost for x in options) for options in places)
    steps = [b.damage - a.damage for options in places for a in options for b in options if b.damage > a.damage]
    return 2 * gain / min(steps) if steps else 1.0


def _at(places: Sequence[Sequence[Option]], price: float) -> list[Option]:
    return [min(options, key=lambda each: (each.cost + price * each.damage, each.damage)) for options in places]


def _spend(places: Sequence[Sequence[Option]], chosen: list[Option], limit: float) -> list[Option]:
    """Spend what the limit leaves, on the place that gains most per damage, until nothing fits."""
    left = limit - _damage(chosen)
    while True:
        steps = [
            ((chosen[at].cost - each.cost) / max(each.damage - chosen[at].damage, 1e-30), at, each)
            for at, options in enumerate(places)
            for each in options
            if each.cost < chosen[at].cost and each.damage - chosen[at].damage <= left
        ]
        if not steps:
            return chosen
        _, at, option = max(steps, key=lambda step: step[0])
        left -= option.damage - chosen[at].damage
        chosen[at] = option
