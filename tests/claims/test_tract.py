"""TrAct's experiments on tiny sizes: what is counted, and what is judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actkit.claims import tract
from actkit.claims.tract import Arms

TINY = tract.Sizes(seeds=(0, 1), epochs=2, training=64)


def test_the_algebra_holds_and_a_difference_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tract.exact().passed
    monkeypatch.setattr(tract, "CLOSE", 0.0)
    assert not tract.exact().passed


def test_varied_images_are_plain_ones_times_a_contrast_plus_a_brightness() -> None:
    plain, labels = tract.images("search", False)
    varied, same = tract.images("search", True)
    assert torch.equal(labels, same)
    contrast = varied.flatten(1).std(1) / plain.flatten(1).std(1)
    brightness = (varied - contrast[:, None, None, None] * plain).flatten(1)
    assert float(contrast.min()) >= 0.2 and float(contrast.max()) <= 1.8 and float(contrast.std()) > 0.3
    assert float(brightness.std(1).max()) < 1e-5 and float(brightness.abs().max()) <= 0.5
    assert torch.equal(varied, tract.images("search", True)[0])


@pytest.mark.parametrize("name", tract.NETS)
def test_arms_are_trained_at_one_rate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    class Watched(tract.Tract):
        def model_post_init(self, context: Any) -> None:
            made.append(self.ridge)

    monkeypatch.setattr(tract, "Tract", Watched)
    arms = Arms(TINY)
    assert arms.rate(name, "varied") in tract.RATES[name]
    courses = [arms.courses(name, "varied", arm) for arm in tract.ARMS]
    assert [len(course) for course in courses[0] + courses[1]] == [2] * 4
    assert made == [0.1, 0.1]  # SGD trains without the rule
    assert all(0 <= each <= 1 for each in arms.accuracies(name, "plain", "TrAct"))


def test_epochs_are_counted_until_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    courses = {"SGD": [[0.5, 0.8, 0.9], [0.6, 0.9, 0.9]], "TrAct": [[0.9, 0.95, 0.9], [0.1, 0.2, 0.3]]}
    monkeypatch.setattr(Arms, "courses", lambda self, name, data, arm: courses[arm])
    monkeypatch.setattr(Arms, "rate", lambda self, name, data: 0.1)
    arms = Arms(tract.Sizes(epochs=3))
    assert arms.epochs("CNN", "varied", "SGD") == [3, 2] and arms.epochs("CNN", "varied", "TrAct") == [1, 4]
    assert not tract.fewer(arms).passed
    courses["TrAct"][1] = [0.9, 0.9, 0.9]
    assert tract.fewer(arms).passed


def test_accuracies_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"SGD": [0.95, 0.96], "TrAct": [0.95, 0.956]}
    monkeypatch.setattr(Arms, "accuracies", lambda self, name, data, arm: found[arm])
    arms = Arms(TINY)
    assert tract.kept(arms).passed and "-0.20 points" in tract.kept(arms).here
    found["TrAct"] = [0.95, 0.95]
    assert not tract.kept(arms).passed
