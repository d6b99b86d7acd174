"""The experiments on tiny sizes: they measure what they say, and a condition that does not hold is reported so."""

from __future__ import annotations

import pytest

from actkit.claims import active_dendrites as claims
from actkit.claims.subject import Subject
from actkit.sparsity.active_dendrites.pattern_simulation import ExpectedVsObserved, Overlaps, SiteMatches

TINY = claims.Sizes(trials=20_000, noisy=300, seeds=(0, 1), rows=24, tokens=300)


def test_simulated_rates_pass_and_a_wrong_formula_would_be_seen(monkeypatch):
    found = claims.simulated_positives(TINY)
    assert found.passed and "0.2921 (" in found.here and "20,000 trials each" in found.here
    assert claims.simulated_negatives(TINY).passed
    monkeypatch.setattr(claims, "false_positive", lambda n, a, s, theta: 0.02)
    assert not claims.simulated_positives(TINY).passed
    monkeypatch.setattr(claims, "false_negative", lambda a, s, theta, v: 0.02)
    assert not claims.simulated_negatives(TINY).passed


def test_the_formulas(monkeypatch):
    assert claims.scaling().passed
    found = claims.threshold()
    assert found.passed and "smallest threshold 10" in found.here and "840 combinations" in found.here
    few = claims.threshold_curve(cells=[1000], densities=[0.1], synapses=[20])
    monkeypatch.setattr(claims, "threshold_curve", lambda **_: few)
    assert not claims.threshold().passed


def test_unions(monkeypatch):
    found = claims.unions(TINY)
    assert found.passed and "0 of 300 noisy codes missed" in found.here
    monkeypatch.setattr(claims, "_missed", lambda sizes: 1)
    assert not claims.unions(TINY).passed


def test_real_activations(sentences):
    text = Subject("minilm", calibration=1, split="calibration", held_out=TINY.rows, model=sentences).held_out
    found = claims.activations(sentences, text, TINY)
    assert "blocks.1: " in found.here and "2 seeds" in found.here


@pytest.mark.parametrize("needed, passed", [(4, True), (10, True), (11, False), (None, False)])
def test_the_condition_on_activations(needed, passed):
    counts = [10**6 - 100] + [0] * 16
    counts[16 if needed is None else needed - 1] = 10**5
    site = SiteMatches("blocks.0.mlp.hidden", 1536, 32, 16, 4, 1000, 1000, Overlaps(tuple(counts)))
    assert site.threshold_needed == needed
    assert claims.judge([ExpectedVsObserved((site, site))]).passed == passed
