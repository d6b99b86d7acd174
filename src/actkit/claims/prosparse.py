"""ProSparse's claims: an L1 factor that rises in stages costs less than a constant one; ReLU alone is not as sparse.

A SwiGLU model of 1.1 M parameters is trained once from scratch and its SiLU replaced by ReLU. From there three arms are
trained on for 300 steps, in three seeds (a seed orders the batches, the same for all arms): (a) ReLU only, (b) a
constant factor from step 60 on, (c) ProSparse, silent for 60 steps. The factor of (b) is looked for in at most three
runs of the first seed, by the sparsity on the validation split; all that is reported is of the test split. Sparsity is
the share of exact zeros in the hidden values, mean over the layers. The last peak of (c) is the smallest of 2, 8 and 32
that was 12 points sparser than (a) in pilot runs of another seed, on the validation split and without (b). Scores and
speeds of 7B and 13B models cannot be checked here.

About 11 minutes on one core.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import mean
from typing import Any

from torch import nn

from actkit.claims.outcome import SMALL, Measurement, Outcome, Statement, conduct
from actkit.claims.small_models import language_model, text
from actkit.claims.subject import spread
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.runner import apply
from actkit.core.recipe.stage import Train
from actkit.core.train.staged_run import run as run_stages
from actkit.data import Batches
from actkit.functions.swap import Swap
from actkit.sparsity.lazy_neuron.neuron_activity import neuron_activity
from actkit.sparsity.prosparse.fatrelu import FatRelu, sweep_threshold
from actkit.sparsity.prosparse.prosparse import ProSparse

LENGTH = 64  # tokens of a row; 16 rows a step
START, RATE = 2e-3, 1e-3  # learning rates: from scratch, and of the arms
SILENT = 0.2  # share of an arm's steps without a penalty, in (b) and (c)
ENDS = (0.25, 0.5, 0.6, 0.9, 1.0)  # of (c): warm-up, half-sine, plateau, half-sine, plateau
RATIOS = (1 / 40, 1 / 4, 1 / 4, 1, 1)  # of the 7B schedule's peaks to its last
GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
MATCH, GAIN = 0.015, 0.10  # sparsities of (b) and (c) differ by at most, of (a) and (c) by at least


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured.

    Attributes:
        seeds: of the batches.
        peak: the last factor of (c).
        start: steps of the training from scratch.
        steps: of an arm.
        tries: runs that look for the factor of (b).
        training: rows of 64 tokens; None for all of the split.
        validation: the same.
        held_out: the same.
        hidden: size of the model.
        layers: of the model.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    peak: float = 2.0
    start: int = 800
    steps: int = 300
    tries: int = 3
    training: int | None = None
    validation: int = 256
    held_out: int | None = None
    hidden: int = 128
    layers: int = 4


SPARSER = Statement(
    "Training with ProSparse leaves far more zeros than training with ReLU alone",
    "LLaMA2-7B: 88.1 % of the hidden values are 0, with ReLU alone 66.0 % at equal tokens (and the higher score)",
    "300 continued steps, in each of 3 seeds: sparsity(c) - sparsity(a) is at least 10 points",
    SMALL,
)
PROGRESSIVE = Statement(
    "At equal sparsity, a factor that rises in stages costs less quality than a constant one",
    "LLaMA2-7B: mean score 38.46 at 88.1 %; with a constant factor 36.34 at 88.6 %",
    "sparsity(b) is within 1.5 points of sparsity(c) in each of 3 seeds, its factor found in at most 3 runs, and mean "
    "perplexity(c) is at most mean perplexity(b)",
    SMALL,
)
THRESHOLD = Statement(
    "FATReLU adds zeros after training at almost no cost",
    "LLaMA2-7B: 88.11 % to 89.32 % at t = 0.01",
    "arm (c), t the largest that costs at most 0.25 % of perplexity on the validation split; in each of 3 seeds "
    "sparsity rises and perplexity changes by less than 0.5 % on the test split",
    SMALL,
)
STATEMENTS = (SPARSER, PROGRESSIVE, THRESHOLD)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    arms = Arms(sizes)
    experiments = [
        (SPARSER, partial(sparser, arms)),
        (PROGRESSIVE, partial(progressive, arms)),
        (THRESHOLD, partial(threshold, arms)),
    ]
    return conduct("prosparse", experiments, sizes, subject, progress)


@dataclass(frozen=True)
class Arm:
    """A trained model.

    Attributes:
        model: the model.
        sparsity: on the test split.
        perplexity: on the test split.
    """

    model: nn.Module
    sparsity: float
    perplexity: float


class Arms:
    """The three arms, one model per seed; each is trained when it is first needed."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._fresh = language_model("silu", hidden=sizes.hidden, layers=sizes.layers)
        self._training = text(self._fresh, "train", sizes.training, length=LENGTH)
        self.validation = text(self._fresh, "search", sizes.validation, length=LENGTH)
        self.test = text(self._fresh, "test", sizes.held_out, length=LENGTH)
        self.tried: list[tuple[float, float]] = []  # factor of (b), sparsity on the validation split

    @cached_property
    def swiglu(self) -> nn.Module:
        """The model that all arms come from, before its activations are replaced."""
        return self._staged(self._fresh, [stage_of(self.sizes.start, START)])

    @cached_property
    def relu(self) -> list[Arm]:
        """(a): ReLU only."""
        return [self._measured(self._continued((), seed)) for seed in self.sizes.seeds]

    @cached_property
    def rising(self) -> list[Arm]:
        """(c): ProSparse."""
        return [self._measured(self._continued((self.rule,), seed)) for seed in self.sizes.seeds]

    @cached_property
    def constant(self) -> list[Arm]:
        """(b), with the factor that came closest to the sparsity of (c) in the first seed."""
        first, *others = self.sizes.seeds
        wanted = sparsity(self.rising[0].model, self.validation)
        tried: list[tuple[float, float, nn.Module]] = []
        for _ in range(self.sizes.tries):
            factor = next_factor([each[:2] for each in tried], wanted, self._mean_factor())
            model = self._continued((constant_factor(factor),), first)
            tried.append((factor, sparsity(model, self.validation), model))
        factor, _, model = min(tried, key=lambda each: abs(each[1] - wanted))
        self.tried = [each[:2] for each in tried]
        return [
            self._measured(model),
            *(self._measured(self._continued((constant_factor(factor),), seed)) for seed in others),
        ]

    @property
    def rule(self) -> ProSparse:
        """The schedule of (c)."""
        return ProSparse(peaks=tuple(self.sizes.peak * ratio for ratio in RATIOS), ends=ENDS, start=SILENT)

    def _mean_factor(self) -> float:
        """Of (c), over the steps with a penalty."""
        factors = [self.rule.factor(step / self.sizes.steps) for step in range(self.sizes.steps)]
        return mean(factor for factor in factors if factor)

    def _continued(self, rules: tuple[ProSparse, ...], seed: int) -> nn.Module:
        return self._staged(
            self.swiglu, [Swap(where="silu", new="relu"), stage_of(self.sizes.steps, RATE, rules, seed)]
        )

    def _staged(self, model: nn.Module, recipe: list[Any]) -> nn.Module:
        data = [(self._training, self.validation) if isinstance(item, Train) else None for item in recipe]
        return run_stages(copy.deepcopy(model), recipe, data, undo="off", progress=False).model

    def _measured(self, model: nn.Module) -> Arm:
        return Arm(model, sparsity(model, self.test), perplexity(model, self.test))


