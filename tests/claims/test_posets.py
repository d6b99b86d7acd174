"""The experiments on posets, on tiny sizes: a condition that does not hold is reported so."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import posets

TINY = posets.Sizes(seeds=(0, 1), blocks=50, channels=2, steps=3, rows=8)


def test_brute_force_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    found = posets.exact(TINY)
    assert found.passed and "219 orders, 16 classes" in found.here and "15 posets by the two rules" in found.here
    monkeypatch.setattr(posets, "poset_eval", lambda x, poset: x.relu().sum(-1))
    assert not posets.exact(TINY).passed


def test_arms_begin_alike() -> None:
    starts = []
    for pool in posets.ARMS.values():
        torch.manual_seed(0)
        starts.append(torch.cat([p.flatten() for p in posets.Network(pool, 2).parameters()]))
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_accuracies_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"average": 95.0, "maximum": 96.0, "mixed": 96.1, "N": 95.9, "ReLU, then N": 95.0}
    monkeypatch.setattr(posets, "accuracy", lambda arm, seed, sizes, progress: scores[arm] + seed)
    found = posets.learned(TINY)
    assert found.passed and "N - maximum -0.10 (-0.10 to -0.10)" in found.here
    scores["N"] = 95.7
    assert not posets.learned(TINY).passed  # 0.4 points under mixed pooling
    scores.update({"N": 94.9, "mixed": 95.0, "maximum": 95.0})
    assert not posets.learned(TINY).passed  # near all, and above none
    monkeypatch.undo()
    assert 0 <= posets.accuracy("N", 0, TINY) <= 100
