"""OmniQuant's experiments on tiny sizes: the arms, and what they judge."""

from __future__ import annotations

import pytest

from actkit.claims import omniquant
from actkit.claims.subject import Subject

TINY = omniquant.Sizes(seeds=(0, 1), calibration=1, held_out=1, epochs=1)


@pytest.fixture(scope="module")
def natural(language):
    return Subject("swiglu", calibration=1, split="train", held_out=1, model=language)


def test_arms_have_a_value_per_seed(natural):
    found = omniquant.weights_alone(natural, TINY, 3, awq=False)
    assert {name: len(values) for name, values in found.items()} == {"rounded": 1, "OmniQuant": 2}
    found = omniquant.with_inputs(natural, omniquant.Sizes((0,), 1, 1, 1), 6, clipping_alone=False)
    assert [len(values) for values in found.values()] == [1, 1, 1]
    assert len({round(values[0], 9) for values in found.values()}) == 3


@pytest.mark.parametrize(
    ("ours", "awq", "passed"),
    [((70, 70, 70), (75, 75, 65), True), ((70, 70, 70), (75, 65, 65), False), ((81, 81, 81), (90, 90, 90), False)],
)
def test_two_bits_are_judged_against_rounding_and_awq(natural, monkeypatch, ours, awq, passed):
    arms = {"rounded": [100.0], "OmniQuant": list(map(float, ours)), "AWQ": list(map(float, awq))}
    monkeypatch.setattr(omniquant, "weights_alone", lambda *_, **__: arms)
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert omniquant.two_bits(natural, omniquant.Sizes()).passed is passed


@pytest.mark.parametrize(("ours", "passed"), [(38.4, True), (38.6, False)])
def test_three_bits_are_judged_by_the_gap(natural, monkeypatch, ours, passed):
    arms = {"rounded": [40.0], "OmniQuant": [ours]}
    monkeypatch.setattr(omniquant, "weights_alone", lambda *_, **__: arms)
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert omniquant.three_bits(natural, TINY).passed is passed


@pytest.mark.parametrize(
    ("ours", "alone", "smoothed", "passed"),
    [(79.0, 80.0, 100.0, True), (81.0, 90.0, 100.0, False), (79.0, 78.0, 100.0, False)],
)
def test_scales_are_judged_against_clipping_and_smoothing(natural, monkeypatch, ours, alone, smoothed, passed):
    arms = {"rounded": [150.0], "SmoothQuant": [smoothed], "clipping alone": [alone], "clipping and scales": [ours]}
    monkeypatch.setattr(omniquant, "with_inputs", lambda *_, **__: arms)
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert omniquant.inputs_too(natural, natural, TINY, 4).passed is passed


@pytest.mark.parametrize(("ours", "passed"), [(32.0, True), (33.0, False)])
def test_six_bits_are_judged_by_the_gap(natural, monkeypatch, ours, passed):
    arms = {"rounded": [50.0], "SmoothQuant": [32.5], "clipping and scales": [ours]}
    monkeypatch.setattr(omniquant, "with_inputs", lambda *_, **__: arms)
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert omniquant.six_bits(natural, natural, TINY).passed is passed
