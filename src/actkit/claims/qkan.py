"""QKAN's claims: frequencies from few parameters, a wave, more repetitions, a small head (2025, arXiv:2509.14026).

Spectra are taken of functions with drawn angles. The wave is sin(20 x) / (20 x) on [0, 1], 1,000 points for training,
200 to choose the step by and 1,000 for the test, 100 steps of LBFGS with line search in float64, 5 seeds of points and
weights. Its
arms have 17 parameters or a few more: a QKAN of one edge with 3 repetitions, of which all learns; cubic B-splines on
[0, 1]; Fourier series with the period 2 (as in the release) and with 1; the last ones have bias and share of SiLU too.
Beside them, not judged, stands the QKAN that begins with w = 2 pi, one period of its slowest wave.
For the extension, on exp(sin(pi x) + y^2), x and y in [-1, 1], networks of widths 2, 5, 1 learn by LBFGS: 60 steps at
each of 1, 3 and 6 repetitions, or 180 at 6; every part keeps its best step. For the head, the zoo's CNN is trained from
new weights on the digits, with its own head (512, 64, 10) or with an HQKAN (512 -> 9 -> 4 -> 10, 3 repetitions): 20
epochs of Adam in batches of 64, the rate chosen for each among 0.001, 0.003 and 0.01 by the mean accuracy of two seeds
on other images, 5 seeds, the 338 test images at the last step. CIFAR-100 and GPT-2 cannot be checked here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.train.fitting import Pair, fit
from actkit.core.univariate.bases import BSplines, Waves
from actkit.core.univariate.kan_linear import KanLinear
from actkit.data import Split, digits
from actkit.functions.qkan.network import Hqkan, Qkan
from actkit.functions.qkan.qkan_layer import QkanLayer
from actkit.zoo.cnn import DigitsCNN

CPU = torch.device("cpu")
DOUBLE = torch.float64
BATCH = 64
OURS = "QKAN"
STAGES = (1, 3, 6)
HIDDEN = 64  # of the CNN's head


@dataclass(frozen=True)
class Sizes:
    """How much is trained.

    Attributes:
        seeds: of points and weights of the wave.
        steps: of each arm on the wave.
        points: for training, and for the test.
        extension_seeds: of the extension.
        stage: steps at each number of repetitions.
        image_seeds: of the heads.
        epochs: of the heads.
        rates: that are tried for each head.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 100
    points: int = 1000
    extension_seeds: tuple[int, ...] = (0, 1, 2)
    stage: int = 60
    image_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 20
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)


SPECTRUM = Statement(
    "A qubit that reads x r times is a sum of cosines with frequencies that grow as 3^r, in closed form",
    "exponential growth of the frequencies with the repetitions (abstract)",
    "r = 3: frequencies 0 to 3 for w = (1, 1, 1), 0 to 13 for w = (1, 3, 9), every one of them and no other, to 1e-9 "
    "of the Fourier transform; more of them than a Fourier series of as many parameters from r = 3 on",
    SYNTHETIC,
)
WAVE = Statement(
    "On an oscillating function a QKAN is better than splines and a Fourier series of its size",
    "better parameter efficiency than KAN on regression (abstract)",
    "sin(20 x) / (20 x), 5 seeds, median test error: at most 0.5 x that of the better baseline with at least 17 "
    "parameters",
    SYNTHETIC,
)
EXTENSION = Statement(
    "Repetitions are added without changing the function, and growing is better than starting large",
    "exp(sin(pi x) + y^2): a network that grew ends at 1.2e-7, one that began with 20 repetitions at 7.7e-7 (release)",
    "r = 1, 3, 6, median of 3 seeds: the test error changes by less than 1e-6 of itself when repetitions are added, "
    "and ends at most at 0.8 x that of r = 6 from the beginning with the same number of steps",
    SYNTHETIC,
)
HEAD = Statement(
    "An HQKAN is as good a head of a CNN as an MLP of more than three times its size",
    "CIFAR-100: 36.2 % with 18,292 parameters, 37.4 % with 86,948 (release)",
    "digits, mean accuracy over 5 seeds: at least the MLP head's less 1.5 points with at most 30 % of its parameters",
    SMALL,
)
STATEMENTS = (SPECTRUM, WAVE, EXTENSION, HEAD)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    experiments: list[Experiment] = [
        (SPECTRUM, spectrum),
        (WAVE, partial(wave, sizes)),
        (EXTENSION, partial(extension, sizes)),
        (HEAD, partial(heads, sizes)),
    ]
    return conduct("qkan", experiments, sizes, subject, progress)


# -- spectra -----------------------------------------------------------------------------------------------------------


