"""S-KAN's claims: nodes that choose their basis are as good as the best basis for the task (2024, arXiv:2408.08338).

Seven functions of one or two variables on [-1, 1], 1,000 training, 200 validation and 1,000 test points, networks of
widths n, 5, 1, Adam at 0.003 with all points in each of 800 steps: constant for 640, then falling to 0 along a cosine,
the validation choosing among the last 160. That is the course of every arm. An S-KAN learns with its whole pool for 320
steps, chooses in the next 320, is pruned, and learns on as what it became; so it has no step more than the others.
Arms: a KAN in each of the four bases, an MLP with SiLU and one hidden layer with at least the parameters of the pruned
S-KAN, and the S-KAN; 2 seeds, of points and weights. Nothing was tuned for an arm; the targets are ours, as those of
the paper were not known. Convolutions: two 3 x 3 layers of 8 and 16 channels on the digits, each with pooling behind
it, and a linear head; 20 epochs of AdamW at 0.003 (16, then pruned, 4), 3 seeds, accuracy on the 338 test images at the
last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import geometric_mean, mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.edit.edits import set_module
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.train.fitting import Pair, fit
from actkit.data import digits
from actkit.functions.s_kan.choose_basis import ChooseBasis
from actkit.functions.s_kan.pool import POOL
from actkit.functions.s_kan.s_kan_layer import POOLED, SConvKan2d, SKanLayer, choosing

HIDDEN, RATE = 5, 3e-3
OURS, MLP = "S-KAN", "MLP"
ARMS = (*POOLED, MLP, OURS)
BATCH = 64
CPU = torch.device("cpu")

Target = tuple[int, Callable[[Tensor], Tensor]]
TARGETS: Mapping[str, Target] = {
    "sin(20 x) / (20 x)": (1, lambda x: torch.sinc(20 * x[:, 0] / math.pi)),
    "exp(sin(pi x) + y^2)": (2, lambda x: torch.exp(torch.sin(math.pi * x[:, 0]) + x[:, 1] ** 2)),
    "x y": (2, lambda x: x[:, 0] * x[:, 1]),
    "sin(e^x + y^2)": (2, lambda x: torch.sin(torch.exp(x[:, 0]) + x[:, 1] ** 2)),
    "kinks": (1, lambda x: x[:, 0].abs() + (x[:, 0] - 0.5).abs() / 2 - 0.7 * (x[:, 0] + 0.4).abs()),
    "tanh(20 (x - y))": (2, lambda x: torch.tanh(20 * (x[:, 0] - x[:, 1]))),
    "exp(-4 x^2) sin(6 pi x)": (1, lambda x: torch.exp(-4 * x[:, 0] ** 2) * torch.sin(6 * math.pi * x[:, 0])),
}


@dataclass(frozen=True)
class Sizes:
    """How much is trained.

    Attributes:
        seeds: of points and weights of the functions.
        steps: of each arm.
        points: for training, and for the test.
        image_seeds: of the convolutions.
        epochs: of the convolutions.
    """

    seeds: tuple[int, ...] = (0, 1)
    steps: int = 800
    points: int = 1000
    image_seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 20


FUNCTIONS = Statement(
    "Nodes that choose their basis are better over seven functions than any fixed basis, and than MLPs of their size",
    "better than baselines on seven function fits and than MLPs of equal size (abstract)",
    "mean rank by test error over the 7 functions better than that of each fixed basis; geometric mean of the errors "
    "at most 1.25 x that of the best basis for each function, and at most 0.7 x that of MLPs of at least its size",
    SYNTHETIC,
)
PRUNING = Statement(
    "Pruning leaves what the nodes chose: the size of a KAN in one basis, and the same function",
    "pruned after the selection; no figure",
    "7 functions, 2 seeds: at most 1.1 x the parameters of the largest KAN in one basis, and pruning itself changes "
    "the test error by less than 1 %",
    SYNTHETIC,
)
IMAGES = Statement(
    "Convolutions whose nodes choose their basis are as good as those in the best basis",
    "leading results on four image data sets (abstract)",
    "digits, mean accuracy over 3 seeds: at least that of the best of the four bases less 0.5 points",
    SMALL,
)
STATEMENTS = (FUNCTIONS, PRUNING, IMAGES)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    bench = Bench(sizes)
    experiments: list[Experiment] = [
        (FUNCTIONS, partial(functions, bench)),
        (PRUNING, partial(pruning, bench)),
        (IMAGES, partial(images, sizes)),
    ]
    return conduct("s-kan", experiments, sizes, subject, progress)


# -- functions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """What an arm reached on a function.

    Attributes:
        error: root mean square on the test points.
        parameters: of the network at the end.
        changed: by how much of itself the test error changed when it was pruned; 0 for what is not.
    """

    error: float
    parameters: int
    changed: float = 0.0


def kan(basis: str, inputs: int) -> nn.Module:
    """A KAN in one basis."""
    return nn.Sequential(POOL[basis](inputs, HIDDEN), POOL[basis](HIDDEN, 1))


def s_kan(inputs: int) -> nn.Module:
    """An S-KAN before it chooses."""
    return nn.Sequential(SKanLayer(inputs, HIDDEN), SKanLayer(HIDDEN, 1))


def mlp(inputs: int, parameters: int) -> nn.Module:
    """An MLP with one hidden layer and at least so many parameters."""
    width = math.ceil((parameters - 1) / (inputs + 2))
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, 1))


def points(target: str, seed: int, count: int) -> tuple[Pair, Pair, Pair]:
    """Training, validation and test points of a function, for validation a fifth as many.

    Args:
        target: of TARGETS.
        seed: of the points.
        count: for training, and for the test.
    """
    inputs, function = TARGETS[target]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in (count, count // 5, count):
        x = 2 * torch.rand(number, inputs, generator=generator) - 1
        found.append((x, function(x)[:, None]))
    return found[0], found[1], found[2]


class Bench:
    """Fits each arm to each function once per seed.

    Args:
        sizes: how long.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._fits: dict[tuple[str, str, int], Fit] = {}

    def fit(self, target: str, arm: str, seed: int) -> Fit:
        """Fit an arm, from this run's memory if it was fitted before."""
        if (target, arm, seed) not in self._fits:
            with own_random_numbers(CPU, seed):
                self._fits[target, arm, seed] = self._fit(target, arm, seed)
        return self._fits[target, arm, seed]

    def _fit(self, target: str, arm: str, seed: int) -> Fit:
        inputs = TARGETS[target][0]
        train, validation, test = points(target, seed, self.sizes.points)
        if arm == OURS:
            model = s_kan(inputs)
        else:
            model = kan(arm, inputs) if arm != MLP else mlp(inputs, self.fit(target, OURS, seed).parameters)
        first = round(0.8 * self.sizes.steps)
        rule = ChooseBasis().attach(model) if arm == OURS else None

        def penalty(step: int) -> Tensor | None:
            if rule is None:
                return None
            rule.before_step((step - 1) / first)
            return rule.penalty()

        fit(
            model,
            train,
            validation=validation,
            steps=first,
            rate=RATE,
            penalty=penalty,
            schedule="constant",
            keep="last",
        )
        changed = 0.0
        if rule is not None:
            before = error(model, test)
            for path, layer in choosing(model).items():
                set_module(model, path, layer.pruned())
            changed = abs(error(model, test) / before - 1)
        fit(model, train, validation=validation, steps=self.sizes.steps - first, rate=RATE, evaluate_every=20)
        return Fit(error(model, test), sum(each.numel() for each in model.parameters()), changed)

    @cached_property
    def errors(self) -> dict[str, dict[str, float]]:
        """Of each arm for each function, the mean over seeds."""
        return {
            target: {arm: mean(self.fit(target, arm, seed).error for seed in self.sizes.seeds) for arm in ARMS}
            for target in TARGETS
        }


