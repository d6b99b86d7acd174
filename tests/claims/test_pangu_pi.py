"""PanGu-pi's experiments on tiny sizes: they measure what they say; a condition that does not hold is reported so."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import pangu_pi
from actkit.claims.small_models import TextArms

TINY = pangu_pi.Sizes(
    seeds=(0, 1), stacks=(0,), depth=3, tokens=6, width=16, heads=2, layers=1, steps=2, held_out=16, rows=1
)


@pytest.fixture(scope="module")
def arms() -> TextArms:
    return pangu_pi.text_arms(TINY)


def test_arms_have_equally_many_parameters_to_a_thousandth():
    sizes = [sum(p.numel() for p in pangu_pi.fresh(arm, 0).parameters()) for arm in pangu_pi.WIDTHS]
    assert max(sizes) / min(sizes) < 1.001


def test_stacks_collapse_and_stay_below_their_bound(monkeypatch: pytest.MonkeyPatch):
    found = pangu_pi.collapse(TINY)
    assert found.passed and "augmented over residual" in found.here
    monkeypatch.setattr(pangu_pi, "WIDER", 2.0)
    assert not pangu_pi.collapse(TINY).passed
    assert pangu_pi.bound(TINY).passed
    monkeypatch.setattr(pangu_pi, "attention_factor", lambda *_: 1e-3)
    assert not pangu_pi.bound(TINY).passed


def test_a_stack_is_what_it_says():
    plain, other = (pangu_pi.Attentions(0, TINY) for _ in range(2))
    distances, factors = plain.run("plain")
    assert len(distances) == 4 and len(factors) == 3
    _, with_residual = other.run("residual")
    assert with_residual[0] == pytest.approx(factors[0] + 1)  # the first attention reads the same


def test_losses_are_compared(arms: TextArms, monkeypatch: pytest.MonkeyPatch):
    assert "both minus plain" in pangu_pi.losses(arms).here
    assert "of 96" in pangu_pi.dimensions(arms).here
    losses = {"plain": [5.0, 5.0], "series": [4.99, 4.99], "shortcut": [5.0, 5.0], "both": [4.98, 4.99]}
    monkeypatch.setattr(TextArms, "losses", lambda self, arm: losses[arm])
    assert pangu_pi.losses(arms).passed
    losses["series"] = [4.97, 4.97]
    assert not pangu_pi.losses(arms).passed
    losses.update(series=[5.0, 5.0], both=[4.995, 4.995])
    assert not pangu_pi.losses(arms).passed


def test_insertion_reports_a_difference(monkeypatch: pytest.MonkeyPatch):
    assert pangu_pi.insertion("minilm", TINY).passed
    calls = []

    def outputs(model, subject):
        calls.append(model)
        return [torch.full((2,), 1e-4 * len(calls))]

    monkeypatch.setattr(pangu_pi, "_outputs", outputs)
    assert not pangu_pi.insertion("minilm", TINY).passed