def stage_of(steps: int, rate: float, rules: tuple[ProSparse, ...] = (), seed: int = 0) -> Train:
    """A training that keeps its last weights."""
    return Train(rules=rules, steps=steps, learning_rate=rate, evaluate_every=steps, keep="last", seed=seed)


def constant_factor(factor: float) -> ProSparse:
    """The rule of (b): one stage."""
    return ProSparse(peaks=(factor,), ends=(1.0,), start=SILENT)


def next_factor(tried: list[tuple[float, float]], wanted: float, first: float) -> float:
    """Choose the factor to try next.

    It is `first`, then twice or half of that, then where a straight line through the last two, sparsity over log
    factor, meets `wanted`; never more than 4 times or less than a quarter.

    Args:
        tried: (factor, sparsity) so far.
        wanted: the sparsity to reach.
        first: the factor to begin with.
    """
    if not tried:
        return first
    factor, found = tried[-1]
    octaves = 1.0 if found < wanted else -1.0
    if len(tried) > 1:
        before, less = tried[-2]
        slope = (found - less) / math.log2(factor / before)
        octaves = (wanted - found) / slope if slope > 0 else octaves
    return factor * 2 ** max(-2.0, min(2.0, octaves))


def sparsity(model: nn.Module, batches: Batches) -> float:
    """The share of exact zeros in the hidden values, mean over the layers."""
    return 1 - neuron_activity(model, batches, progress=False).share


