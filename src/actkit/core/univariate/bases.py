"""Bases of fixed functions: B-splines, bells, polynomials, ReLU-KAN's bumps, sines; and all bases by name."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from actkit.core.univariate.basis import Basis, Outside
from actkit.core.univariate.shifted_pairs import ShiftedPairs, check_grid
from actkit.kernels.bases import BELLS, BUMPS, POLYNOMIALS, SPLINES, TANH_BELLS, KernelBasis


class BSplines(Basis):
    """B-splines on equal intervals: `grid` intervals, polynomials of degree `order`, grid + order functions.

    On the domain they sum to 1. Outside they fall to 0 within `order` intervals.

    Args:
        grid: intervals of the domain.
        order: degree of the pieces.
        domain: which the intervals fill.
        outside: of the domain; `vanish` is the usual one.

    Raises:
        ValueError: grid < 1 or order < 0.
    """

    def __init__(
        self,
        grid: int = 5,
        order: int = 3,
        domain: tuple[float, float] = (-1.0, 1.0),
        outside: Outside = "vanish",
    ) -> None:
        check_grid(grid, order)
        super().__init__(grid + order, domain, outside)
        self.grid, self.order = grid, order

    def evaluate(self, x: Tensor) -> Tensor:
        return _cardinal_spline(self._places(x), self.order)

    def slopes(self, x: Tensor) -> Tensor:
        if self.order == 0:
            return torch.zeros_like(self._places(x))
        u, step = self._places(x), (self.domain[1] - self.domain[0]) / self.grid
        return (_cardinal_spline(u, self.order - 1) - _cardinal_spline(u - 1, self.order - 1)) / step

    def _places(self, x: Tensor) -> Tensor:
        """Where x is in each function's support, in intervals from its left end: [..., channels, size]."""
        low, high = self.domain
        first = torch.arange(self.size, device=x.device, dtype=x.dtype) - self.order
        return ((x - low) * (self.grid / (high - low))).unsqueeze(-1) - first

    def kernel(self) -> KernelBasis:
        step = (self.domain[1] - self.domain[0]) / self.grid
        return self._kernel(SPLINES, [self.domain[0] - self.order * step, 1 / step, 1.0, self.order])

    def settings(self) -> dict[str, Any]:
        return {"grid": self.grid, "order": self.order, **super().settings()}


class Bells(Basis):
    """Equal bells at equal distances: of a Gaussian exp(-u^2), or 1 - tanh(u)^2; u = (x - centre) / width.

    Each is 1 at its centre. With a Gaussian and the distance of two centres as width this is FastKAN's basis, with
    1 - tanh^2 FasterKAN's.

    Args:
        count: how many.
        domain: the first and the last centre.
        width: None for the distance of two centres.
        shape: "gaussian" or "tanh".
        outside: of the domain; `vanish` is the usual one.

    Raises:
        ValueError: fewer than 2 bells, a width of 0 or less, or an unknown shape.
    """

    def __init__(
        self,
        count: int = 8,
        domain: tuple[float, float] = (-2.0, 2.0),
        width: float | None = None,
        shape: Literal["gaussian", "tanh"] = "gaussian",
        outside: Outside = "vanish",
    ) -> None:
        if count < 2:
            raise ValueError(f"count: {count} was given; give at least 2 bells.")
        if width is not None and not width > 0:
            raise ValueError(
                f"width: {width} was given; give a width above 0, or None for the distance of the centres."
            )
        if shape not in ("gaussian", "tanh"):
            raise ValueError(f"shape: {shape!r} was given, allowed are 'gaussian' and 'tanh'.")
        super().__init__(count, domain, outside)
        self.width, self.shape = width or (domain[1] - domain[0]) / (count - 1), shape

    def evaluate(self, x: Tensor) -> Tensor:
        u = self._places(x)
        return torch.exp(-(u**2)) if self.shape == "gaussian" else 1 - torch.tanh(u) ** 2

    def slopes(self, x: Tensor) -> Tensor:
        u, height = self._places(x), self.evaluate(x)
        return -2 * height * (u if self.shape == "gaussian" else torch.tanh(u)) / self.width

    def _places(self, x: Tensor) -> Tensor:
        centres = torch.linspace(*self.domain, self.size, device=x.device, dtype=x.dtype)
        return (x.unsqueeze(-1) - centres) / self.width

    def kernel(self) -> KernelBasis:
        distance = (self.domain[1] - self.domain[0]) / (self.size - 1)
        kind = BELLS if self.shape == "gaussian" else TANH_BELLS
        return self._kernel(kind, [self.domain[0], 1 / self.width, distance / self.width])

    def settings(self) -> dict[str, Any]:
        return {"count": self.size, "width": self.width, "shape": self.shape, **super().settings()}


