"""What the record of an activation function must satisfy: `check_function`, one small function per property.

    from actkit.testing import check_function

    def test_my_function():
        check_function(SQUAREPLUS)

Everything is asked in float64, of the function itself: derivatives by automatic differentiation, integrals by scipy's
adaptive quadrature, roots by Brent's method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor

from actkit.core.layers.activation_function import ActivationFunction, Function, Piece
from actkit.testing.checks import Check, NotApplicable, close, equal, run_checks

NEAR = 1e-5  # how far from a break nothing is asked of what jumps there


@dataclass(frozen=True)
class FunctionCase:
    """What all checks share: the record, and the inputs that it is looked at."""

    record: ActivationFunction
    low: float
    high: float

    def inputs(self, points: int = 2001) -> Tensor:
        """float64 [points], evenly spread, without those at a break."""
        x = torch.linspace(self.low, self.high, points, dtype=torch.float64)
        for each in self.record.breaks:
            x = x[(x - each.at).abs() > NEAR]
        return x

    def needs(self, name: str) -> Any:
        """A field of an element-wise function. Raises NotApplicable if the record has none."""
        if self.record.mixes:
            raise NotApplicable("it is not element-wise")
        found = getattr(self.record, name)
        if found is None or found == ():
            raise NotApplicable(f"it has none: {name} is {found}")
        return found

    def split(self, low: float, high: float) -> list[float]:
        """The ends of an interval, with the breaks between them."""
        return [low, *(each.at for each in self.record.breaks if low < each.at < high), high]


def check_function(record: ActivationFunction, *, low: float = -6.0, high: float = 6.0) -> list[Check]:
    """Check everything that the record of an activation function says.

    Args:
        record: of the function.
        low: the least input that it is looked at.
        high: the largest one; all breaks should lie between.

    Returns:
        What was checked, and what did not apply and why.

    Raises:
        AssertionError: it begins with the name of the first property that fails.
    """
    return run_checks(CHECKS, FunctionCase(record, low, high))


# -- the properties ----------------------------------------------------------------------------------------------------


def keeps_shape(case: FunctionCase) -> None:
    """Any shape, float64, float32 and bfloat16; finite outputs. One that mixes may change the last dimension."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in ((4,), (2, 3, 4), (0, 4)):
            output = case.record.function(torch.linspace(-3, 3, math.prod(shape)).to(dtype).view(shape))
            assert output.dtype == dtype, f"{output.dtype} for {dtype}"
            kept = slice(-1 if case.record.mixes else None)
            assert output.shape[kept] == shape[kept], f"{tuple(output.shape)} for {shape}"
            assert bool(torch.isfinite(output).all()), "the output holds NaN or Inf"


