"""AF-KAN's claims: a KAN at an MLP's size, on the digits (2025, arXiv:2503.06112).

The 1,797 digits of 8 x 8 pixels, 64 features in [0, 1], split 80 / 20 with equal shares of each class, another split
for each of 5 seeds. All models are trained alike: 40 epochs, AdamW at 0.001 with a weight decay of 0.0001, batches of
64, and a rate that is multiplied by one factor after each epoch. The factor is chosen once for all, among 0.9, 0.95 and
0.98, by the mean accuracy of the four models on a fifth of the training images of the first seed. Models: AF-KAN and an
MLP with LayerNorm and SiLU at widths 64, 32, 10 (logits as they come; the release puts SiLU on the MLP's logits), and
ReLU-KANs at 64, 5, 10, which is about that size, and at 64, 32, 10. AF-KAN brings its values to [0, 1] row by row here;
beside it stand, not judged, the released way (over the batch), none, and ReLU for SiLU. MNIST and Fashion-MNIST cannot
be checked here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from statistics import mean, median, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.outcome import SMALL, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.functions.af_kan.af_kan_layer import AfKanNetwork, relu_kan_layer

BATCH, RATE, DECAY = 64, 1e-3, 1e-4
OURS, MLP, MATCHED, WIDE = "AF-KAN", "MLP", "ReLU-KAN 5 wide", "ReLU-KAN 32 wide"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """How much is trained.

    Attributes:
        seeds: of splits, weights and orders.
        epochs: of each training.
        factors: of the rate after each epoch, to choose from.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 40
    factors: tuple[float, ...] = (0.9, 0.95, 0.98)


SIZE = Statement(
    "At an MLP's size AF-KAN is far better than a ReLU-KAN of that size, and as good as the MLP",
    "it beats MLPs and other KANs at the same number of parameters (abstract)",
    "digits, mean accuracy over 5 seeds: at least 2.0 points above the ReLU-KAN of matched size, and at least the "
    "MLP's less 1.0 point",
    SMALL,
)
FEWER = Statement(
    "AF-KAN comes close to a ReLU-KAN of the same widths with a sixth of its parameters",
    "competitive with 6 to 10 times fewer parameters (abstract)",
    "digits, mean accuracy over 5 seeds: at least that of the ReLU-KAN of the same widths less 1.5 points",
    SMALL,
)
STATEMENTS = (SIZE, FEWER)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    bench = Bench(sizes)
    experiments: list[Experiment] = [(SIZE, partial(at_an_mlps_size, bench)), (FEWER, partial(with_fewer, bench))]
    return conduct("af-kan", experiments, sizes, subject, progress)


def mlp(*widths: int) -> nn.Module:
    """LayerNorm and a linear layer without bias, as AF-KAN has behind its reduction, with SiLU between the layers."""
    (first, hidden), *rest = pairwise(widths)
    layers: list[nn.Module] = [nn.LayerNorm(first), nn.Linear(first, hidden, False)]
    for a, b in rest:
        layers += [nn.SiLU(), nn.LayerNorm(a), nn.Linear(a, b, False)]
    return nn.Sequential(*layers)


def relu_kan(*widths: int) -> nn.Module:
    """A stack of ReLU-KAN layers."""
    return nn.Sequential(*(relu_kan_layer(*pair) for pair in pairwise(widths)))


JUDGED: Mapping[str, Callable[[], nn.Module]] = {
    OURS: lambda: AfKanNetwork((64, 32, 10)),
    MLP: lambda: mlp(64, 32, 10),
    MATCHED: lambda: relu_kan(64, 5, 10),
    WIDE: lambda: relu_kan(64, 32, 10),
}
BESIDE: Mapping[str, Callable[[], nn.Module]] = {
    "by the batch, as released": lambda: AfKanNetwork((64, 32, 10), scale="batch"),
    "not brought to [0, 1]": lambda: AfKanNetwork((64, 32, 10), scale="none"),
    "with ReLU": lambda: AfKanNetwork((64, 32, 10), act="relu"),
}
MODELS = {**JUDGED, **BESIDE}