class Polynomials(Basis):
    """Orthogonal polynomials on [-1, 1], degrees 0 to `degree`: Jacobi's P(a, b), or Chebyshev's T, by recurrence.

    Each polynomial has its usual scale: T_n is 1 at 1, as is Legendre's P(0, 0). The recurrence has finite slopes at
    the ends, which cos(n arccos x) has not.

    Args:
        degree: the highest.
        jacobi: a and b, above -1; None for Chebyshev's of the first kind. (0, 0) are Legendre's.
        outside: `clamped` or `squashed`.

    Raises:
        ValueError: degree < 0, or a or b of -1 or less.
    """

    allowed = ("clamped", "squashed")

    def __init__(
        self, degree: int = 4, jacobi: tuple[float, float] | None = None, outside: Outside = "clamped"
    ) -> None:
        if degree < 0:
            raise ValueError(f"degree: {degree} was given; give 0 or more.")
        if jacobi is not None and min(jacobi) <= -1:
            raise ValueError(f"jacobi: {jacobi} was given; give two numbers above -1.")
        super().__init__(degree + 1, (-1.0, 1.0), outside)
        self.degree, self.jacobi = degree, None if jacobi is None else (float(jacobi[0]), float(jacobi[1]))

    def evaluate(self, x: Tensor) -> Tensor:
        return self._with_slopes(x)[0]

    def slopes(self, x: Tensor) -> Tensor:
        return self._with_slopes(x)[1]

    def _with_slopes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = [torch.ones_like(x)], [torch.zeros_like(x)]
        for n in range(1, self.size):
            scale, shift, before = self._step(n)
            value, slope = (scale * x + shift) * values[-1], scale * values[-1] + (scale * x + shift) * slopes[-1]
            if n > 1:
                value, slope = value - before * values[-2], slope - before * slopes[-2]
            values.append(value)
            slopes.append(slope)
        return torch.stack(values, -1), torch.stack(slopes, -1)

    def _step(self, n: int) -> tuple[float, float, float]:
        """P_n = (scale x + shift) P_(n-1) - before P_(n-2)."""
        if self.jacobi is None:
            return (1.0, 0.0, 0.0) if n == 1 else (2.0, 0.0, 1.0)
        a, b = self.jacobi
        if n == 1:
            return (a + b + 2) / 2, (a - b) / 2, 0.0
        s = 2 * n + a + b
        below = 2 * n * (n + a + b) * (s - 2)
        return (
            (s - 1) * s * (s - 2) / below,
            (s - 1) * (a * a - b * b) / below,
            2 * (n + a - 1) * (n + b - 1) * s / below,
        )

    def kernel(self) -> KernelBasis:
        steps = [self._step(n) for n in range(1, self.size)]
        return self._kernel(POLYNOMIALS, [0.0, 0.0, 0.0, *(number for step in steps for number in step)])

    def settings(self) -> dict[str, Any]:
        jacobi = None if self.jacobi is None else list(self.jacobi)
        return {"degree": self.degree, "jacobi": jacobi, "outside": self.outside}