@torch.no_grad()
def error(model: nn.Module, points: Pair) -> float:
    """The root mean square error on points."""
    model.eval()
    found = float((model(points[0]) - points[1]).double().square().mean().sqrt())
    model.train()
    return found


def functions(bench: Bench) -> Measurement:
    """Errors of all arms, their ranks and geometric means."""
    errors = bench.errors
    ranks = {arm: mean(sorted(each.values()).index(each[arm]) + 1 for each in errors.values()) for arm in ARMS}
    means = {arm: geometric_mean(each[arm] for each in errors.values()) for arm in ARMS}
    best = geometric_mean(min(each[basis] for basis in POOLED) for each in errors.values())
    arms = [f"{arm} {ranks[arm]:.2f} and {means[arm]:.3g}" for arm in ARMS]
    parts = [f"{target}: {', '.join(f'{each[arm]:.2g}' for arm in ARMS)}" for target, each in errors.items()]
    here = (
        f"mean rank and geometric mean of the errors: {', '.join(arms)}; S-KAN is {means[OURS] / best:.2f} x the best "
        f"basis for each and {means[OURS] / means[MLP]:.2f} x the MLP. Errors ({', '.join(ARMS)}): {'; '.join(parts)}"
    )
    ranked = all(ranks[OURS] < ranks[basis] for basis in POOLED)
    return Measurement(here, ranked and means[OURS] <= 1.25 * best and means[OURS] <= 0.7 * means[MLP])


