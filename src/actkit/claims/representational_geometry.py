"""The claims of representational geometry: tanh nets take the geometry of their targets, ReLU nets keep their inputs'.

Tasks of 16 conditions in 100 inputs whose kernel is orthogonal to the targets' (alignment 0, equal eigenvalues), one
and four binary targets, noise of standard deviation 1 in training and 0.5 in tests, 5,000 samples of each. Nets of one
hidden layer of 128 units without biases at the inputs, uniform weights, a linear readout; Adam at 1e-2, batches of 200,
until the loss over all training samples is at most 0.05 nats per target (looked at after every step, at most 200
epochs). 5 tasks with 3 nets each; activations tanh, ReLU and hard tanh. Hidden activity is read by
`representational_geometry` at the activation's output.

The sign test is over the 15 pairs of nets (one-sided, ties left out). The loss is reached within an epoch, so what 20
epochs give is printed beside it and not judged. Nudged XOR (99 inputs) at epsilon 2, 1, 0.5, 0.25 and 0, 10 nets each,
trained alike, with biases that begin at 0: without them a net of tanh is an odd function, and XOR is an even one.

The order of kernels matters little: CKA of the mean kernel over a task's nets is printed beside the mean of CKAs, which
is judged. CIFAR-10 and deeper nets are not checked. About 5 minutes of one core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from actkit.claims.outcome import SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.ground.progress import track
from actkit.interpretation.representational_geometry.kernels import cka, kernel
from actkit.interpretation.representational_geometry.representational_geometry import (
    SiteGeometry,
    representational_geometry,
)
from actkit.interpretation.representational_geometry.tasks import KernelTask, NudgedXor, Task

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "hard tanh": nn.Hardtanh}
WIDTH, BATCH, RATE, LOSS, EPOCHS = 128, 200, 1e-2, 0.05, 200
LATER = 20  # epochs
TARGET_GAP, INPUT_GAP, HARD, ACCURACY, SIGNIFICANT = 0.15, 0.10, 0.1, 0.95, 0.05
SHRINKS = 0.1


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        seeds: of tasks.
        nets: for each task.
        samples: to train on, and to test on.
        epsilons: of nudged XOR, the largest first.
        xor_nets: for each of them.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    nets: int = 3
    samples: int = 5000
    epsilons: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25, 0.0)
    xor_nets: int = 10


SHAPED = Statement(
    "At equal loss tanh nets are like their targets and ReLU nets like their inputs",
    "the same (abstract; the figures' values were not seen)",
    "one target: CKA with targets of tanh at least 0.15 above ReLU's, with inputs of ReLU at least 0.10 above tanh's; "
    "parallelism and CCGP higher in tanh nets (sign test, p < 0.05); hard tanh within 0.1 of tanh; all nets >= 95 % on "
    "test samples; four targets: the same signs of both differences",
    SYNTHETIC,
)
SEPARABLE = Statement(
    "The difference shrinks as the target is harder to separate linearly",
    "the same (figure)",
    "nudged XOR: the gap of CKA with targets between tanh and ReLU at the largest epsilon at least 0.1 above that at 0",
    SYNTHETIC,
)
STATEMENTS = (SHAPED, SEPARABLE)


def run(sizes: Sizes | None = None, subject: str | None = None, progress: bool = True) -> Outcome:
    """Run the claims.

    Args:
        sizes: how much.
        subject: only the claims on it; None for all.
        progress: show bars.
    """
    sizes = sizes or Sizes()
    experiments: list[Experiment] = [
        (SHAPED, partial(shaped, sizes, progress)),
        (SEPARABLE, partial(separable, sizes, progress)),
    ]
    return conduct("representational-geometry", experiments, sizes, subject, progress)


class Net(nn.Module):
    """One hidden layer.

    Args:
        inputs: of a sample.
        activation: of the layer.
        targets: outputs.
        bias: at the inputs, from 0.
    """

    def __init__(self, inputs: int, activation: nn.Module, targets: int, bias: bool) -> None:
        super().__init__()
        self.hidden, self.act = nn.Linear(inputs, WIDTH, bias=bias), activation
        self.readout = nn.Linear(WIDTH, targets)
        nn.init.uniform_(self.hidden.weight, -(inputs**-0.5), inputs**-0.5)
        if bias:
            nn.init.zeros_(self.hidden.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, targets]."""
        found: Tensor = self.readout(self.act(self.hidden(x)))
        return found


class Shape(NamedTuple):
    """What is compared of one net."""

    site: SiteGeometry
    accuracy: float
    loss: float
    states: np.ndarray

    def mean(self, name: str) -> float:
        """A measure, over the targets."""
        return mean(getattr(each, name) for each in self.site.targets)


def fitted(task: Task, activation: str, seed: int, samples: int, epochs: int | None = None) -> tuple[Net, float]:
    """A net at the loss where all nets are compared, and that loss; or after so many epochs."""
    torch.manual_seed(seed)
    x, y, _ = task.sample(samples, seed=1)
    net = Net(x.shape[1], ACTIVATIONS[activation](), y.shape[1], bias=isinstance(task, NudgedXor))
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    draw = torch.Generator().manual_seed(seed)
    error = nn.functional.binary_cross_entropy_with_logits
    loss = float("inf")
    for _ in range(epochs or EPOCHS):
        for rows in torch.randperm(samples, generator=draw).split(BATCH):
            optimizer.zero_grad()
            error(net(x[rows]), y[rows]).backward()
            optimizer.step()
            with torch.no_grad():
                loss = float(error(net(x), y))
            if loss <= LOSS and epochs is None:
                return net.eval(), loss
    return net.eval(), loss