class Bumps(Basis):
    """ReLU-KAN's bumps: the square of a parabola between two zeros, grid + order of them, each 1 at its middle.

        r relu(x - low)^2 relu(high - x)^2,  low = (m - order) / grid,  high = low + (order + 1) / grid  (on [0, 1])

    Args:
        grid: intervals of the domain.
        order: how far a bump reaches over its interval.
        domain: which the intervals fill.
        outside: of the domain; `vanish` is the usual one.

    Raises:
        ValueError: grid < 1 or order < 0.
    """

    def __init__(
        self,
        grid: int = 5,
        order: int = 3,
        domain: tuple[float, float] = (0.0, 1.0),
        outside: Outside = "vanish",
    ) -> None:
        check_grid(grid, order)
        super().__init__(grid + order, domain, outside)
        self.grid, self.order = grid, order

    def evaluate(self, x: Tensor) -> Tensor:
        u = self._places(x)
        return (u.clamp(min=0) * (1 - u).clamp(min=0) * 4) ** 2

    def slopes(self, x: Tensor) -> Tensor:
        u = self._places(x)
        step = (self.domain[1] - self.domain[0]) / self.grid * (self.order + 1)
        return 32 * u.clamp(min=0) * (1 - u).clamp(min=0) * (1 - 2 * u) * ((u > 0) & (u < 1)).to(x.dtype) / step

    def _places(self, x: Tensor) -> Tensor:
        """Where x is between the zeros of each bump, 0 to 1: [..., channels, size]."""
        low, high = self.domain
        first = torch.arange(self.size, device=x.device, dtype=x.dtype) - self.order
        return (((x - low) * (self.grid / (high - low))).unsqueeze(-1) - first) / (self.order + 1)

    def kernel(self) -> KernelBasis:
        step, reach = (self.domain[1] - self.domain[0]) / self.grid, self.order + 1
        return self._kernel(BUMPS, [self.domain[0] - self.order * step, 1 / (step * reach), 1 / reach])

    def settings(self) -> dict[str, Any]:
        return {"grid": self.grid, "order": self.order, **super().settings()}


class Waves(Basis):
    """cos(k u) and sin(k u) for k = 1 to `waves`, u from -pi to pi on the domain: a Fourier series, as in FourierKAN.

    The constant is left to the bias of what sums them.

    Args:
        waves: the highest k.
        domain: one period.
        outside: of the domain; `repeat` is the usual one.

    Raises:
        ValueError: waves < 1.
    """

    allowed = ("repeat", "clamped", "squashed")

    def __init__(self, waves: int = 4, domain: tuple[float, float] = (-1.0, 1.0), outside: Outside = "repeat") -> None:
        if waves < 1:
            raise ValueError(f"waves: {waves} was given; give 1 or more.")
        super().__init__(2 * waves, domain, outside)
        self.waves = waves

    def evaluate(self, x: Tensor) -> Tensor:
        u = self._angles(x)[0]
        return torch.cat((u.cos(), u.sin()), -1)

    def slopes(self, x: Tensor) -> Tensor:
        u, turns = self._angles(x)
        return torch.cat((-turns * u.sin(), turns * u.cos()), -1)

    def _angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k u of x [..., channels, waves], and what x is multiplied by for it [waves]."""
        low, high = self.domain
        turns = torch.arange(1, self.waves + 1, device=x.device, dtype=x.dtype) * (2 * math.pi / (high - low))
        return (x - (low + high) / 2).unsqueeze(-1) * turns, turns

    def settings(self) -> dict[str, Any]:
        return {"waves": self.waves, **super().settings()}


BASES: dict[str, type[Basis]] = {
    "bspline": BSplines,
    "bells": Bells,
    "polynomials": Polynomials,
    "bumps": Bumps,
    "waves": Waves,
    "shifted_pairs": ShiftedPairs,
}


def basis_of(name: str, **settings: Any) -> Basis:
    """Make a basis by its name.

    Args:
        name: one of `BASES`.
        settings: of its class; lists stand for tuples, as in JSON.

    Returns:
        The basis.

    Raises:
        ValueError: an unknown name or setting, or a value out of bounds.
    """
    if name not in BASES:
        raise ValueError(f"basis: {name!r} was given, allowed are {', '.join(BASES)}.")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    made: Any = BASES[name]
    try:
        return made(**given)
    except TypeError as error:
        raise ValueError(f"basis {name}: {error}.") from error


def name_of_basis(basis: Basis) -> str:
    """The name under which `basis_of` makes a basis of this class."""
    return next(name for name, kind in BASES.items() if kind is type(basis))


def _cardinal_spline(u: Tensor, order: int) -> Tensor:
    """The B-spline of whole knots 0 to order + 1 at u [...], by truncated powers on its left half, the right mirrored.

    So no power is of more than (order + 1) / 2, and little cancels.
    """
    if order == 0:
        return ((u >= 0) & (u < 1)).to(u.dtype)
    half = torch.minimum(u, order + 1 - u).clamp(min=0)
    value = half**order
    for knot in range(1, (order + 1) // 2 + 1):
        value = value + (-1) ** knot * math.comb(order + 1, knot) * (half - knot).clamp(min=0) ** order
    return value / math.factorial(order)
