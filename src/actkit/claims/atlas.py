"""aTLAS's claims: coefficients per block compose task vectors better than one for all, and adapt from few examples.

A small vision transformer is trained on the 8 x 8 digits, and its encoder fine-tuned, under the same frozen head, on
six tasks of the same digits: inverted, rotated, mirrored, noisy, thickened and shifted. 1,085 images to train, 374 to
learn coefficients and to choose by (the search and calibration splits), 338 to test. 3 seeds, of weights, batches and
noise.

Addition: one model for all six tasks. Isotropic search tries 21 coefficients for all vectors together; isotropic and
block-wise learning minimise the mean loss over the 374 images of each task: AdamW, decay 0.1, batches of 128, 20
epochs, gradients clipped at 1, the epoch of the best mean relative accuracy there, and the rate of three that is best
so with the first seed. An accuracy is relative to that of the model fine-tuned on the task.

Few shots: a seventh task, digits of low contrast, that no vector has seen; 1 or 4 images of each class, 100 steps with
a cosine. aTLAS with the six vectors, training of the whole encoder, and LoRA of rank 4, each at the rate of three that
does best on the 374 images with the first seed.

The CLIP models and 22 data sets of the paper cannot be checked here. About 14 minutes of one core.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from actkit.claims.digit_arms import Images, accuracy, in_batches
from actkit.claims.outcome import SMALL, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.small_models import vision_transformer
from actkit.claims.subject import spread
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.store.deltas import Delta
from actkit.core.train.score import Score
from actkit.core.train.training import Trained, train
from actkit.data import Split, digits
from actkit.data.image_tasks import ImageTask, image_task
from actkit.finetuning.adapters import Lora
from actkit.finetuning.atlas.atlas import Atlas, isotropic_search
from actkit.finetuning.low_rank_training import train_adapter

TASKS: tuple[ImageTask, ...] = ("inverted", "rotated", "mirrored", "noisy", "thickened", "shifted")
UNSEEN: ImageTask = "contrast"
ENCODER = "vit.*"  # all but the head
RANK = 4


@dataclass(frozen=True)
class Sizes:
    """How much is trained.

    Attributes:
        seeds: of weights, batches and noise.
        epochs: of the base, and half as many of each task.
        learned: epochs of the coefficients.
        rates: of coefficients that are added.
        steps: of a training on few shots.
        shots: images of each class.
        few_rates: of a training on few shots, by arm.
        training: images of the training split; None for all.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 30
    learned: int = 20
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    steps: int = 100
    shots: tuple[int, ...] = (1, 4)
    few_rates: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "aTLAS": (1e-2, 3e-2, 1e-1),
            "full": (1e-4, 3e-4, 1e-3),
            "LoRA": (3e-4, 1e-3, 3e-3),
        }
    )
    training: int | None = None


ADDS = Statement(
    "A coefficient for each block merges tasks better than one for all",
    "ViT-B/32, 8 tasks: isotropic search 77.24 % relative, aTLAS 93.79 % (Table 2)",
    "six tasks of digits, test accuracy relative to the tuned models: aTLAS >= isotropic search + 3 points in the "
    "mean, and better in all 3 seeds",
    SMALL,
)
FEW = Statement(
    "One example of each class adapts to a task that no vector has seen",
    "best at one shot (a figure)",
    "test accuracy at one shot, mean of 3 seeds: aTLAS >= zero-shot + 2 points, and >= training of the encoder",
    SMALL,
)
EXACT = Statement(
    "Coefficients of one vector alone give its model, those of none the base",
    "by construction",
    "lambda = e_i: weights of tuned model i to 1e-6; lambda = 0: the base bit for bit; outputs before and after "
    "merging to 1e-5",
    SMALL,
)
STATEMENTS = (ADDS, FEW, EXACT)


def run(sizes: Sizes | None = None, subject: str | None = None, progress: bool = True) -> Outcome:
    """Run the claims.

    Args:
        sizes: how much.
        subject: only the claims on it; None for all.
        progress: show bars.
    """
    sizes = sizes or Sizes()
    tasks = Tasks(sizes)
    experiments: list[Experiment] = [
        (ADDS, partial(adds, tasks)),
        (FEW, partial(few, tasks)),
        (EXACT, partial(exact, tasks)),
    ]
    return conduct("atlas", experiments, sizes, subject, progress)


# -- models and their task vectors -------------------------------------------------------------------------------------


def images(splits: tuple[Split, ...], task: ImageTask | None, seed: int, rows: int | None = None) -> Images:
    """Digits of a task with their labels."""
    pixels, labels = (torch.cat(each)[:rows] for each in zip(*(digits(split) for split in splits), strict=True))
    return (pixels if task is None else image_task(pixels, task, seed)), labels


CHOOSING: tuple[Split, ...] = ("search", "calibration")


@dataclass(frozen=True)
class Family:
    """A base with the models tuned from it.

    Attributes:
        base: trained on plain digits.
        tuned: by task.
        vectors: of the tasks, in their order.
    """

    base: nn.Module
    tuned: dict[ImageTask, nn.Module]
    vectors: list[Delta]


