"""Nets that are compared on digits: a rate chosen by validation, trained once, judged on images that were not seen."""

from __future__ import annotations

import torch
from torch import nn

from actkit.claims.digit_arms import DigitArms, accuracy, in_batches
from actkit.core.train.score import Score
from actkit.data import digits
from actkit.zoo.cnn import DigitsCNN


def test_arms_choose_their_rate_and_are_trained_once() -> None:
    made: list[tuple[str, int]] = []

    def fresh(arm: str, seed: int) -> nn.Module:
        made.append((arm, seed))
        torch.manual_seed(seed)
        return DigitsCNN()

    arms = DigitArms(fresh, seeds=(0, 1), rates=(1e-9, 1e-2), epochs=2, training=128, score=Score(accuracy, "higher"))
    assert arms.rate("plain") == 1e-2
    found = arms.accuracies("plain")
    assert made == [("plain", 0), ("plain", 0), ("plain", 1)] and found == arms.accuracies("plain")
    fitted = arms.fitted("plain", 0)
    assert fitted.accuracy == accuracy(fitted.model, in_batches(digits("test"))) > 0.15
    assert len(fitted.course) == 1 and not fitted.model.training  # validated at the end
    assert arms.described("plain").startswith("plain ") and arms.described("plain").endswith("% (0.01)")


def test_batches_hold_all_images() -> None:
    images = digits("search")
    batches = in_batches(images, rows=50)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), images[1])
    assert [len(batch["labels"]) for batch in batches[:-1]] == [50] * (len(batches) - 1)
    assert torch.equal(in_batches(images, rows=None)[0]["pixel_values"], images[0])
