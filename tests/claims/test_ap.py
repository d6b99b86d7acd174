"""AP's experiments on tiny sizes: what is compared, and what is judged."""

from __future__ import annotations

import pytest

from actkit.claims import ap
from actkit.claims.ap import ARMS, Arms, Layer

TINY = ap.Sizes(layers=5, rows=4, seeds=(0, 1), rates=(0.03,), epochs=1, cycles=2)


def test_steps_raise_pre_activations_and_a_fall_is_seen() -> None:
    found = ap.rises(ap.random_layers(5))
    assert found.passed and "5 layers: the largest fall is 0.0e+00" in found.here
    assert ap.rises(ap.convolutional(4)).passed
    layer = next(ap.random_layers(1))
    assert not ap.rises(iter([Layer(layer.weight, layer.bias, -layer.x)])).passed


def test_the_layers_of_a_language_model_read_gates() -> None:
    layers = list(ap.behind_gates(2))
    assert all(float(layer.x.min()) >= 0 and float((layer.x == 0).double().mean()) > 0.2 for layer in layers)
    assert ap.rises(iter(layers)).passed


def test_a_convolution_s_pre_activations_are_rows() -> None:
    layer = next(ap.convolutional(2))
    assert layer.at(layer.weight).shape == (2 * 16, len(layer.weight))


def test_arms_lose_as_many_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = Arms(TINY)
    runs = {arm: arms.cycles(arm, 0) for arm in ARMS}
    assert {tuple(each.count for each in cycles) for cycles in runs.values()} == {(40346, 32277)}  # of 50,432
    assert all(0 < each.dead < 1 and each.accuracy > 0.1 for cycles in runs.values() for each in cycles)
    assert arms.sparse("AP", 0) == runs["AP"][-1:]  # none leaves so few
    assert "% of the weights alive" in ap.wakes(arms).here and "unpruned" in ap.kept(arms).here


def test_rates_and_accuracies_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"dead": {arm: [0.3, 0.3] for arm in ARMS}, "accuracy": {arm: [0.9, 0.9] for arm in ARMS}}
    monkeypatch.setattr(Arms, "mean", lambda self, arm, what: figures[what][arm])
    monkeypatch.setattr(Arms, "cycles", lambda self, arm, seed: [ap.Pruned(0.1, 5, 0.3, 0.9)])
    arms = Arms(TINY)
    for rates, passed in (([0.28, 0.29], True), ([0.25, 0.31], False), ([0.295, 0.295], False)):
        figures["dead"]["AP"] = rates
        assert ap.wakes(arms).passed == passed
    for found, passed in (([0.9, 0.895], True), ([0.9, 0.89], False)):
        figures["accuracy"]["AP"] = found
        assert ap.kept(arms).passed == passed
