"""VanillaNet's experiments on tiny sizes: they measure what they say; what does not hold is reported so."""

from __future__ import annotations

import pytest

from actkit.claims import vanillanet
from actkit.claims.vanillanet import CELLS, Arms

TINY = vanillanet.Sizes(seeds=(0, 1), presets=("tiny", "digits"), images=16, epochs=1, training=64, steps=3, rounds=2)


def test_folds_are_exact_and_a_difference_is_reported(monkeypatch: pytest.MonkeyPatch):
    found = vanillanet.exact(TINY)
    assert found.passed and found.here.count(" M") == 2
    monkeypatch.setattr(vanillanet, "WIDE", 0.0)
    assert not vanillanet.exact(TINY).passed


def test_times_are_compared(monkeypatch: pytest.MonkeyPatch):
    assert "medians of 2 rounds" in vanillanet.speed(TINY).here
    monkeypatch.setattr(vanillanet, "FASTER", 0.0)
    assert not vanillanet.speed(TINY).passed


def test_the_four_arms_are_trained():
    arms = Arms(TINY)
    assert 0 <= arms.mean("deep, series") <= 1 and arms.rate("neither") in vanillanet.RATES


def test_effects(monkeypatch: pytest.MonkeyPatch):
    found = {"deep, series": 0.96, "deep": 0.955, "series": 0.955, "neither": 0.95}
    monkeypatch.setattr(Arms, "accuracies", lambda self, arm: [found[arm]])
    monkeypatch.setattr(Arms, "rate", lambda self, arm: 1e-3)
    arms = Arms(TINY)
    assert vanillanet.series(arms).passed and vanillanet.both(arms).passed and vanillanet.deep(arms).passed
    assert all(arm in vanillanet.series(arms).here for arm in CELLS)
    found.update({"deep, series": 0.957, "deep": 0.9595})
    assert not vanillanet.series(arms).passed and not vanillanet.both(arms).passed
    found.update({"series": 0.985, "deep, series": 0.985, "deep": 0.982, "neither": 0.982})
    assert vanillanet.series(arms).passed  # less than half a point, but a sixth of the error, above 97 %
    found.update({"deep": 0.97, "deep, series": 0.97})
    assert not vanillanet.deep(arms).passed


def test_a_collapsed_cnn_is_as_large_as_before():
    assert "numbers and" in vanillanet.any_layer(TINY).here
