"""How the largest activation of a layer grows over a training: one law of five parameters, and its rivals.

    f(t) = A exp(-lambda x) ln x + K,    x = gamma t + t0        (the law; it ends at K)
         = exp(-beta t) (A1 ln(t + tau0) + A2) + K               (the same, identifiable: beta = lambda gamma, ...)
    peak: 1 = lambda x ln x,  x* = exp(W(1 / lambda)),  t* = (x* - t0) / gamma
    rivals: K (1 - exp(-t / tau));  a second-order step;  A ln(t + t0) + K
    AIC = n ln(RSS / n) + 2 k;  AICc adds 2 k (k + 1) / (n - k - 1)

From "Hidden Dynamics of Massive Activations in Transformer Training" (2025, arXiv:2508.03616): r is the mean over
sequences of the largest magnitude over the median one at a layer (`massive_activations`), read along a training.
When to use it: to say when a layer's massive activations peak and where they end, from 10 readings or more.
Cost: some 0.1 s for a layer and law.
Settled here: all laws are fitted alike. What enters linearly (A and K of the law) is solved for, so that three
parameters are left; the best of a grid over them are refined by least squares. So no start is chosen by hand, and the
optimum is no worse than that of the trust-region fit of five parameters from the paper's start (checked in the tests).
Our own reading: t* counts as a forecast if it lies behind the last reading, and then as no more than that: only the
rising part was seen, in which A, gamma and t0 stand in for one another; `standard_errors` says how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actkit.core.ground.errors import DataError

Array = NDArray[np.float64]
FEWEST = 6  # readings, for five parameters
REFINED = 4  # of the grid


@dataclass(frozen=True)
class Law:
    """One form that is fitted.

    Attributes:
        name: of it.
        linear: names of the parameters that enter linearly, in the order of the columns.
        others: names of the others, all positive.
        columns: (t, others) -> [n, linear], what the linear ones multiply.
        grid: (span) -> for each of the others the values that are tried.
    """

    name: str
    linear: tuple[str, ...]
    others: tuple[str, ...]
    columns: Callable[..., Array]
    grid: Callable[[float], tuple[Array, ...]]

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return len(self.linear) + len(self.others)


def _spread(low: float, high: float, count: int) -> Array:
    return np.geomspace(low, high, count)


def _decaying_logarithm(t: Array, beta: float, gamma: float, t0: float) -> Array:
    """exp(-lambda (x - t0)) ln x, which cannot vanish as a whole: A is multiplied by exp(lambda t0) afterwards."""
    return np.stack((np.exp(-beta * t) * np.log(gamma * t + t0), np.ones_like(t)), 1)


def _second_order(t: Array, damping: float, frequency: float) -> Array:
    """The answer to a step of a damped oscillator: under-, critically and over-damped."""
    at = frequency * t
    if damping < 1 - 1e-6:
        root = math.sqrt(1 - damping**2)
        swing = np.cos(root * at) + damping / root * np.sin(root * at)
        return (1 - np.exp(-damping * at) * swing)[:, None]
    if damping < 1 + 1e-6:
        return (1 - np.exp(-at) * (1 + at))[:, None]
    root = math.sqrt(damping**2 - 1)
    slow, fast = damping - root, damping + root
    return (1 - (fast * np.exp(-slow * at) - slow * np.exp(-fast * at)) / (2 * root))[:, None]


LAW = Law(
    "law",
    ("A", "K"),
    ("beta", "gamma", "t0"),
    _decaying_logarithm,
    lambda span: (_spread(0.01 / span, 100 / span, 12), _spread(0.1 / span, 1e3 / span, 10), _spread(0.01, 30, 9)),
)
FIRST_STEP = Law(
    "first-order step",
    ("K",),
    ("tau",),
    lambda t, tau: (1 - np.exp(-t / tau))[:, None],
    lambda span: (_spread(1e-4 * span, 30 * span, 60),),
)
SECOND_STEP = Law(
    "second-order step",
    ("K",),
    ("damping", "frequency"),
    _second_order,
    lambda span: (_spread(0.02, 30, 16), _spread(0.1 / span, 1e4 / span, 24)),
)
LOGARITHM = Law(
    "logarithm",
    ("A", "K"),
    ("t0",),
    lambda t, t0: np.stack((np.log(t + t0), np.ones_like(t)), 1),
    lambda span: (_spread(1e-6 * span, 30 * span, 60),),
)
LAWS = (LAW, FIRST_STEP, SECOND_STEP, LOGARITHM)


@dataclass(frozen=True)
class Fitted:
    """A law fitted to the readings of a layer.

    Attributes:
        law: which one.
        parameters: by name; of the law in its original form A, lambda, gamma, t0, K. Empty if it did not converge.
        r2: share of the variance that it explains.
        aic: by which laws are compared, the lower the better.
        aicc: the same, corrected for few readings; infinite for too few.
        last: the time of the last reading.
        converged: whether a fit was found; if not, the numbers are NaN.
        standard_errors: of the law's parameters, from its Jacobian; infinite for those that the readings do not tell
            apart, empty for the rivals.
    """

    law: str
    parameters: Mapping[str, float]
    r2: float
    aic: float
    aicc: float
    last: float
    converged: bool = True
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    _form: tuple[Law, tuple[float, ...], tuple[float, ...]] | None = field(default=None, repr=False, compare=False)

    def predict(self, t: Sequence[float] | Array) -> Array:
        """The ratio at these times.

        Args:
            t: as the readings were.

        Raises:
            ValueError: the fit did not converge.
        """
        if self._form is None:
            raise ValueError(f"{self.law}: the fit did not converge, so that it predicts nothing; give more readings.")
        law, others, linear = self._form
        return law.columns(np.asarray(t, dtype=float), *others) @ np.asarray(linear)

    @property
    def peak(self) -> float | None:
        """When the law has its maximum; None if it has none, or at the very start."""
        if "lambda" not in self.parameters or self.parameters["A"] <= 0:
            return None
        from scipy.special import lambertw

        x = math.exp(float(lambertw(1 / self.parameters["lambda"]).real))
        time = (x - self.parameters["t0"]) / self.parameters["gamma"]
        return time if time > 0 else None

    @property
    def peak_observed(self) -> bool:
        """Whether the maximum lies inside of the readings; else it is a forecast."""
        return self.peak is not None and self.peak <= self.last

    @property
    def steady_state(self) -> float | None:
        """Where the law ends, K."""
        return self.parameters.get("K") if self.law == LAW.name else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it; what is not finite is None."""
        numbers: dict[str, float | None] = {"r2": self.r2, "aic": self.aic, "aicc": self.aicc, "last": self.last}
        numbers |= {"peak": self.peak, "steady_state": self.steady_state}
        return {
            "law": self.law,
            "converged": self.converged,
            "peak_observed": self.peak_observed,
            "parameters": {name: _finite(value) for name, value in self.parameters.items()},
            "standard_errors": {name: _finite(value) for name, value in self.standard_errors.items()},
            **{name: _finite(value) for name, value in numbers.items()},
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def fit(t: Sequence[float], r: Sequence[float], law: Law = LAW, *, layer: str = "this layer") -> Fitted:
    """Fit a law to the ratios of one layer.

    Args:
        t: steps or tokens at which it was read, rising.
        r: the ratios, in the same order.
        law: which one.
        layer: its name, for errors.

    Returns:
        The fit; `converged` is False if none was found.

    Raises:
        DataError: fewer than 6 readings, times that do not rise, or a ratio that is negative or not finite.
    """
    from scipy.optimize import least_squares

    times, ratios = checked(t, r, layer)
    span, size = float(times[-1]), float(np.ptp(ratios)) or float(abs(ratios[-1])) or 1.0
    scaled, values = times / span, ratios / size

    def solved(others: Any) -> tuple[Array, Array]:
        columns = law.columns(scaled, *others)
        linear = np.linalg.lstsq(columns, values, rcond=None)[0].astype(float)
        return linear, values - columns @ linear

    def rest(logs: Array) -> Array:
        return solved(np.exp(logs))[1]

    grid = law.grid(1.0)
    low = np.log([each[0] for each in grid]) - math.log(100)
    high = np.log([each[-1] for each in grid]) + math.log(100)
    tried = sorted((float(np.square(solved(each)[1]).sum()), each) for each in product(*grid))
    found: list[tuple[float, Array]] = []
    for loss, start in tried[:REFINED]:
        if math.isfinite(loss):
            ended = least_squares(
                rest, np.log(start), bounds=(low, high), xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=400
            )
            found.append((2 * float(ended.cost), np.exp(ended.x)))
    found = [each for each in found if math.isfinite(each[0])]
    if not found:
        return Fitted(law.name, {}, math.nan, math.nan, math.nan, span, False)
    loss, others = min(found, key=lambda each: each[0])
    linear = solved(others)[0] * size
    others, linear = _unscaled(law, others, linear, span)
    parameters = dict(zip((*law.others, *law.linear), map(float, (*others, *linear)), strict=True))
    if law is LAW:
        parameters = _of_the_law(**parameters)
    n, k = len(times), law.size
    aic = n * math.log(max(loss * size**2 / n, 1e-300)) + 2 * k
    aicc = aic + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf
    total = float(np.square(ratios - ratios.mean()).sum())
    r2 = 1 - loss * size**2 / total if total else math.nan
    errors = _standard_errors(parameters, times, loss * size**2) if law is LAW else {}
    form = (law, tuple(map(float, others)), tuple(map(float, linear)))
    return Fitted(law.name, parameters, r2, aic, aicc, span, True, errors, form)


def compare_laws(t: Sequence[float], r: Sequence[float], *, layer: str = "this layer") -> dict[str, Fitted]:
    """Fit the law and its rivals to the same readings.

    Args:
        t: as in `fit`, and so are the others.
        r: the ratios.
        layer: its name, for errors.

    Returns:
        The fits by name, the least AIC first; those that did not converge last.
    """
    fits = [fit(t, r, law, layer=layer) for law in LAWS]
    fits.sort(key=lambda each: each.aic if each.converged else math.inf)
    return {each.law: each for each in fits}


def checked(t: Sequence[float], r: Sequence[float], layer: str) -> tuple[Array, Array]:
    """The readings as arrays.

    Args:
        t: as in `fit`, and so are the others.
        r: the ratios.
        layer: its name, for errors.

    Raises:
        DataError: as in `fit`.
    """
    times, ratios = np.asarray(t, dtype=float), np.asarray(r, dtype=float)
    if times.shape != ratios.shape or times.ndim != 1:
        raise DataError(f"{layer}: {times.size} times and {ratios.size} ratios were given; give one ratio per time.")
    if len(times) < FEWEST:
        raise DataError(
            f"{layer}: {len(times)} readings were given for five parameters; give at least {FEWEST}, better 10 or more."
        )
    if not (np.diff(times) > 0).all() or times[0] < 0:
        raise DataError(f"{layer}: the times do not rise from 0 or more; sort the readings, each time once.")
    wrong = ~np.isfinite(ratios) | (ratios < 0)
    if wrong.any():
        place = int(wrong.argmax())
        raise DataError(
            f"{layer}: the ratio at time {times[place]:g} is {ratios[place]}; ratios are finite and not negative."
        )
    return times, ratios


# -- forms of the law --------------------------------------------------------------------------------------------------


def identifiable(parameters: Mapping[str, float]) -> dict[str, float]:
    """beta, tau0, A1, A2, K from A, lambda, gamma, t0, K.

    Args:
        parameters: of the original form.
    """
    a1 = parameters["A"] * math.exp(-parameters["lambda"] * parameters["t0"])
    return {
        "beta": parameters["lambda"] * parameters["gamma"],
        "tau0": parameters["t0"] / parameters["gamma"],
        "A1": a1,
        "A2": a1 * math.log(parameters["gamma"]),
        "K": parameters["K"],
    }


def original(parameters: Mapping[str, float]) -> dict[str, float]:
    """A, lambda, gamma, t0, K from beta, tau0, A1, A2, K.

    Args:
        parameters: of the identifiable form.
    """
    gamma = math.exp(parameters["A2"] / parameters["A1"])
    return _of_the_law(parameters["beta"], gamma, parameters["tau0"] * gamma, parameters["A1"], parameters["K"])


def _of_the_law(beta: float, gamma: float, t0: float, A: float, K: float) -> dict[str, float]:
    """The five parameters, from A that stands beside exp(-lambda (x - t0))."""
    rate = beta / gamma
    return {"A": A * math.exp(min(rate * t0, 600.0)), "lambda": rate, "gamma": gamma, "t0": t0, "K": K}


def original_curve(t: Sequence[float] | Array, parameters: Mapping[str, float]) -> Array:
    """The law in its original form.

    Args:
        t: times.
        parameters: A, lambda, gamma, t0, K.
    """
    x = parameters["gamma"] * np.asarray(t, dtype=float) + parameters["t0"]
    return parameters["A"] * np.exp(-parameters["lambda"] * x) * np.log(x) + parameters["K"]


def jacobian(t: Sequence[float] | Array, parameters: Mapping[str, float]) -> Array:
    """Derivatives of the original form by A, lambda, gamma, t0 and K: [n, 5].

    Args:
        t: times.
        parameters: of the original form.
    """
    t = np.asarray(t, dtype=float)
    x = parameters["gamma"] * t + parameters["t0"]
    decay, log = np.exp(-parameters["lambda"] * x), np.log(x)
    by_x = parameters["A"] * decay * (1 / x - parameters["lambda"] * log)
    return np.stack((decay * log, -parameters["A"] * x * decay * log, t * by_x, by_x, np.ones_like(t)), 1)


def _unscaled(law: Law, others: Array, linear: Array, span: float) -> tuple[Array, Array]:
    """Parameters for times of their own from those for times of at most 1."""
    scales = {"beta": 1 / span, "gamma": 1 / span, "frequency": 1 / span, "damping": 1.0}
    if law is LAW:
        scales["t0"] = 1.0
    if law is LOGARITHM:  # ln(t / span + t0) = ln(t + t0 span) - ln span
        linear = linear - np.array([0.0, linear[0] * math.log(span)])
    return np.array([each * scales.get(name, span) for name, each in zip(law.others, others, strict=True)]), linear


def _standard_errors(parameters: Mapping[str, float], times: Array, loss: float) -> dict[str, float]:
    names = ("A", "lambda", "gamma", "t0", "K")
    derivatives = jacobian(times, parameters)
    sizes = np.linalg.norm(derivatives, axis=0)
    if not np.isfinite(derivatives).all() or not sizes.all() or len(times) <= len(names):
        return dict.fromkeys(names, math.inf)
    normal = (derivatives / sizes).T @ (derivatives / sizes)
    if np.linalg.cond(normal) > 1e14:
        return dict.fromkeys(names, math.inf)
    variances = np.diag(np.linalg.inv(normal)) / sizes**2 * loss / (len(times) - len(names))
    return dict(zip(names, map(float, np.sqrt(np.abs(variances))), strict=True))
