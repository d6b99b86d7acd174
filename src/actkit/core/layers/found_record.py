"""Records of smooth functions that are known by formulas with coefficients: where they turn and bend is found.

    a sum   c_1 f_1(a_1 x + b_1) + ... + c_n f_n(a_n x + b_n)   of functions that have records; `sum_of`
    others  by a function, its two derivatives and its breaks; `found_record`

A derivative is computed in float64 together with its size, the sum of the magnitudes of what it adds up. A sign counts
where the derivative is larger than 1e-12 of its size, so that rounding bends nothing; coefficients near 0 may still, by
as little as they are. Between two inputs with opposite signs Brent's method finds the change. Changes are looked for
between neighbours of a set of inputs: a narrower pair of them is not seen. A sum is looked at where an input of one of
its functions lies in [-40, 40], at steps of 0.01 of that input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from scipy.optimize import brentq
from torch import Tensor

from actkit.core.layers.activation_function import ActivationFunction, Break, Function, Piece

ROUNDING = 1e-12  # of the size of a derivative
JUMP = 1e-6  # a smaller one is none, as `actkit.testing` has it
WIDE, STEP = 40.0, 0.01  # inputs of a function at which a sum of functions is looked at
Sized = Callable[[Tensor], tuple[Tensor, Tensor]]  # float64 inputs -> a derivative there, and its size


@dataclass(frozen=True)
class Term:
    """A part of a sum: factor * function(scale * x + shift).

    Attributes:
        function: what is known of it; it is element-wise.
        factor: of its outputs.
        scale: of its inputs.
        shift: of its inputs.
    """

    function: ActivationFunction
    factor: float = 1.0
    scale: float = 1.0
    shift: float = 0.0

    def part(self, x: Tensor, order: int) -> Tensor | None:
        """What it adds to the derivative of an order (0: the function; -1: the antiderivative), None if it is unknown.

        Args:
            x: inputs of the sum.
            order: of the derivative.
        """
        known = self.function
        functions = (known.function, known.derivative, known.second_derivative, known.antiderivative)
        if (function := functions[order]) is None:
            return None
        if order == -1 and self.scale == 0:
            return self.factor * known.at(self.shift) * x
        return self.factor * self.scale**order * function(self.scale * x + self.shift)

    def back(self, inputs: Iterable[float]) -> Iterator[float]:
        """The inputs of the sum at which its function gets these inputs; none if it gets one alone.

        Args:
            inputs: of its function.
        """
        return ((each - self.shift) / self.scale for each in inputs if self.scale)

    @property
    def breaks(self) -> Iterator[Break]:
        """At inputs of the sum."""
        known = self.function.breaks if self.factor else ()
        return (Break(at, each.order) for each, at in zip(known, self.back(each.at for each in known)))

    @property
    def limits(self) -> tuple[float, float]:
        """Of what it adds."""
        assert self.function.limits is not None
        if not self.scale or not self.factor:
            return (self.factor * self.function.at(self.shift),) * 2
        below, above = (self.factor * each for each in self.function.limits)
        return (below, above) if self.scale > 0 else (above, below)


@lru_cache(maxsize=256)
def sum_of(name: str, terms: tuple[Term, ...], flops: int | None = None) -> ActivationFunction | None:
    """The record of a sum of scaled and shifted functions.

    Args:
        name: of the sum.
        terms: one or more, of element-wise functions with two derivatives.
        flops: for one output.

    Returns:
        The record; None if a second derivative is not known, or if terms grow against each other far from 0, so that no
        limit follows.
    """
    limits = tuple(map(sum, zip(*(term.limits for term in terms), strict=True)))
    if any(map(math.isnan, limits)) or any(term.function.second_derivative is None for term in terms):
        return None

    def added(order: int) -> Function:
        def function(x: Tensor) -> Tensor:
            return sum((part for term in terms if (part := term.part(x, order)) is not None), torch.zeros_like(x))

        return function

    def sized(order: int) -> Sized:
        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            parts = torch.stack([part for term in terms if (part := term.part(x, order)) is not None])
            return parts.sum(0), parts.abs().sum(0)

        return both

    grid = torch.arange(-WIDE, WIDE, STEP, dtype=torch.float64).tolist()
    lowest: dict[float, int] = {}  # of breaks at one input the first to be seen
    for each in (each for term in terms for each in term.breaks):
        lowest[each.at] = min(each.order, lowest.get(each.at, each.order))
    whole = all(term.function.antiderivative is not None for term in terms)
    return found_record(
        name,
        added(0),
        (added(1), added(2)),
        (sized(1), sized(2)),
        breaks=[Break(at, order) for at, order in lowest.items()],
        inputs=[x for term in terms for x in term.back(grid)],
        limits=(limits[0], limits[1]),
        antiderivative=added(-1) if whole else None,
        flops=flops,
    )


def found_record(
    name: str,
    function: Function,
    derivatives: tuple[Function, Function],
    sized: tuple[Sized, Sized],
    *,
    breaks: Sequence[Break] = (),
    inputs: Sequence[float],
    limits: tuple[float, float],
    antiderivative: Function | None = None,
    flops: int | None = None,
) -> ActivationFunction:
    """The record of a function, its pieces and inflections found in float64.

    Args:
        name: of the function.
        function: computes it.
        derivatives: the first and the second one.
        sized: both once more, with their sizes.
        breaks: where it is not smooth; each is kept if what it says jumps by more than 1e-6.
        inputs: between neighbours of these a sign changes once at most.
        limits: at -inf and inf.
        antiderivative: an integral.
        flops: for one output.

    Returns:
        The record.
    """
    orders = (function, *derivatives)
    kept = [each for given in breaks if (each := _break(given, orders)) is not None]
    kept.sort(key=lambda each: each.at)
    places = [0.0, *inputs, *(each.at + side for each in kept for side in (-1, 1))]
    segments = list(_between([each.at for each in kept], sorted(set(places))))
    turns, bends = ([list(runs_of(each, segment)) for segment in segments] for each in sized)
    return ActivationFunction(
        name=name,
        function=function,
        derivative=derivatives[0],
        second_derivative=derivatives[1],
        antiderivative=antiderivative,
        breaks=tuple(kept),
        inflections=tuple(_inflections(bends, kept)),
        pieces=tuple(_pieces(turns, kept)),
        limits=limits,
        flops=flops,
    )


Run = tuple[float, int]  # where a sign begins, and the sign; of the first one -inf


def _break(given: Break, orders: Sequence[Function]) -> Break | None:
    """Of the lowest order, from the one that is given on, that jumps."""
    beside = 1e-9 * max(1.0, abs(given.at))
    sides = torch.tensor([given.at - beside, given.at + beside], dtype=torch.float64)
    for order in range(given.order, 3):
        before, after = orders[order](sides).tolist()
        if abs(after - before) > JUMP:
            return Break(given.at, order)
    return None


def _between(breaks: Sequence[float], inputs: Sequence[float]) -> Iterator[Tensor]:
    """The inputs of each segment, one in its middle too, if it has one."""
    for low, high in pairwise([-math.inf, *breaks, math.inf]):
        middle = [(low + high) / 2] if math.isfinite(high - low) else []
        yield torch.tensor(sorted([*middle, *(x for x in inputs if low < x < high)]), dtype=torch.float64)


def runs_of(sized: Sized, x: Tensor) -> Iterator[Run]:
    """The signs of what is computed with its size, from the left to the right; one run of sign 0 if it has none.

    Args:
        sized: computes it.
        x: inputs in order, float64; between neighbours the sign changes once at most.
    """
    values, size = sized(x)
    certain = values.abs() > ROUNDING * size
    if not bool(certain.any()):
        yield -math.inf, 0
        return
    places, signs = x[certain].tolist(), values[certain].sign().int().tolist()
    yield -math.inf, signs[0]

    def value(at: float) -> float:
        return float(sized(torch.tensor([at], dtype=torch.float64))[0])

    for (low, before), (high, after) in pairwise(zip(places, signs, strict=True)):
        if before != after:
            yield float(brentq(value, low, high, xtol=1e-15)), after


def _inflections(segments: Sequence[Sequence[Run]], breaks: Sequence[Break]) -> Iterator[float]:
    for index, runs in enumerate(segments):
        if index and breaks[index - 1].order == 2 and segments[index - 1][-1][1] * runs[0][1] < 0:
            yield breaks[index - 1].at
        yield from (at for at, _ in runs[1:])


def _pieces(segments: Sequence[Sequence[Run]], breaks: Sequence[Break]) -> list[Piece]:
    """Neighbours that go the same way are one piece, if the function does not jump between them."""
    found: list[Piece] = []
    for index, runs in enumerate(segments):
        begins = breaks[index - 1] if index else Break(-math.inf, 0)
        for start, sign in runs:
            joins = bool(found) and found[-1].direction == sign and not (start == -math.inf and begins.order == 0)
            start = begins.at if start == -math.inf else start
            if found:
                before = found.pop()
                start = before.start if joins else start
                found += [] if joins else [Piece(before.start, start, before.direction)]
            found.append(Piece(start, math.inf, sign))  # type: ignore[arg-type]
    return found
