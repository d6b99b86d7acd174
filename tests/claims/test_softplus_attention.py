"""Softplus attention's experiments on tiny sizes: a condition that does not hold is reported so."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import softplus_attention as claims
from actkit.core.layers.attention_function import function_of

TINY = claims.Sizes(seeds=(0,), layers=1, steps=3, rows=4, lengths=(8, 16, 32), texts=3, held_out=1)


@pytest.fixture(scope="module")
def arms() -> claims.Arms:
    return claims.Arms(TINY)


def test_arms_begin_alike_and_compute_by_their_functions(arms: claims.Arms) -> None:
    with torch.random.fork_rng():
        models = {arm: arms.model(arm, 0) for arm in claims.ARMS}
    named = {arm: None if (found := function_of(model)) is None else found.spec() for arm, model in models.items()}
    assert all((given is None) == (named[arm] is None) for arm, given in claims.ARMS.items())
    assert all(given is None or given.items() <= named[arm].items() for arm, given in claims.ARMS.items())


def test_losses_are_judged(arms: claims.Arms, monkeypatch: pytest.MonkeyPatch) -> None:
    found = claims.short(arms)
    assert "read at 8: softmax" in found.here and found.passed  # 3 steps teach nobody much
    monkeypatch.setattr(claims, "NEAR", -1.0)
    assert not claims.short(arms).passed
    found = claims.long(arms)
    assert found.here.count(";") == 3 and "LSSAR loses" in found.here
    monkeypatch.setattr(claims, "LOST", -100.0)
    assert not claims.long(arms).passed
    assert claims.sharpened(arms).here.startswith("read at 8, 16, 32: softmax, re-weighted")


def test_half_precision_and_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert claims.finite().passed
    monkeypatch.setattr(claims, "DAMAGE", 0.1)
    found = claims.untrained("swiglu", TINY)
    assert "test loss: softmax" in found.here and found.passed
    monkeypatch.setattr(claims, "DAMAGE", 100.0)
    assert not claims.untrained("swiglu", TINY).passed
