"""PolyCom's experiments on tiny sizes: they measure what they say; a condition that does not hold is reported so."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import polycom
from actkit.claims.small_models import TextArms

TINY = polycom.Sizes(seeds=(0, 1), steps=2, layers=1, held_out=16, fits=(0, 1), fitting_steps=3, points=16)


@pytest.fixture(scope="module")
def arms() -> TextArms:
    return polycom.text_arms(TINY)


def test_arms_have_equally_many_weights():
    sizes = {
        arm: sum(p.numel() for p in polycom.fresh(arm, 0).parameters()) for arm in ("SwiGLU", *polycom.ACTIVATIONS)
    }
    assert sizes["GELU"] == sizes["SwiGLU"] and sizes["PolyNorm"] == sizes["PolyReLU"] == sizes["GELU"] + 8


def test_losses_are_compared(arms: TextArms, monkeypatch: pytest.MonkeyPatch):
    found = polycom.against_gelu(arms)
    assert "mean degree of PolyNorm by layer" in found.here and "PolyReLU" in found.here
    losses = {"PolyNorm": [5.0, 5.0], "GELU": [5.02, 5.01], "SwiGLU": [4.98, 5.0], "PolyReLU": [5.0, 5.0]}
    monkeypatch.setattr(TextArms, "losses", lambda self, arm: losses[arm])
    assert polycom.against_gelu(arms).passed and polycom.against_swiglu(arms).passed
    losses["GELU"] = [5.01, 5.0]
    losses["SwiGLU"] = [4.97, 5.0]
    assert not polycom.against_gelu(arms).passed and not polycom.against_swiglu(arms).passed


def test_the_rate_is_chosen_by_validation_with_the_first_seed(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def trained(self, arm, seed, rate):
        asked.append((seed, rate))
        return None, {1e-3: 2.0, 3e-3: 1.0}[rate]

    arms = polycom.text_arms(TINY)
    monkeypatch.setattr(TextArms, "_model", trained)
    assert arms.rate("GELU") == 3e-3 and asked == [(0, 1e-3), (0, 3e-3)]


def test_errors_of_fits_are_compared(monkeypatch: pytest.MonkeyPatch):
    assert "tanh" in polycom.formulas(TINY).here
    for error, passes in ((0.4, True), (0.6, False)):
        monkeypatch.setattr(polycom, "fit", lambda f, *_, e=error: (0.0, e if type(f).__name__ == "PolyReLU" else 1.0))
        assert polycom.formulas(TINY).passed is passes


def test_the_target():
    points = torch.tensor([[0.5, -0.25]])
    assert float(polycom.target(points)) == pytest.approx(0.8753826 - 0.03125, abs=1e-4)
