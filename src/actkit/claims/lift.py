"""LIFT's claims: noise on principal weights hurts most; trained, they learn a new domain and forget less of the old.

Matrices: 512 x 512 of normal numbers, rank 8 of the filter, 5 % of the entries, noise of 3 standard deviations there,
5 seeds; the same for other ranks beside it, as the effect needs a rank far below the width.

Probe: 5 % of the entries of each linear layer in the blocks, rank of the filter a 32nd of the model's width (as 128 is
of 4096), noise of 0.5 root mean squares, 5 seeds; perplexity on rows of the test split.

Training: a small model of Llama's architecture (1.1 M parameters) that has read half of the library's modules goes on
with the reference pages of Python's topics, 300 steps of 128 tokens; the sheet's model of the zoo has read these pages
before. Arms: all weights; LoRA of rank 4; and as many entries as its numbers, principal, of largest magnitude, or at
random, chosen again every 100 steps. All have AdamW with betas 0.9 and 0.95, no decay, and the rate of three that is
best for the arm on pages of the search and calibration splits with the first seed; sparse arms try larger ones. Losses
are of pages of the test split, and for what is forgotten of other modules of the test split. 3 seeds.

On SmolLM2-135M the probe alone. The tables of the paper cannot be checked here.

About 9 minutes of one core; on SmolLM2 (`--subject smollm2`) 2; the probe alone also on Gemma 3 270M
(`--subject gemma3`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from actkit.claims import eva
from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, spread
from actkit.core.ground.largest import largest
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import anatomy
from actkit.core.train.masks import Masks, layer_weights
from actkit.core.train.training import train
from actkit.data import Batches
from actkit.data.text import documents
from actkit.finetuning.adapters import Lora
from actkit.finetuning.lift.lift import Lift
from actkit.finetuning.lift.principal import principal_mask
from actkit.finetuning.lift.probe import weight_probe
from actkit.finetuning.low_rank_training import train_adapter

SHARE = 0.05  # of the entries, in matrices and in the probe
WIDTH, FILTER, NOISE = 512, 8, 3.0
SIGMA, PART = 0.5, 32  # of the probe: noise, and the width over the rank of the filter
RANK, INTERVAL = 4, 100  # of the training
ADAM: dict[str, Any] = {"betas": [0.9, 0.95], "eps": 1e-6}
SPARSE = ("magnitude", "random", "LIFT")
CHOSEN = {"magnitude": "magnitude", "random": "random", "LIFT": "principal"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of matrices, of noise.
        filters: ranks of the filter that are printed beside.
        rows: of 256 tokens, in the probe.
        trainings: seeds of the training.
        steps: of a training.
        rates: that an arm is tried with, by arm.
        batch: rows of 64 tokens of a step.
        pretrained: steps of 1,024 tokens in which the small model is trained first.
        held_out: rows that losses are measured on.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    filters: tuple[int, ...] = (2, 32, 128)
    rows: int = 32
    trainings: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    rates: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "full": (3e-4, 1e-3, 3e-3),
            "LoRA": (1e-3, 3e-3, 1e-2),
            "magnitude": (1e-3, 3e-3, 1e-2),
            "random": (1e-3, 3e-3, 1e-2),
            "LIFT": (1e-3, 3e-3, 1e-2),
        }
    )
    batch: int = 2
    pretrained: int = 400
    held_out: int = 96


REAL_SIZES = Sizes(rows=4)
SPECTRAL = Statement(
    "Noise on principal entries raises the spectral norm most",
    "its Fig. 8",
    "random matrices of 512 x 512, rank 8, 5 %, noise of 3 standard deviations, mean of 5 seeds: the increase is at "
    "least 1.3 x that at random entries and 1.2 x that at the largest, at Frobenius norms within 2 %",
    SYNTHETIC,
)
PROBE = Statement(
    "A language model suffers more from noise on principal weights",
    "noise of scale 0.01 destroys perplexity on principal weights alone (its Fig. 2)",
    "5 % of the entries, noise of 0.5 rms, mean perplexity over 5 seeds, over that without noise: larger than for the "
    "largest weights, and more than 1.3 x that for random ones",
    "swiglu",
)
LEARNS = Statement(
    "Principal weights learn a new domain better than as many others",
    "LLaMA-2-7B 84.66, full 83.53, LoRA 81.25 (Table 1)",
    "mean test loss of 3 seeds, equal counts, rates tuned alike: at most that of the largest weights - 0.01 nats, and "
    "at most that of random ones",
    SMALL,
)
FORGETS = Statement(
    "It forgets less than full training",
    "up to 20 % better on the source domain (abstract)",
    "the same trainings: the loss on the source domain rises by at most 0.8 x the rise of full training",
    SMALL,
)
STATE = Statement(
    "The optimizer's state is small",
    "LLaMA-2-7B 27 GB -> 1.3 GB",
    "bytes of LIFT's state, indices included, <= 12 % of AdamW's in full training",
    SMALL,
)
STATEMENTS = (SPECTRAL, PROBE, *(PROBE.on(name) for name in REAL), LEARNS, FORGETS, STATE)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    name = subject if subject in REAL else "swiglu"
    given = sizes or (REAL_SIZES if name in REAL else Sizes())
    arms = Arms(given)
    experiments: list[Experiment] = []
    if subject in (None, SYNTHETIC):
        experiments.append((SPECTRAL, partial(spectral, given)))
    if subject in (None, name):
        experiments.append((PROBE.on(name), partial(probed, name, given)))
    if subject == SMALL:
        experiments += [
            (LEARNS, partial(learns, arms)),
            (FORGETS, partial(forgets, arms)),
            (STATE, partial(state, arms)),
        ]
    return conduct("lift", experiments, given, subject, progress)


# -- matrices and a model under noise ----------------------------------------------------------------------------------


def masks_of(weight: Tensor, filter_rank: int, seed: int) -> dict[str, Tensor]:
    """As many principal entries, largest ones and random ones."""
    number = int(SHARE * weight.numel())
    drawn = torch.rand(weight.numel(), generator=torch.Generator().manual_seed(seed))
    return {
        "LIFT": principal_mask(weight, filter_rank, k=number, algorithm="gram"),
        "magnitude": largest(weight.detach().abs().float().flatten(), number).view(weight.shape),
        "random": largest(drawn, number).view(weight.shape),
    }


def spectral(sizes: Sizes) -> Measurement:
    """Increases of the spectral norm, and the Frobenius norms."""
    found = {rank: _increases(rank, sizes) for rank in (FILTER, *sizes.filters)}
    norms, sides = found[FILTER]
    means = {name: mean(each) for name, each in norms.items()}
    largest_gap = max(mean(each) for each in sides.values()) / min(mean(each) for each in sides.values()) - 1
    others = "; ".join(
        f"rank {rank}: {wide:.2f}, {wide / means['random']:.2f} x random"
        for rank in sizes.filters
        for wide in [mean(found[rank][0]["LIFT"])]
    )
    text = (
        f"rank {FILTER}: LIFT {means['LIFT']:.2f} ({means['LIFT'] / means['random']:.2f} x random, "
        f"{means['LIFT'] / means['magnitude']:.2f} x magnitude), magnitude {means['magnitude']:.2f}, random "
        f"{means['random']:.2f}; Frobenius norms of the noise within {largest_gap:.2%}; {others}"
    )
    passed = means["LIFT"] >= 1.3 * means["random"] and means["LIFT"] >= 1.2 * means["magnitude"]
    return Measurement(text, passed and largest_gap <= 0.02)


def _increases(filter_rank: int, sizes: Sizes) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By choice, how much the spectral norm rises and the Frobenius norm of the noise, for each seed."""
    rises: dict[str, list[float]] = {}
    sides: dict[str, list[float]] = {}
    for seed in sizes.seeds:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        noise = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) * NOISE * weight.std()
        before = float(torch.linalg.matrix_norm(weight, 2))
        for name, mask in masks_of(weight, filter_rank, seed).items():
            rises.setdefault(name, []).append(float(torch.linalg.matrix_norm(weight + noise * mask, 2)) - before)
            sides.setdefault(name, []).append(float((noise * mask).norm()))
    return rises, sides


