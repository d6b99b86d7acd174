"""Records whose turns and bends are found: held to what they say, and against derivatives of torch and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import bisect
from torch import Tensor

from actkit.core.layers.activation_function import ActivationFunction
from actkit.core.layers.activations import activation_function
from actkit.core.layers.found_record import Term, sum_of
from actkit.core.layers.known_functions import IDENTITY, leaky_relu
from actkit.core.univariate.rational_record import rational_record
from actkit.testing import check_function

SILU, RELU, TANH = map(activation_function, ("silu", "relu", "tanh"))
LIKE_SILU = ((0.0, 0.5, 0.25, 0.05, 0.006, 0.0003), (0.0, 0.1, 0.0, 0.0005))
RATIONALS = [
    (*LIKE_SILU, "A"),
    ((0.2, 0.6, 2.2, 2.6, 1.2, 0.2), (1.1, -3.8, 0.7, 0.3), "A"),  # a kink at 0
    ((0.1, 1.0), (0.0, 0.5), "A"),
    ((0.1, 0.5, -0.3, 0.2), (0.3, -0.2, 0.1), "B"),  # kinks at the roots of what is inside of |.|
    ((0.0, 1.0), (0.0,), "A"),
    ((0.3,), (0.5,), "A"),
]


def by_torch(function: Callable[[Tensor], Tensor], order: int, x: Tensor) -> Tensor:
    """A derivative by torch alone."""
    at = x.clone().requires_grad_()
    y = function(at)
    for _ in range(order):
        if not y.requires_grad:  # straight, so that nothing is left of it
            return torch.zeros_like(x)
        (y,) = torch.autograd.grad(y.sum(), at, create_graph=True)
    return y.detach()


def changes(function: Callable[[Tensor], Tensor], order: int, breaks: tuple[float, ...]) -> list[float]:
    """Where a derivative changes its sign between -6 and 6, off breaks."""
    x = torch.linspace(-6, 6, 1202, dtype=torch.float64)
    y = by_torch(function, order, x)
    pairs = [(float(x[index]), float(x[index + 1])) for index in (y[1:] * y[:-1] < 0).nonzero().flatten()]
    smooth = [pair for pair in pairs if not any(pair[0] < each < pair[1] for each in breaks)]

    def value(at: float) -> float:
        return float(by_torch(function, order, torch.tensor(at, dtype=torch.float64)))

    return [float(bisect(value, *pair, xtol=1e-12)) for pair in smooth]


def plain(numerator: tuple[float, ...], denominator: tuple[float, ...], kind: str) -> Callable[[Tensor], Tensor]:
    """P / Q, written out."""

    def function(x: Tensor) -> Tensor:
        top = sum(a * x**power for power, a in enumerate(numerator))
        terms = [b * x**power for power, b in enumerate(denominator, start=1)]
        return top / (1 + sum(each.abs() for each in terms) if kind == "A" else 1 + sum(terms).abs())  # type: ignore[union-attr]

    return function


def inside(values: tuple[float, ...], breaks: tuple[float, ...]) -> list[float]:
    return [each for each in values if abs(each) < 6 and each not in breaks]


def agrees(record: ActivationFunction, function: Callable[[Tensor], Tensor]) -> None:
    """Derivatives, turns and bends are those of the function that is written out."""
    breaks = tuple(each.at for each in record.breaks)
    turns = tuple(piece.start for piece in record.pieces[1:])
    for order, said in ((1, turns), (2, record.inflections)):
        assert inside(said, breaks) == pytest.approx(changes(function, order, breaks), abs=1e-9)
    x = torch.linspace(-5.87, 5.93, 60, dtype=torch.float64)  # no break among them
    for order, derivative in ((1, record.derivative), (2, record.second_derivative)):
        assert derivative is not None
        torch.testing.assert_close(derivative(x), by_torch(function, order, x), rtol=1e-9, atol=1e-11)


# -- rational functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("numerator", "denominator", "kind"), RATIONALS)
def test_rational_functions(numerator: Any, denominator: Any, kind: Any) -> None:
    record = rational_record(numerator, denominator, kind)
    check_function(record)
    if len(numerator) > 2:
        agrees(record, plain(numerator, denominator, kind))
    for x in (-3.1, -0.4, 0.7, 2.9):  # there and back
        assert min((abs(each - x) for each in record.solve(record.at(x))), default=0.0) < 1e-6


def test_closed_forms_of_a_rational_function() -> None:
    record = rational_record((0.0, 1.0), (0.0, 1.0), "A")  # x / (1 + x^2)
    assert [piece.direction for piece in record.pieces] == [-1, 1, -1] and record.limits == (0.0, 0.0)
    assert [piece.end for piece in record.pieces[:2]] == pytest.approx([-1, 1], abs=1e-12)
    assert record.inflections == pytest.approx((-math.sqrt(3), 0, math.sqrt(3)), abs=1e-12)
    assert record.solve(0.4) == pytest.approx((0.5, 2.0), abs=1e-9) and record.breaks == ()


def test_limits_and_breaks_of_rational_functions() -> None:
    assert rational_record((1.0, 0.0, -2.0), (0.0, 0.5), "A").limits == (-4.0, -4.0)
    assert rational_record((1.0, 3.0), (-0.5,), "A").limits == (-6.0, 6.0)
    assert rational_record((0.0, 0.0, 0.0, -1.0), (1.0,), "A").limits == (math.inf, -math.inf)
    assert rational_record((0.0,), (1.0,), "A").pieces[0].direction == 0
    kinked, bent = (rational_record(top, (1.0, 0.2), "A") for top in ((0.5, 1.0), (0.0, 1.0)))
    assert kinked.kinks == (0.0,) and [each.order for each in bent.breaks] == [2]  # a_0 |b_1|, then a_1 |b_1|


@pytest.mark.parametrize("near", [1e-9, 1e-14, 1e-19])
def test_coefficients_near_0_make_up_no_bends(near: float) -> None:
    """A straight line, but for what no output in [-6, 6] shows: no more is said than torch's f'' shows."""
    record = rational_record((near, 1.0, -near, near, near, 0.0), (near, near, near, near), "A")
    assert [piece.direction for piece in record.pieces if piece.start < 6 and piece.end > -6] == [1]
    straight = rational_record((0.0, 1.0, 0.0), (0.0, 0.0), "A")
    assert straight.inflections == () and straight.breaks == () and len(straight.pieces) == 1
    silu = rational_record(tuple(each + near for each in LIKE_SILU[0]), LIKE_SILU[1], "A")
    assert len(inside(silu.inflections, (0.0,))) == len(inside(rational_record(*LIKE_SILU, "A").inflections, (0.0,)))


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "tanh", "softsign", "mish", "hardtanh", "elu"])
def test_sums_of_shifted_functions(name: str) -> None:
    base = activation_function(name)
    terms = (Term(base, 0.5, 1.1, -0.4), Term(base, 0.5, -0.6, 0.9), Term(base, 1.0, 0.4, 0.0))
    record = sum_of("series", terms)
    assert record is not None
    check_function(record)

    def plainly(x: Tensor) -> Tensor:
        return base.function(1.1 * x - 0.4) / 2 + base.function(0.9 - 0.6 * x) / 2 + base.function(0.4 * x)

    if name != "elu":  # of which torch has no second derivative
        agrees(record, plainly)