def perplexity(model: nn.Module, batches: Batches) -> float:
    """Perplexity of the model on the batches."""
    return measure_quality(model, batches, task="language", resamples=1, progress=False).metrics["perplexity"].value


# -- what is measured --------------------------------------------------------------------------------------------------


def sparser(arms: Arms) -> Measurement:
    """Sparsity of (c) over that of (a), seed by seed."""
    gains = [c.sparsity - a.sparsity for a, c in zip(arms.relu, arms.rising, strict=True)]
    here = (
        f"sparsity: (a) {_sparsities(arms.relu)}, (c) {_sparsities(arms.rising)}, higher by "
        f"{spread([100 * gain for gain in gains], '.1f')} points; perplexity: SwiGLU before "
        f"{perplexity(arms.swiglu, arms.test):.2f}, (a) {_perplexities(arms.relu)}, (c) {_perplexities(arms.rising)}; "
        f"{len(gains)} seeds"
    )
    return Measurement(here, min(gains) >= GAIN)


def progressive(arms: Arms) -> Measurement:
    """Compare the perplexity of (b) and (c) if their sparsities match."""
    b, c = arms.constant, arms.rising
    apart = max(abs(mine.sparsity - other.sparsity) for mine, other in zip(b, c, strict=True))
    cost = [arm.perplexity for arm in b], [arm.perplexity for arm in c]
    tried = ", ".join(f"{factor:.3g} gave {found:.1%}" for factor, found in arms.tried)
    here = (
        f"sparsity: (b) {_sparsities(b)}, (c) {_sparsities(c)}, at most {100 * apart:.1f} points apart; perplexity: "
        f"(b) {_perplexities(b)}, (c) {_perplexities(c)}, (a) {_perplexities(arms.relu)}. Last peak of (c) "
        f"{arms.sizes.peak:g}; factors tried for (b), on the validation split: {tried}"
    )
    return Measurement(here, apart <= MATCH and mean(cost[1]) <= mean(cost[0]))


def threshold(arms: Arms) -> Measurement:
    """FATReLU on (c): t chosen on the validation split, zeros and perplexity on the test split."""
    chosen, gains, costs = [], [], []
    for arm in arms.rising:
        point = sweep_threshold(arm.model, arms.validation, GRID, progress=False).choose(0.0025)
        applied = apply(arm.model, FatRelu(threshold=point.threshold), undo="memory", progress=False)
        chosen.append(point.threshold)
        gains.append(sparsity(arm.model, arms.test) - arm.sparsity)
        costs.append(perplexity(arm.model, arms.test) / arm.perplexity - 1)
        applied.undo()
    loose = [
        f"({name}) {sweep_threshold(arm.model, arms.validation, GRID, progress=False).choose(0.01).sparsity:.1%}"
        for name, arm in zip("abc", (arms.relu[0], arms.constant[0], arms.rising[0]), strict=True)
    ]
    here = (
        f"t {', '.join(f'{t:g}' for t in chosen)}; sparsity higher by {spread([100 * g for g in gains], '.2f')} "
        f"points, perplexity by {spread([100 * cost for cost in costs], '.2f')} %. Each arm's sparsity with perplexity "
        f"up by at most 1 % (validation split, first seed): {', '.join(loose)}"
    )
    return Measurement(here, min(gains) > 0 and max(map(abs, costs)) < 0.005)


def _sparsities(arms: list[Arm]) -> str:
    return spread([arm.sparsity for arm in arms], ".1%")


def _perplexities(arms: list[Arm]) -> str:
    return spread([arm.perplexity for arm in arms])