def probed(name: str, sizes: Sizes) -> Measurement:
    """Perplexities of a language model with noise on its weights."""
    subject = Subject(name, calibration=1, split="train", held_out=sizes.rows)
    view = anatomy(subject.model)
    paths = {f"{linear.path}.weight" for block in view.blocks for linear in block.linears()}
    weights = {each: weight for each, weight in layer_weights(subject.model).items() if each in paths}
    config: Any = subject.model.config
    filter_rank = config.hidden_size // PART
    choices = {each: masks_of(weight, filter_rank, index) for index, (each, weight) in enumerate(weights.items())}
    masks = {
        arm: Masks({each: found[arm] for each, found in choices.items()}) for arm in ("LIFT", "magnitude", "random")
    }
    probe = weight_probe(
        subject.model,
        masks,
        partial(perplexity, batches=subject.held_out),
        sigma=SIGMA,
        seeds=sizes.seeds,
        progress=False,
    )
    ratios = {choice.name: choice.mean / probe.before for choice in probe.choices}
    each = "; ".join(f"{choice.name} {spread(list(choice.values), '.2f')}" for choice in probe.choices)
    text = (
        f"perplexity {probe.before:.2f} -> {each}: x {ratios['LIFT']:.2f}, {ratios['magnitude']:.2f} and "
        f"{ratios['random']:.2f}; {len(weights)} layers, rank {filter_rank}"
    )
    return Measurement(text, ratios["LIFT"] > ratios["magnitude"] and ratios["LIFT"] > 1.3 * ratios["random"])


