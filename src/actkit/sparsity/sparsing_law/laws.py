"""Fit how the share of active neurons moves with training tokens and with shape: three laws (2024, arXiv:2411.02335).

    relu:   A(D) = exp(b - c * D^alpha) + A0      falls towards A0
    silu:   A(D) = A0 - c / D^alpha               rises towards A0
    shape:  A0(r) = intercept + slope * min(r, bottleneck)      r = hidden size / number of layers

D: training tokens, in billions inside the law (so that coefficients compare with the paper's), in tokens everywhere
else. A: PPL-p% activation ratios (`perplexity_sparsity.py`), shares in 0 to 1.

Cost: milliseconds. The paper fits with Levenberg-Marquardt; here it is scipy's trust-region method, as it keeps the
bounds alpha > 0, c > 0 and 0 < A0 < 1, from several starts, on tokens divided by their geometric mean: over decades of
raw tokens both diverge. If no bound is reached the minimum is the same. The third law is our reading of the paper's
figure ("linear up to a bottleneck, then flat"); it gives no formula and no coefficients for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeWarning, curve_fit

from actkit.core.ground.figures import plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


Values = NDArray[np.float64]
BILLION = 1e9
STARTS = (0.1, 0.25, 0.5, 1.0, 2.0)  # of alpha


def relu_law(billions: Any, alpha: float, b: float, c: float, a0: float) -> Any:
    """The activation ratio of a ReLU model after so many billions of tokens. 0 < alpha, 0 < c, 0 < a0 < 1."""
    return np.exp(b - c * np.power(billions, alpha)) + a0


def silu_law(billions: Any, alpha: float, c: float, a0: float) -> Any:
    """The activation ratio of a SiLU model after so many billions of tokens. 0 < alpha, 0 < c, 0 < a0 < 1."""
    return a0 - c / np.power(billions, alpha)


_LAWS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "relu": (relu_law, ("alpha", "b", "c", "a0")),
    "silu": (silu_law, ("alpha", "c", "a0")),
}
_BOUNDS = {"alpha": (1e-3, 10.0), "b": (-np.inf, np.inf), "c": (0.0, np.inf), "a0": (0.0, 1.0)}


@dataclass(frozen=True)
class LawFit:
    """A fitted law.

    Attributes:
        law: its name.
        parameters: for tokens in billions.
        covariance: of the parameters, in their order; None if the data do not determine it.
        r2: 1 - sse / total.
        sse: sum of squared errors.
        tokens: what was fitted.
        ratios: what was fitted.
    """

    law: str
    parameters: dict[str, float]
    covariance: tuple[tuple[float, ...], ...] | None
    r2: float
    sse: float
    tokens: tuple[float, ...]
    ratios: tuple[float, ...]

    def predict(self, tokens: ArrayLike) -> Any:
        """Return the activation ratio after so many tokens: a float, or an array of their shape."""
        found = _LAWS[self.law][0](np.asarray(tokens, float) / BILLION, **self.parameters)
        return float(found) if np.ndim(found) == 0 else found

    def tokens_for(self, ratio: float) -> float:
        """Return the tokens after which the activation ratio is `ratio`. Raises ValueError if it never is."""
        at = self.parameters
        low, high = (at["a0"], at["a0"] + math.exp(at["b"])) if self.law == "relu" else (-math.inf, at["a0"])
        if not low < ratio < high:
            raise ValueError(f"ratio: {ratio} was given; this law passes {low:.4g} to {high:.4g}, ends excluded.")
        if self.law == "relu":
            power = (at["b"] - math.log(ratio - at["a0"])) / at["c"]
        else:
            power = at["c"] / (at["a0"] - ratio)
        return power ** (1 / at["alpha"]) * BILLION

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return dict(vars(self))

    def table(self) -> Table:
        """The parameters with their standard errors."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"{self.law} law, {len(self.tokens)} points (R2 {self.r2:.4f}; tokens in billions)"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("parameter", "value", "standard error"):
            table.add_column(name, justify="left" if name == "parameter" else "right")
        for index, (name, value) in enumerate(self.parameters.items()):
            error = "unknown" if self.covariance is None else f"{math.sqrt(self.covariance[index][index]):.3g}"
            table.add_row(name, f"{value:.4g}", error)
        return table

    def figure(self) -> Figure:
        """Draw the points and the curve.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects

        dense = np.geomspace(min(self.tokens), max(self.tokens), 200)
        figure = graph_objects.Figure(
            [
                graph_objects.Scatter(x=self.tokens, y=self.ratios, mode="markers", name="measured"),
                graph_objects.Scatter(x=dense, y=self.predict(dense), mode="lines", name=f"{self.law} law"),
            ]
        )
        figure.update_xaxes(title="training tokens", type="log")
        return figure.update_yaxes(title="activation ratio")


def fit_relu_law(tokens: ArrayLike, ratios: ArrayLike) -> LawFit:
    """Fit A(D) = exp(b - c * D^alpha) + A0.

    Args:
        tokens: training tokens, at least five.
        ratios: as many, shares.

    Returns:
        The law.

    Raises:
        ValueError: there are too few points, tokens are not positive, or ratios are outside 0 to 1.
    """
    return _fit("relu", tokens, ratios)


def fit_silu_law(tokens: ArrayLike, ratios: ArrayLike) -> LawFit:
    """Fit A(D) = A0 - c / D^alpha.

    Args:
        tokens: training tokens, at least four.
        ratios: as many, shares.

    Returns:
        The law.

    Raises:
        ValueError: as `fit_relu_law`.
    """
    return _fit("silu", tokens, ratios)


def _fit(law: str, tokens: ArrayLike, ratios: ArrayLike) -> LawFit:
    curve, names = _LAWS[law]
    d, a = _checked("tokens", tokens, ratios, len(names) + 1)
    if not (d > 0).all():
        raise ValueError(f"tokens: {d.min():g} was given; give the number of training tokens, above 0.")
    scale = float(np.exp(np.log(d).mean()))
    bounds = tuple(zip(*(_BOUNDS[name] for name in names)))
    best: tuple[float, Values, Values] | None = None
    for alpha in STARTS:
        start = _start(law, d / scale, a, alpha)
        try:
            with np.errstate(over="ignore"), warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", OptimizeWarning
                )  # a covariance that the data leave open is given as None
                found, covariance = curve_fit(curve, d / scale, a, start, bounds=bounds, x_scale="jac", max_nfev=5000)
        except RuntimeError:  # it did not converge from here
            continue
        sse = float(np.square(curve(d / scale, *found) - a).sum())
        if best is None or sse < best[0]:
            best = sse, found, covariance
    if best is None:
        raise ValueError(f"tokens, ratios: the {law} law converged from no start; look at the points, or give more.")
    sse, found, covariance = best
    parameters = dict(zip(names, found.tolist()))
    # back to billions: c * (D / scale)^alpha (or its inverse) = (c * factor) * (D / 1e9)^alpha
    sign = -1 if law == "relu" else 1
    unit = scale / BILLION
    factor = unit ** (sign * parameters["alpha"])
    jacobian = np.eye(len(names))
    row, column = names.index("c"), names.index("alpha")
    jacobian[row, row] = factor
    jacobian[row, column] = sign * math.log(unit) * parameters["c"] * factor
    parameters["c"] *= factor
    covariance = jacobian @ covariance @ jacobian.T
    known = tuple(map(tuple, covariance.tolist())) if np.isfinite(covariance).all() else None
    return LawFit(law, parameters, known, _r2(sse, a), sse, tuple(d.tolist()), tuple(a.tolist()))


def _start(law: str, d: Values, a: Values, alpha: float) -> list[float]:
    """Where the search begins for one alpha: the other parameters are then nearly a linear fit."""
    spread = float(a.max() - a.min()) or 1e-3
    if law == "silu":
        slope, a0 = np.polyfit(d**-alpha, a, 1)
        return [alpha, max(-float(slope), 1e-3 * spread), float(np.clip(a0, 1e-3, 1 - 1e-3))]
    a0 = max(float(a.min()) - 0.1 * spread, 1e-6)
    slope, b = np.polyfit(d**alpha, np.log(a - a0), 1)
    return [alpha, float(b), max(-float(slope), 1e-3), min(a0, 1 - 1e-3)]


# -- shape -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WidthFit:
    """The limit ratio over width / depth.

    Attributes:
        slope: of the line.
        intercept: of the line.
        bottleneck: where it turns flat; None if the points show no flat part (then the line holds as far as they
            reach).
        r2: 1 - sse / total.
        sse: sum of squared errors.
        shapes: what was fitted.
        ratios: what was fitted.
    """

    slope: float
    intercept: float
    bottleneck: float | None
    r2: float
    sse: float
    shapes: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def plateau(self) -> float | None:
        """The share beyond the bottleneck; None if the fit has none."""
        return None if self.bottleneck is None else self.intercept + self.slope * self.bottleneck

    def predict(self, shapes: ArrayLike) -> Any:
        """Return the limit ratio at hidden size / layers: a float, or an array of their shape."""
        x = np.minimum(np.asarray(shapes, float), math.inf if self.bottleneck is None else self.bottleneck)
        found = self.intercept + self.slope * x
        return float(found) if np.ndim(found) == 0 else found

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**vars(self), "plateau": self.plateau}

    def table(self) -> Table:
        """The line and where it turns flat."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"width law, {len(self.shapes)} points (R2 {self.r2:.4f})"
        table = PlainTable("parameter", title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("value", justify="right")
        for name in ("intercept", "slope", "bottleneck", "plateau"):
            value = getattr(self, name)
            table.add_row(name, "none seen" if value is None else f"{value:.4g}")
        return table

    def figure(self) -> Figure:
        """Draw the points and the line.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects

        ends = [min(self.shapes), max(self.shapes)]
        turns = sorted(ends if self.bottleneck is None else [*ends, self.bottleneck])
        figure = graph_objects.Figure(
            [
                graph_objects.Scatter(x=self.shapes, y=self.ratios, mode="markers", name="measured"),
                graph_objects.Scatter(x=turns, y=self.predict(turns).tolist(), mode="lines", name="width law"),
            ]
        )
        return figure.update_layout(xaxis_title="hidden size / layers", yaxis_title="activation ratio")


def fit_width_law(shapes: ArrayLike, ratios: ArrayLike) -> WidthFit:
    """Fit a line up to a bottleneck and a constant beyond it, by least squares.

    The bottleneck is exact: between two neighbouring points the best one follows from both parts' own fits, else it is
    at a point.

    Args:
        shapes: hidden size / number of layers of models that differ in nothing else, at least four.
        ratios: their limit ratios (A0 of their laws, or the ratio at the end of training).

    Returns:
        The line.

    Raises:
        ValueError: there are too few points.
    """
    x, a = _checked("shapes", shapes, ratios, 4)
    order = np.argsort(x, kind="stable")
    x, a = x[order], a[order]
    if len(np.unique(x)) < 4:
        raise ValueError(f"shapes: {len(np.unique(x))} different ones were given; give at least 4.")

    def fitted(bottleneck: float) -> tuple[float, float, float]:
        cut = np.minimum(x, bottleneck)
        slope, intercept = np.polyfit(cut, a, 1)
        return float(np.square(intercept + slope * cut - a).sum()), float(slope), float(intercept)

    candidates = list(np.unique(x)[1:])
    for index in range(2, len(x)):
        slope, intercept = np.polyfit(x[:index], a[:index], 1) if x[index - 1] > x[0] else (0.0, 0.0)
        crossing = (a[index:].mean() - intercept) / slope if slope else math.nan
        if x[index - 1] < crossing < x[index]:
            candidates.append(crossing)
    (sse, slope, intercept), bottleneck = min((fitted(each), float(each)) for each in candidates)
    flat = bottleneck < x[-1]
    given = tuple(x.tolist()), tuple(a.tolist())
    return WidthFit(slope, intercept, bottleneck if flat else None, _r2(sse, a), sse, *given)


# -- shared ------------------------------------------------------------------------------------------------------------


def _checked(name: str, x: ArrayLike, ratios: ArrayLike, least: int) -> tuple[Values, Values]:
    first, second = np.asarray(x, float), np.asarray(ratios, float)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"{name}, ratios: shapes {first.shape} and {second.shape} were given; give two equal lists.")
    if len(first) < least:
        raise ValueError(f"{name}: {len(first)} points were given; this law needs at least {least}.")
    for what, values in ((name, first), ("ratios", second)):
        if not np.isfinite(values).all():
            raise ValueError(f"{what}: NaN or Inf was given; leave those points out.")
    if not ((second > 0) & (second <= 1)).all():
        raise ValueError(f"ratios: {second.min():g} to {second.max():g} was given; give shares above 0, up to 1.")
    return first, second


def _r2(sse: float, values: Values) -> float:
    total = float(np.square(values - values.mean()).sum())
    return 1 - sse / total if total else 0.0
