"""CRReLU's claims: the worst function, the correction, and the function in a small vision transformer.

The theory is checked by quadrature in float64, on random numbers alone; a function with a kink is integrated on either
side of it. The training is that of a vision transformer of two blocks (hidden size 64, patches of 2 pixels) on the
8 x 8 digits: 30 epochs at one rate for every function, which was tuned for none, kept as they are at the last step, and
measured on test images that no training saw. The paper's CIFAR, ImageNet and DPO results cannot be checked here.

About 7 minutes on one idle core. On SmolLM2-135M, untrained by us, the premise is measured: whether the correction for
a standard normal input is that of its layers (a minute).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.small_models import vision_transformer
from actkit.claims.subject import REAL, Subject, spread
from actkit.core.edit.edits import set_module
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.progress import track
from actkit.core.layers.activation_function import Function
from actkit.core.layers.moments import Density, entropy
from actkit.core.train.training import train
from actkit.data import digits
from actkit.functions.crrelu.crrelu import START, CRReLU
from actkit.functions.crrelu.eafo import correct, eafo, worst

BATCH, RATE = 64, 1e-3
ARMS: dict[str, Callable[[], nn.Module]] = {"crrelu": CRReLU, "relu": nn.ReLU, "gelu": nn.GELU, "prelu": nn.PReLU}


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured.

    Attributes:
        seeds: of the trainings, and of the random functions.
        functions: random ones, compared with the worst.
        epochs: of each training.
        images: training images; None for all.
        calibration: rows of 256 tokens for the real model.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    functions: int = 20
    epochs: int = 30
    images: int | None = None
    calibration: int = 4


REAL_SIZES = Sizes(seeds=(0,))
WORST = Statement(
    "Of all functions with values in (0, 1) the distribution function of the input has the largest output entropy",
    "a theorem",
    "20 random mixtures of shifted sigmoids, standard normal input: H[f(X)] <= H[Phi(X)] + 1e-6 for each",
    SYNTHETIC,
)
CORRECTION = Statement(
    "Moving the inverse of a function along EAFO's correction lowers the entropy of its output",
    "by its derivation",
    "10 rising functions, standard normal input, a step of 0.01 / max|eta|: the entropy is lower for all 10",
    SYNTHETIC,
)
DIGITS = Statement(
    "CRReLU trains a vision transformer as well as a ReLU, and uses its epsilon",
    "better than ReLU's other corrections on CIFAR-10, CIFAR-100 and ImageNet-1K (no figure was verified)",
    "digits, 2 blocks, 30 epochs, 5 seeds, one recipe: mean accuracy >= ReLU's - 0.3 points, and |epsilon - 0.01| > "
    "1e-3 in at least half of the layers",
    SMALL,
)
PREMISE = Statement(
    "The correction for a standard normal input is that of a trained model's layers",
    "assumed",
    "the correction of a ReLU at the measured pre-activations is explained to 90 % by x exp(-x^2 / 2), with an epsilon "
    "from -0.8 to -0.2 (-0.399 for a standard normal input), in at least half of the layers",
    "smollm2",
)
STATEMENTS = (WORST, CORRECTION, DIGITS, *(PREMISE.on(name) for name in REAL))


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        small = sizes or REAL_SIZES
        only: Experiment = (PREMISE.on(subject), partial(premise, subject, small))
        return conduct("crrelu", [only], small, subject, progress)
    sizes = sizes or Sizes()
    experiments: list[Experiment] = [
        (WORST, partial(worst_of_all, sizes)),
        (CORRECTION, correction_lowers),
        (DIGITS, partial(on_digits, sizes, progress)),
    ]
    return conduct("crrelu", experiments, sizes, subject, progress)


# -- the theory --------------------------------------------------------------------------------------------------------


def worst_of_all(sizes: Sizes) -> Measurement:
    """Compare random functions with the distribution function of the input."""
    density = Density.normal()
    bound = entropy(worst(density), density)
    found = [entropy(_mixture(seed), density) for seed in range(sizes.functions)]
    here = f"H[Phi(X)] = {bound:.6f}; the {len(found)} functions {min(found):.4f} to {max(found):.4f}"
    return Measurement(here, max(found) <= bound + 1e-6)


def _mixture(seed: int) -> Function:
    """A rising function with values in (0, 1): up to six sigmoids, shifted, scaled and weighted at random."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 7, (), generator=generator))
    weights = torch.rand(count, generator=generator, dtype=torch.float64)
    shifts = torch.randn(count, generator=generator, dtype=torch.float64)
    scales = 0.5 + 2.5 * torch.rand(count, generator=generator, dtype=torch.float64)
    return lambda x: torch.sigmoid((x[..., None] - shifts) * scales) @ (weights / weights.sum())


RISING: dict[str, Function] = {
    "softplus": F.softplus,
    "leaky softplus": lambda x: 0.1 * x + 0.9 * F.softplus(x),
    "elu": F.elu,
    "selu": F.selu,
    "celu(2)": lambda x: F.celu(x, 2.0),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": F.softsign,
    "log_sigmoid": F.logsigmoid,
    "asinh": torch.asinh,
}


def correction_lowers() -> Measurement:
    """Move the inverse of each function along its correction, and compare entropies."""
    changes = {name: _moved(function) for name, function in RISING.items()}
    here = "change of the entropy: " + ", ".join(f"{name} {change:+.5f}" for name, change in changes.items())
    return Measurement(here, max(changes.values()) < 0)