def perplexity(model: nn.Module, batches: Any) -> float:
    """On held-out text."""
    return measure_quality(model, batches, task="language", resamples=1, progress=False).metrics["perplexity"].value


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """A model after its training.

    Attributes:
        choosing: loss on the pages that rates are chosen by.
        target: loss on test pages.
        source: loss on other modules of the test split.
        numbers: that were trained.
        state: bytes of the optimizer's state.
    """

    choosing: float
    target: float
    source: float
    numbers: int
    state: int


@dataclass
class Arms:
    """The trained models; each is trained when it is first needed.

    Attributes:
        sizes: how much is trained.
    """

    sizes: Sizes
    _base: nn.Module | None = None
    _texts: dict[str, Batches] = field(default_factory=dict)
    _found: dict[tuple[str, int, float], Tuned] = field(default_factory=dict)

    @property
    def shape(self) -> eva.Sizes:
        """Rows and pages, read as EVA's claim reads them."""
        sizes = self.sizes
        return eva.Sizes(steps=sizes.steps, rows=sizes.batch, held_out=sizes.held_out, pretrained=sizes.pretrained)

    @property
    def base(self) -> nn.Module:
        """The small model before the new domain."""
        if self._base is None:
            self._base = eva.pretrained(self.shape)
            modules = [each for each in documents("test") if eva.half(each.name)]
            shape, model = self.shape, self._base
            self._texts = {
                "choosing": eva.topics(model, ("search", "calibration"), shape, None),
                "target": eva.topics(model, ("test",), shape, None),
                "source": eva.read(model, modules, shape.length, shape.rows)[: self.sizes.held_out // shape.rows],
            }
        return self._base

    def loss(self, model: nn.Module, text: str) -> float:
        """Nats per token on one of the texts."""
        return math.log(perplexity(model, self._texts[text]))

    def before(self, text: str) -> float:
        """The loss of the model before training."""
        return self.loss(self.base, text)

    def rate(self, arm: str) -> float:
        """The best of an arm's rates on the pages to choose by, with the first seed."""
        seed = self.sizes.trainings[0]
        return min(self.sizes.rates[arm], key=lambda rate: self.tuned(arm, seed, rate).choosing)

    def runs(self, arm: str) -> list[Tuned]:
        """All seeds of an arm, at its rate."""
        return [self.tuned(arm, seed, self.rate(arm)) for seed in self.sizes.trainings]

    def tuned(self, arm: str, seed: int, rate: float) -> Tuned:
        """One training."""
        if (arm, seed, rate) not in self._found:
            model, sizes = copy.deepcopy(self.base), self.shape
            text = eva.topics(model, ("train",), sizes, sizes.rows * sizes.steps, seed)
            settings: dict[str, Any] = {
                "validation": self._texts["choosing"][:2],
                "steps": sizes.steps,
                "learning_rate": rate,
                "weight_decay": 0.0,
                "seed": seed,
                "keep": "last",
                "evaluate_every": sizes.steps,
                "progress": False,
            }
            if arm == "LoRA":
                layers = Lora(rank=RANK).layers(model, text)
                trained = train_adapter(model, text, layers=layers, optimizer={"adamw": ADAM}, **settings)
            elif arm == "full":
                trained = train(model, text, optimizer={"adamw": ADAM}, **settings)
            else:
                rule = Lift(
                    lora_rank=RANK, rank_filter=RANK, update_interval=INTERVAL, choose=CHOSEN[arm], seed=seed, **ADAM
                )
                trained = train(model, text, rules=[rule], **settings)
            report = (trained.history[-1].reports or {}).get("0.Lift", {})
            numbers = trained.trainable
            choosing, target, source = (self.loss(model, each) for each in ("choosing", "target", "source"))
            state_bytes = report.get("state_bytes", 8 * numbers)
            self._found[arm, seed, rate] = Tuned(choosing, target, source, numbers, state_bytes)
        return self._found[arm, seed, rate]


def learns(arms: Arms) -> Measurement:
    """Losses on the new domain."""
    losses = {arm: [run.target for run in arms.runs(arm)] for arm in arms.sizes.rates}
    gaps = {arm: mean(losses["LIFT"]) - mean(losses[arm]) for arm in losses}
    each = "; ".join(f"{arm} {spread(found, '.4f')} (rate {arms.rate(arm):g})" for arm, found in losses.items())
    text = (
        f"LIFT against magnitude {gaps['magnitude']:+.4f}, random {gaps['random']:+.4f}, LoRA {gaps['LoRA']:+.4f}, "
        f"full {gaps['full']:+.4f} nats; before {arms.before('target'):.4f}; {each}"
    )
    return Measurement(text, gaps["magnitude"] <= -0.01 and gaps["random"] <= 0)


def forgets(arms: Arms) -> Measurement:
    """Losses on the old domain."""
    before = arms.before("source")
    rises = {arm: [run.source - before for run in arms.runs(arm)] for arm in arms.sizes.rates}
    share = mean(rises["LIFT"]) / mean(rises["full"])
    each = "; ".join(f"{arm} {spread(found, '.4f')}" for arm, found in rises.items())
    return Measurement(f"LIFT's rise is {share:.2f} x that of full training; before {before:.4f}; {each}", share <= 0.8)


def state(arms: Arms) -> Measurement:
    """Bytes of optimizers' states."""
    sizes = {arm: arms.runs(arm)[0] for arm in ("full", "LoRA", "LIFT")}
    share = sizes["LIFT"].state / sizes["full"].state
    each = ", ".join(f"{arm} {run.state:,} bytes" for arm, run in sizes.items())
    return Measurement(f"{share:.1%} of full training's: {each} (full and LoRA by count, 8 per number)", share <= 0.12)