def pruning(bench: Bench) -> Measurement:
    """Sizes, and what pruning changed."""
    pairs = [(target, seed) for target in TARGETS for seed in bench.sizes.seeds]
    ours = {pair: bench.fit(pair[0], OURS, pair[1]) for pair in pairs}
    largest = {pair: max(bench.fit(pair[0], basis, pair[1]).parameters for basis in POOLED) for pair in pairs}
    ratio = max(ours[pair].parameters / largest[pair] for pair in pairs)
    changed = max(each.changed for each in ours.values())
    sizes = [each.parameters for each in ours.values()]
    here = (
        f"{min(sizes)} to {max(sizes)} parameters after pruning, {ratio:.2f} x the largest KAN in one basis at most; "
        f"pruning changes the test error by {changed:.2%} at most"
    )
    return Measurement(here, ratio <= 1.1 and changed < 0.01)


# -- convolutions ------------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Two convolutions of KANs with pooling, and a linear head, for 8 x 8 digits.

    Args:
        basis: of both; None for a pool to choose from.
    """

    def __init__(self, basis: str | None) -> None:
        super().__init__()
        self.first, self.second = SConvKan2d(1, 8, 3, padding=1), SConvKan2d(8, 16, 3, padding=1)
        if basis is not None:
            self.first.layer, self.second.layer = POOL[basis](9, 8), POOL[basis](72, 16)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [batch, 10] of images [batch, 1, 8, 8]."""
        for layer in (self.first, self.second):
            x = F.max_pool2d(layer(x), 2)
        return self.head(x.flatten(1))


def accuracy(basis: str | None, seed: int, epochs: int) -> float:
    """Train one network, and return its accuracy on the test images in percent.

    Args:
        basis: as in ConvNet.
        seed: of weights and order.
        epochs: of all phases together.
    """
    (x, y), (test, labels) = digits("train"), digits("test")
    with own_random_numbers(CPU, seed):
        model = ConvNet(basis)
        first = round(0.8 * epochs)
        rule = ChooseBasis().attach(model) if basis is None else None
        for phase, count in ((0, first), (1, epochs - first)):
            if phase and rule is not None:
                for path, layer in choosing(model).items():
                    set_module(model, path, layer.pruned())
            optimizer = torch.optim.AdamW(model.parameters(), RATE)
            steps = count * math.ceil(len(x) / BATCH)
            falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
            step = 0
            for _ in range(count):
                for chosen in torch.randperm(len(x)).split(BATCH):
                    optimizer.zero_grad()
                    more = None
                    if rule is not None and not phase:
                        rule.before_step(step / steps)
                        more = rule.penalty()
                    loss = F.cross_entropy(model(x[chosen]), y[chosen])
                    (loss if more is None else loss + more).backward()
                    optimizer.step()
                    step += 1
                    if phase:
                        falling.step()
        model.eval()
        with torch.no_grad():
            return 100 * float((model(test).argmax(-1) == labels).double().mean())


def images(sizes: Sizes) -> Measurement:
    """Accuracies of convolutions in each basis, and in those that nodes chose."""
    found = {
        arm: [accuracy(basis, seed, sizes.epochs) for seed in sizes.image_seeds]
        for arm, basis in ({name: name for name in POOLED} | {OURS: None}).items()
    }
    here = f"test accuracy in percent: {', '.join(f'{arm} {spread(values)}' for arm, values in found.items())}"
    return Measurement(here, mean(found[OURS]) >= max(mean(found[basis]) for basis in POOLED) - 0.5)
