"""Fits a rational function to any function, on an interval or on measured inputs.

Least squares in float64. The problem is linear once the denominator of the step before divides the residuals
(Sanathanan and Koerner 1963); these steps start from several denominators, and the best of their ends is polished by a
trust-region method on the true residuals. Inputs are scaled to [-1, 1] meanwhile, so that powers are harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actkit.core.layers.activations import activation_function
from actkit.kernels.rationals import Kind, rational

POINTS = 2001  # on an interval
STEPS = 40  # with the denominator of the step before
APART = 1e-10  # of its size, by which a column has to differ from others
STARTS = (0.0, 1.0, 30.0)  # coefficients of x^n in the first denominators

Array = Any  # of numpy, float64


@dataclass(frozen=True)
class RationalFit:
    """A fitted rational function.

    Attributes:
        numerator: a_0 to a_m.
        denominator: b_1 to b_n.
        kind: of the denominator.
        largest_error: of the points, |F - function|.
        at: the input at which it is.
        error: the root of the weighted mean square.
        between: the smallest and largest point; nothing is known of F outside.
    """

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    kind: Kind
    largest_error: float
    at: float
    error: float
    between: tuple[float, float]

    def __call__(self, x: Tensor) -> Tensor:
        """F of x [...]."""
        a, b = (torch.tensor([values], dtype=torch.float64) for values in (self.numerator, self.denominator))
        return rational(x.unsqueeze(-1), a.to(x.device), b.to(x.device), self.kind).squeeze(-1)


def fit_rational(
    function: Callable[[Tensor], Tensor],
    degrees: tuple[int, int] = (5, 4),
    kind: Kind = "A",
    *,
    between: tuple[float, float] = (-3.0, 3.0),
    points: Tensor | None = None,
    weights: Tensor | None = None,
) -> RationalFit:
    """Fit F to a function.

    Args:
        function: [k] float64 -> [k].
        degrees: of numerator and denominator, m >= 0 and n >= 1.
        kind: of the denominator.
        between: the interval, if no points are given.
        points: [k] inputs to fit on; None for many on the interval, denser at its ends.
        weights: [k] of their squared errors; None for 1.

    Returns:
        The coefficients and the largest error on the points.

    Raises:
        ValueError: a degree out of bounds, an empty interval, too few different points, weights that are not one per
            point and 0 or more, or a function that is not finite on them.
    """
    m, n = degrees
    if m < 0 or n < 1:
        raise ValueError(f"degrees: {degrees} was given; the numerator's is 0 or more, the denominator's 1 or more.")
    if kind not in ("A", "B"):
        raise ValueError(f"kind: {kind!r} was given, allowed are 'A' and 'B'.")
    if points is None:
        low, high = between
        if not low < high:
            raise ValueError(f"between: {between} was given; give a lower end below the upper one.")
        nodes = torch.cos(torch.linspace(torch.pi, 0, POINTS, dtype=torch.float64))
        points = low + (high - low) * (nodes + 1) / 2
    points = points.detach().double().flatten().cpu()
    if len(points.unique()) < m + n + 1:
        raise ValueError(
            f"points: {len(points.unique())} different ones were given for {m + n + 1} coefficients; give more inputs, "
            f"that are not all the same."
        )
    if weights is not None and (weights.numel() != len(points) or not bool((weights >= 0).all() and weights.sum() > 0)):
        raise ValueError(f"weights: give one of 0 or more for each of the {len(points)} points, and not all 0.")
    targets = function(points).detach().double().numpy()
    if not np.isfinite(targets).all():
        raise ValueError("function: it is not finite on all points; fit on an interval on which it is.")
    w = np.ones(len(points)) if weights is None else weights.detach().double().flatten().cpu().numpy()
    problem = _Problem(points.numpy(), targets, np.sqrt(w / w.sum()), m, n, kind)
    best = problem.polished(min(problem.starts(), key=problem.loss))
    a, b = problem.unscaled(best)
    errors = np.abs(problem.values(best) - targets)
    worst = int(errors.argmax())
    ends = (float(points.min()), float(points.max()))
    return RationalFit(a, b, kind, float(errors[worst]), float(points[worst]), problem.loss(best) ** 0.5, ends)


@lru_cache(maxsize=64)
def rational_like(
    name: str, degrees: tuple[int, int] = (5, 4), kind: Kind = "A", between: tuple[float, float] = (-3.0, 3.0)
) -> RationalFit:
    """The fit to a registered function on an interval, made once per process; `identity` is exact.

    Args:
        name: of an element-wise function.
        degrees: of numerator and denominator.
        kind: of the denominator.
        between: the interval.

    Returns:
        The fit.

    Raises:
        RecipeError: an unknown name.
        ValueError: what `fit_rational` raises, or a function that mixes.
    """
    if name == "identity" and degrees[0] >= 1:
        m, n = degrees
        return RationalFit((0.0, 1.0, *(0.0,) * (m - 1)), (0.0,) * n, kind, 0.0, between[0], 0.0, between)
    record = activation_function(name)
    if record.mixes:
        raise ValueError(f"function: {name!r} mixes {', '.join(record.mixes)}; give an element-wise function.")
    return fit_rational(record.function, degrees, kind, between=between)


class _Problem:
    """Fits coefficients (a, b) of scaled inputs; of kind A the b are 0 or more."""

    def __init__(self, x: Array, y: Array, w: Array, m: int, n: int, kind: Kind) -> None:
        self.scale = float(np.abs(x).max())
        t = x / self.scale
        self.y, self.w, self.m, self.kind = y, w, m, kind
        self.over = t[:, None] ** np.arange(m + 1)  # [k, m + 1]
        base = np.abs(t) if kind == "A" else t
        self.under = base[:, None] ** np.arange(1, n + 1)  # [k, n]

    def starts(self) -> Iterator[Array]:
        """Ends of the linear steps, from several denominators, each with and without signs left free (kind B)."""
        for bounded in (True,) if self.kind == "A" else (False, True):
            for start in STARTS:
                b = np.zeros(self.under.shape[1])
                b[-1] = start
                yield self._linear_steps(b, bounded)

    def _linear_steps(self, b: Array, bounded: bool) -> Array:
        best, least = np.concatenate([np.zeros(self.m + 1), b]), np.inf
        for _ in range(STEPS):
            w = self.w / self._bottom(b)
            matrix = w[:, None] * np.concatenate([self.over, -self.y[:, None] * self.under], 1)
            q, r = np.linalg.qr(matrix)
            target = q.T @ (w * self.y)
            found = self._bounded(r, target) if bounded else np.linalg.lstsq(r, target, rcond=None)[0]
            loss = self.loss(found)
            if loss < least:
                best, least = found, loss
            if np.allclose(found[self.m + 1 :], b, rtol=1e-10, atol=1e-14):
                break
            b = found[self.m + 1 :]
        return best

    def _bounded(self, r: Array, target: Array) -> Array:
        """The least squares of a triangular matrix whose b are 0 or more: b first, as rows of its own hold b alone."""
        from scipy.linalg import solve_triangular
        from scipy.optimize import nnls

        free = self.m + 1
        columns = r[free:, free:]
        apart = np.linalg.norm(columns, axis=0) > APART * np.linalg.norm(r[:, free:], axis=0)  # from the numerator's
        b = np.zeros(len(columns))
        b[apart] = nnls(columns[:, apart], target[free:])[0]
        return np.concatenate([solve_triangular(r[:free, :free], target[:free] - r[:free, free:] @ b), b])

    def polished(self, start: Array) -> Array:
        """The nearest minimum of the weighted squares."""
        from scipy.optimize import least_squares

        low = np.full(len(start), -np.inf)
        if self.kind == "A":
            low[self.m + 1 :] = -1e-300  # a start may lie on the bound itself
            start = np.maximum(start, np.where(np.isfinite(low), 0.0, -np.inf))
        found = least_squares(
            self._residuals, start, self._jacobian, (low, np.inf), x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15,
            max_nfev=200,
        ).x  # fmt: skip
        return found if self.loss(found) < self.loss(start) else start

    def loss(self, z: Array) -> float:
        return float((self._residuals(z) ** 2).sum())

    def values(self, z: Array) -> Array:
        a, b = z[: self.m + 1], z[self.m + 1 :]
        return self.over @ a / self._bottom(b)

    def _bottom(self, b: Array) -> Array:
        return 1 + (self.under @ np.abs(b) if self.kind == "A" else np.abs(self.under @ b))

    def _residuals(self, z: Array) -> Array:
        return self.w * (self.values(z) - self.y)

    def _jacobian(self, z: Array) -> Array:
        b = z[self.m + 1 :]
        bottom = self._bottom(b)
        sign = np.where(b >= 0, 1.0, -1.0) if self.kind == "A" else np.where(self.under @ b >= 0, 1.0, -1.0)[:, None]
        to_b = -(self.values(z) / bottom)[:, None] * self.under * sign
        return self.w[:, None] * np.concatenate([self.over / bottom[:, None], to_b], 1)

    def unscaled(self, z: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The coefficients of inputs as they are."""
        a, b = z[: self.m + 1], z[self.m + 1 :]
        b = np.maximum(b, 0.0) if self.kind == "A" else b
        a = a / self.scale ** np.arange(len(a))
        b = b / self.scale ** np.arange(1, len(b) + 1)
        return tuple(map(float, a)), tuple(map(float, b))
