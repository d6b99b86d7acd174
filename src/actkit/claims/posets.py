"""Poset filters' claims: the layer is the support function of the order polytope, and learns digits as other pooling.

What is measured here: all 16 posets on four points against brute force on 10,000 random blocks each, and the 219
labelled orders of four points. And a network of two convolutions on the 8 x 8 digits, with pooling on the signed values
of the convolutions: average, maximum, or half of each, each followed by ReLU, and N (divided by 4) with none, as a ReLU
is built in. N behind a ReLU, as the release's README has it, is measured beside them and not judged. Weights at the
start, data and order are the same, all arms train alike (AdamW, peak 3e-3, 600 steps of 32, last weights), and nothing
was tuned for one of them. Eight of the seeds that the release lists.

The paper's figures on CIFAR-10 are not repeated: its posets lie within a standard deviation of each other, and no order
among them is claimed. About 4 minutes on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.core.measure.quality import measure_quality
from actkit.core.train.training import train
from actkit.data import load_data
from actkit.functions.posets.pooling import PosetPool2d
from actkit.functions.posets.poset import Poset
from actkit.functions.posets.tropical import poset_argmax, poset_eval

NEAR = 0.3  # points
RATE = 3e-3
Pool = Callable[[int], nn.Module]  # of so many channels


@dataclass(frozen=True)
class Sizes:
    """How much is compared and trained.

    Attributes:
        seeds: of weights and order.
        blocks: random blocks for each poset.
        channels: of the first convolution; the second one has twice as many.
        steps: of training.
        rows: images of a step.
    """

    seeds: tuple[int, ...] = (2, 315, 568, 6664, 32168, 35156, 351646, 789465)
    blocks: int = 10_000
    channels: int = 16
    steps: int = 600
    rows: int = 32


EXACT = Statement(
    "The layer is the support function of the order polytope, for all 16 posets on four points",
    "f(x) = max over the filters of a poset (its definition)",
    "16 classes among the 219 labelled orders; for each poset and 10,000 blocks the value is the largest over all "
    "vertices, the gradient its indicator, and the two rules of series-parallel posets give the same (float64, 1e-12)",
    SYNTHETIC,
)
DIGITS = Statement(
    "N in place of average, maximum or mixed pooling learns no worse, without parameters",
    "all 16 posets between 78.7 and 79.1 % on CIFAR-10 (baselines are not in the sources that we could read)",
    "digits, 8 seeds: mean test accuracy of N >= that of each of average, maximum and mixed pooling with ReLU - 0.3 "
    "points, and above the worst of the three",
    SMALL,
)
STATEMENTS = (EXACT, DIGITS)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    experiments: list[Experiment] = [(EXACT, partial(exact, sizes)), (DIGITS, partial(learned, sizes, progress))]
    return conduct("posets", experiments, sizes, subject, progress)


# -- exact -------------------------------------------------------------------------------------------------------------


def exact(sizes: Sizes) -> Measurement:
    """Every poset against brute force."""
    orders = list(_orders())
    classes = {next(k for k, poset in enumerate(Poset.all(4)) if poset.isomorphic(order)) for order in orders}
    worst, gradients, ruled = 0.0, True, 0
    for number, poset in enumerate(Poset.all(4)):
        draw = torch.Generator().manual_seed(number)
        x = torch.randn(sizes.blocks, 4, dtype=torch.float64, generator=draw).requires_grad_()
        vertices = torch.tensor(_vertices(poset), dtype=torch.float64)
        sums = (x.detach()[:, None] * vertices).sum(-1)
        found = poset_eval(x, poset)
        found.sum().backward()
        worst = max(worst, float((found.detach() - sums.amax(1)).abs().max()))
        assert x.grad is not None
        chosen = vertices[sums.argmax(1)]
        gradients &= torch.equal(x.grad, chosen) and torch.equal(poset_argmax(x.detach(), poset).double(), chosen)
        if poset.is_series_parallel():
            ruled += 1
            large = poset.union(Poset(8))  # 12 points are evaluated by the two rules
            apart = torch.cat((x.detach(), x.detach().new_full((sizes.blocks, 8), -1.0)), 1)
            worst = max(worst, float((poset_eval(apart, large) - sums.amax(1)).abs().max()))
    here = (
        f"{len(orders)} orders, {len(classes)} classes; largest difference {worst:.1e}, {ruled} posets by the "
        f"two rules; gradients are {'' if gradients else 'not '}the indicators"
    )
    return Measurement(here, len(orders) == 219 and len(classes) == 16 and worst <= 1e-12 and gradients)


def _orders() -> Any:
    """Every partial order of four labelled points."""
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    for mask in range(1 << len(pairs)):
        chosen = {pair for bit, pair in enumerate(pairs) if mask >> bit & 1}
        if any((b, a) in chosen for a, b in chosen):
            continue
        if all((a, d) in chosen for a, b in chosen for c, d in chosen if b == c):
            yield Poset(4, frozenset(chosen))


def _vertices(poset: Poset) -> list[list[int]]:
    """The 0/1 points of the order polytope: t_i <= t_j if i is below j."""
    corners = [[int(k in chosen) for k in range(4)] for size in range(5) for chosen in combinations(range(4), size)]
    return [corner for corner in corners if all(corner[low] <= corner[high] for low, high in poset.relations)]


# -- learned -----------------------------------------------------------------------------------------------------------


class _Mixed(nn.Module):
    """Half of average pooling and half of maximum pooling."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.avg_pool2d(x, 2) + F.max_pool2d(x, 2)) / 2


