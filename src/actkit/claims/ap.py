"""AP's claims: its step can only raise pre-activations, and fewer units are silent in what is trained after it.

The exact part: layers with inputs of 0 or more and random weights in float64; the layers of the zoo's CNN that read a
ReLU, on digits; and in the zoo's `relu` model what the gates give, which is 0 or more, through the weights of the down
projections. (What these read there is the gate times a factor of either sign, of which nothing is claimed.) A fifth of
the weights are pruned by magnitude first; how far weights have moved is drawn, as the claim holds for any movement.

The measured part: an MLP 64-256-128-10 with ReLU on the 8 x 8 digits (1,085 images to train, 182 to choose the rate,
338 to test; the project's splits), pruned in 10 cycles of 20 % with a training from the same start after each, 30
epochs of SGD with momentum 0.9 and a cosine. Arms: magnitude alone; magnitude 18 % and AP 2 %; and for AP's 2 %
negative weights at random, or those of any sign that moved least. All have as many weights left after each cycle,
trained as often. The rate is the one that the unpruned net does best with, of three, with the first seed. Rates of dead
units and accuracies are means over the cycles that leave at most 20 % of the weights, on test images.

The gains of 3 to 4 % on CIFAR and 2 to 3 % on ImageNet cannot be checked here. About 6 minutes of one core.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit import zoo
from actkit.claims.digit_arms import DigitArms, accuracy, in_batches
from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import Subject, spread
from actkit.compression.ap.ap import ActivatingPruner, ap_select
from actkit.compression.ap.dead_neurons import dead_neuron_rate
from actkit.core.ground.largest import largest
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.train.masks import KeepMasks
from actkit.core.train.training import train
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.data import digits

CLOSE = 1e-6
SILENT, LOST = 0.01, 0.003  # of the rate of dead units; of the accuracy
P, Q, SPARSE = 0.2, 0.02, 0.2
ARMS: dict[str, dict[str, Any]] = {
    "magnitude": {"activating": 0.0},
    "AP": {"activating": Q},
    "negative at random": {"activating": Q, "order": "random"},
    "any sign": {"activating": Q, "sign": "any"},
}
TRAINING: dict[str, Any] = {"optimizer": "sgd:momentum=0.9", "weight_decay": 5e-4, "max_grad_norm": None}


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        layers: random ones.
        rows: of text or images that zoo models read.
        seeds: of the trainings.
        rates: that are tried.
        epochs: of a training.
        cycles: of pruning.
    """

    layers: int = 100
    rows: int = 64
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    epochs: int = 30
    cycles: int = 10


RISES = Statement(
    "Where inputs are not negative, AP's step raises pre-activations or leaves them",
    "by construction",
    "100 random layers: no pre-activation falls by more than 1e-6, and the dynamic rate of dead units does not rise in "
    "any",
    SYNTHETIC,
)
WAKES = Statement(
    "Fewer units are silent after training with AP",
    "AP lowers the dynamic rate of dead neurons (abstract)",
    "digits MLP, cycles with at most 20 % of the weights alive, test images: the mean dynamic rate with AP is at least "
    "1 point lower than with magnitude alone, and lower in at least 4 of 5 seeds, at equal counts of weights",
    SMALL,
)
KEPT = Statement(
    "It costs no accuracy at equal sparsity",
    "CIFAR +3 to +4 %, ImageNet +2 to +3 % (abstract)",
    "the same nets: mean accuracy with AP >= magnitude's - 0.3 points",
    SMALL,
)
STATEMENTS = (RISES, RISES.on("cnn"), RISES.on("relu"), WAKES, KEPT)


def run(sizes: Sizes | None = None, subject: str | None = None, progress: bool = True) -> Outcome:
    """Run the claims.

    Args:
        sizes: how much.
        subject: only the claims on it; None for all.
        progress: show bars.
    """
    sizes = sizes or Sizes()
    arms = Arms(sizes)
    experiments: list[Experiment] = [
        (RISES, lambda: rises(random_layers(sizes.layers))),
        (RISES.on("cnn"), lambda: rises(convolutional(sizes.rows))),
        (RISES.on("relu"), lambda: rises(behind_gates(sizes.rows))),
        (WAKES, partial(wakes, arms)),
        (KEPT, partial(kept, arms)),
    ]
    return conduct("ap", experiments, sizes, subject, progress)