class Bench:
    """Trains each model once per seed.

    Args:
        sizes: how long.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._accuracies: dict[tuple[str, int], float] = {}
        self.seconds: dict[str, list[float]] = {}

    @cached_property
    def factor(self) -> float:
        """Of the rate after each epoch: the one that is best for the four models together."""
        seed = self.sizes.seeds[0]
        x, y, *_ = split(seed)
        inner = stratified(y, 0.2, seed)

        def score(factor: float) -> float:
            parts = (x[~inner], y[~inner], x[inner], y[inner])
            return mean(self.train(make, parts, factor, seed) for make in JUDGED.values())

        return max(self.sizes.factors, key=score)

    def accuracies(self, name: str) -> list[float]:
        """In percent on the test images, a value per seed."""
        for seed in self.sizes.seeds:
            if (name, seed) not in self._accuracies:
                started = time.perf_counter()
                self._accuracies[name, seed] = self.train(MODELS[name], split(seed), self.factor, seed)
                self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return [self._accuracies[name, seed] for seed in self.sizes.seeds]

    def train(self, make: Callable[[], nn.Module], parts: tuple[Tensor, ...], factor: float, seed: int) -> float:
        """Train a new model on the first two parts and return its accuracy on the others, in percent."""
        x, y, test, labels = parts
        with own_random_numbers(CPU, seed):
            model = make()
            optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
            for _ in range(self.sizes.epochs):
                for chosen in torch.randperm(len(x)).split(BATCH):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                    optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] *= factor
        model.eval()
        with torch.no_grad():
            return 100 * float((model(test).argmax(-1) == labels).double().mean())


def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images [n, 64] with their labels."""
    from actkit.data import digits

    pairs = [digits(name) for name in ("train", "calibration", "search", "test")]
    x, y = torch.cat([images.flatten(1) for images, _ in pairs]), torch.cat([labels for _, labels in pairs])
    test = stratified(y, 0.2, seed)
    return x[~test], y[~test], x[test], y[test]


def stratified(labels: Tensor, share: float, seed: int) -> Tensor:
    """A mask of a share of each class."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        of_class = (labels == label).nonzero().flatten()
        order = torch.randperm(len(of_class), generator=generator)
        mask[of_class[order[: round(share * len(of_class))]]] = True
    return mask


def at_an_mlps_size(bench: Bench) -> Measurement:
    """Accuracies at about one size; what the parts of AF-KAN do, and what a step takes."""
    found = {name: bench.accuracies(name) for name in (OURS, MLP, MATCHED)}
    parts = [f"{name} ({count(MODELS[name])} parameters) {spread(values)}" for name, values in found.items()]
    beside = [f"{name} {spread(bench.accuracies(name))}" for name in BESIDE]
    low, high = interval([a - b for a, b in zip(found[OURS], found[MLP], strict=True)])
    ratio = median(bench.seconds[OURS]) / median(bench.seconds[MLP])
    here = (
        f"test accuracy in percent: {', '.join(parts)}; AF-KAN less MLP {low:+.2f} to {high:+.2f} (95 %, in pairs); "
        f"AF-KAN {', '.join(beside)}; a training takes {ratio:.1f} x the MLP's time; rate x {bench.factor:g} per epoch"
    )
    ours = mean(found[OURS])
    return Measurement(here, ours >= mean(found[MATCHED]) + 2 and ours >= mean(found[MLP]) - 1)


def with_fewer(bench: Bench) -> Measurement:
    """Accuracies at the same widths."""
    ours, wide = bench.accuracies(OURS), bench.accuracies(WIDE)
    sizes = [count(MODELS[name]) for name in (OURS, WIDE)]
    here = (
        f"test accuracy in percent: AF-KAN ({sizes[0]} parameters) {spread(ours)}, ReLU-KAN ({sizes[1]}) {spread(wide)}"
    )
    return Measurement(here, mean(ours) >= mean(wide) - 1.5)


def count(make: Callable[[], nn.Module]) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in make().parameters())


def interval(differences: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean of paired differences, by Student's t."""
    if len(differences) < 2:
        return -math.inf, math.inf
    from scipy.stats import t

    half = float(t.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return mean(differences) - half, mean(differences) + half
