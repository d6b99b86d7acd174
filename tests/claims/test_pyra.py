"""PYRA's claims run at a small size, and judge what was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actkit.claims import pyra
from actkit.claims.outcome import SMALL

pytest.importorskip("peft")
TINY = pyra.Sizes(seeds=(0, 1), few=(0,), before=1, epochs=1, training=64, rounds=1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pre-trained model that is not."""
    monkeypatch.setattr(pyra.Arms, "base", property(lambda arms: pyra.net(0).eval()))
    monkeypatch.setattr(pyra, "NOISES", 1)


def test_all_claims_run() -> None:
    outcome = pyra.run(progress=False, sizes=TINY)
    start, better, cheap = outcome.claims
    assert [each.subject for each in outcome.claims] == [SMALL] * 3
    assert start.passed and start.here == "the largest difference is 0"
    assert all(arm in better.here for arm in pyra.ARMS)
    assert cheap.here.startswith("0.39% more numbers, 0.15% more multiplications")


class Fixed(pyra.Arms):
    """Arms whose accuracies are given."""

    def __init__(self, **found: list[float]) -> None:
        super().__init__(pyra.Sizes())
        self.found = found

    def accuracies(self, arm: str) -> list[float]:
        return self.found.get({"ToMe": "plain", "PYRA": "ours"}.get(arm, ""), [0.5] * 5)


@pytest.mark.parametrize(
    ("ours", "passed"),
    [
        ([0.71] * 5, True),
        ([0.702] * 5, False),  # on average too little
        ([0.75, 0.75, 0.75, 0.69, 0.69], False),  # in too few seeds
        ([0.75, 0.75, 0.75, 0.70, 0.69], True),
    ],
)
def test_what_passes(ours: list[float], passed: bool) -> None:
    assert pyra.better(Fixed(plain=[0.7] * 5, ours=ours)).passed == passed


def test_the_other_task_is_the_same_each_time_and_differs_by_split() -> None:
    pixels, labels = pyra.other_task("search")
    assert torch.equal(pixels, pyra.other_task("search")[0]) and len(pixels) == len(labels)
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_the_matrix_begins_as_plain_merging() -> None:
    arms: Any = pyra.Arms(TINY)
    one, other = (pyra.logits(arms.fresh(arm)) for arm in (pyra.PLAIN, pyra.MATRIX))
    assert torch.equal(one, other)
