"""LIFT's experiments on tiny sizes: what is compared, and what is judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actkit.claims import lift
from actkit.claims.lift import Arms, Tuned

TINY = lift.Sizes(seeds=(0,), filters=(2,), rows=2, trainings=(0,), steps=3, pretrained=2, held_out=8)


def test_choices_are_of_equal_number_and_noise_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = lift.masks_of(torch.randn(40, 30), 2, 0)
    assert {int(mask.sum()) for mask in masks.values()} == {60}
    monkeypatch.setattr(lift, "WIDTH", 64)
    monkeypatch.setattr(lift, "FILTER", 2)
    assert "x random" in lift.spectral(TINY).here
    found = {"LIFT": [13.0], "magnitude": [10.0], "random": [9.9]}
    monkeypatch.setattr(lift, "_increases", lambda rank, sizes: (found, {name: [5.0] for name in found}))
    assert lift.spectral(TINY).passed
    found["random"] = [10.1]
    assert not lift.spectral(TINY).passed


@pytest.mark.parametrize("arm", ["full", "LoRA", "LIFT"])
def test_an_arm_is_trained(arm: str, arms: Arms) -> None:
    tuned = arms.tuned(arm, 0, 1e-3)
    numbers = {"full": 1_115_264, "LoRA": 40_960, "LIFT": 851_968}[arm]  # LIFT's parameters, of which it trains some
    assert tuned.target < 10 and tuned.source < 10 and tuned.state > 0
    assert tuned.numbers == numbers
    if arm == "LIFT":
        assert tuned.state == 40_960 * (4 + 4 + 8) + 4 * 28


@pytest.fixture(scope="module")
def arms() -> Arms:
    return Arms(TINY)


def test_losses_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {
        "full": Tuned(1, 3.0, 2.5, 10, 1000),
        "LoRA": Tuned(1, 3.1, 2.3, 10, 80),
        "magnitude": Tuned(1, 3.2, 2.3, 10, 100),
        "random": Tuned(1, 3.15, 2.3, 10, 100),
        "LIFT": Tuned(1, 3.14, 2.3, 10, 120),
    }
    monkeypatch.setattr(Arms, "runs", lambda self, arm: [figures[arm]])
    monkeypatch.setattr(Arms, "rate", lambda self, arm: 0.1)
    monkeypatch.setattr(Arms, "before", lambda self, text: 2.0)
    arms = Arms(TINY)
    assert lift.learns(arms).passed and lift.forgets(arms).passed and lift.state(arms).passed
    assert "0.60 x" in lift.forgets(arms).here and "12.0%" in lift.state(arms).here
    judged: list[tuple[Any, Tuned]] = [
        (lift.learns, Tuned(1, 3.16, 2.3, 10, 120)),
        (lift.learns, Tuned(1, 3.195, 2.3, 10, 120)),
        (lift.forgets, Tuned(1, 3.14, 2.45, 10, 120)),
        (lift.state, Tuned(1, 3.14, 2.3, 10, 121)),
    ]
    for judge, worse in judged:
        figures["LIFT"] = worse
        assert not judge(arms).passed
