"""What is known of an activation function: derivatives, kinks, monotone pieces, inverses, limits, moments.

One record per function. The functions of torch and transformers have theirs in `known_functions.py`; a function of your
own stands in the entry-point group `actkit.functions` of its package, and a module with learned coefficients answers
`record()` at its present ones. `actkit.testing.check_function` holds a record to what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Axis = Literal["channels", "positions", "batch"]
AXES: tuple[Axis, ...] = ("channels", "positions", "batch")
FAR = 12.0  # standard deviations at which a normal density is 1e-32
NODES = 24  # of Gauss and Legendre, per panel


@dataclass(frozen=True)
class Break:
    """A point at which a function is not smooth.

    Attributes:
        at: the input.
        order: 0 if the function itself jumps there, 1 if its derivative does (a kink), 2 if its second derivative does.
    """

    at: float
    order: int


@dataclass(frozen=True)
class Piece:
    """An interval on which a function rises, falls, or stays the same; as long as it can be.

    Attributes:
        start: the lower end, -inf if there is none.
        end: the upper end, inf if there is none.
        direction: 1 if it rises, -1 if it falls, 0 if it is constant.
        inverse: output -> input, on the outputs of this piece; None if there is no closed form, or it is constant.
    """

    start: float
    end: float
    direction: Literal[-1, 0, 1]
    inverse: Function | None = None

    @property
    def middle(self) -> float:
        """An input inside the piece, away from its ends."""
        if math.isinf(self.start) and math.isinf(self.end):
            return 0.0
        if math.isinf(self.start):
            return self.end - 1
        return self.start + 1 if math.isinf(self.end) else (self.start + self.end) / 2


@dataclass(frozen=True)
class Moments:
    """What a function does to a normal input: initialisation needs these.

    Attributes:
        mean: of the output.
        second: mean of the squared output.
        slope: mean of the derivative.
        squared_slope: mean of the squared derivative; jumps of the function itself are left out of both.
    """

    mean: float
    second: float
    slope: float
    squared_slope: float

    @property
    def variance(self) -> float:
        """Of the output."""
        return self.second - self.mean**2


@dataclass(frozen=True, kw_only=True)
class ActivationFunction:
    """What is known of an activation function.

    One that is element-wise (`mixes` is empty) has a derivative, pieces and limits; of one that mixes, only the
    function is known, as nothing else is a number per input. A field is None if there is no closed form that torch can
    compute.

    Attributes:
        name: as in recipes, with its settings if they are not the usual ones: `leaky_relu(0.2)`.
        function: [...] -> the same shape, unless it mixes channels (GLU halves them).
        mixes: what an output depends on besides its own input: "channels", "positions", "batch"; () is element-wise.
        derivative: [...] -> the same shape; at a kink, the slope of either side.
        second_derivative: the same, 0 or either side at a break.
        antiderivative: an integral of the function, continuous; None if there is none.
        breaks: points at which the function, its derivative or its second derivative jumps, in order.
        inflections: points at which the second derivative changes its sign, in order.
        pieces: where the function is monotone, from -inf to inf.
        limits: of the function at -inf and at inf; may be infinite.
        config_name: what a transformers config calls it (`hidden_act` and its kin); None if it has no name there.
        torch_name: the class in torch.nn, with settings if they are not its usual ones: `LeakyReLU(0.2)`; None if torch
            has none.
        flops: operations for one output, as the formula is written: additions, products, quotients, comparisons,
            changes of sign, and one each for exp, log, tanh and erf; of a condition the costlier side. None if nobody
            counted.

    Raises:
        ValueError: an unknown axis, a field that an element-wise function must have, or pieces with a gap.
    """

    name: str
    function: Function
    mixes: tuple[Axis, ...] = ()
    derivative: Function | None = None
    second_derivative: Function | None = None
    antiderivative: Function | None = None
    breaks: tuple[Break, ...] = ()
    inflections: tuple[float, ...] = ()
    pieces: tuple[Piece, ...] = ()
    limits: tuple[float, float] | None = None
    config_name: str | None = None
    torch_name: str | None = None
    flops: int | None = None

    def __post_init__(self) -> None:
        if not set(self.mixes) <= set(AXES):
            raise ValueError(f"mixes: {self.mixes} was given for {self.name!r}, allowed are {', '.join(AXES)}, or ().")
        if self.mixes:
            return
        if self.derivative is None or self.limits is None:
            raise ValueError(
                f"derivative, limits: {self.name!r} is element-wise and lacks one; give both, or say what it mixes."
            )
        ends = [-math.inf, *(piece.end for piece in self.pieces)]
        if [piece.start for piece in self.pieces] != ends[:-1] or ends[-1] != math.inf:
            raise ValueError(
                f"pieces: those of {self.name!r} leave gaps; give intervals from -inf to inf, each from where the last "
                f"one ends."
            )

    @property
    def elementwise(self) -> bool:
        """Whether each output depends on its own input alone."""
        return not self.mixes

    @property
    def kinks(self) -> tuple[float, ...]:
        """Where the derivative jumps and the function does not."""
        return tuple(each.at for each in self.breaks if each.order == 1)

    @property
    def jumps(self) -> tuple[float, ...]:
        """Where the function itself jumps."""
        return tuple(each.at for each in self.breaks if each.order == 0)

    @property
    def zeros(self) -> tuple[tuple[float, float], ...]:
        """The intervals of inputs on which the output is exactly 0."""
        constant = (piece for piece in self.pieces if piece.direction == 0)
        return tuple((piece.start, piece.end) for piece in constant if self.at(piece.middle) == 0)

    def at(self, x: float) -> float:
        """The output for one input, in float64."""
        return float(self.function(torch.tensor([x], dtype=torch.float64)))

    def share_of_zeros(self, mean: float = 0.0, deviation: float = 1.0) -> float:
        """The probability of an output that is exactly 0, for a normal input."""

        def below(x: float) -> float:
            return math.erfc((mean - x) / deviation / math.sqrt(2)) / 2

        return sum(below(end) - below(start) for start, end in self.zeros)

    def moments(self, mean: float = 0.0, deviation: float = 1.0) -> Moments | None:
        """The moments under a normal input.

        The integrals are Gauss-Legendre sums in float64 over panels that are split at every break.

        Args:
            mean: of the input.
            deviation: standard deviation of the input, above 0.

        Returns:
            The moments; None for a function that mixes.

        Raises:
            ValueError: a deviation that is not above 0.
        """
        if not deviation > 0:
            raise ValueError(f"deviation: {deviation} was given; give a standard deviation above 0.")
        if self.derivative is None or self.mixes:
            return None
        points = (*(each.at for each in self.breaks), *self.inflections)
        x, weights = normal_rule(float(mean), float(deviation), points)
        y, slope = self.function(x), self.derivative(x)
        return Moments(*(float((weights * values).sum()) for values in (y, y**2, slope, slope**2)))

    def solve(self, output: float) -> tuple[float, ...]:
        """The inputs with one output, in order: one per monotone piece at most, and none of a constant piece.

        Args:
            output: the value to reach.

        Returns:
            The inputs, by the inverse of a piece or by root finding (Brent's method) in float64.
        """
        found = [self._solve(piece, output) for piece in self.pieces if piece.direction]
        return tuple(dict.fromkeys(x for x in found if x is not None))

    def _solve(self, piece: Piece, output: float) -> float | None:
        from scipy.optimize import brentq

        assert self.limits is not None
        # an end may be a jump, and belong to the other side
        low, high = math.nextafter(piece.start, math.inf), math.nextafter(piece.end, -math.inf)
        first = self.limits[0] if math.isinf(piece.start) else self.at(low)
        last = self.limits[1] if math.isinf(piece.end) else self.at(high)
        if not min(first, last) < output < max(first, last):  # a limit is not reached, though it may be by rounding
            return next((x for x in (piece.start, piece.end) if math.isfinite(x) and self.at(x) == output), None)
        if piece.inverse is not None:
            return float(piece.inverse(torch.tensor([output], dtype=torch.float64)))
        return float(brentq(lambda x: self.at(x) - output, max(low, -1e9), min(high, 1e9), xtol=1e-15))


@lru_cache(maxsize=64)
def normal_rule(mean: float, deviation: float, points: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Nodes and weights, float64 [nodes], of an integral under a normal density, split at `points`.

    Args:
        mean: of the density.
        deviation: of the density.
        points: where what is integrated may bend.
    """
    steps = [mean + deviation * step for step in range(-int(FAR), int(FAR) + 1)]
    x, weights = panels(steps, points)
    density = torch.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
    return x, weights * density


def panels(edges: Sequence[float], points: Iterable[float]) -> tuple[Tensor, Tensor]:
    """Nodes and weights, float64 [nodes], of Gauss-Legendre sums between edges, split at points too.

    Around each point, and around 0, panels grow by factors of two, so that a step that is narrow beside them is met.

    Args:
        edges: of the panels, in order; nothing outside of them is summed.
        points: where what is integrated may bend.
    """
    more = set(edges)
    for point in (0.0, *points):
        more |= {point, *(point + sign * 2.0**power for power in range(-6, 12) for sign in (-1, 1))}
    kept = np.array(sorted(edge for edge in more if edges[0] <= edge <= edges[-1]))
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    half = np.diff(kept)[:, None] / 2  # [panels, 1]
    x = kept[:-1, None] + half + half * nodes
    return torch.from_numpy(x.ravel()), torch.from_numpy((half * weights).ravel())


@lru_cache(maxsize=256)
def thresholded(base: ActivationFunction, threshold: float) -> ActivationFunction:
    """A function of which outputs smaller than a threshold in magnitude are 0.

    Args:
        base: an element-wise function; over ReLU this is FATReLU (JumpReLU), over SiLU what CATS uses.
        threshold: a magnitude of outputs, 0 or more.

    Returns:
        Its record, named `BASE with threshold T`; it has no antiderivative.
    """
    name = f"{base.name} with threshold {threshold:.6g}"
    flops = None if base.flops is None else base.flops + 2  # a magnitude, a comparison
    if threshold == 0:
        return replace(base, name=name, config_name=None, torch_name=None, flops=flops)

    def cut(function: Function) -> Function:
        def kept(x: Tensor) -> Tensor:
            small = base.function(x).abs() < threshold  # false for NaN, which so is kept
            return torch.where(small, torch.zeros((), dtype=x.dtype, device=x.device), function(x))

        return kept

    def is_small(piece: Piece) -> bool:
        return abs(base.at(piece.middle)) < threshold

    edges = [*base.solve(threshold), *base.solve(-threshold)]
    pieces: list[Piece] = []
    for piece in base.pieces:
        inside = sorted(x for x in edges if piece.start < x < piece.end)
        for start, end in zip([piece.start, *inside], [*inside, piece.end], strict=True):
            part = replace(piece, start=start, end=end)
            if is_small(part):
                joins = bool(pieces) and is_small(pieces[-1])
                part = Piece(pieces.pop().start if joins else start, end, 0)
            pieces.append(part)
    zeros = [piece for piece in pieces if is_small(piece)]

    def inside_kept(x: float) -> bool:
        return all(not (piece.start <= x <= piece.end) for piece in zeros)

    ends = {x for piece in zeros for x in (piece.start, piece.end) if math.isfinite(x)}
    breaks = [*(Break(x, 0) for x in ends), *(each for each in base.breaks if inside_kept(each.at))]
    assert base.derivative is not None and base.limits is not None
    below, above = (limit if abs(limit) >= threshold else 0.0 for limit in base.limits)
    return ActivationFunction(
        name=name,
        function=cut(base.function),
        derivative=cut(base.derivative),
        second_derivative=None if base.second_derivative is None else cut(base.second_derivative),
        breaks=tuple(sorted(breaks, key=lambda each: each.at)),
        inflections=tuple(x for x in base.inflections if inside_kept(x)),
        pieces=tuple(pieces),
        limits=(below, above),
        flops=flops,
    )


def piecewise_polynomial(
    name: str,
    function: Function,
    knots: tuple[float, ...],
    polynomials: tuple[tuple[float, ...], ...],
    config_name: str | None = None,
    *,
    torch_name: str | None = None,
    flops: int | None = None,
) -> ActivationFunction:
    """The record of a function that is a polynomial of degree 2 at most between knots.

    Args:
        name: of the function.
        function: computes it.
        knots: inputs at which one polynomial ends and the next begins, in order.
        polynomials: coefficients, constant first; one more than there are knots.
        config_name: what transformers calls it.
        torch_name: what torch.nn calls it.
        flops: for one output.

    Returns:
        The record; derivatives, antiderivative, pieces, inverses and breaks follow from the coefficients.
    """
    slopes = tuple(_differentiate(each) for each in polynomials)
    curvatures = tuple(_differentiate(each) for each in slopes)
    integrals: list[tuple[float, ...]] = []
    for index, each in enumerate(polynomials):
        integral = (0.0, *(value / (power + 1) for power, value in enumerate(each)))
        if index:  # continuous at the knot
            gap = _value(integrals[-1], knots[index - 1]) - _value(integral, knots[index - 1])
            integral = (gap, *integral[1:])
        integrals.append(integral)
    signs = [0 if each == (0.0,) else math.copysign(1, each[0]) for each in curvatures]
    return ActivationFunction(
        name=name,
        function=function,
        derivative=_piecewise(knots, slopes),
        second_derivative=_piecewise(knots, curvatures),
        antiderivative=_piecewise(knots, tuple(integrals)),
        breaks=tuple(_breaks(knots, (polynomials, slopes, curvatures))),
        inflections=tuple(knot for knot, a, b in zip(knots, signs, signs[1:]) if a * b < 0),
        pieces=tuple(_joined(list(_monotone(knots, polynomials)), polynomials, knots)),
        limits=(_limit(polynomials[0], -1), _limit(polynomials[-1], 1)),
        config_name=config_name,
        torch_name=torch_name,
        flops=flops,
    )


Coefficients = tuple[float, ...]


def _value(coefficients: Coefficients, x: float) -> float:
    return sum(value * x**power for power, value in enumerate(coefficients))


def _differentiate(coefficients: Coefficients) -> Coefficients:
    found = tuple(power * value for power, value in enumerate(coefficients))[1:]
    while found and not found[-1]:
        found = found[:-1]
    return found or (0.0,)


def _piecewise(knots: tuple[float, ...], polynomials: tuple[Coefficients, ...]) -> Function:
    def evaluate(x: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for index, each in enumerate(polynomials):
            value = torch.full_like(x, each[-1])
            for coefficient in each[-2::-1]:  # Horner
                value = value * x + coefficient
            found = torch.where(x > knots[index - 1], value, found) if index else value
        return found

    return evaluate


def _breaks(knots: tuple[float, ...], orders: tuple[tuple[Coefficients, ...], ...]) -> Iterator[Break]:
    for index, knot in enumerate(knots):
        for order, polynomials in enumerate(orders):
            before, after = (_value(each, knot) for each in polynomials[index : index + 2])
            if not math.isclose(before, after, rel_tol=1e-12, abs_tol=1e-12):
                yield Break(knot, order)
                break


def _monotone(knots: tuple[float, ...], polynomials: tuple[Coefficients, ...]) -> Iterator[Piece]:
    """Each polynomial's monotone pieces, in order."""
    for start, end, each in zip((-math.inf, *knots), (*knots, math.inf), polynomials, strict=True):
        constant, slope, curvature = (*each, 0.0, 0.0)[:3]
        if curvature:
            vertex = -slope / (2 * curvature)
            for low, high, side in ((start, min(end, vertex), -1), (max(start, vertex), end, 1)):
                if low < high:
                    lowest = constant + slope * vertex / 2
                    yield Piece(low, high, _sign(side * curvature), _root(vertex, lowest, curvature, side))
        elif slope:
            yield Piece(start, end, _sign(slope), _line(constant, slope))
        else:
            yield Piece(start, end, 0)


def _sign(value: float) -> Literal[-1, 1]:
    return 1 if value > 0 else -1


def _line(constant: float, slope: float) -> Function:
    return lambda y: (y - constant) / slope


def _root(vertex: float, lowest: float, curvature: float, side: int) -> Function:
    return lambda y: vertex + side * ((y - lowest) / curvature).clamp(min=0).sqrt()


def _joined(pieces: list[Piece], polynomials: tuple[Coefficients, ...], knots: tuple[float, ...]) -> Iterator[Piece]:
    """Neighbours that go the same way become one piece, if the function does not jump between them."""
    before = pieces[0]
    for piece in pieces[1:]:
        index = knots.index(piece.start) if piece.start in knots else None
        jumps = index is not None and not math.isclose(
            *(_value(each, piece.start) for each in polynomials[index : index + 2]), abs_tol=1e-12
        )
        if jumps or piece.direction != before.direction or index is None:
            yield before
            before = piece
        else:
            edge = _value(polynomials[index], piece.start)
            before = Piece(before.start, piece.end, piece.direction, _either(before, piece, edge))
    yield before


def _either(first: Piece, second: Piece, edge: float) -> Function | None:
    """The inverse of two pieces that meet at the output `edge`."""
    one, other = first.inverse, second.inverse
    if one is None or other is None:
        return None
    return lambda y: torch.where((y - edge) * first.direction <= 0, one(y), other(y))


def _limit(coefficients: Coefficients, side: int) -> float:
    slope = _differentiate(coefficients)
    if slope == (0.0,):
        return coefficients[0]
    return math.copysign(math.inf, slope[-1] * side ** len(slope))