def _moved(function: Function, step: float = 0.01) -> float:
    """The change of -int p(y) y' log(p(y) y') dx when the inverse y becomes y + step eta / max|eta|.

    Integrated over u = y(x): y becomes u + s g(u), where g(u) = eta(f(u)), and y' = (1 + s g') / f'.
    """
    density = Density.normal()
    u, weights = density.rule()
    kept = weights > 1e-20
    u, weights = u[kept].requires_grad_(), weights[kept] / density(u[kept])  # of plain integrals
    slope = torch.autograd.grad(function(u).sum(), u, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), u, create_graph=True)[0] if slope.requires_grad else 0 * u
    change = _density(u) * curvature / slope**2 + u * _density(u) / slope
    direct = correct(function, density).of_inverse(function(u.detach()))
    middle = u.abs() < 3  # bisection is exact where the function still rises by more than rounding
    assert torch.allclose(direct[middle], change.detach()[middle], atol=1e-6), "eta by the inverse is another one"
    share = torch.autograd.grad(change.sum(), u)[0]
    u, slope, change = u.detach(), slope.detach(), change.detach()

    def value(by: float) -> float:
        q = _density(u + by * change) * (1 + by * share) / slope
        return float(-(weights * slope * torch.special.xlogy(q, q)).sum())

    return value(step / float(change.abs().max())) - value(0.0)


def _density(u: Tensor) -> Tensor:
    return torch.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)


# -- training ----------------------------------------------------------------------------------------------------------


def on_digits(sizes: Sizes, progress: bool = True) -> Measurement:
    """Train a small vision transformer with each function."""
    accuracy: dict[str, list[float]] = {name: [] for name in ARMS}
    epsilons: list[list[float]] = []
    for seed in track(sizes.seeds, "Training vision transformers", enabled=progress):
        for name in ARMS:
            model = trained(name, seed, sizes)
            accuracy[name].append(_accuracy(model))
            if name == "crrelu":
                epsilons.append([float(each.epsilon.detach()) for each in model.modules() if isinstance(each, CRReLU)])
    used = [abs(value - START) > 1e-3 for each in epsilons for value in each]
    differences = {other: _paired(accuracy["crrelu"], accuracy[other]) for other in ("relu", "gelu")}
    layers = [spread([each[layer] for each in epsilons], "+.4f") for layer in range(len(epsilons[0]))]
    here = (
        f"accuracy {', '.join(f'{name} {spread(values)} %' for name, values in accuracy.items())}; CRReLU less "
        f"{'; less '.join(f'{other} {text}' for other, text in differences.items())} points; epsilon by layer "
        f"{' and '.join(layers)}, moved by more than 0.001 in {sum(used)} of {len(used)}"
    )
    passed = mean(accuracy["crrelu"]) >= mean(accuracy["relu"]) - 0.3 and 2 * sum(used) >= len(used)
    return Measurement(here, passed)


def trained(name: str, seed: int, sizes: Sizes) -> nn.Module:
    """A vision transformer of two blocks, trained on the digits; arms of one seed start from the same weights."""
    model = vision_transformer("relu", seed=seed)
    for path in [path for path, module in model.named_modules() if isinstance(module, nn.ReLU)]:
        set_module(model, path, ARMS[name]())
    images, classes = digits("train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: sizes.images]
    held, held_classes = digits("search")
    train(
        model,
        [{"pixel_values": images[part], "labels": classes[part]} for part in order.split(BATCH)],
        validation=[{"pixel_values": held, "labels": held_classes}],
        epochs=sizes.epochs,
        learning_rate=RATE,
        seed=seed,
        keep="last",
        evaluate_every=10**9,  # at the end only
        progress=False,
    )
    return model.eval()


def _accuracy(model: nn.Module) -> float:
    """In percent, on the test images."""
    images, classes = digits("test")
    with evaluating(model):
        logits = first_tensor(forward(model, {"pixel_values": images}))
    return 100 * float((logits.argmax(-1) == classes).float().mean())


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference over the seeds, with Student's 95 % interval."""
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return f"{differences[0]:+.2f}"
    half = float(student.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    middle = mean(differences)
    return f"{middle:+.2f} ({middle - half:+.2f} to {middle + half:+.2f})"


# -- a real model ------------------------------------------------------------------------------------------------------


def premise(name: str, sizes: Sizes) -> Measurement:
    """Measure what is suggested for each layer of a trained model."""
    subject = Subject(name, calibration=sizes.calibration, held_out=1, split="train")
    result = eafo(subject.model, subject.calibration(0), progress=False)
    return judged(
        [(each.epsilon, each.fit, each.deviation, each.standardised) for each in result.layers], result.values
    )


def judged(layers: Sequence[tuple[Any, ...]], values: int) -> Measurement:
    """Count the layers for which it holds; each is (epsilon, fit, deviation of the input, entropy at deviation 1)."""
    epsilons, fits, deviations, entropies = (list(each) for each in zip(*layers, strict=True))
    met = [fit >= 0.9 and -0.8 <= epsilon <= -0.2 for epsilon, fit in zip(epsilons, fits, strict=True)]
    here = (
        f"in {sum(met)} of {len(met)} layers; epsilon {spread(epsilons)}, fit {spread(fits, '.0%')}, deviation of the "
        f"pre-activations {spread(deviations)}, entropy of the outputs at deviation 1 {spread(entropies)} nats; "
        f"{values:,} values each"
    )
    return Measurement(here, 2 * sum(met) >= len(met))
