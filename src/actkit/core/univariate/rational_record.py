"""What is known of a rational function at its coefficients, as `actkit.kernels.rationals` computes it.

    F = P / Q,   F' = (P' - F Q') / Q,   F'' = (P'' - 2 F' Q' - F Q'') / Q

Q is smooth but at 0 for kind A, and at the real roots of what stands inside of |.| for kind B; there the slope jumps,
unless P is 0 there. The roots of the numerators of F' and F'', found as eigenvalues, only say between which inputs
signs are compared (`found_record`), so that a root that rounding made up is none; so is a jump of 1e-6 or less.
Inverses and antiderivatives have no closed form here.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from actkit.core.layers.activation_function import ActivationFunction, Break, Function
from actkit.core.layers.found_record import Sized, found_record, runs_of
from actkit.kernels.rationals import Kind, rational

# inputs are looked at from 1e-6 to 1e6 too, 50 for each power of ten
BESIDE = np.concatenate((-np.logspace(-6, 6, 601), np.logspace(-6, 6, 601)))


@lru_cache(maxsize=256)
def rational_record(numerator: tuple[float, ...], denominator: tuple[float, ...], kind: Kind) -> ActivationFunction:
    """The record of a rational function.

    Args:
        numerator: a_0 to a_m.
        denominator: b_1 to b_n, n from 1 on.
        kind: of the denominator.

    Returns:
        The record, named by its coefficients.
    """
    a, b = (torch.tensor([values], dtype=torch.float64) for values in (numerator, denominator))
    top, inside = Polynomial(numerator), Polynomial((0.0, *denominator))
    if kind == "A":
        magnitudes: Any = np.abs(inside.coef)
        inside, mirrored = (Polynomial(magnitudes * side ** np.arange(len(magnitudes))) for side in (1.0, -1.0))
        bottoms, knots = (1 + inside, 1 + mirrored), [0.0]
    else:
        bottoms = (1 + inside, 1 - inside)
        knots = [at for at, _ in list(runs_of(_polynomial(inside), _between([inside])))[1:]]
    sized = _derivatives(top, inside, kind)
    slopes = [top.deriv() * bottom - top * bottom.deriv() for bottom in bottoms]
    bends = [slope.deriv() * q - 2 * slope * q.deriv() for slope, q in zip(slopes, bottoms, strict=True)]

    def function(x: Tensor) -> Tensor:
        return rational(x.unsqueeze(-1), a.to(x.device), b.to(x.device), kind).squeeze(-1)

    def derivative(order: int) -> Function:
        return lambda x: sized[order](x.double())[0].to(x.dtype)

    above, below = (" ".join(f"{value:.4g}" for value in values) for values in (numerator, denominator))
    return found_record(
        f"rational({above} / 1 {below}, {kind})",
        function,
        (derivative(0), derivative(1)),
        sized,
        breaks=[Break(at, 1) for at in knots],
        inputs=_between([*slopes, *bends]).tolist(),
        limits=_limits(top, inside, kind),
        flops=2 * (len(numerator) - 1 + len(denominator)) + 2,
    )


def _derivatives(top: Polynomial, inside: Polynomial, kind: Kind) -> tuple[Sized, Sized]:
    """F' and F'' with the magnitudes of what they add up."""
    tops, insides = ([each, each.deriv(), each.deriv(2)] for each in (top, inside))

    def parts(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """P, P', P'' and Q, Q', Q''; Q' at a break is that of either side."""
        at = x.abs() if kind == "A" else x
        q, slope, bend = (_horner(each, at) for each in insides)
        side = torch.where((x if kind == "A" else q) < 0, -1.0, 1.0).to(x.dtype)
        below = [1 + q, side * slope, bend] if kind == "A" else [1 + side * q, side * slope, side * bend]
        return [_horner(each, x) for each in tops], below

    def magnitudes(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        above, below = ([_horner(Polynomial(np.abs(p.coef)), x.abs()) for p in each] for each in (tops, insides))
        return above, [parts(x)[1][0], *below[1:]]

    def first(p: list[Tensor], q: list[Tensor], sign: int) -> Tensor:
        return (p[1] + sign * p[0] / q[0] * q[1]) / q[0]

    def second(p: list[Tensor], q: list[Tensor], sign: int) -> Tensor:
        return (p[2] + sign * 2 * first(p, q, sign) * q[1] + sign * p[0] / q[0] * q[2]) / q[0]

    return (
        lambda x: (first(*parts(x), -1), first(*magnitudes(x), 1)),
        lambda x: (second(*parts(x), -1), second(*magnitudes(x), 1)),
    )


def _polynomial(p: Polynomial) -> Sized:
    size = Polynomial(np.abs(p.coef))
    return lambda x: (_horner(p, x), _horner(size, x.abs()))


def _horner(p: Polynomial, x: Tensor) -> Tensor:
    y = torch.full_like(x, float(p.coef[-1]))
    for coefficient in p.coef[-2::-1]:
        y = y * x + float(coefficient)
    return y


def _between(polynomials: list[Polynomial]) -> Tensor:
    """Inputs, in order, that lie between the roots of polynomials and beyond them: float64."""
    roots = np.unique(np.concatenate([np.real(each.trim().roots()) for each in polynomials]))
    beyond = [roots[:1] * 2 - 1, roots[-1:] * 2 + 1]
    inputs = np.concatenate((BESIDE, (roots[1:] + roots[:-1]) / 2, *beyond))
    return torch.from_numpy(np.unique(inputs[np.abs(inputs) < 1e9]))


def _limits(top: Polynomial, inside: Polynomial, kind: Kind) -> tuple[float, float]:
    top, inside = top.trim(), inside.trim()
    m, n = top.degree(), inside.degree()
    lead, by = float(top.coef[-1]), abs(float(inside.coef[-1])) if n else 1.0 + abs(float(inside.coef[0]))
    if m < n or not lead:
        return 0.0, 0.0
    size = lead / by if m == n else math.copysign(math.inf, lead)
    return (-1) ** m * size, size
