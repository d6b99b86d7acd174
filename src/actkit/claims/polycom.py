"""PolyCom's claims: PolyNorm lowers the loss of language models, PolyReLU fits smooth functions better than ReLU.

What is measured here: Llama-like language models (2 layers, width 96, 4 heads, 64 tokens) trained from random weights
for 250 steps of 1,024 tokens of the embedded text, with SwiGLU of 256 units and, with equal parameters, MLPs of 384
units without a gate: GELU, PolyNorm, PolyReLU. The rate is the better of 1e-3 and 3e-3 by validation loss with the
first seed, for every arm; losses are those of the test split. And networks of two hidden layers of 16 units, fitted
to a smooth function of two variables with ReLU and with PolyReLU (and, reported, GELU and tanh), each at the best of
three rates.

Models so small, trained so briefly, say little about 1 B parameters and 200 B tokens. The paper's losses and downstream
scores cannot be checked here.

About 6 minutes on one core.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import torch
from torch import Tensor, nn

from actkit.claims.outcome import SMALL, SYNTHETIC, Measurement, Outcome, Statement, conduct
from actkit.claims.small_models import TextArms, language_model
from actkit.claims.subject import spread
from actkit.core.layers.activations import Activation
from actkit.core.recipe.runner import apply
from actkit.functions.polycom.degrees import polynomial_degrees
from actkit.functions.polycom.polynomials import PolyReLU
from actkit.functions.polycom.ungate import Ungate

BETTER, NEAR = 0.01, 0.01  # nats
HALF = 0.5  # of the error
RATES, FITTING_RATES = (1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
ACTIVATIONS = {"GELU": "gelu", "PolyNorm": "poly_norm", "PolyReLU": "poly_relu"}


@dataclass(frozen=True)
class Sizes:
    """How much is trained and fitted.

    Attributes:
        seeds: of weights and texts.
        steps: of training a language model.
        layers: of it.
        held_out: rows of 64 test tokens.
        fits: seeds of fitting.
        fitting_steps: of Adam, on all points at once.
        points: that are fitted; as many for validation, four times as many for the test.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 250
    layers: int = 2
    held_out: int = 640
    fits: tuple[int, ...] = (0, 1, 2, 3, 4)
    fitting_steps: int = 2000
    points: int = 1024


GELU = Statement(
    "PolyNorm without a gate trains language models to a lower loss than GELU",
    "lower loss and perplexity than ReLU, GELU and SwiGLU (1 B dense, 1 B active of 7 B; in plots)",
    "3 seeds, equal parameters, tokens and tuning: mean test loss(PolyNorm) <= mean test loss(GELU) - 0.01 nats",
    SMALL,
)
SWIGLU = Statement(
    "PolyNorm without a gate is at least as good as SwiGLU",
    "about +1.21 points on six downstream tasks over SwiGLU at 1 B (quoted from memory)",
    "3 seeds, equal parameters, tokens and tuning: mean test loss(PolyNorm) <= mean test loss(SwiGLU) + 0.01 nats",
    SMALL,
)
FORMULAS = Statement(
    "Polynomials of ReLU approximate smooth functions with fewer parameters than ReLU",
    "the optimal rate in Sobolev spaces (a theorem; no figure)",
    "sin(3x) cos(2y) + x^2 y / 2 on [-1, 1]^2, 2 x 16 units, Adam, 2000 steps, each function at the best of 3 rates by "
    "validation: median test error over 5 seeds (mean square) of PolyReLU <= 0.5 x that of ReLU",
    SYNTHETIC,
)
STATEMENTS = (GELU, SWIGLU, FORMULAS)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    arms = text_arms(sizes, progress)
    experiments = [
        (GELU, partial(against_gelu, arms)),
        (SWIGLU, partial(against_swiglu, arms)),
        (FORMULAS, partial(formulas, sizes)),
    ]
    return conduct("polycom", experiments, sizes, subject, progress)


# -- language models ---------------------------------------------------------------------------------------------------


