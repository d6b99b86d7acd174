"""S2A's experiments on tiny sizes: the arms differ in what they say, and what is said is what was measured."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import s2a
from actkit.core.train.choice import trained_parameters
from actkit.finetuning.s2a.side_path import SidePath

pytest.importorskip("peft")
TINY = s2a.Sizes(seeds=(0, 1), steps=1, rows=2, length=8, measured=8, held_out=4, epochs=1, images=64, batches=1)


def test_the_arms_train_what_they_say() -> None:
    case = s2a.Digits(TINY)
    names = {}
    for arm in s2a.ARMS:
        model = s2a.arranged(case.plain(), arm, 0)
        with trained_parameters(model, s2a.RULES[arm]):
            names[arm] = {name for name, each in model.named_parameters() if each.requires_grad}
        assert any(isinstance(each, SidePath) for each in model.modules()) == (arm == s2a.OURS)
    head = {"classifier.weight", "classifier.bias"}
    assert all(name in head or ".lora_" in name for name in names[s2a.LORA]) and head < names[s2a.LORA]
    assert all(name in head or name.endswith("bias") for name in names[s2a.BIAS])
    assert len(names[s2a.BIAS]) < len(names[s2a.OURS]) < len(names[s2a.FULL]) + 9


def test_digits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s2a, "DIGIT_RATES", dict.fromkeys(s2a.ARMS, (1e-3,)))
    case = s2a.Digits(TINY)
    bytes_ = s2a.smaller(case)
    assert bytes_.passed and "x full training" in bytes_.here
    alike = s2a.faithful(case)
    assert "before training: 0.99" in alike.here
    monkeypatch.setattr(case, "accuracies", {arm: [0.5, 0.6] for arm in s2a.ARMS}.__getitem__)
    assert s2a.accurate(case).passed
    monkeypatch.setattr(case, "accuracies", lambda arm: [0.5, 0.53] if arm == s2a.OURS else [0.5, 0.57])
    found = s2a.accurate(case)
    assert not found.passed and found.here.startswith("-2.0 points")
    monkeypatch.setattr(s2a, "TRAINED", 0.001)
    assert not s2a.few(case).passed
    pixels, labels = s2a.turned("search")
    assert torch.equal(torch.rot90(1 - pixels, -1, (2, 3)), s2a.digits("search")[0]) and len(labels) == len(pixels)


def test_docstrings_of_ten_packages() -> None:
    case = s2a.Docstrings(TINY)
    train, test = s2a.docstrings("train"), s2a.docstrings("test")
    assert {label for _, label in train} == {label for _, label in test} == set(range(10))
    assert not {text for text, _ in train} & {text for text, _ in test}
    batch = case.large()
    assert batch["input_ids"].shape == (2, 8) and bool(batch["attention_mask"].all())
    model = s2a.arranged(case.plain(), s2a.OURS, 0)
    assert len(s2a.compared(model, 4, case.batches())) == 1
