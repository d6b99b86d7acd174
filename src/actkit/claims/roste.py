"""RoSTE's claims: trained through the rounding, rotated if that lowers its error, a model loses the least.

The zoo's SwiGLU model (5 M parameters), and its twin with planted outliers, are fine-tuned from docstrings to the
topics of Python's reference, which the standard library holds, at W4A4KV4: weights by rows and inputs per token with
zero points, keys and values per token and head without. Six arms, from one start, at equal steps: plain; that, then
rounded; that, rotated whole, then rounded; trained rounded without rotations (STE); the same, rotated whole; RoSTE.
The learning rate, of three, and what ranges are multiplied by, of two, are the best of each arm on the validation
topics, in the first seed; what is reported is the loss on held-out topics. The bounds of the theory are tested on
vectors with one outlier. Scores of ROUGE and of Tulu's tasks cannot be checked here.

Two hours and more on one core. By default it is a smaller run (60 steps, ranges as they are), of 20 minutes; `FULL` is
the whole.

On SmolLM2-135M (in float32) nothing is planted; the start is its off-grid twin, as its weights were rounded to 4 bits
before they were published. That is a much smaller run (`REAL_SIZES`): 20 steps, one learning rate for all, one seed, 64
rows of the held-out topics, without the arm that is rotated whole and trained.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from actkit import zoo
from actkit.claims.outcome import SYNTHETIC, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.hadamard import Rotation
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.runner import apply
from actkit.core.recipe.transform import Transform
from actkit.core.train.training import train
from actkit.quantization.fake_quantize import FakeQuantize, TrainedInputs, TrainedWeights
from actkit.quantization.freeze import Freeze
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.roste import Roste
from actkit.quantization.rotate import Rotate
from actkit.zoo.off_grid import off_grid_twin
from actkit.zoo.outliers import outlier_twin

REAL = "smollm2"
LENGTH, BATCH = 64, 4  # tokens of a row, rows of a step
SHARE = {"test": 0.15, "validation": 0.1}  # of the topics; the others train
MOST = {"test": 128, "validation": 64}  # rows of these
HELD_OUT_ON_REAL = 64  # rows of the topics there
OUTLIERS = {"channels": 4, "factor": 30.0}  # of the twin
PLAIN, ROUNDED, ROTATED_ROUNDED = "plain", "plain, rounded", "plain, rotated, rounded"
STE, STE_ROTATED, ROSTE = "STE", "STE, rotated", "RoSTE"
ARMS = (PLAIN, ROUNDED, ROTATED_ROUNDED, STE, STE_ROTATED, ROSTE)
ARMS_ON_REAL = tuple(arm for arm in ARMS if arm != STE_ROTATED)
EVERY, RESIDUAL = Rotate(), Rotate(sites=("R1",))
BITS, CLOSED, SLACK = 4, 0.3, 0.01
SIZES, DELTA = (64, 256, 1024), 0.05  # of the theory


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured.

    Attributes:
        seeds: of the order of the batches.
        steps: of a training.
        rates: learning rates that each arm chooses from.
        clips: what ranges are multiplied by; each rounded arm chooses from them.
        calibration: rows that the rotations are chosen on; the paper's n.
        draws: of the theory, for each size.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 60
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    clips: tuple[float, ...] = (1.0,)
    calibration: int = 128
    draws: int = 1000


FULL = Sizes(steps=300, clips=(1.0, 0.95))  # hours
REAL_SIZES = Sizes(seeds=(0,), steps=20, rates=(1e-4,), calibration=32, draws=0)

ON_TWIN = Statement(
    "Trained rounded and rotated if it pays, a model loses less than trained without rotations, or rounded afterwards",
    "W4A4KV4, ROUGE on TL;DR: Pythia-1B trained plainly 23.91, STE 22.37, RoSTE 23.07; Qwen2.5-0.5B: STE 21.67, RoSTE "
    "22.28; QuaRot on Pythia-6.9B 7.46, RoSTE 23.66",
    "twin with outliers, loss on held-out topics: RoSTE below STE and below plain training, rotated, rounded in each "
    "of 3 seeds, and it closes at least 30 % of the gap between STE and plain training",
    "swiglu",
)
ON_NATURAL = Statement(
    "Without outliers the choice of rotations costs nothing",
    "Pythia-1B, ROUGE: no rotation 22.37, all rotated 13.09, chosen 23.07",
    "the model as it is, loss on held-out topics: RoSTE at most STE + 0.01, mean over 3 seeds",
    "swiglu",
)
CHOICE = Statement(
    "The rotations chosen have an error no larger than none and all, and are neither none nor all",
    "rotations are chosen for each layer and site; how many are is not reported",
    "the twin: E of the choice is at most that of no rotation and of all; one site at least is rotated, one left",
    "swiglu",
)
THEORY = Statement(
    "A random rotation bounds the error of rounding a vector with an outlier, which its largest value bounds otherwise",
    "with probability 1 - delta, |Q(R^T w) - R^T w|^2 <= log(4 d / delta) |w|^2 / (2 (2^(b-1) - 1)^2); without R "
    "|Q(w) - w|^2 <= d max w_i^2 / (4 (2^(b-1) - 1)^2)",
    "d of 64, 256 and 1024, 4 bits, one outlier, 1000 draws each: the second holds in every draw, the first in a share "
    "of 1 - delta at least, delta 0.05",
    SYNTHETIC,
)
ON_REAL = replace(
    ON_TWIN.on(REAL),
    condition="off-grid twin, loss on held-out topics: RoSTE below STE and below plain training, rotated, rounded, and "
    "it closes at least 30 % of the gap between STE and plain training",
)
CHOICE_ON_REAL = replace(
    CHOICE.on(REAL),
    condition="off-grid twin: E of the choice is at most that of no rotation and of all; one site at least is rotated, "
    "one left",
)
STATEMENTS = (ON_TWIN, ON_NATURAL, CHOICE, THEORY, ON_REAL, CHOICE_ON_REAL)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject == REAL:
        sizes = sizes or REAL_SIZES
        real = Bench(sizes, off_grid_twin(zoo.load(REAL, dtype=torch.float32)), REAL)
        real.test, real.validation = real.test[: HELD_OUT_ON_REAL // BATCH], real.validation[:1]
        asked = [(ON_REAL, partial(on_twin, real, ARMS_ON_REAL)), (CHOICE_ON_REAL, partial(choice, real))]
        return conduct("roste", asked, sizes, subject, progress)
    sizes = sizes or Sizes()
    twin, natural = Bench(sizes, small(outliers=True)), Bench(sizes, small(outliers=False))
    experiments = [
        (ON_TWIN, partial(on_twin, twin)),
        (ON_NATURAL, partial(on_natural, natural)),
        (CHOICE, partial(choice, twin)),
        (THEORY, partial(theory, sizes)),
    ]
    return conduct("roste", experiments, sizes, subject, progress)


def small(outliers: bool) -> nn.Module:
    """The zoo's model, or its twin with outliers."""
    model = zoo.load("swiglu", dtype=torch.float32)
    return outlier_twin(model, **OUTLIERS) if outliers else model  # type: ignore[arg-type]


