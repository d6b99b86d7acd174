"""Nets that are compared on the 8 x 8 digits: the same images in one order, a rate chosen alike, the last weights.

    accuracies = DigitArms(fresh, seeds=(0, 1, 2), rates=(1e-3, 3e-3), epochs=30).accuracies("plain")

Validation is on the search split, and no accuracy that is reported is of images that training or validation saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actkit.claims.subject import spread
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.train.training import train
from actkit.data import Split, digits

BATCH = 64
Images = tuple[Tensor, Tensor]  # pixels [n, 1, 8, 8] and labels [n]


def in_batches(images: Images, rows: int | None = BATCH) -> list[dict[str, Tensor]]:
    """Images with their labels as batches of at most `rows`; None for all in one."""
    pixels, labels = (each.split(rows or len(each)) for each in images)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]


def accuracy(model: nn.Module, batches: Sequence[Any]) -> float:
    """The share of labels that a model finds, in evaluation mode."""
    with evaluating(model):
        right = [first_tensor(forward(model, batch)).argmax(-1) == batch["labels"] for batch in batches]
    return float(torch.cat(right).double().mean())


@dataclass(frozen=True)
class Fitted:
    """A net after its training.

    Attributes:
        model: with its last weights, in evaluation mode.
        validation: loss on the search split.
        course: its score there after each validation, if there is one.
        accuracy: on the test split.
        seconds: that the training took.
    """

    model: nn.Module
    validation: float
    course: list[float]
    accuracy: float
    seconds: float


class DigitArms:
    """The nets of several arms; each is trained when it is first needed.

    Args:
        fresh: (arm, seed) -> a net with random weights.
        seeds: of weights and of the order of batches.
        rates: that are tried.
        epochs: of a training.
        images: of a split.
        training: images of the training split; None for all.
        batch: images of a step.
        rules: that an arm is trained under.
        progress: show bars.
        settings: more settings of `train`; without them AdamW, a cosine, gradients clipped at 1, validated at the end.
    """

    def __init__(
        self,
        fresh: Callable[[str, int], nn.Module],
        *,
        seeds: Sequence[int],
        rates: Sequence[float],
        epochs: int,
        images: Callable[[Split], Images] = digits,
        training: int | None = None,
        batch: int = BATCH,
        rules: Callable[[str], Sequence[Any]] = lambda arm: (),
        progress: bool = False,
        **settings: Any,
    ) -> None:
        self.fresh, self.seeds, self.rates, self.epochs = fresh, tuple(seeds), tuple(rates), epochs
        self.images, self.training, self.rules, self.progress = images, training, rules, progress
        self.settings, self.batch = settings, batch
        self._fitted: dict[tuple[str, int, float], Fitted] = {}

    def rate(self, arm: str) -> float:
        """The rate of an arm: of the least validation loss with the first seed."""
        if len(self.rates) == 1:
            return self.rates[0]
        return min(self.rates, key=lambda rate: self.fitted(arm, self.seeds[0], rate).validation)

    def accuracies(self, arm: str) -> list[float]:
        """The test accuracy of an arm in each seed, at its rate."""
        return [self.fitted(arm, seed).accuracy for seed in self.seeds]

    def described(self, arm: str) -> str:
        """Accuracies and rate of an arm, for the record."""
        return f"{arm} {spread([100 * each for each in self.accuracies(arm)])} % ({self.rate(arm):g})"

    def fitted(self, arm: str, seed: int, rate: float | None = None) -> Fitted:
        """A trained net of an arm.

        Args:
            arm: its name.
            seed: of its weights and batches.
            rate: of its training; None for that of the arm.
        """
        rate = self.rate(arm) if rate is None else rate
        if (arm, seed, rate) not in self._fitted:
            model = self.fresh(arm, seed)
            pixels, labels = self.images("train")
            batches = in_batches((pixels[: self.training], labels[: self.training]), self.batch)
            trained = train(
                model,
                batches,
                validation=in_batches(self.images("search"), rows=None),
                epochs=self.epochs,
                learning_rate=rate,
                rules=self.rules(arm),
                seed=seed,
                keep="last",
                progress=self.progress,
                **{"evaluate_every": self.epochs * len(batches), **self.settings},
            )
            course = [step.score for step in trained.history[1:] if step.score is not None]
            found = accuracy(model.eval(), in_batches(self.images("test"), rows=None))
            self._fitted[arm, seed, rate] = Fitted(model, trained.validation, course, found, trained.seconds)
        return self._fitted[arm, seed, rate]