def spectrum() -> Measurement:
    """Frequencies in closed form against those of a Fourier transform, and how many there are."""
    off, weakest, right = 0.0, math.inf, True
    for weights, highest in (((1.0, 1.0, 1.0), 3), ((1.0, 3.0, 9.0), 13)):
        for seed in range(5):
            with own_random_numbers(CPU, seed):
                layer = QkanLayer(1, 1).double()
                nn.init.normal_(layer.theta)
            with torch.no_grad():
                layer.frequency.copy_(torch.tensor(weights, dtype=DOUBLE)[:, None, None])
                found = layer.spectrum(0, 0)
                points = torch.arange(64, dtype=DOUBLE) * (2 * math.pi / 64)
                values = layer.values(points.view(-1, 1, 1), *layer.edge_parameters()).flatten()
            sizes = torch.fft.rfft(values).abs() / 64 * torch.where(torch.arange(33) == 0, 1.0, 2.0)
            right &= found.frequencies.tolist() == list(range(highest + 1))
            expected = torch.zeros(33, dtype=DOUBLE)
            expected[: highest + 1] = found.amplitudes.abs()
            off = max(off, float((sizes - expected).abs().max()))
            weakest = min(weakest, float(sizes[: highest + 1].min()))
    counts = {reps: reachable(reps) for reps in range(1, 7)}
    rows = [f"r = {reps}: {found} from {size} (a series: {(size - 1) // 2})" for reps, (found, size) in counts.items()]
    more = all(found > (size - 1) // 2 for reps, (found, size) in counts.items() if reps >= 3)
    which = "none missing or too many" if right else "others than said"
    here = (
        f"off by {off:.1e} at most, the weakest frequency {weakest:.1e}, {which}; frequencies "
        f"above 0 from learned numbers of an edge: {', '.join(rows)}"
    )
    return Measurement(here, right and off < 1e-9 and weakest > 1e-9 and more)


def reachable(reps: int) -> tuple[int, int]:
    """Frequencies above 0 that an edge with w = 1, 3, 9 ... has, and its learned numbers without a share of SiLU."""
    with own_random_numbers(CPU, 0):
        layer = QkanLayer(1, 1, reps, trainable=("frequency", "gain", "offset")).double()
        nn.init.normal_(layer.theta)
    with torch.no_grad():
        layer.frequency.copy_(3.0 ** torch.arange(reps, dtype=DOUBLE)[:, None, None])
    found = layer.spectrum(0, 0)
    strong = (found.frequencies > 0) & (found.amplitudes.abs() > 1e-9)
    return int(strong.sum()), sum(each.numel() for each in layer.parameters() if each.requires_grad)


# -- functions ---------------------------------------------------------------------------------------------------------


ARMS: Mapping[str, Callable[[], nn.Module]] = {
    OURS: lambda: Qkan((1, 1)),
    "splines": lambda: KanLinear(1, 1, BSplines(12, 3, (0.0, 1.0)), base="silu"),
    "Fourier series of period 2": lambda: KanLinear(1, 1, Waves(8), base="silu"),
    "of period 1": lambda: KanLinear(1, 1, Waves(8, (0.0, 1.0)), base="silu"),
}


def one_period() -> nn.Module:
    """The QKAN of the wave, whose frequencies begin at one period of [0, 1]."""
    network = Qkan((1, 1))
    for layer in network.layers:
        nn.init.constant_(cast(QkanLayer, layer).frequency, 2 * math.pi)
    return network


BESIDE: Mapping[str, Callable[[], nn.Module]] = {"QKAN from w = 2 pi": one_period}


def points(function: Callable[[Tensor], Tensor], low: float, inputs: int, count: int, seed: int) -> list[Pair]:
    """Training, validation and test points of a function on [low, 1]."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in (count, max(1, count // 5), count):
        x = low + (1 - low) * torch.rand(number, inputs, generator=generator, dtype=DOUBLE)
        found.append((x, function(x)))
    return found


def error(model: nn.Module, pair: Pair) -> float:
    """The mean square error on points."""
    with torch.no_grad():
        return float((model(pair[0]) - pair[1]).square().mean())


def wave(sizes: Sizes) -> Measurement:
    """Test errors of all arms."""
    arms = {**ARMS, **BESIDE}
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for seed in sizes.seeds:
        train, validation, test = points(lambda x: torch.sinc(20 * x / math.pi), 0.0, 1, sizes.points, seed)
        for arm, make in arms.items():
            with own_random_numbers(CPU, seed):
                model = make().double()
            fit(model, train, validation=validation, steps=sizes.steps, method="lbfgs", evaluate_every=10)
            found[arm].append(error(model, test))
    middle = {arm: median(errors) for arm, errors in found.items()}
    best = min(middle[arm] for arm in ARMS if arm != OURS)
    parts = [
        f"{arm} ({sum(each.numel() for each in arms[arm]().parameters())}) {middle[arm]:.2e} "
        f"({min(errors):.1e} to {max(errors):.1e})"
        for arm, errors in found.items()
    ]
    here = (
        f"median test error, mean square: {', '.join(parts)}; QKAN is {middle[OURS] / best:.2g} x the better baseline"
    )
    return Measurement(here, middle[OURS] <= 0.5 * best)


def extension(sizes: Sizes) -> Measurement:
    """Test errors of a network that grew and of one that was large from the beginning."""
    jumps, grown, direct = [], [], []
    courses: list[list[float]] = []
    for seed in sizes.extension_seeds:
        train, validation, test = points(
            lambda x: torch.exp(torch.sin(math.pi * x[:, :1]) + x[:, 1:] ** 2), -1.0, 2, sizes.points, seed
        )

        def learn(network: Qkan, steps: int, parts: tuple[Pair, Pair] = (train, validation)) -> None:
            fit(network, parts[0], validation=parts[1], steps=steps, method="lbfgs", evaluate_every=10)

        with own_random_numbers(CPU, seed):
            network = Qkan((2, 5, 1), reps=STAGES[0]).double()
        course: list[float] = []
        for reps in STAGES:
            before = error(network, test)
            network = network.extended(reps)
            jumps.append(abs(error(network, test) - before) / before)
            learn(network, sizes.stage)
            course.append(error(network, test))
        courses.append(course)
        grown.append(course[-1])
        with own_random_numbers(CPU, seed):
            network = Qkan((2, 5, 1), reps=STAGES[-1]).double()
        learn(network, sizes.stage * len(STAGES))
        direct.append(error(network, test))
    at = [median(course[number] for course in courses) for number in range(len(STAGES))]
    parts = [f"r = {reps} {each:.2e}" for reps, each in zip(STAGES, at, strict=True)]
    here = (
        f"median test error, mean square: {', '.join(parts)}; r = {STAGES[-1]} from the beginning {median(direct):.2e} "
        f"({', '.join(f'{each:.1e}' for each in direct)}; grown {', '.join(f'{each:.1e}' for each in grown)}); adding "
        f"repetitions changes the error by {max(jumps):.1e} of itself at most"
    )
    return Measurement(here, max(jumps) < 1e-6 and median(grown) <= 0.8 * median(direct))


# -- heads -------------------------------------------------------------------------------------------------------------


def cnn(hqkan: bool) -> DigitsCNN:
    """The zoo's CNN with new weights, with its own head or with an HQKAN in its place."""
    model = DigitsCNN(hidden=HIDDEN)
    if hqkan:
        made: dict[str, nn.Module] = {"fc1": Hqkan(512, 10, reps=3), "act3": nn.Identity(), "fc2": nn.Identity()}
        for name, module in made.items():
            setattr(model, name, module)
    return model


def head_size(model: DigitsCNN) -> int:
    """Parameters behind the convolutions."""
    return sum(each.numel() for name in ("fc1", "fc2") for each in getattr(model, name).parameters())


def accuracy(hqkan: bool, rate: float, seed: int, epochs: int, part: Split) -> float:
    """Train one CNN, and return its accuracy on a part of the data in percent.

    Args:
        hqkan: its head.
        rate: of Adam.
        seed: of weights and order.
        epochs: of the training.
        part: of the digits.
    """
    (x, y), (test, labels) = digits("train"), digits(part)
    with own_random_numbers(CPU, seed):
        model = cnn(hqkan)
        optimizer = torch.optim.Adam(model.parameters(), rate)
        for _ in range(epochs):
            for chosen in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
    model.eval()
    with torch.no_grad():
        return 100 * float((model(test).argmax(-1) == labels).double().mean())


def heads(sizes: Sizes) -> Measurement:
    """Accuracies and sizes of both heads."""
    found: dict[bool, list[float]] = {}
    rates: dict[bool, float] = {}
    for hqkan in (False, True):
        scores = {
            rate: mean(accuracy(hqkan, rate, 100 + seed, sizes.epochs, "search") for seed in (0, 1))
            for rate in sizes.rates
        }
        rates[hqkan] = max(sizes.rates, key=scores.__getitem__)
        found[hqkan] = [accuracy(hqkan, rates[hqkan], seed, sizes.epochs, "test") for seed in sizes.image_seeds]
    small, large = head_size(cnn(True)), head_size(cnn(False))
    here = (
        f"test accuracy in percent: MLP head ({large} parameters, rate {rates[False]:g}) {spread(found[False])}, HQKAN "
        f"({small}, {small / large:.0%}, rate {rates[True]:g}) {spread(found[True])}"
    )
    return Measurement(here, mean(found[True]) >= mean(found[False]) - 1.5 and small <= 0.3 * large)
