"""What a function does to a distribution: its mean and variance from layer to layer, where they rest, its entropy.

A density is a mixture of normal ones of one width: a single normal density, or measured values with a little noise.
Integrals are Gauss-Legendre sums in float64, split at every break of the function: a rule over the whole line (Gauss
and Hermite) with 64 nodes misses the mean of ReLU by 3e-3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from actkit.core.layers.activation_function import ActivationFunction, Function, normal_rule, panels

CELLS = 2  # centers of measured values per width of the density
REACH = 9.0  # widths beyond which a normal density is below 1e-18
TINY = 1e-20  # weight of a node below which it counts for nothing


@dataclass(frozen=True, eq=False)
class Density:
    """A mixture of normal densities of one width.

    Attributes:
        centers: float64 [n], in order.
        weights: float64 [n], their sum is 1.
        width: standard deviation of each.
    """

    centers: Tensor
    weights: Tensor
    width: float

    @classmethod
    def normal(cls, mean: float = 0.0, deviation: float = 1.0) -> Density:
        """The normal density.

        Args:
            mean: of it.
            deviation: standard deviation, above 0.

        Raises:
            ValueError: a deviation that is not above 0.
        """
        if not deviation > 0:
            raise ValueError(f"deviation: {deviation} was given; give a standard deviation above 0.")
        return cls(torch.tensor([mean], dtype=torch.float64), torch.ones(1, dtype=torch.float64), float(deviation))

    @classmethod
    def measured(cls, values: Tensor, counts: Tensor | None = None, width: float | None = None) -> Density:
        """The density of measured values, smoothed by a normal kernel.

        Args:
            values: [n], any float dtype.
            counts: [n], how often each was seen; None for once.
            width: of the kernel; None for Silverman's 0.9 min(deviation, interquartile range / 1.349) n^(-1/5).

        Raises:
            ValueError: no value, values that are all the same, or ones that are not finite.
        """
        x, order = values.detach().double().flatten().cpu().sort()
        n = torch.ones_like(x) if counts is None else counts.double().flatten().cpu()[order]
        if not len(x) or not bool(torch.isfinite(x).all()) or float(x[0]) == float(x[-1]):
            what = "none" if not len(x) else f"from {float(x[0]):.6g} to {float(x[-1]):.6g}"
            raise ValueError(f"values: {what} were given; a density needs finite ones that differ.")
        total = n.sum()
        mean = (x * n).sum() / total
        deviation = float((((x - mean) ** 2 * n).sum() / total).sqrt())
        if width is None:
            below = n.cumsum(0) / total
            low, high = (float(x[min(int(torch.searchsorted(below, p)), len(x) - 1)]) for p in (0.25, 0.75))
            spread = min(deviation, (high - low) / 1.349) if high > low else deviation
            width = 0.9 * spread * float(total) ** -0.2
        cell, group = torch.floor(x / width * CELLS).unique_consecutive(return_inverse=True)
        share = torch.zeros(len(cell), dtype=torch.float64).index_add_(0, group, n / total)
        centers = torch.zeros_like(share).index_add_(0, group, x * n / total) / share
        return cls(centers, share, width)

    @property
    def mean(self) -> float:
        """The mean."""
        return float((self.centers * self.weights).sum())

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return math.sqrt(float((self.weights * (self.centers - self.mean) ** 2).sum()) + self.width**2)

    def __call__(self, x: Tensor) -> Tensor:
        """The density at x, float64 [...]."""
        return self._sum(x, lambda z: torch.exp(-(z**2) / 2) / (self.width * math.sqrt(2 * math.pi)))

    def slope(self, x: Tensor) -> Tensor:
        """Its derivative at x, float64 [...]."""
        return self._sum(x, lambda z: -z * torch.exp(-(z**2) / 2) / (self.width**2 * math.sqrt(2 * math.pi)))

    def below(self, x: Tensor) -> Tensor:
        """The probability of a value below x, float64 [...]."""
        return self._sum(x, torch.special.ndtr)

    def rule(self, points: tuple[float, ...] = ()) -> tuple[Tensor, Tensor]:
        """Nodes and weights, float64 [nodes], whose sum of f(nodes) * weights is the mean of f.

        Args:
            points: where f may bend.
        """
        if len(self.centers) == 1:
            return normal_rule(float(self.centers[0]), self.width, points)
        step = 4 * self.width
        reached = [torch.floor((self.centers + far * step) / step) for far in range(-3, 4)]
        cells = torch.cat([*reached, *(each + 1 for each in reached)]).unique()
        x, weights = panels((cells * step).tolist(), points)
        weights = weights * self(x)
        kept = weights > TINY  # gaps between far values hold nothing
        return x[kept], weights[kept]

    def support(self, points: tuple[float, ...] = ()) -> Tensor:
        """The nodes of `rule` at which there is anything, float64 [nodes]."""
        x, weights = self.rule(points)
        return x[weights > TINY]

    def entropy(self) -> float:
        """The differential entropy, in nats."""
        x, weights = self.rule()
        return float(-(weights * self(x).clamp(min=torch.finfo(torch.float64).tiny).log()).sum())

    def _sum(self, x: Tensor, function: Function) -> Tensor:
        flat = x.double().flatten()
        parts = [self._part(part, function) for part in flat.split(max(1, (1 << 22) // len(self.centers)))]
        return torch.cat(parts).view(x.shape) if parts else torch.zeros_like(flat).view(x.shape)

    def _part(self, x: Tensor, function: Function) -> Tensor:
        return function((x[:, None] - self.centers) / self.width) @ self.weights


# -- from layer to layer -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mapped:
    """Mean and variance of the activations of a layer, from those of the layer before.

    Attributes:
        mean: of f(z).
        variance: of f(z).
        jacobian: ((d mean / d mean, d mean / d variance), (d variance / d mean, d variance / d variance)).
    """

    mean: float
    variance: float
    jacobian: tuple[tuple[float, float], tuple[float, float]]

    @property
    def norm(self) -> float:
        """The spectral norm of the Jacobian; below 1 the map brings neighbours together."""
        return float(torch.linalg.matrix_norm(torch.tensor(self.jacobian, dtype=torch.float64), 2))


@dataclass(frozen=True)
class FixedPoint:
    """A mean and a variance that a layer hands on as they are.

    Attributes:
        mean: of the activations.
        variance: of the activations.
        radius: the largest absolute eigenvalue of the Jacobian there.
    """

    mean: float
    variance: float
    radius: float

    @property
    def attracts(self) -> bool:
        """Whether what is near comes nearer, layer by layer."""
        return self.radius < 1


def moment_map(
    record: ActivationFunction, mean: float, variance: float, *, omega: float = 0.0, tau: float = 1.0
) -> Mapped:
    """Map mean and variance of a layer's inputs to those of its outputs f(z), z normal.

        z ~ N(omega mean, tau variance)        omega: n times the mean weight, tau: n times the mean squared weight

    Args:
        record: of f, element-wise.
        mean: of the inputs.
        variance: of the inputs, above 0.
        omega: sum of the weights of a unit.
        tau: sum of their squares, above 0.

    Returns:
        The moments, with the Jacobian; it holds for jumps too, as the density is differentiated and not f.

    Raises:
        ValueError: a variance or tau that is not above 0, or a function that mixes.
    """
    for name, value in (("variance", variance), ("tau", tau)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: {value} was given; give a number above 0.")
    x, weights = Density.normal(omega * mean, math.sqrt(tau * variance)).rule(_bends(record))
    y, z, v = record.function(x), x - omega * mean, tau * variance

    def average(values: Tensor) -> float:
        return float((weights * values).sum())

    first, second = average(y), average(y**2)
    by_mean = [omega * average(each * z) / v for each in (y, y**2)]
    by_variance = [tau * average(each * (z**2 / v - 1)) / (2 * v) for each in (y, y**2)]
    rows = (
        (by_mean[0], by_variance[0]),
        (by_mean[1] - 2 * first * by_mean[0], by_variance[1] - 2 * first * by_variance[0]),
    )
    return Mapped(first, second - first**2, rows)


def rescaling(record: ActivationFunction, mean: float = 0.0, variance: float = 1.0) -> tuple[float, float]:
    """Find a scale and a shift with which scale f(z) + shift hands on a mean and a variance, at omega 0 and tau 1.

    Args:
        record: of f, element-wise.
        mean: of the activations.
        variance: of the activations, above 0.

    Returns:
        The scale, above 0, and the shift. Whether what is near comes nearer is another question: the Jacobian of the
        rescaled map is that of `moment_map`, times the scale for the mean and its square for the variance.

    Raises:
        ValueError: a variance that is not above 0, a function that mixes, or one that is constant there.
    """
    mapped = moment_map(record, mean, variance)
    if not mapped.variance > 0:
        raise ValueError(f"record: {record.name} is constant for these inputs; give a function that is not.")
    scale = math.sqrt(variance / mapped.variance)
    return scale, mean - scale * mapped.mean


def fixed_points(record: ActivationFunction, *, omega: float = 0.0, tau: float = 1.0) -> tuple[FixedPoint, ...]:
    """Find the means and variances that `moment_map` gives back, one by one; a variance of 0 is none.

    Args:
        record: of f, element-wise.
        omega: as in `moment_map`.
        tau: as in `moment_map`.

    Returns:
        Those of variances from 0.001 to 1000, by variance: for omega = 0 each at which the variance changes from
        growing to shrinking or back, else those that Powell's method reaches from there or from any power of 4.
    """
    from scipy.optimize import brentq, root

    def at(mean: float, variance: float) -> Mapped:
        return moment_map(record, mean, variance, omega=omega, tau=tau)

    def grows(log_variance: float) -> float:
        return at(0.0, math.exp(log_variance)).variance - math.exp(log_variance)

    def gap(point: list[float]) -> list[float]:
        mapped = at(point[0], math.exp(min(point[1], 20.0)))
        return [mapped.mean - point[0], mapped.variance - math.exp(min(point[1], 20.0))]

    grid = [math.log(10) * (step / 10 - 3.03) for step in range(62)]  # none at a round variance
    signs = [grows(each) for each in grid]
    starts = [
        float(brentq(grows, low, high, xtol=1e-14))
        for low, high, before, after in zip(grid, grid[1:], signs, signs[1:])
        if min(abs(before), abs(after)) > 1e-12 * math.exp(low) and before * after < 0
    ]
    found = [(at(0.0, math.exp(start)).mean, start) for start in starts]
    if omega:
        starts += [math.log(4) * power for power in range(-4, 5)]
        solved = [root(gap, [mean, start], options={"maxfev": 60}) for start in starts for mean in (-1.0, 0.0, 1.0)]
        found = [(float(each.x[0]), float(each.x[1])) for each in solved if max(map(abs, gap(list(each.x)))) < 1e-9]
    points: list[FixedPoint] = []
    for mean, log_variance in found:
        if abs(log_variance) > 7 or any(abs(math.exp(log_variance) - each.variance) < 1e-5 for each in points):
            continue
        jacobian = at(mean, math.exp(log_variance)).jacobian
        radius = torch.linalg.eigvals(torch.tensor(jacobian, dtype=torch.float64)).abs().max()
        points.append(FixedPoint(mean, math.exp(log_variance), float(radius)))
    return tuple(sorted(points, key=lambda each: each.variance))


# -- entropy -----------------------------------------------------------------------------------------------------------


def entropy(function: ActivationFunction | Function, density: Density) -> float:
    """Differential entropy, in nats, of f(X) for a rising f: H(X) + E log f'(X).

    Args:
        function: f, a record or any differentiable function of a tensor.
        density: of X.

    Raises:
        ValueError: f does not rise everywhere that X may be; the interval is named.
    """
    x, weights = density.rule(_bends(function))
    x, weights = x[weights > TINY], weights[weights > TINY]
    slope = slope_of(function)(x)
    check_rising(x, slope)
    return density.entropy() + float((weights * slope.log()).sum())


def slope_of(function: ActivationFunction | Function) -> Function:
    """The derivative of a function: that of its record, or by automatic differentiation.

    Args:
        function: a record, or any differentiable function of a tensor.

    Raises:
        ValueError: a record of a function that mixes.
    """
    if isinstance(function, ActivationFunction):
        if function.derivative is None:
            raise ValueError(f"function: {function.name} mixes {', '.join(function.mixes)}; give an element-wise one.")
        return function.derivative
    given: Function = function

    def slope(x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(given(x).sum(), x)[0]

    return slope


def check_rising(x: Tensor, slope: Tensor) -> None:
    """Refuse a function that does not rise.

    Args:
        x: [n], inputs in order.
        slope: [n], of the function there.

    Raises:
        ValueError: with the first interval of these inputs on which the slope is 0 or below, or no number.
    """
    wrong = ~(slope > 0)
    if not bool(wrong.any()):
        return
    first = int(wrong.nonzero()[0])
    rest = (~wrong[first:]).nonzero()
    last = first + int(rest[0]) - 1 if len(rest) else len(x) - 1
    raise ValueError(
        f"function: it does not rise from {float(x[first]):.4g} to {float(x[last]):.4g}, so that its entropy has no "
        f"closed form; give one that rises, or measure the entropy of its outputs (Histogram.entropy)."
    )


def _bends(function: ActivationFunction | Function) -> tuple[float, ...]:
    if not isinstance(function, ActivationFunction):
        return ()
    return (*(each.at for each in function.breaks), *function.inflections)
