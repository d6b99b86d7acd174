"""KAT's experiments on tiny sizes: what is compared, and what is judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actkit.claims import kat
from actkit.claims.kat import GELU, IDENTITY, KAT, RELEASED, Workshop
from actkit.claims.subject import Subject
from actkit.functions.kat.group_rational import GroupRational
from actkit.kernels.rationals import rational

TINY = kat.Sizes(seeds=(0, 1), sentences=20, held_out_sentences=16, rows=1, epochs=1, tuning=1, images=64, samples=32)


def test_the_released_coefficients_fit_the_other_kind() -> None:
    """The errors that the notes on the paper give."""
    x = torch.linspace(-3, 3, 2001, dtype=torch.float64).unsqueeze(-1)
    a, b = (torch.tensor([each], dtype=torch.float64) for each in (RELEASED.numerator, RELEASED.denominator))
    errors = [float((rational(x, a, b, kind) - F.gelu(x)).abs().max()) for kind in ("A", "B")]
    assert errors[0] == pytest.approx(1.46, abs=0.01) and errors[1] < 0.01


def test_the_encoder_is_judged_against_both(sentences: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kat.conversion(TINY, sentences)
    assert found.passed and "2 seeds" in found.here
    assert not any(isinstance(each, GroupRational) for each in sentences.modules())
    monkeypatch.setattr(kat, "released", lambda model: [])  # perfect, so that the fit is not better
    assert not kat.conversion(replace(TINY, seeds=(0,)), sentences).passed


@pytest.mark.parametrize(("ratio", "passed"), [(1.005, True), (1.0051, False)])
def test_gates_are_judged_by_the_worst_seed(ratio: float, passed: bool) -> None:
    class Fixed:
        def perplexity(self, transform: Any = None, seed: int = 0) -> float:
            return 30.0 if transform is None else 90.0 if transform.between else 30.0 * (ratio if seed else 1.0)

    found = kat.gates(Fixed(), TINY)  # type: ignore[arg-type]
    assert found.passed is passed and "90 with a fit on" in found.here


def test_gates_on_a_small_model(language: nn.Module) -> None:
    subject = Subject("swiglu", calibration=2, split="calibration", held_out=2, model=language)
    assert kat.gates(subject, replace(TINY, seeds=(0,))).passed


def test_arms_and_how_they_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = Workshop(replace(TINY, seeds=(0,)))
    models = {kind: workshop.untrained(kind, 0) for kind in (GELU, KAT, IDENTITY)}
    for kind, start in ((KAT, F.silu), (IDENTITY, lambda x: x)):
        second = models[kind].vit.layers[0].mlp.inner.activation_fn
        x = torch.randn(3, 256).clamp(-3, 3)
        torch.testing.assert_close(second(x), start(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(
        workshop.untrained(KAT, 0).vit.layers[0].mlp.inner.fc1.weight, models[KAT].vit.layers[0].mlp.inner.fc1.weight
    )
    monkeypatch.setattr(workshop, "trained", lambda kind, seed: kind)
    for accuracies, passed in (((90.0, 89.7, 89.5), True), ((90.0, 89.6, 80.0), False), ((90.0, 95.0, 94.9), False)):
        given = dict(zip((GELU, KAT, IDENTITY), accuracies, strict=True))
        monkeypatch.setattr(workshop, "accuracy", given.__getitem__)
        found = kat.training(workshop)
        assert found.passed is passed and "304 more parameters" in found.here


def test_tuning_goes_on_from_the_trained_model() -> None:
    found = kat.tuning(Workshop(replace(TINY, seeds=(0,))))
    assert "before" in found.here and "converted" in found.here


def test_the_variance_of_a_stack() -> None:
    assert 0.5 < kat.output_variance(0, 64, layers=3, width=256) < 2
    assert kat.output_variance(0, 64, 0.02, layers=3, width=256) < 0.1
    assert kat.output_variance(0, 64, layers=1, width=64) == kat.output_variance(0, 64, layers=1, width=64)
