"""The minimal transformer's experiments on tiny sizes: they measure what they say, and report what does not hold."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import minimal_transformer as minimal
from actkit.claims.minimal_transformer import ARMS, WHOLE, Arms
from actkit.data import digits

TINY = minimal.Sizes(seeds=(0, 1), epochs=1, depth=1, training=128, short=1)


def test_collapses_are_exact_and_a_difference_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert minimal.exact().passed and "as the formulas say" in minimal.exact().here
    assert minimal.trained(TINY).passed
    monkeypatch.setattr(minimal, "WIDE", 0.0)
    assert not minimal.exact().passed and not minimal.trained(TINY).passed


def test_training_images_are_shifted_and_others_are_not() -> None:
    pixels, labels = minimal.images("train")
    plain, own = digits("train")
    assert len(pixels) == 9 * len(plain) and torch.equal(labels[::9], own)
    assert torch.equal(pixels[4::9], plain)  # the place in the middle
    assert torch.equal(pixels[0::9][:, :, 1:, 1:], plain[:, :, :-1, :-1])
    assert torch.equal(minimal.images("test")[0], digits("test")[0])


def test_arms_are_told_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = Arms(TINY)
    told = minimal.judged(arms, "symmetric").here
    assert all(f"{arm} " in told for arm in ARMS) and "Q 0." in told and "+-" in told
    assert arms.parameters("minimum") < arms.parameters("symmetric") < arms.parameters(WHOLE)
    found = {WHOLE: 0.95, "symmetric": 0.94, "minimum": 0.9, "no MLP": 0.94}
    monkeypatch.setattr(Arms, "accuracies", lambda self, arm: [found.get(arm, 0.9)] * 2)
    monkeypatch.setattr(Arms, "parameters", lambda self, arm: {WHOLE: 1000, "symmetric": 400}.get(arm, 150))
    assert minimal.judged(arms, "symmetric").passed and minimal.judged(arms, "minimum").passed
    found |= {"symmetric": 0.93, "minimum": 0.88}
    assert not minimal.judged(arms, "symmetric").passed and not minimal.judged(arms, "minimum").passed
    found |= {"symmetric": 0.95, "minimum": 0.95}
    monkeypatch.setattr(Arms, "parameters", lambda self, arm: {WHOLE: 1000, "symmetric": 401}.get(arm, 151))
    assert not minimal.judged(arms, "symmetric").passed and not minimal.judged(arms, "minimum").passed
