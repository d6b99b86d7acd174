"""MobileTL's experiments on tiny sizes: what is said is what was measured, and conditions can fail."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import mobiletl
from actkit.core.train.choice import trained_parameters
from actkit.finetuning.mobiletl import MobileTL

TINY = mobiletl.Sizes(seeds=(0, 1), pretraining=1, epochs=1, images=64, rates=(1e-3,), side=8)


def test_bytes_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mobiletl.half(TINY)
    assert found.passed and found.here.startswith("V2 -4") and "V3 -5" in found.here
    assert mobiletl.gradients().passed
    monkeypatch.setattr(mobiletl, "V2", (0.6, 0.04))
    assert not mobiletl.half(TINY).passed


def test_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mobiletl.cheaper()
    share = float(found.here.split()[0])
    assert 0.5 < share < 1 and found.passed == (share <= mobiletl.OPERATIONS)
    for name in ("OF_FROZEN", "OF_STEP"):
        monkeypatch.setattr(mobiletl, name, 0)
    assert float(mobiletl.cheaper().here.split()[0]) < share


def test_the_arms_train_what_they_say() -> None:
    names = {}
    for arm in mobiletl.ARMS:
        model = mobiletl.fresh(0)
        with trained_parameters(model, [MobileTL(blocks=3)] if arm == mobiletl.OURS else [], mobiletl.patterns(arm)):
            names[arm] = {name for name, each in model.named_parameters() if each.requires_grad}
    head = {"classifier.weight", "classifier.bias"}
    assert names[mobiletl.HEAD] == head < names[mobiletl.SHIFTS] < names[mobiletl.OURS] < names[mobiletl.FULL]
    left = names[mobiletl.FULL] - names[mobiletl.OURS]
    assert left == {f"blocks.{index}.layers.{layer}.weight" for index in (2, 3, 4) for layer in (1, 4)}


def test_transfer_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = mobiletl.Arms(TINY)
    found = mobiletl.transfers(arms)
    assert "points against the blocks" in found.here and "before, on plain digits" in found.here
    fixed = {mobiletl.HEAD: [0.5], mobiletl.FULL: [0.7], mobiletl.OURS: [0.69], mobiletl.SHIFTS: [0.6]}
    monkeypatch.setattr(arms, "accuracies", fixed.__getitem__)
    assert mobiletl.transfers(arms).passed
    fixed[mobiletl.OURS] = [0.68]
    assert not mobiletl.transfers(arms).passed
    pixels, _ = mobiletl.turned("search")
    assert torch.equal(torch.rot90(1 - pixels, -1, (2, 3)), mobiletl.digits("search")[0])