# -- pre-activations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer whose inputs are 0 or more.

    Attributes:
        weight: float64 [outputs, ...].
        bias: float64 [outputs], or None.
        x: its inputs, float64.
        settings: of a convolution; None for a linear layer.
    """

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    settings: dict[str, Any] | None = None

    def at(self, weight: Tensor) -> Tensor:
        """The pre-activations [rows, outputs] with other weights."""
        if self.settings is None:
            return F.linear(self.x, weight, self.bias)
        return F.conv2d(self.x, weight, self.bias, **self.settings).movedim(1, -1).flatten(0, -2)


def rises(layers: Iterator[Layer]) -> Measurement:
    """Prune each layer by magnitude, then by AP, and compare pre-activations and dead units before and after AP."""
    generator = torch.Generator().manual_seed(0)
    falls, rates, woken, number = [], [], [], 0
    for layer in layers:
        count = layer.weight.numel()
        alive = largest(layer.weight.abs().flatten(), count - int((P - Q) * count)).view_as(layer.weight)
        now = layer.weight * alive
        reference = now + torch.randn(now.shape, generator=generator, dtype=torch.float64) * now.std()
        stays = ap_select(now, reference, alive, int(Q * count))
        before, after = layer.at(now), layer.at(now * stays)
        falls.append(float((before - after).max()))
        known = (stays.flatten(1).any(1), alive.flatten(1).any(1))
        silenced = [float(((z <= 0) & some).double().mean()) for z, some in zip((after, before), known, strict=True)]
        rates.append(silenced[0] - silenced[1])
        woken.append(-rates[-1])
        number += 1
    text = (
        f"{number} layers: the largest fall is {max(max(falls), 0.0):.1e}, the rate of dead units changes by "
        f"{100 * min(rates):+.2f} to {100 * max(rates):+.2f} points (mean {-100 * mean(woken):+.2f})"
    )
    return Measurement(text, max(falls) <= CLOSE and max(rates) <= 0)


def random_layers(number: int) -> Iterator[Layer]:
    """Layers of 20 to 100 inputs, with the positive part of normal numbers as inputs."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    for index in range(number):
        inputs, outputs = 20 + index % 81, 10 + index % 31
        yield Layer(draw(outputs, inputs), draw(outputs), draw(50, inputs).relu())


def convolutional(rows: int) -> Iterator[Layer]:
    """The layers of the zoo's CNN that read a ReLU, on test digits."""
    model: Any = zoo.load("cnn").double()
    with torch.no_grad():
        x = model.act1(model.conv1(digits("test")[0][:rows].double()))
        settings = {"stride": model.conv2.stride, "padding": model.conv2.padding}
        yield Layer(model.conv2.weight, model.conv2.bias, x, settings)
        x = model.flatten(model.act2(model.conv2(x)))
        yield Layer(model.fc1.weight, model.fc1.bias, x)
        yield Layer(model.fc2.weight, model.fc2.bias, model.act3(model.fc1(x)))


def behind_gates(rows: int) -> Iterator[Layer]:
    """What the gates of the zoo's `relu` give, and the weights of the down projections."""
    subject = Subject("relu", calibration=1, split="train", held_out=rows)
    view = anatomy(subject.model)
    sites = {Site("mlp.gate", block.index): Sample(1024) for block in view.blocks}
    seen = record(subject.model, sites, subject.held_out, anatomy=view, progress=False)
    for block in view.blocks:
        assert block.mlp is not None
        x = seen[Site("mlp.gate", block.index)].rows.double()
        yield Layer(block.mlp.down.weight.detach().double(), None, x)


# -- digits ------------------------------------------------------------------------------------------------------------


class DigitsMlp(nn.Module):
    """64-256-128-10 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [batch, 10]."""
        found: Tensor = self.layers(pixel_values)
        return found


def fresh(arm: str, seed: int) -> nn.Module:
    """A net with random weights."""
    torch.manual_seed(seed)
    return DigitsMlp()


@dataclass(frozen=True)
class Pruned:
    """A net after a cycle and its training.

    Attributes:
        alive: share of its weights.
        count: how many these are.
        dead: its dynamic rate of dead units.
        accuracy: on test images.
    """

    alive: float
    count: int
    dead: float
    accuracy: float


