"""QKAN's experiments on tiny sizes: what is counted, the arms' sizes, and what is judged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actkit.claims import qkan
from actkit.claims.qkan import ARMS, OURS, Sizes

TINY = Sizes(
    seeds=(0,), steps=2, points=50, extension_seeds=(0,), stage=2, image_seeds=(0,), epochs=1, rates=(3e-3, 1e-2)
)


def test_spectra_are_those_of_the_sheet() -> None:
    found = qkan.spectrum()
    assert found.passed and "none missing or too many" in found.here and "r = 3: 13 from 16" in found.here
    assert qkan.reachable(2) == (4, 12)


def test_the_arms_have_as_many_parameters_or_more() -> None:
    sizes = {arm: sum(each.numel() for each in make().parameters()) for arm, make in ARMS.items()}
    assert sizes[OURS] == 17 and all(17 <= size <= 18 for size in sizes.values())


@pytest.mark.parametrize(("ours", "passed"), [(0.9, True), (1.1, False)])
def test_the_wave_is_judged_by_medians(ours: float, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {qkan.Qkan: ours}

    def error(model: nn.Module, pair: qkan.Pair) -> float:
        return errors.get(type(model), 2.0)

    monkeypatch.setattr(qkan, "fit", lambda *args, **settings: None)
    monkeypatch.setattr(qkan, "error", error)
    assert qkan.wave(TINY).passed is passed


def test_the_extension_keeps_the_function_and_both_take_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: dict[int, int] = {}
    real = qkan.fit

    def fit(model: qkan.Qkan, *args: object, **settings: int) -> object:
        reps = model.layers[0].circuit.reps  # type: ignore[union-attr]
        steps[reps] = steps.get(reps, 0) + settings["steps"]
        return real(model, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(qkan, "fit", fit)
    found = qkan.extension(TINY)
    assert steps == {1: 2, 3: 2, 6: 2 + 6} and "of itself at most" in found.here


def test_heads_of_the_conditions() -> None:
    small, large = (qkan.head_size(qkan.cnn(hqkan)) for hqkan in (True, False))
    assert large == 33_482 and small <= 0.3 * large
    assert qkan.cnn(True)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    found = qkan.heads(TINY)
    assert f"HQKAN ({small}, 16%" in found.here