@dataclass
class Tasks:
    """The models of each seed; trained when they are first needed.

    Attributes:
        sizes: how much is trained.
    """

    sizes: Sizes
    _families: dict[int, Family] = field(default_factory=dict)
    _accuracies: dict[int, dict[str, dict[ImageTask, float]]] = field(default_factory=dict)
    _composed: dict[tuple[int, str, float], tuple[nn.Module, float]] = field(default_factory=dict)
    _own: dict[tuple[int, ImageTask, tuple[Split, ...]], float] = field(default_factory=dict)
    _few: dict[tuple[str, int, int, float], tuple[float, float]] = field(default_factory=dict)

    def family(self, seed: int) -> Family:
        """The base and the tuned models of a seed."""
        if seed not in self._families:
            base = vision_transformer(seed=seed)
            self._train(base, None, seed, self.sizes.epochs, 3e-3, trainable=None)
            tuned: dict[ImageTask, nn.Module] = {}
            for task in TASKS:
                tuned[task] = copy.deepcopy(base)
                self._train(tuned[task], task, seed, max(1, self.sizes.epochs // 2), 1e-3, trainable=ENCODER)
            self._families[seed] = Family(base, tuned, [Delta.between(tuned[task], base) for task in TASKS])
        return self._families[seed]

    def _train(
        self, model: nn.Module, task: ImageTask | None, seed: int, epochs: int, rate: float, trainable: Any
    ) -> None:
        batches = in_batches(images(("train",), task, seed, self.sizes.training))
        train(
            model,
            batches,
            validation=in_batches(images(CHOOSING, task, seed + 1000), rows=None),
            epochs=epochs,
            learning_rate=rate,
            trainable=trainable,
            seed=seed,
            keep="last",
            evaluate_every=epochs * len(batches),
            progress=False,
        )
        model.eval()

    def relative(self, model: nn.Module, seed: int, splits: tuple[Split, ...]) -> dict[ImageTask, float]:
        """The accuracy on each task, over that of the model tuned on it."""
        family = self.family(seed)
        found = {}
        for task in TASKS:
            batches = in_batches(images(splits, task, seed + 1000), rows=None)
            key = (seed, task, splits)
            if key not in self._own:
                self._own[key] = accuracy(family.tuned[task], batches)
            found[task] = accuracy(model, batches) / self._own[key]
        return found

    def score(self, seed: int) -> Any:
        """What chooses: the mean relative accuracy on the images that coefficients are learned from."""
        return lambda model, batches=None: mean(self.relative(model, seed, CHOOSING).values())

    # -- addition

    def added(self, seed: int) -> dict[str, dict[ImageTask, float]]:
        """Relative test accuracies of each way to add the six vectors."""
        if seed not in self._accuracies:
            family = self.family(seed)
            models = {"base": family.base, "search": copy.deepcopy(family.base)}
            isotropic_search(models["search"], family.vectors, self.score(seed))
            for arm, mode in (("isotropic", "isotropic"), ("aTLAS", "block")):
                models[arm] = self._learned(seed, mode, self.rate(mode))[0]
            self._accuracies[seed] = {arm: self.relative(model, seed, ("test",)) for arm, model in models.items()}
        return self._accuracies[seed]

    def rate(self, mode: str) -> float:
        """The rate with which coefficients score best, with the first seed."""
        return max(self.sizes.rates, key=lambda rate: self._learned(self.sizes.seeds[0], mode, rate)[1])

    def _learned(self, seed: int, mode: Any, rate: float) -> tuple[nn.Module, float]:
        """The base with learned coefficients, and its score."""
        key = (seed, mode, rate)
        if key not in self._composed:
            self._composed[key] = self._learn(seed, mode, rate)
        return self._composed[key]

    def _learn(self, seed: int, mode: Any, rate: float) -> tuple[nn.Module, float]:
        family = self.family(seed)
        model = copy.deepcopy(family.base)
        given = [images(CHOOSING, task, seed + 1000) for task in TASKS]
        together = (torch.cat([x for x, _ in given]), torch.cat([labels for _, labels in given]))
        order = torch.randperm(len(together[1]), generator=torch.Generator().manual_seed(seed))
        batches = in_batches((together[0][order], together[1][order]), 128)
        train(
            model,
            batches,
            validation=in_batches(given[0], rows=None),
            epochs=self.sizes.learned,
            learning_rate=rate,
            weight_decay=0.1,
            rules=[Atlas.of(family.vectors, mode=mode)],
            seed=seed,
            score=Score(self.score(seed), "higher"),
            evaluate_every=len(batches),
            progress=False,
        )
        model.eval()
        return model, self.score(seed)(model)

    # -- few shots

    def few(self, arm: str, shots: int) -> list[float]:
        """Test accuracies on the unseen task, of each seed, at the arm's rate."""
        if arm == "zero-shot":
            test = {seed: in_batches(images(("test",), UNSEEN, seed), rows=None) for seed in self.sizes.seeds}
            return [accuracy(self.family(seed).base, batches) for seed, batches in test.items()]
        first = self.sizes.seeds[0]
        rates = self.sizes.few_rates[arm]
        rate = max(rates, key=lambda each: self._adapted(arm, shots, first, each)[0])
        return [self._adapted(arm, shots, seed, rate)[1] for seed in self.sizes.seeds]

    def _adapted(self, arm: str, shots: int, seed: int, rate: float) -> tuple[float, float]:
        """Accuracies of one training, on the images to choose by and on those to test."""
        key = (arm, shots, seed, rate)
        if key not in self._few:
            family = self.family(seed)
            model = copy.deepcopy(family.base)
            choosing = in_batches(images(CHOOSING, UNSEEN, seed), rows=None)
            settings: dict[str, Any] = {
                "validation": choosing,
                "steps": self.sizes.steps,
                "learning_rate": rate,
                "seed": seed,
                "keep": "last",
                "evaluate_every": self.sizes.steps,
                "progress": False,
            }
            batches = [dict(zip(("pixel_values", "labels"), self._shots(shots, seed), strict=True))]
            trained: Trained
            if arm == "aTLAS":
                trained = train(model, batches, rules=[Atlas.of(family.vectors)], weight_decay=0.1, **settings)
            elif arm == "LoRA":
                layers = Lora(rank=RANK).layers(model, batches)
                trained = train_adapter(model, batches, layers=layers, **settings)
            else:
                trained = train(model, batches, trainable=ENCODER, **settings)
            trained.model.eval()
            test = in_batches(images(("test",), UNSEEN, seed), rows=None)
            self._few[key] = accuracy(model, choosing), accuracy(model, test)
        return self._few[key]

    def _shots(self, shots: int, seed: int) -> tuple[Tensor, Tensor]:
        """So many training images of each class."""
        pixels, labels = images(("train",), UNSEEN, seed)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[labels[order] == digit][:shots] for digit in range(10)])
        return pixels[chosen], labels[chosen]


