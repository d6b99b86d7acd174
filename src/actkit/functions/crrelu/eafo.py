"""EAFO: activation functions by the entropy of their output (Sun et al. 2024, arXiv:2405.12954).

    H[f(X)] = H(X) + E log f'(X)                         f rising, X with density p
    worst:      f(u) = low + (high - low) P(X < u)       the output is uniform: the largest entropy of a bounded f
    correction: eta(x) = -(p(u) y''(x) / y'(x) + p'(u) y'(x))       x: an output, y: the inverse of f, u = y(x)
                df(u) = p'(u) - p(u) f''(u) / f'(u)      the same as a change of f; it lowers H, to first order

For a ReLU and a standard normal X, df is -x exp(-x^2 / 2) / sqrt(2 pi) where x > 0: that, for all x, is CRReLU's term.

When to use it: to see how far each layer's pre-activations are from a standard normal one, how much of them the
function lets through, and which epsilon the argument wants there: `eafo(model, batches)`. For any function and density:
`worst`, `correct`, `suggest`, and `entropy` in `core/layers/moments.py`.
Cost: one pass over the batches, 4 MB per activation function, and about 0.1 s for each.
Settled here: entropies are in nats, and of values that are not exactly 0, as a share of exact zeros has none. They
depend on the scale, so that the table also has them for outputs of deviation 1, whose largest is a normal one's, 1.419.
A function that does not rise everywhere (CRReLU itself, GELU, SiLU) is measured by the histogram of its outputs.
Our own reading: the paper's text of the correction is from memory, and was derived again here; the sign of the change
of f, and so that of epsilon, is ours. The suggestion is the least-squares fit, weighted by the density, of df of a ReLU
to epsilon x exp(-x^2 / 2) where x > 0: its unit is the paper's step of 1, so that signs and ratios say something, and
sizes only beside -0.399, that of a standard normal input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.ground.errors import CoverageError
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.layers.activation_function import ActivationFunction, Function
from actkit.core.layers.activations import record_of
from actkit.core.layers.moments import Density, check_rising, slope_of
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Histogram

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

STANDARD = -1 / math.sqrt(2 * math.pi)  # what is suggested for a standard normal input
NORMAL = 0.5 * math.log(2 * math.pi * math.e)  # entropy of a normal output of deviation 1, the largest there is


# -- any function and density ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correction:
    """The direction in which the entropy of f(X) falls fastest.

    Attributes:
        of_inverse: eta, output x [...] -> what is added to the inverse of f there.
        of_function: df, input u [...] -> what f changes by there; -eta(f(u)) f'(u).
    """

    of_inverse: Function
    of_function: Function


def worst(density: Density, low: float = 0.0, high: float = 1.0) -> Function:
    """The function with values between two bounds whose output has the largest entropy: a scaled distribution function.

    Args:
        density: of the input.
        low: the lower bound.
        high: the upper one.

    Raises:
        ValueError: the bounds are not in order.
    """
    if not low < high:
        raise ValueError(f"low, high: {low} and {high} were given; give a lower bound below the upper one.")
    return lambda u: (low + (high - low) * density.below(u)).to(u.dtype)


def correct(function: ActivationFunction | Function, density: Density, inverse: Function | None = None) -> Correction:
    """Find how a rising function would have to change for its output to have less entropy.

    Args:
        function: f, a record or any function of a tensor that can be differentiated twice.
        density: of the input.
        inverse: of f; None for that of its record, or bisection.

    Raises:
        ValueError: f does not rise everywhere that the input may be; the interval is named.
    """
    slope, curvature = slope_of(function), _curvature_of(function)
    nodes = density.support()
    check_rising(nodes, slope(nodes))
    compute: Function = function.function if isinstance(function, ActivationFunction) else function
    if inverse is None and isinstance(function, ActivationFunction) and len(function.pieces) == 1:
        inverse = function.pieces[0].inverse
    back = inverse or (lambda y: _bisected(compute, y, float(nodes[0]), float(nodes[-1])))

    def of_inverse(y: Tensor) -> Tensor:
        u = back(y.double())
        return (density(u) * curvature(u) / slope(u) ** 2 - density.slope(u) / slope(u)).to(y.dtype)

    def of_function(u: Tensor) -> Tensor:
        x = u.double()
        return (density.slope(x) - density(x) * curvature(x) / slope(x)).to(u.dtype)

    return Correction(of_inverse, of_function)


def _curvature_of(function: ActivationFunction | Function) -> Function:
    if isinstance(function, ActivationFunction):
        assert function.derivative is not None  # or `slope_of` has refused it
        return function.second_derivative or slope_of(function.derivative)
    given: Function = function

    def curvature(x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(given(x).sum(), x, create_graph=True)[0]
            return torch.autograd.grad(slope.sum(), x)[0] if slope.requires_grad else torch.zeros_like(x)

    return curvature


def _bisected(function: Function, y: Tensor, low: float, high: float) -> Tensor:
    """The inputs of a rising function with outputs y [...]; outside of its values, the nearer bound."""
    lower, upper = torch.full_like(y, low), torch.full_like(y, high)
    for _ in range(100):
        middle = (lower + upper) / 2
        above = function(middle) > y
        lower, upper = torch.where(above, lower, middle), torch.where(above, middle, upper)
    return (lower + upper) / 2


@dataclass(frozen=True)
class Suggestion:
    """The epsilon that the entropy argument wants of a CRReLU.

    Attributes:
        epsilon: of the least-squares fit; -0.399 for a standard normal input.
        fit: the share of the correction that x exp(-x^2 / 2) explains, 0 to 1.
    """

    epsilon: float
    fit: float


def suggest(density: Density) -> Suggestion:
    """Fit a ReLU's correction by CRReLU's term, where the input is above 0.

    Args:
        density: of the input.

    Returns:
        The fit; epsilon 0 and fit 0 if no input is above 0.
    """
    u, weights = density.rule((0.0,))
    weights = weights * (u > 0)
    term, change = u * torch.exp(-(u**2) / 2), density.slope(u)
    size, whole = float((weights * term**2).sum()), float((weights * change**2).sum())
    if size < 1e-300 or whole < 1e-300:
        return Suggestion(0.0, 0.0)
    epsilon = float((weights * term * change).sum()) / size
    rest = float((weights * (change - epsilon * term) ** 2).sum())
    return Suggestion(epsilon, max(0.0, 1 - rest / whole))


# -- a model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerEntropy:
    """One activation function of a model.

    Attributes:
        path: of its module.
        function: what it computes, or its class.
        mean: of its inputs.
        deviation: of its inputs.
        zeros: the share of its outputs that are exactly 0.
        entropy: of the other outputs, in nats; None if they are all one value.
        standardised: the same for outputs of deviation 1; at most 1.419.
        epsilon: what `suggest` gives for its inputs.
        fit: the same.
    """

    path: str
    function: str
    mean: float
    deviation: float
    zeros: float
    entropy: float | None
    standardised: float | None
    epsilon: float
    fit: float


@dataclass(frozen=True)
class Eafo:
    """The activation functions of a model, by entropy.

    Attributes:
        layers: in the order of the model.
        values: how many inputs each was measured on, the least.
    """

    layers: tuple[LayerEntropy, ...]
    values: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)

    def table(self) -> Table:
        """One row per activation function."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = (
            f"Entropy of activations, in nats (a normal output of deviation 1: {NORMAL:.3f}); {self.values:,} values"
        )
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("activation", overflow="fold")
        table.add_column("function")
        for name in ("mean", "deviation", "zeros", "entropy", "at deviation 1", "epsilon", "fit"):
            table.add_column(name, justify="right")
        for at in self.layers:
            entropies = ("-" if value is None else f"{value:.3f}" for value in (at.entropy, at.standardised))
            numbers = (f"{at.mean:.3f}", f"{at.deviation:.3f}", f"{at.zeros:.1%}", *entropies)
            table.add_row(at.path, at.function, *numbers, f"{at.epsilon:.3f}", f"{at.fit:.0%}")
        return table

    def figure(self) -> Figure:
        """Draw the suggested epsilon and the entropy by layer.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects

        paths = all_plain(at.path for at in self.layers)
        figure = graph_objects.Figure()
        for name in ("epsilon", "standardised"):
            values = [getattr(at, name) for at in self.layers]
            figure.add_trace(graph_objects.Scatter(x=paths, y=values, name=name, mode="lines+markers"))
        return figure.update_yaxes(title="suggested epsilon; entropy at deviation 1, nats")


def eafo(model: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> Eafo:
    """Measure the entropy of every activation function of a model, and the epsilon that CRReLU would want there.

    Args:
        model: any; functions that are no modules are not seen.
        batches: dicts of the model's keywords, or single arguments; padding is left out.
        progress: show a bar.

    Returns:
        A row for each activation function that the batches reach.

    Raises:
        CoverageError: the model has no activation function that is a module, or no batch reaches one.
        ActkitError: what `record` raises.
    """
    batches = list(batches)
    view = anatomy(model, batches[0] if batches else None)
    paths = view.activations()
    if not paths:
        raise CoverageError(
            "model: no activation function that is a module was found; make functions it calls modules."
        )
    wanted = {Site(f"activation.{end}", path=path): Histogram() for path in paths for end in ("input", "output")}
    seen = record(model, wanted, batches, anatomy=view, progress=progress)
    layers, totals = [], []
    for path in paths:
        inputs, outputs = (seen[Site(f"activation.{end}", path=path)] for end in ("input", "output"))
        if inputs.count:
            layers.append(_layer(path, model.get_submodule(path), inputs, outputs))
            totals.append(inputs.total)
    if not layers:
        raise CoverageError("model: no batch reaches an activation function; give others.")
    return Eafo(tuple(layers), min(totals))


def _layer(path: str, module: nn.Module, inputs: Histogram, outputs: Histogram) -> LayerEntropy:
    found = record_of(module)
    name = type(module).__name__ if found is None else found.name
    mean, deviation = _mean_and_deviation(inputs)
    entropy, spread = outputs.entropy(), _mean_and_deviation(outputs, zeros=False)[1]
    known = math.isfinite(entropy) and spread > 0
    lower, upper, counts = inputs.cells()
    suggested = Suggestion(0.0, 0.0)
    if len(counts) > 1:
        suggested = suggest(Density.measured((lower + upper) / 2, counts))
    return LayerEntropy(
        path,
        name,
        mean,
        deviation,
        outputs.zeros,
        entropy if known else None,
        entropy - math.log(spread) if known else None,
        suggested.epsilon,
        suggested.fit,
    )


def _mean_and_deviation(histogram: Histogram, *, zeros: bool = True) -> tuple[float, float]:
    lower, upper, counts = histogram.cells()
    kept = counts * ((upper > lower) | zeros)
    middle, total = (lower + upper) / 2, max(float(kept.sum()), 1.0)
    mean = float((middle * kept).sum()) / total
    return mean, math.sqrt(float((kept * (middle - mean) ** 2).sum()) / total)
