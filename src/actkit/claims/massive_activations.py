"""The claims of massive activations: a law that can be fitted and told from its rivals, and values a model needs.

What is measured here:

- 200 synthetic layers, 40 times (20 logarithmic, 20 linear, and 0), 2 % multiplicative noise. Each rises from 5 to
  50 % of its steady state K (20 to 500) to a peak of 1.3 to 3 K; lambda is 0.02 to 1. The peak lies at 5 to 60 % of the
  window in every second layer, at 1.2 to 3 windows in the others. K and the time of the peak are compared over all
  layers, as the condition says, and also apart: a peak behind the last reading is a forecast from the rise alone.
- Two language models of 1.1 M parameters, gated MLPs with SiLU and with GELU, trained on the embedded text (AdamW,
  1e-3, cosine, 16 rows of 64 tokens, 1,000 steps) under a meter at 40 steps, on 10 rows of the search split. The
  paper's models have 14 M to 12 B parameters and 143,000 steps.
- The forecast on 40 synthetic shapes: K is a smooth function of depth, heads per width and depth of the model, with 5 %
  noise; whole models are held out.
- SmolLM2-135M in bf16, as it is stored: perplexity of 16 rows of 256 tokens with the massive entries of the first block
  that has some, found on 8 other rows, as they are, at their mean and at zero.

The figures for Pythia cannot be checked here. About 12 minutes on one core, 5 of them for SmolLM2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np

from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.small_models import language_model, text
from actkit.claims.subject import Subject
from actkit.core.measure.quality import measure_quality
from actkit.core.train.meter import Meter
from actkit.core.train.training import train
from actkit.interpretation.massive_activations.dynamics import Dynamics, dynamics, trajectories
from actkit.interpretation.massive_activations.forecast import TARGETS, Forecast, Shape
from actkit.interpretation.massive_activations.law import FIRST_STEP, LAW, LOGARITHM, SECOND_STEP, compare_laws
from actkit.interpretation.massive_activations.law import original_curve as curve
from actkit.interpretation.massive_activations.massive_activations import massive_activations
from actkit.interpretation.massive_activations.overwriting import massive_values, overwritten

STEADY, PEAK, R2, PREFERRED = 0.02, 0.05, 0.98, 0.9
R2_TRAINED, PREFERRED_TRAINED = 0.90, 0.6
R2_FORECAST = 0.7
WORSE, ALIKE = 10.0, 1.05
WINDOW = 143.0
MODELS = {"SwiGLU": "silu", "GELU": "gelu"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        seeds: of random numbers, weights and batches.
        layers: synthetic ones.
        steps: of each training.
        rows: of the training text.
        points: readings.
        shapes: of the forecast.
        calibration: rows on which massive values are found.
        held_out: rows of which the perplexity is measured.
    """

    seeds: tuple[int, ...] = (0,)
    layers: int = 200
    steps: int = 1000
    rows: int = 8000
    points: int = 40
    shapes: int = 40
    calibration: int = 8
    held_out: int = 16


REAL_SIZES = Sizes()

RECOVERED = Statement(
    "The fit recovers the law, and AIC tells it from steps of first and second order",
    "the law's mean R2 is 0.984 over 188 layers of Pythia; first-order steps reach about 0.6 to 0.8",
    "200 synthetic layers, peaks inside of the window for half, 2 % noise: median error of K <= 2 %, of the time of "
    "the peak <= 5 %, median R2 >= 0.98, AIC below both steps in >= 90 %",
    SYNTHETIC,
)
TRAINED = Statement(
    "Small models that are trained follow the law",
    "mean R2 per model 0.93 to 0.996 (Pythia, 14 M to 12 B)",
    "two models of 1.1 M parameters, 40 readings: mean R2 over layers >= 0.90, and AIC below the first-order step and "
    "A ln(t + t0) + K in >= 60 % of the layers",
    SMALL,
)
FORETOLD = Statement(
    "Where a layer ends is foretold from the model's shape",
    "R2 of K 0.80 to 0.85 with trees, of the others at most 0.66",
    "40 synthetic shapes with a known mapping, whole models held out: R2 of K >= 0.7",
    SYNTHETIC,
)
NEEDED = Statement(
    "A model needs its massive activations, but not more of them than their mean",
    "Sun et al. 2024: perplexity hardly moves with the mean, and collapses with 0",
    "the strict definition is met; perplexity with the entries of one block at 0 >= 10 x, at their mean <= 1.05 x that "
    "of the model",
    "smollm2",
)
STATEMENTS = (RECOVERED, TRAINED, FORETOLD, NEEDED)