@dataclass
class Arms:
    """The pruned nets; each arm is run when it is first needed.

    Attributes:
        sizes: how much is trained.
    """

    sizes: Sizes
    _found: dict[tuple[str, int], list[Pruned]] = field(default_factory=dict)
    _dense: DigitArms | None = None

    @property
    def dense(self) -> DigitArms:
        """The nets before pruning, which all arms share."""
        sizes = self.sizes
        self._dense = self._dense or DigitArms(
            fresh, seeds=sizes.seeds, rates=sizes.rates, epochs=sizes.epochs, **TRAINING
        )
        return self._dense

    def sparse(self, arm: str, seed: int) -> list[Pruned]:
        """The cycles that leave at most 20 % of the weights, or the last if none does."""
        cycles = self.cycles(arm, seed)
        return [each for each in cycles if each.alive <= SPARSE] or cycles[-1:]

    def mean(self, arm: str, what: str) -> list[float]:
        """The mean of a figure over these cycles, for each seed."""
        return [mean(getattr(each, what) for each in self.sparse(arm, seed)) for seed in self.sizes.seeds]

    def cycles(self, arm: str, seed: int) -> list[Pruned]:
        """All cycles of an arm."""
        if (arm, seed) not in self._found:
            trained = self.dense.fitted("dense", seed).model
            model = fresh(arm, seed)
            pruner = ActivatingPruner(model, share=P, seed=seed, **ARMS[arm])
            model.load_state_dict(copy.deepcopy(trained.state_dict()))
            self._found[arm, seed] = [self._cycle(model, pruner, seed) for _ in range(self.sizes.cycles)]
        return self._found[arm, seed]

    def _cycle(self, model: nn.Module, pruner: ActivatingPruner, seed: int) -> Pruned:
        report = pruner.prune()
        pruner.rewind()
        batches, test = in_batches(digits("train")), in_batches(digits("test"), rows=None)
        train(
            model,
            batches,
            validation=in_batches(digits("search"), rows=None),
            epochs=self.sizes.epochs,
            learning_rate=self.dense.rate("dense"),
            rules=[KeepMasks.of(pruner.masks)],
            seed=seed,
            keep="last",
            evaluate_every=self.sizes.epochs * len(batches),
            progress=False,
            **TRAINING,
        )
        dead = dead_neuron_rate(model, test, progress=False).dynamic
        return Pruned(report.alive / report.total, report.alive, dead, accuracy(model, test))


def wakes(arms: Arms) -> Measurement:
    """Rates of dead units, at equal counts of weights."""
    seeds = arms.sizes.seeds
    for seed in seeds:
        counts = {arm: [each.count for each in arms.cycles(arm, seed)] for arm in ARMS}
        assert len({tuple(each) for each in counts.values()}) == 1, counts
    rates = {arm: arms.mean(arm, "dead") for arm in ARMS}
    gap = mean(rates["AP"]) - mean(rates["magnitude"])
    lower = sum(ours < theirs for ours, theirs in zip(rates["AP"], rates["magnitude"], strict=True))
    dense = mean(
        dead_neuron_rate(
            arms.dense.fitted("dense", seed).model, in_batches(digits("test"), rows=None), progress=False
        ).dynamic
        for seed in seeds
    )
    left = [each.alive for each in arms.sparse("AP", seeds[0])]
    each = "; ".join(f"{arm} {spread([100 * rate for rate in rates[arm]])} %" for arm in ARMS)
    text = (
        f"AP {100 * gap:+.2f} points, lower in {lower} of {len(seeds)} seeds; {each}; unpruned {100 * dense:.2f} %; "
        f"{100 * max(left):.1f} to {100 * min(left):.1f} % of the weights alive, rate {arms.dense.rate('dense'):g}"
    )
    return Measurement(text, gap <= -SILENT and lower >= 0.8 * len(seeds))


def kept(arms: Arms) -> Measurement:
    """Accuracies."""
    found = {arm: arms.mean(arm, "accuracy") for arm in ARMS}
    gap = mean(found["AP"]) - mean(found["magnitude"])
    each = "; ".join(f"{arm} {spread([100 * one for one in found[arm]])} %" for arm in ARMS)
    dense = mean(arms.dense.accuracies("dense"))
    return Measurement(f"AP {100 * gap:+.2f} points; {each}; unpruned {100 * dense:.2f} %", gap >= -LOST)