ARMS: dict[str, Pool] = {
    "average": lambda _: nn.Sequential(nn.AvgPool2d(2), nn.ReLU()),
    "maximum": lambda _: nn.Sequential(nn.MaxPool2d(2), nn.ReLU()),
    "mixed": lambda _: nn.Sequential(_Mixed(), nn.ReLU()),
    "N": lambda _: PosetPool2d("N", normalize=True),
    "ReLU, then N": lambda _: nn.Sequential(nn.ReLU(), PosetPool2d("N", normalize=True)),
}
BASELINES = ("average", "maximum", "mixed")


class Network(nn.Module):
    """Two convolutions with pooling and a linear layer, for images [batch, 1, 8, 8].

    Args:
        pool: behind each convolution, made for its channels.
        channels: of the first convolution.
        second: channels of the second one; None for twice as many.
    """

    input_shape = (1, 8, 8)

    def __init__(self, pool: Pool, channels: int, second: int | None = None) -> None:
        super().__init__()
        second = 2 * channels if second is None else second
        self.conv1, self.pool1 = nn.Conv2d(1, channels, 3, padding=1), pool(channels)
        self.conv2, self.pool2 = nn.Conv2d(channels, second, 3, padding=1), pool(second)
        self.fc = nn.Linear(4 * second, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the logits [batch, 10]."""
        return self.fc(self.pool2(self.conv2(self.pool1(self.conv1(pixel_values)))).flatten(1))


def accuracy(arm: str, seed: int, sizes: Sizes, progress: bool = False) -> float:
    """Test accuracy of a trained network, in percent."""
    torch.manual_seed(seed)
    model = Network(ARMS[arm], sizes.channels)
    given: dict[str, Any] = {"batch_size": sizes.rows}
    train(
        model,
        load_data(None, model, split="train", seed=seed, **given),
        validation=load_data(None, model, split="search", **given),
        steps=sizes.steps,
        learning_rate=RATE,
        seed=seed,
        evaluate_every=sizes.steps,
        keep="last",
        progress=progress,
    )
    held_out = load_data(None, model.eval(), split="test", batch_size=256)
    quality = measure_quality(model, held_out, task="classification", resamples=1, progress=False)
    return 100 * quality.metrics["accuracy"].value


def learned(sizes: Sizes, progress: bool = False) -> Measurement:
    """Test accuracies, and paired differences with t intervals."""
    found = {arm: [accuracy(arm, seed, sizes, progress) for seed in sizes.seeds] for arm in ARMS}
    means = {arm: mean(values) for arm, values in found.items()}
    parts = [f"{arm} {means[arm]:.2f} %" for arm in ARMS]
    for arm in BASELINES:
        differences = [ours - theirs for ours, theirs in zip(found["N"], found[arm], strict=True)]
        parts.append(f"N - {arm} {_interval(differences)}")
    passed = all(means["N"] >= means[arm] - NEAR for arm in BASELINES)
    return Measurement("; ".join(parts), passed and means["N"] > min(means[arm] for arm in BASELINES))


def _interval(values: list[float]) -> str:
    """The mean with its 95 % t interval: '+0.10 (-0.20 to +0.40)'."""
    middle = mean(values)
    if len(values) == 1:
        return f"{middle:+.2f}"
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{middle:+.2f} ({middle - half:+.2f} to {middle + half:+.2f})"