# -- what is claimed ---------------------------------------------------------------------------------------------------


def adds(tasks: Tasks) -> Measurement:
    """Relative accuracies of one model for all tasks."""
    seeds = tasks.sizes.seeds
    found = {seed: tasks.added(seed) for seed in seeds}
    means = {
        arm: [mean(found[seed][arm].values()) for seed in seeds] for arm in ("base", "search", "isotropic", "aTLAS")
    }
    gain = mean(means["aTLAS"]) - mean(means["search"])
    better = all(ours > theirs for ours, theirs in zip(means["aTLAS"], means["search"], strict=True))
    each = "; ".join(f"{arm} {spread([100 * one for one in values])} %" for arm, values in means.items())
    own = ", ".join(f"{task} {100 * mean(found[seed]['aTLAS'][task] for seed in seeds):.1f}" for task in TASKS)
    rates = ", ".join(f"{mode} {tasks.rate(mode):g}" for mode in ("isotropic", "block"))
    text = f"aTLAS {100 * gain:+.2f} points against the search; {each}; aTLAS by task: {own} %; rates: {rates}"
    return Measurement(text, gain >= 0.03 and better)


def few(tasks: Tasks) -> Measurement:
    """Accuracies on a task that no vector has seen."""
    parts, gains = [], {}
    for shots in tasks.sizes.shots:
        found = {arm: tasks.few(arm, shots) for arm in ("zero-shot", "aTLAS", "full", "LoRA")}
        gains[shots] = {arm: mean(found["aTLAS"]) - mean(found[arm]) for arm in ("zero-shot", "full")}
        each = ", ".join(f"{arm} {spread([100 * one for one in values])} %" for arm, values in found.items())
        parts.append(f"{shots} of each class: {each}")
    first = gains[tasks.sizes.shots[0]]
    return Measurement("; ".join(parts), first["zero-shot"] >= 0.02 and first["full"] >= 0)


def exact(tasks: Tasks) -> Measurement:
    """Largest differences."""
    family = tasks.family(tasks.sizes.seeds[0])
    batch = in_batches(images(("test",), None, 0), rows=64)[0]
    apart, merged = 0.0, 0.0
    for index, task in enumerate(TASKS):
        model = copy.deepcopy(family.base)
        running = Atlas.of(family.vectors).attach(model)
        with torch.no_grad(), evaluating(model):
            for each in running.composed.values():
                each.coefficients.zero_()[index] = 1.0
            before = first_tensor(forward(model, batch))
            running.detach()
            merged = max(merged, float((first_tensor(forward(model, batch)) - before).abs().max()))
        for name, value in model.named_parameters():
            apart = max(apart, float((value - family.tuned[task].get_parameter(name)).detach().abs().max()))
    model = copy.deepcopy(family.base)
    Atlas.of(family.vectors).attach(model).detach()
    same = all(torch.equal(value, family.base.state_dict()[name]) for name, value in model.state_dict().items())
    text = (
        f"weights differ by {apart:.1e}, the base is {'the same bits' if same else 'another'}, outputs after merging "
        f"by {merged:.1e}"
    )
    return Measurement(text, apart <= 1e-6 and same and merged <= 1e-5)