def run(sizes: Sizes | None = None, subject: str | None = None, progress: bool = True) -> Outcome:
    """Run the claims.

    Args:
        sizes: how much.
        subject: only the claims on it; None for all that comes with actkit.
        progress: show bars.
    """
    sizes = sizes or Sizes()
    experiments: list[Experiment] = [
        (RECOVERED, partial(recovered, sizes)),
        (TRAINED, partial(trained, sizes, progress)),
        (FORETOLD, partial(foretold, sizes)),
    ]
    if subject == "smollm2":
        experiments = [(NEEDED, partial(needed, sizes))]
    return conduct("massive-activations", experiments, sizes, subject, progress)


# -- synthetic layers --------------------------------------------------------------------------------------------------


def synthetic(random: np.random.Generator, inside: bool) -> tuple[dict[str, float], float]:
    """Parameters of a layer, and the time of its peak."""
    from scipy.optimize import brentq
    from scipy.special import lambertw

    rate = math.exp(random.uniform(math.log(0.02), 0.0))
    x = math.exp(float(lambertw(1 / rate).real))
    steady, height = random.uniform(20, 500), random.uniform(1.3, 3.0)
    size = steady * (height - 1) / (math.exp(-rate * x) * math.log(x))
    start = steady * (random.uniform(0.05, 0.5) - 1)
    t0 = float(brentq(lambda at: size * math.exp(-rate * at) * math.log(at) - start, 1e-12, 1.0))
    peak = WINDOW * (random.uniform(0.05, 0.6) if inside else random.uniform(1.2, 3.0))
    return {"A": size, "lambda": rate, "gamma": (x - t0) / peak, "t0": t0, "K": steady}, peak


def recovered(sizes: Sizes) -> Measurement:
    """The law against its rivals on curves whose parameters are known."""
    random = np.random.default_rng(sizes.seeds[0])
    logarithmic, linear = np.geomspace(WINDOW / 1000, WINDOW, 20), np.linspace(WINDOW / 20, WINDOW, 20)
    t = np.unique(np.concatenate([[0.0], logarithmic, linear]))
    steady: dict[bool, list[float]] = {True: [], False: []}
    times: dict[bool, list[float]] = {True: [], False: []}
    scores, preferred = [], 0
    for index in range(sizes.layers):
        inside = index % 2 == 0
        parameters, peak = synthetic(random, inside)
        r = curve(t, parameters) * (1 + 0.02 * random.standard_normal(len(t)))
        fits = compare_laws(t.tolist(), np.abs(r).tolist())
        law = fits[LAW.name]
        found = law.peak if law.converged else None
        steady[inside].append(abs(law.parameters["K"] / parameters["K"] - 1) if law.converged else math.inf)
        times[inside].append(math.inf if found is None else abs(found / peak - 1))
        scores.append(law.r2 if law.converged else 0.0)
        preferred += law.converged and all(law.aic < fits[each.name].aic for each in (FIRST_STEP, SECOND_STEP))
    errors = [median(steady[True] + steady[False]), median(times[True] + times[False])]
    share = preferred / sizes.layers
    here = (
        f"K {errors[0]:.1%} (peak inside {median(steady[True]):.1%}, later {median(steady[False]):.1%}), time of the "
        f"peak {errors[1]:.1%} (inside {median(times[True]):.1%}, later {median(times[False]):.1%}), R2 "
        f"{median(scores):.4f}, preferred to both steps in {share:.0%}"
    )
    passed = errors[0] <= STEADY and errors[1] <= PEAK and median(scores) >= R2 and share >= PREFERRED
    return Measurement(here, passed)


# -- trained models ----------------------------------------------------------------------------------------------------


