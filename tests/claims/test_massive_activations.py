"""The claims of massive activations on tiny sizes: what is drawn, what is judged, and that each can fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actkit.claims import massive_activations as claim
from actkit.interpretation.massive_activations.law import original_curve
from actkit.testing import tiny_batches, tiny_model

TINY = claim.Sizes(layers=4, steps=12, rows=192, points=8, shapes=5)


def test_synthetic_layers_peak_where_they_are_said_to() -> None:
    random = np.random.default_rng(0)
    for inside in (True, False) * 10:
        parameters, peak = claim.synthetic(random, inside)
        t = np.linspace(0, 4 * claim.WINDOW, 20_001)
        curve = original_curve(t, parameters)
        assert float(t[curve.argmax()]) == pytest.approx(peak, abs=0.1)
        assert 0.04 < curve[0] / parameters["K"] < 0.51 and 1.29 < curve.max() / parameters["K"] < 3.01
        assert (peak < claim.WINDOW) == inside


def test_the_fit_is_judged_over_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = claim.recovered(TINY)
    assert "peak inside" in found.here and "preferred to both steps in" in found.here
    for name in ("STEADY", "PEAK"):
        monkeypatch.setattr(claim, name, 1e9)
    monkeypatch.setattr(claim, "PREFERRED", 0.0)
    assert claim.recovered(TINY).passed
    monkeypatch.setattr(claim, "R2", 1.1)
    assert not claim.recovered(TINY).passed


def test_models_are_followed_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "MODELS", {"SwiGLU": "silu"})
    found = claim.followed(TINY, "silu")
    assert len(found.layers) == 4 and all(layer.times[-1] == 12 for layer in found.layers)
    monkeypatch.setattr(claim, "followed", lambda *_: found)
    measured = claim.trained(TINY)
    assert "SwiGLU: R2" in measured.here
    monkeypatch.setattr(claim, "R2_TRAINED", -1.0)
    monkeypatch.setattr(claim, "PREFERRED_TRAINED", 0.0)
    assert claim.trained(TINY).passed


def test_a_forecast_is_judged_by_held_out_models(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, laws = claim.shapes(TINY)
    assert len(rows) == len(laws) and len({shape for shape, _ in rows}) == 5
    scores = {"A": 0.5, "lambda": 0.5, "gamma": 0.5, "t0": 0.5, "K": 0.69}
    monkeypatch.setattr(claim.Forecast, "score", lambda *_: scores)
    assert not claim.foretold(TINY).passed
    scores["K"] = 0.71
    assert claim.foretold(TINY).passed


def test_the_intervention_is_judged_by_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    batches = tiny_batches("llama")
    subject: Any = SimpleNamespace(model=model, calibration=lambda seed: batches, held_out=batches)
    assert claim.needed(TINY, subject).here == "the strict definition is met in no block"
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[5] *= 1e6
    found = claim.needed(TINY, subject)
    assert "strict in 2 of 2 blocks" in found.here and "at blocks.0.block.output" in found.here
    monkeypatch.setattr(claim, "WORSE", 0.0)
    monkeypatch.setattr(claim, "ALIKE", 1e9)
    assert claim.needed(TINY, subject).passed