def measured(
    task: Task, activation: str, seed: int, samples: int, *, splits: int = 10, epochs: int | None = None
) -> Shape:
    """A net and its geometry on test samples."""
    net, loss = fitted(task, activation, seed, samples, epochs)
    x, y, condition = task.sample(samples, seed=2, noise=0.5)
    with torch.no_grad():
        accuracy = float(((net(x) > 0) == (y > 0.5)).float().mean())
        states = net.act(net.hidden(task.clean)).double().numpy()
    found = representational_geometry(
        net,
        [x],
        sites=("activation.output:act",),
        conditions=condition,
        targets=torch.from_numpy(task.targets),
        clean=[task.clean],
        splits=splits,
        untrained=2,
        progress=False,
    )
    return Shape(found.sites[0], accuracy, loss, states)


def sign_test(one: Sequence[float], other: Sequence[float]) -> float:
    """p of `one` being larger in so many pairs by chance."""
    from scipy.stats import binomtest

    signs = [a > b for a, b in zip(one, other, strict=True) if a != b]
    return float(binomtest(sum(signs), len(signs), alternative="greater").pvalue) if signs else 1.0


def shaped(sizes: Sizes, progress: bool) -> Measurement:
    """Tanh, ReLU and hard tanh on tasks whose inputs say nothing of the targets."""

    @cache
    def shapes(number: int, activation: str, epochs: int | None = None) -> list[Shape]:
        runs = [(seed, net) for seed in sizes.seeds for net in range(sizes.nets)]
        about = f"{activation}, {number} targets"
        return [
            measured(KernelTask(16, number, seed=seed), activation, 100 * seed + net, sizes.samples, epochs=epochs)
            for seed, net in track(runs, about, len(runs), progress)
        ]

    def average(number: int, activation: str, name: str, epochs: int | None = None) -> float:
        return mean(getattr(shape.site, name) for shape in shapes(number, activation, epochs))

    gaps = {
        number: (
            average(number, "tanh", "target_alignment") - average(number, "relu", "target_alignment"),
            average(number, "relu", "input_alignment") - average(number, "tanh", "input_alignment"),
        )
        for number in (1, 4)
    }
    tests = {
        name: sign_test(*([shape.mean(name) for shape in shapes(1, each)] for each in ("tanh", "relu")))
        for name in ("parallelism", "ccgp")
    }
    hard = abs(average(1, "hard tanh", "target_alignment") - average(1, "tanh", "target_alignment"))
    accuracies = {each: [shape.accuracy for shape in shapes(1, each)] for each in ("tanh", "relu")}
    losses = [shape.loss for number in (1, 4) for each in ("tanh", "relu") for shape in shapes(number, each)]
    passed = (
        gaps[1][0] >= TARGET_GAP
        and gaps[1][1] >= INPUT_GAP
        and max(tests.values()) < SIGNIFICANT
        and hard <= HARD
        and min(min(each) for each in accuracies.values()) >= ACCURACY
        and min(gaps[4]) > 0
    )
    lines = [
        f"{number} target{'s' if number > 1 else ''}: {each} {average(number, each, 'target_alignment'):.3f} like "
        f"targets, {average(number, each, 'input_alignment'):.3f} like inputs"
        for number in (1, 4)
        for each in ("tanh", "relu", *(("hard tanh",) if number == 1 else ()))
    ]
    means = {name: [mean(s.mean(name) for s in shapes(1, each)) for each in ("tanh", "relu")] for name in tests}
    shown = "; ".join(f"{name} {means[name][0]:.3f} and {means[name][1]:.3f} (p {p:.2g})" for name, p in tests.items())
    later = "; ".join(
        f"{number} target{'s' if number > 1 else ''}: {each} {average(number, each, 'target_alignment', LATER):.3f} "
        f"and {average(number, each, 'input_alignment', LATER):.3f}"
        for number in (1, 4)
        for each in ("tanh", "relu")
    )
    kernels = ", ".join(f"{each} {of_mean_kernel(sizes, shapes(1, each)):.3f}" for each in ("tanh", "relu"))
    text = (
        f"{'; '.join(lines)}; {shown} for tanh and ReLU; test accuracy {spread(accuracies['tanh'], '.3f')} and "
        f"{spread(accuracies['relu'], '.3f')}; loss at most {max(losses):.3f}; of mean kernels {kernels} like targets; "
        f"after {LATER} epochs, not judged: like targets and inputs {later}"
    )
    return Measurement(text, passed)


def of_mean_kernel(sizes: Sizes, shapes: Sequence[Shape]) -> float:
    """CKA with targets of the mean kernel over a task's nets, as in the paper's figures; a mean over tasks."""
    found = []
    for at, seed in enumerate(sizes.seeds):
        mine = shapes[at * sizes.nets : (at + 1) * sizes.nets]
        total = np.mean([kernel(shape.states) for shape in mine], axis=0)
        found.append(cka(total, KernelTask(16, 1, seed=seed).target_kernel))
    return mean(found)


def separable(sizes: Sizes, progress: bool) -> Measurement:
    """Nudged XOR."""
    gaps, texts = [], []
    for epsilon in track(sizes.epsilons, "Nudged XOR", len(sizes.epsilons), progress):
        found = {
            each: [
                measured(NudgedXor(epsilon, seed=net), each, net, sizes.samples, splits=2).site.target_alignment
                for net in range(sizes.xor_nets)
            ]
            for each in ("tanh", "relu")
        }
        gaps.append(mean(found["tanh"]) - mean(found["relu"]))
        texts.append(f"{epsilon:g}: {mean(found['tanh']):.3f} and {mean(found['relu']):.3f}")
    text = f"tanh and ReLU like targets at epsilon {'; '.join(texts)}; gap {gaps[0]:.3f} to {gaps[-1]:.3f}"
    return Measurement(text, gaps[0] - gaps[-1] >= SHRINKS)