class Bench:
    """The arms from one start.

    Args:
        sizes: how much is trained.
        start: the model that is trained.
        tokenizer: the name of its tokenizer in the zoo.
    """

    def __init__(self, sizes: Sizes, start: nn.Module, tokenizer: str = "swiglu") -> None:
        self.sizes, self.start = sizes, start
        self.train, self.validation, self.test = (
            rows_of(split, tokenizer) for split in ("train", "validation", "test")
        )
        self.best: dict[str, tuple[float, float]] = {}  # rate and clip of each arm
        self._losses: dict[tuple[str, int], float] = {}

    @property
    def calibration(self) -> list[dict[str, Tensor]]:
        """The training rows that rotations are chosen on."""
        return self.train[: math.ceil(self.sizes.calibration / BATCH)]

    def loss(self, arm: str, seed: int) -> float:
        """Return the loss of an arm on the held-out topics, at its best settings on the validation topics.

        Args:
            arm: PLAIN, ROUNDED and so on.
            seed: of the order of the batches.
        """
        if (arm, seed) not in self._losses:
            first = self.sizes.seeds[0]
            if arm not in self.best:
                choices = [(rate, clip) for rate in self.sizes.rates for clip in self._clips(arm)]
                tried = {choice: self._tried(arm, first, *choice) for choice in choices}
                self.best[arm] = min(choices, key=lambda choice: tried[choice][0])
                self._losses[arm, first] = tried[self.best[arm]][1]
            if seed != first:
                self._losses[arm, seed] = self._tried(arm, seed, *self.best[arm])[1]
        return self._losses[arm, seed]

    def _clips(self, arm: str) -> Sequence[float]:
        return (1.0,) if arm == PLAIN else self.sizes.clips

    def _tried(self, arm: str, seed: int, rate: float, clip: float) -> tuple[float, float]:
        """Loss on the validation and on the held-out topics."""
        if arm in (PLAIN, ROUNDED, ROTATED_ROUNDED):
            model = copy.deepcopy(self._plain(seed, rate))
        else:
            model = copy.deepcopy(self.start)
            self._apply(model, [*self._rotations(arm), *rounding(clip)])
            model = self._trained(model, seed, rate)
            self._apply(model, [Freeze()])
        if arm in (ROUNDED, ROTATED_ROUNDED):
            self._apply(model, [*self._rotations(arm), *rounding(clip)])
            self._apply(model, [Freeze()])
        return loss_of(model, self.validation), loss_of(model, self.test)

    @cache  # noqa: B019  # a bench lives as long as its run
    def _plain(self, seed: int, rate: float) -> nn.Module:
        return self._trained(copy.deepcopy(self.start), seed, rate)

    def _rotations(self, arm: str) -> list[Transform]:
        if arm in (STE_ROTATED, ROTATED_ROUNDED):
            return [EVERY]
        return [RESIDUAL, Roste()] if arm == ROSTE else []

    def _apply(self, model: nn.Module, recipe: list[Transform]) -> Any:
        return apply(model, recipe, self.calibration, undo="off", progress=False).report

    def _trained(self, model: nn.Module, seed: int, rate: float) -> nn.Module:
        settings: dict[str, Any] = {"steps": self.sizes.steps, "learning_rate": rate, "seed": seed, "keep": "last"}
        every = self.sizes.steps
        return train(
            model, self.train, validation=self.validation, evaluate_every=every, progress=False, **settings
        ).model

    def chosen(self) -> list[dict[str, Any]]:
        """What RoSTE chose: site, its error without and with the rotation."""
        report = self._apply(copy.deepcopy(self.start), [RESIDUAL, Roste()])
        return [values for _, _, values in report.values if "plain" in values]