def followed(sizes: Sizes, activation: str, progress: bool = False) -> Dynamics:
    """Train a model under a meter, and fit the laws to what it read."""
    model = language_model(activation, seed=sizes.seeds[0])
    watched = text(model, "search", 10, length=64, batch=10)
    found = train(
        model,
        text(model, "train", sizes.rows, length=64),
        validation=text(model, "search", 32, seed=1, length=64),
        steps=sizes.steps,
        learning_rate=1e-3,
        rules=[Meter(analysis="massive_activations:top=1", points=sizes.points, batches=watched)],
        evaluate_every=max(1, sizes.steps // 2),
        keep="last",
        progress=progress,
    )
    return dynamics(trajectories(found))


def trained(sizes: Sizes, progress: bool = False) -> Measurement:
    """The laws in the layers of two models."""
    parts, scores, wins = [], [], []
    for name, activation in MODELS.items():
        found = followed(sizes, activation, progress)
        each = [layer.law.r2 if layer.law.converged else 0.0 for layer in found.layers]
        won = [layer.prefers_law_to(FIRST_STEP.name, LOGARITHM.name) for layer in found.layers]
        ends = ", ".join(f"{layer.ratios[-1]:.0f}" for layer in found.layers)
        best = ", ".join(layer.preferred for layer in found.layers)
        parts.append(
            f"{name}: R2 {', '.join(f'{score:.3f}' for score in each)}, least AIC of all laws: {best}, ratios at the "
            f"end {ends}"
        )
        scores += each
        wins += won
    share = mean(map(float, wins))
    here = f"mean R2 {mean(scores):.3f}, preferred to the two in {share:.0%} of the layers; {'; '.join(parts)}"
    return Measurement(here, mean(scores) >= R2_TRAINED and share >= PREFERRED_TRAINED)


# -- the forecast ------------------------------------------------------------------------------------------------------


def shapes(sizes: Sizes) -> tuple[list[tuple[Shape, int]], list[dict[str, float]]]:
    """Layers of synthetic models, and laws that follow from their shapes."""
    random = np.random.default_rng(sizes.seeds[0])
    rows: list[tuple[Shape, int]] = []
    laws: list[dict[str, float]] = []
    for _ in range(sizes.shapes):
        depth, size = int(random.integers(4, 33)), int(random.choice([32, 64, 128]))
        heads = int(random.integers(2, 33))
        shape = Shape(depth, heads * size, heads, 4 * heads * size)
        for layer in range(depth):
            at = (layer + 1) / depth
            noise = 1 + 0.05 * random.standard_normal(5)
            steady = 500 * math.sin(math.pi * at) * (64 * heads / shape.hidden) ** -0.5 + 10 * depth
            values = (steady * (1 + at), 0.05 + 0.01 * layer, 0.1 * (1 + at), 0.2 + 0.5 * at, steady)
            rows.append((shape, layer))
            laws.append(dict(zip(TARGETS, (np.array(values) * noise).tolist(), strict=True)))
    return rows, laws


def foretold(sizes: Sizes) -> Measurement:
    """R2 of each parameter over models that were held out."""
    rows, laws = shapes(sizes)
    scores: dict[str, dict[str, float]] = {
        learner: Forecast(learner).score(rows, laws)  # type: ignore[arg-type]
        for learner in ("forest", "boosting", "ridge")
    }
    told: Any = "; ".join(
        f"{learner}: " + ", ".join(f"{name} {value:.2f}" for name, value in each.items())
        for learner, each in scores.items()
    )
    return Measurement(f"R2, {told}", scores["forest"]["K"] >= R2_FORECAST)


# -- a real model ------------------------------------------------------------------------------------------------------


def needed(sizes: Sizes, subject: Subject | None = None) -> Measurement:
    """Perplexity with the massive entries as they are, at their mean, and at zero."""
    if subject is None:
        subject = Subject("smollm2", calibration=sizes.calibration, split="calibration", held_out=sizes.held_out)
    model, rows = subject.model, subject.calibration(sizes.seeds[0])
    found = massive_activations(model, rows, progress=False)
    if not found.strict:
        return Measurement("the strict definition is met in no block", False)
    values = massive_values(model, rows, progress=False)
    plain = _perplexity(subject)
    ratios = {}
    for mode in ("zero", "mean"):
        with overwritten(model, values, mode):  # type: ignore[arg-type]
            ratios[mode] = _perplexity(subject) / plain
    largest = max(found.strict, key=lambda layer: abs(layer.top[0].value))
    top = largest.top[0]
    here = (
        f"strict in {len(found.strict)} of {len(found.layers)} blocks, largest {top.value:,.0f} in {largest.site}, "
        f"channel {top.channel}, token {top.token_id} at place {top.place}; {values.count} entries of "
        f"{len(values.means)} channels at {values.site}: perplexity {plain:.2f}, x {ratios['zero']:.3g} at zero, x "
        f"{ratios['mean']:.4f} at the mean"
    )
    return Measurement(here, ratios["zero"] >= WORSE and ratios["mean"] <= ALIKE)


def _perplexity(subject: Subject) -> float:
    found = measure_quality(subject.model, subject.held_out, task="language", resamples=1, progress=False)
    return found.metrics["perplexity"].value
