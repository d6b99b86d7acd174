"""AdaDim's experiments on tiny sizes: the isolation against numpy, what an arm is, and what is judged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from actkit.claims import adadim
from actkit.claims.adadim import CHOSEN, GPTQ, GPTQ_CHOSEN, INPUT, OUTPUT, Arms
from actkit.claims.subject import Subject

TINY = adadim.Sizes(seeds=(0, 1, 2), calibration=1, held_out=1, search=64, bits=(3,))


@pytest.fixture(scope="module")
def natural(language):
    return Subject("swiglu", calibration=1, split="train", held_out=1, model=language)


@pytest.fixture(scope="module")
def arms(natural):
    return Arms(natural, TINY)


@pytest.mark.parametrize(("weights", "inputs"), [(1.0, 100.0), (0.01, 100.0), (100.0, 1.0)])
def test_the_errors_of_a_random_layer_are_those_of_numpy(weights, inputs):
    generator = torch.Generator().manual_seed(1)
    w, x = (torch.randn(n, 256, generator=generator, dtype=torch.float64).numpy() for n in (256, 1024))
    w[:, 0] *= weights
    x[:, 0] *= inputs
    for found, flat in zip(adadim.errors(1, weights=weights, inputs=inputs), (w, w.T), strict=True):
        groups = flat.reshape(256, 4, 64)
        low, high = np.minimum(groups.min(-1), 0)[..., None], np.maximum(groups.max(-1), 0)[..., None]
        step = (high - low) / 7
        zero = np.round(-low / step)
        rounded = ((np.clip(np.round(groups / step) + zero, 0, 7) - zero) * step).reshape(256, 256)
        lost = rounded - w if flat is w else rounded.T - w
        alone = (x**2).mean(0) * (lost**2).mean(0)
        assert found == pytest.approx((((x @ lost.T) ** 2).mean(), alone[0] / alone.sum()), rel=1e-6)


def test_the_isolation_is_judged_by_the_mean(monkeypatch):
    for ratio, passed in ((0.3, True), (0.31, False)):
        monkeypatch.setattr(adadim, "errors", lambda *_, ratio=ratio, **__: [(1.0, 0.9), (ratio, 0.9)])
        assert adadim.isolation(TINY).passed is passed


def test_an_arm_has_a_value_per_seed(natural):
    arms = Arms(natural, replace(TINY, seeds=(0, 1)))
    found = {name: arms.of(name, 3) for name in (INPUT, OUTPUT, CHOSEN, GPTQ, GPTQ_CHOSEN)}
    assert [len(values) for values in found.values()] == [1, 1, 2, 2, 2]
    assert len({round(value, 9) for values in found.values() for value in values}) >= 7
    layers = arms.choice(3, 0)[1]
    assert len(layers) == 14 and all({"axis", "input", "output"} <= each.keys() for each in layers.values())
    assert arms.of(CHOSEN, 3)[1] == arms.subject.perplexity(arms._recipes(3)[CHOSEN], 1)
    assert "every layer took" in adadim.choice({"natural model": arms}).here


@pytest.mark.parametrize(
    ("inputs", "outputs", "passed"), [(32.0, 31.4, True), (32.0, 31.5, False), (29.9, 29.0, False)]
)
def test_the_twin_is_judged_by_the_gap(natural, arms, monkeypatch, inputs, outputs, passed):
    monkeypatch.setattr(Arms, "of", lambda _, name, bits: [inputs if name == INPUT else outputs])
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert adadim.on_the_twin(arms, natural).passed is passed


@pytest.mark.parametrize(
    ("chosen", "axis", "passed"),
    [([31.6, 31.5, 31.4], "input", True), ([31.6, 31.7, 31.4], "input", False), ([31.0] * 3, "output", False)],
)
def test_the_choice_is_judged_in_every_seed(arms, monkeypatch, chosen, axis, passed):
    values = {INPUT: [31.0], OUTPUT: [32.0], CHOSEN: chosen}
    monkeypatch.setattr(Arms, "of", lambda _, name, bits: values[name])
    monkeypatch.setattr(Arms, "choice", lambda *_: (0.0, {"layer": {"axis": axis, "input": 1.0, "output": 2.0}}))
    assert adadim.choice({"natural model": arms}).passed is passed


@pytest.mark.parametrize(("chosen", "passed"), [([30, 31, 33], True), ([30, 33, 33], False)])
def test_gptq_is_judged_seed_by_seed(arms, monkeypatch, chosen, passed):
    monkeypatch.setattr(Arms, "of", lambda _, name, bits: chosen if name == GPTQ_CHOSEN else [30.0, 31.0, 32.0])
    assert adadim.second_order({"natural model": arms}).passed is passed