def rounding(clip: float) -> list[Transform]:
    """W4A4KV4, to be trained or frozen at once.

    Args:
        clip: what ranges are multiplied by.
    """
    weights, inputs = TrainedWeights(bits=BITS, clip=clip), TrainedInputs(bits=BITS, clip=clip)
    return [QuantizeCache(bits=BITS), FakeQuantize(weights=weights, inputs=inputs)]


@cache
def rows_of(split: str, name: str = "swiglu") -> list[dict[str, Tensor]]:
    """Batches of the topics of a split: 'train', 'validation' or 'test'.

    Args:
        split: which topics; they are told apart by a hash of their names.
        name: of the tokenizer, whose token 0 ends a text.
    """
    tokenizer = zoo.tokenizer(name)
    ids: list[int] = []
    for name in sorted(topics):
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
        test, validation = SHARE["test"], SHARE["test"] + SHARE["validation"]
        own = "test" if place < test else "validation" if place < validation else "train"
        if own == split:
            ids += [*tokenizer(topics[name])["input_ids"], 0]
    whole = torch.tensor(ids)[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    chosen = whole[order][: MOST.get(split)]
    return [{"input_ids": rows} for rows in chosen.split(BATCH) if len(rows) == BATCH]


def loss_of(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Mean loss in nats per token."""
    found = measure_quality(model, batches, task="language", resamples=1, progress=False)
    return math.log(found.metrics["perplexity"].value)


# -- what is measured --------------------------------------------------------------------------------------------------


def on_twin(bench: Bench, arms: Sequence[str] = ARMS) -> Measurement:
    """The arms from the twin."""
    found = {arm: [bench.loss(arm, seed) for seed in bench.sizes.seeds] for arm in arms}
    closed = [
        (ste - ours) / (ste - plain) for plain, ste, ours in zip(found[PLAIN], found[STE], found[ROSTE], strict=True)
    ]
    below = all(
        ours < min(ste, rounded)
        for ours, ste, rounded in zip(found[ROSTE], found[STE], found[ROTATED_ROUNDED], strict=True)
    )
    here = f"{_losses(found)}; {_settings(bench)}; RoSTE closes {spread(closed, '.0%')} of the gap; {len(closed)} seeds"
    return Measurement(here, below and min(closed) >= CLOSED)


def on_natural(bench: Bench) -> Measurement:
    """The arms from the model as it is."""
    found = {arm: [bench.loss(arm, seed) for seed in bench.sizes.seeds] for arm in (PLAIN, STE, STE_ROTATED, ROSTE)}
    ours, ste = (sum(found[arm]) / len(found[arm]) for arm in (ROSTE, STE))
    here = f"{_losses(found)}; {_settings(bench)}; RoSTE {ours - ste:+.3f} over STE; {len(found[ROSTE])} seeds"
    return Measurement(here, ours <= ste + SLACK)


def choice(bench: Bench) -> Measurement:
    """The sites and their errors."""
    found = bench.chosen()
    none, every = (sum(each[name] for each in found) for name in ("plain", "rotated"))
    chosen = sum(min(each["plain"], each["rotated"]) for each in found)
    counts = {
        site: (
            sum(each["rotated"] < each["plain"] for each in found if each["site"] == site),
            sum(each["site"] == site for each in found),
        )
        for site in ("R2", "R3", "R4")
    }
    rotated = sum(taken for taken, _ in counts.values())
    shares = ", ".join(f"{site} in {taken} of {of} blocks" for site, (taken, of) in counts.items())
    here = f"E {none:.4g} without rotations, {every:.4g} with all, {chosen:.4g} as chosen: {shares}"
    return Measurement(here, chosen <= min(none, every) and 0 < rotated < len(found))


def theory(sizes: Sizes) -> Measurement:
    """Both bounds on drawn vectors, normal but for one value that is 50 times as large."""
    grid = IntegerGrid(BITS, symmetric=True)
    levels = 2 ** (BITS - 1) - 1
    parts, passed = [], True
    for size in SIZES:
        generator = torch.Generator().manual_seed(size)
        w = torch.randn(sizes.draws, size, generator=generator, dtype=torch.float64)
        w[:, 0] *= 50
        turned = torch.stack([Rotation.drawn(size, f"{draw}")(row) for draw, row in enumerate(w)])
        plain, rotated = ((grid.fake(x) - x).square().sum(-1) for x in (w, turned))
        least = (plain <= size * w.abs().amax(-1).square() / (4 * levels**2)).double().mean()
        random = math.log(4 * size / DELTA) * w.square().sum(-1) / (2 * levels**2)
        share = (rotated <= random).double().mean()
        parts.append(
            f"d = {size}: {float(least):.1%} and {float(share):.1%}, errors {plain.mean():.3g}, {rotated.mean():.3g}"
        )
        passed &= bool(least == 1) and bool(share >= 1 - DELTA)
    return Measurement(f"the bound without and with a rotation holds for {'; '.join(parts)}", passed)


def _losses(found: dict[str, list[float]]) -> str:
    return "loss: " + ", ".join(f"{arm} {spread(values, '.3f')}" for arm, values in found.items())


def _settings(bench: Bench) -> str:
    rates = ", ".join(f"{arm} {rate:g}" for arm, (rate, _) in bench.best.items())
    return f"{bench.sizes.steps} steps, rates: {rates}"