def test_one_term_is_the_function_itself() -> None:
    record = sum_of("same", (Term(SILU), Term(SILU, 1.0, 0.0, 0.0)))
    assert record is not None
    assert record.inflections == pytest.approx(SILU.inflections, abs=1e-12)
    assert [piece.direction for piece in record.pieces] == [-1, 1] and record.limits == SILU.limits
    assert record.pieces[0].end == pytest.approx(SILU.pieces[0].end, abs=1e-12)


def test_zeros_and_kinks_of_a_sum() -> None:
    both = sum_of("both", (Term(RELU, 1.0, 1.0, -1.0), Term(RELU, 1.0, -1.0, -1.0)))
    assert both is not None and both.zeros == ((-1.0, 1.0),) and both.kinks == (-1.0, 1.0)
    assert [piece.direction for piece in both.pieces] == [-1, 0, 1] and both.limits == (math.inf, math.inf)
    half = sum_of("half", (Term(RELU, 0.5), Term(IDENTITY, 0.5)))
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert half is not None and torch.equal(half.function(x), leaky_relu(0.5).function(x))
    assert half.kinks == (0.0,)


def test_no_record_without_a_limit() -> None:
    line = Term(IDENTITY, 1.0, -1.0)
    assert sum_of("against", (Term(RELU), line)) is None  # inf - inf on the right
    assert sum_of("with", (Term(TANH), line)) is not None
