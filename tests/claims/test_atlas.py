"""aTLAS's experiments on tiny sizes: what is compared, and what is judged."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import atlas
from actkit.claims.atlas import TASKS, Tasks

RATES = {"aTLAS": (0.1,), "full": (1e-3,), "LoRA": (1e-3,)}
TINY = atlas.Sizes(seeds=(0,), epochs=1, learned=1, rates=(0.01,), steps=2, shots=(1,), few_rates=RATES, training=64)


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return Tasks(TINY)


def test_coefficients_of_one_vector_give_its_model(tasks: Tasks) -> None:
    assert atlas.exact(tasks).passed
    family = tasks.family(0)
    assert list(family.tuned) == list(TASKS) and len(family.vectors) == 6
    assert all(name.startswith("vit.") for vector in family.vectors for name in vector.parts)  # one head


def test_few_shots_are_of_each_class(tasks: Tasks) -> None:
    pixels, labels = tasks._shots(2, 0)
    assert labels.tolist() == [digit for digit in range(10) for _ in range(2)]
    assert float(pixels.min()) >= 0.35 - 1e-6 and float(pixels.max()) <= 0.65 + 1e-6
    assert all(0 <= each <= 1 for arm in ("zero-shot", "aTLAS", "full", "LoRA") for each in tasks.few(arm, 1))


def test_splits_are_apart() -> None:
    learned, test = (atlas.images(splits, None, 0)[0] for splits in (atlas.CHOOSING, ("test",)))
    assert len(learned) == 374 and len(test) == 338
    assert not bool((torch.cdist(learned.flatten(1), test.flatten(1)) == 0).any())


def test_accuracies_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    added = {arm: dict.fromkeys(TASKS, value) for arm, value in (("base", 0.5), ("search", 0.8), ("isotropic", 0.8))}
    few = {"zero-shot": [0.8], "full": [0.81], "LoRA": [0.8]}
    monkeypatch.setattr(Tasks, "added", lambda self, seed: added)
    monkeypatch.setattr(Tasks, "rate", lambda self, mode: 0.1)
    monkeypatch.setattr(Tasks, "few", lambda self, arm, shots: few[arm])
    tasks = Tasks(TINY)
    for value, passed in ((0.84, True), (0.82, False)):
        added["aTLAS"] = dict.fromkeys(TASKS, value)
        assert atlas.adds(tasks).passed == passed
    for value, passed in ((0.83, True), (0.815, False)):
        few["aTLAS"] = [value]
        assert atlas.few(tasks).passed == passed
    few["full"] = [0.84]
    few["aTLAS"] = [0.83]
    assert not atlas.few(tasks).passed