def text_arms(sizes: Sizes, progress: bool = False) -> TextArms:
    """The compared models: 'SwiGLU', and those of ACTIVATIONS."""
    return TextArms(
        partial(fresh, layers=sizes.layers),
        seeds=sizes.seeds,
        rates=RATES,
        steps=sizes.steps,
        held_out=sizes.held_out,
        progress=progress,
    )


def fresh(arm: str, seed: int, layers: int = 2) -> nn.Module:
    """A model with random weights."""
    model = language_model(hidden=96, intermediate=256, layers=layers, seed=seed)
    if arm == "SwiGLU":
        return model
    return apply(model, Ungate(activation=ACTIVATIONS[arm], seed=seed), undo="off", progress=False).model


def against_gelu(arms: TextArms) -> Measurement:
    """Mean losses of PolyNorm and GELU; PolyReLU and the learned degrees are reported."""
    model = arms.model("PolyNorm", arms.seeds[0])
    learned = polynomial_degrees(model, list(arms.test(model))[:4], progress=False)
    found = _difference(arms, "GELU", -BETTER)
    degrees = ", ".join(f"{layer.degree:.2f}" for layer in learned.layers)
    here = f"{found.here}. Not judged: {arms.described('PolyReLU')}; mean degree of PolyNorm by layer {degrees}"
    return Measurement(here, found.passed)


def against_swiglu(arms: TextArms) -> Measurement:
    """Mean losses of PolyNorm and SwiGLU."""
    return _difference(arms, "SwiGLU", NEAR)


def _difference(arms: TextArms, other: str, limit: float) -> Measurement:
    gaps = [a - b for a, b in zip(arms.losses("PolyNorm"), arms.losses(other), strict=True)]
    here = f"{arms.described('PolyNorm')}, {arms.described(other)}; differences {spread(gaps, '+.3f')}"
    return Measurement(here, mean(gaps) <= limit)


# -- a formula ---------------------------------------------------------------------------------------------------------


def target(points: Tensor) -> Tensor:
    """The function that is fitted, of points [n, 2]: [n, 1]."""
    x, y = points.unbind(-1)
    return (torch.sin(3 * x) * torch.cos(2 * y) + 0.5 * x**2 * y)[:, None]


def formulas(sizes: Sizes) -> Measurement:
    """Median test errors of both functions; of GELU and tanh for the report."""
    functions = {
        "ReLU": nn.ReLU(),
        "PolyReLU": PolyReLU(),
        "GELU": Activation("gelu"),
        "tanh": Activation("tanh"),
    }
    errors, parts = {}, []
    for name, function in functions.items():
        rate = min(FITTING_RATES, key=lambda rate: fit(function, sizes.fits[0], rate, sizes)[0])
        found = [fit(function, seed, rate, sizes)[1] for seed in sizes.fits]
        errors[name] = median(found)
        parts.append(f"{name} {errors[name]:.2e} ({min(found):.1e} to {max(found):.1e}, rate {rate:g})")
    ratio = errors["PolyReLU"] / errors["ReLU"]
    return Measurement(f"{ratio:.2f} x ReLU's error; medians: {', '.join(parts)}", ratio <= HALF)


def fit(function: nn.Module, seed: int, rate: float, sizes: Sizes) -> tuple[float, float]:
    """Fit a network with an activation function to the target. Returns validation and test error."""
    generator = torch.Generator().manual_seed(seed)
    train, validation, test = (2 * torch.rand(count * sizes.points, 2, generator=generator) - 1 for count in (1, 1, 4))
    torch.manual_seed(seed)
    first, second = copy.deepcopy(function), copy.deepcopy(function)
    network = nn.Sequential(nn.Linear(2, 16), first, nn.Linear(16, 16), second, nn.Linear(16, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    wanted = target(train)
    for _ in range(sizes.fitting_steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(train), wanted).backward()
        optimizer.step()
    with torch.no_grad():
        errors = [float(nn.functional.mse_loss(network(points), target(points))) for points in (validation, test)]
    return errors[0], errors[1]