def mixes_as_said(case: FunctionCase) -> None:
    """Values, channels, positions and rows [batch, positions, channels] alone give what they give among others."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixes, function = case.record.mixes, case.record.function
    output = function(x)
    if not mixes:
        equal([function(x[1, 2, 3])], [output[1, 2, 3]], "one value alone")
    if "positions" not in mixes:
        close([function(x[:, 1:2])], [output[:, 1:2]], "one position alone")
    if "batch" not in mixes:
        close([function(x[1:])], [output[1:]], "one row of the batch alone")


def derivative_is_right(case: FunctionCase) -> None:
    """Against automatic differentiation of the function."""
    x, derivative = case.inputs(), case.needs("derivative")
    close([derivative(x)], [_slope(case.record.function, x)], "the derivative", 1e-7)


def second_derivative_is_right(case: FunctionCase) -> None:
    """Against automatic differentiation of the derivative."""
    x, second = case.inputs(), case.needs("second_derivative")
    close([second(x)], [_slope(case.needs("derivative"), x)], "the second derivative", 1e-7)


def breaks_are_right(case: FunctionCase) -> None:
    """What is said to jump jumps, and what comes before it does not."""
    orders = ("function", "derivative", "second_derivative")
    for each in case.needs("breaks"):
        for order in range(each.order + 1):
            function = getattr(case.record, orders[order])
            if function is None:
                continue
            sides = torch.tensor([each.at - 1e-9, each.at + 1e-9], dtype=torch.float64)
            before, after = function(sides).tolist()
            jumps = abs(after - before) > 1e-6
            assert jumps == (order == each.order), f"its {orders[order]} goes from {before} to {after} at {each.at}"


def breaks_are_all(case: FunctionCase) -> None:
    """Between two breaks neither the function nor its derivative jumps."""
    derivative = case.needs("derivative")
    for function, what in ((case.record.function, "function"), (derivative, "derivative")):
        ends = case.split(case.low, case.high)
        for low, high in pairwise(ends):
            coarse, fine = (_largest_step(function, low + NEAR, high - NEAR, points) for points in (2001, 64001))
            # a step of something smooth shrinks with the distance of its points, a jump does not
            assert fine < 0.5 * coarse or fine < 1e-9, f"the {what} jumps by {fine:.3g} between {low} and {high}"


def pieces_are_monotone(case: FunctionCase) -> None:
    """The function rises, falls or stays on each piece as it says, and goes another way on the next."""
    pieces: tuple[Piece, ...] = case.needs("pieces")
    for piece in pieces:
        values = case.record.function(_inside(piece, case))
        steps, rounding = values.diff(), 1e-12 * max(1.0, float(values.abs().max()))
        if piece.direction == 0:
            assert bool((steps == 0).all()), f"it is not constant from {piece.start} to {piece.end}"
        else:
            wrong = (piece.direction * steps).min()
            assert wrong >= -rounding, f"it goes the other way between {piece.start} and {piece.end}, by {wrong:.3g}"
            assert float(steps.abs().max()) > 0, f"it is constant between {piece.start} and {piece.end}"
    for before, after in pairwise(pieces):
        same = before.direction == after.direction
        assert not same or after.start in case.record.jumps, f"the pieces that meet at {after.start} are one"


def inverses_are_right(case: FunctionCase) -> None:
    """The function of an inverse is the output again, and the input lies in the piece."""
    pieces = [piece for piece in case.needs("pieces") if piece.inverse is not None]
    if not pieces:
        raise NotApplicable("no piece has one")
    for piece in pieces:
        assert piece.inverse is not None
        output = case.record.function(_inside(piece, case))
        x = piece.inverse(output)
        assert bool(((x >= piece.start - 1e-9) & (x <= piece.end + 1e-9)).all()), "an inverse lies outside its piece"
        close([case.record.function(x)], [output], "the function of its inverse", 1e-9)


def inflections_are_right(case: FunctionCase) -> None:
    """Between `low` and `high` the second derivative changes its sign there and nowhere else."""
    second: Function = case.needs("second_derivative")
    x = case.inputs()
    values = second(x)
    x, signs = x[values.abs() > 1e-12], values[values.abs() > 1e-12].sign()
    found = []
    for index in (signs.diff() != 0).nonzero().flatten().tolist():
        low, high = float(x[index]), float(x[index + 1])
        broken = [each for each in case.record.breaks if low < each.at < high]
        if any(each.order < 2 for each in broken):
            continue  # a kink or a jump is no inflection
        found.append(broken[0].at if broken else brentq(_scalar(second), low, high, xtol=1e-14))
    said = [each for each in case.record.inflections if case.low < each < case.high]
    agree = len(said) == len(found) and all(abs(a - b) < 1e-7 for a, b in zip(said, found))
    assert agree, f"the record says {said}, its second derivative {found}"


def antiderivative_is_right(case: FunctionCase) -> None:
    """Differences of it are the integrals of the function."""
    antiderivative = case.needs("antiderivative")
    ends = np.linspace(case.low, case.high, 9)
    for low, high in pairwise(ends):
        expected = _integral(_scalar(case.record.function), case.split(low, high))
        found = float(antiderivative(torch.tensor([low, high], dtype=torch.float64)).diff())
        assert abs(found - expected) < 1e-8 * max(1, abs(expected)), f"{found} from {low} to {high}, not {expected}"


def limits_are_right(case: FunctionCase) -> None:
    """Far away the function comes ever nearer to its limit."""
    for side, limit in zip((-1, 1), case.needs("limits")):
        x = torch.tensor([side * 10.0**power for power in (2, 3, 4, 5)], dtype=torch.float64)
        y = case.record.function(x)
        if math.isinf(limit):
            assert bool((y.diff() * limit > 0).all()) and y[-1] * limit > 0, f"{y.tolist()} does not go to {limit}"
        else:
            gaps = (y - limit).abs()
            assert bool((gaps.diff() <= 0).all()) and gaps[-1] < 1e-3, f"{y.tolist()} does not go to {limit}"


def moments_are_right(case: FunctionCase) -> None:
    """Against adaptive quadrature, for three normal inputs."""
    case.needs("derivative")
    function, derivative = map(_scalar, (case.record.function, case.record.derivative))
    for mean, deviation in ((0.0, 1.0), (0.7, 1.5), (-1.0, 0.2)):

        def density(x: float, mean: float = mean, deviation: float = deviation) -> float:
            return math.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))

        ends = case.split(mean - 10 * deviation, mean + 10 * deviation)
        more = np.linspace(ends[0], ends[-1], 21)
        ends = sorted([*ends, *(x for x in more if min(abs(x - end) for end in ends) > NEAR)])
        found: Any = case.record.moments(mean, deviation)
        for name, values in (
            ("mean", lambda x: function(x)),
            ("second", lambda x: function(x) ** 2),
            ("slope", lambda x: derivative(x)),
            ("squared_slope", lambda x: derivative(x) ** 2),
        ):
            expected = _integral(lambda x: values(x) * density(x), ends)  # noqa: B023
            assert abs(getattr(found, name) - expected) < 1e-8 * max(1, abs(expected)), (
                f"{name} for N({mean}, {deviation}^2) is {getattr(found, name)}, not {expected}"
            )


def solutions_are_right(case: FunctionCase) -> None:
    """`solve` finds an input on every piece that reaches an output."""
    for piece in case.needs("pieces"):
        if piece.direction == 0:
            continue
        x = float(_inside(piece, case)[3])
        output = case.record.at(x)
        found = case.record.solve(output)
        assert any(abs(each - x) < 1e-6 for each in found), f"{x} gives {output}, solve finds {found}"
        for each in found:
            assert abs(case.record.at(each) - output) < 1e-9, f"{each} does not give {output}"


def _slope(function: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = function(x)
    if not y.requires_grad:  # constant
        return torch.zeros_like(x)
    return torch.autograd.grad(y.sum(), x)[0]


def _scalar(function: Any) -> Callable[[float], float]:
    return lambda x: float(function(torch.tensor([x], dtype=torch.float64)))


def _integral(function: Callable[[float], float], ends: list[float]) -> float:
    parts = (quad(function, low, high, epsabs=1e-11, epsrel=1e-10)[0] for low, high in pairwise(ends))
    return float(sum(parts))


def _largest_step(function: Function, low: float, high: float, points: int) -> float:
    return float(function(torch.linspace(low, high, points, dtype=torch.float64)).diff().abs().max())


def _inside(piece: Piece, case: FunctionCase) -> Tensor:
    """Inputs of a piece, float64 [41]."""
    low, high = max(piece.start, min(case.low, piece.end - 1)), min(piece.end, max(case.high, piece.start + 1))
    return torch.linspace(low, high, 43, dtype=torch.float64)[1:-1]


CHECKS: dict[str, Callable[[FunctionCase], None]] = {
    "shape and dtype are kept": keeps_shape,
    "it mixes what it says": mixes_as_said,
    "the derivative is right": derivative_is_right,
    "the second derivative is right": second_derivative_is_right,
    "what breaks is right": breaks_are_right,
    "no break is missing": breaks_are_all,
    "pieces are monotone": pieces_are_monotone,
    "inverses are right": inverses_are_right,
    "inflections are right": inflections_are_right,
    "the antiderivative is right": antiderivative_is_right,
    "limits are right": limits_are_right,
    "moments are right": moments_are_right,
    "outputs are solved for": solutions_are_right,
}
