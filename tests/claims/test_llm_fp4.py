"""LLM-FP4's experiments on tiny sizes: they measure what they say, and what does not hold is reported so."""

from __future__ import annotations

import pytest

from actkit.claims import llm_fp4
from actkit.claims.subject import Subject
from actkit.zoo.outliers import outlier_twin

TINY = llm_fp4.Sizes(seeds=(0, 1), calibration=1, held_out=2, sentences=4, candidates=3, rounds=1, tokens=64)


@pytest.fixture(scope="module")
def twin(language):
    return Subject("swiglu", calibration=1, split="train", held_out=2, model=outlier_twin(language))


@pytest.fixture(scope="module")
def encoder(sentences):
    return Subject("minilm", calibration=4, split="train", held_out=4, model=sentences)


def test_arms_have_a_value_per_seed(twin, encoder):
    for subject in (twin, encoder):
        found = llm_fp4.arms(subject, TINY, TINY.seeds)
        assert [len(values) for values in found.values()] == [2] * 5
        assert len({round(values[0], 9) for values in found.values()}) >= 3  # integers may all be zeros


@pytest.mark.parametrize(
    ("method", "baseline", "integers", "passed"),
    [(0.5, 1.0, 2.0, True), (0.7, 1.0, 2.0, False), (0.5, 1.0, 0.9, False)],
)
def test_the_condition(twin, encoder, monkeypatch, method, baseline, integers, passed):
    found = {"integers": [integers], "symmetric integers": [3.0], "E2M1": [3.0], "one bias": [baseline]}
    monkeypatch.setattr(llm_fp4, "arms", lambda *_: {**found, "LLM-FP4": [method]})
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert llm_fp4.on_the_twin(twin, twin, TINY).passed is passed
    assert llm_fp4.on_the_encoder(encoder, TINY).passed is passed
    assert llm_fp4.on_a_real_model(twin, TINY).passed is passed


def test_of_two_collapsed_models_none_is_better(twin, monkeypatch):
    gaps = {"integers": 9e5, "symmetric integers": 9e5, "E2M1": 9e5, "one bias": 8e5, "LLM-FP4": 1e5}
    monkeypatch.setattr(llm_fp4, "arms", lambda *_: {name: [gap] for name, gap in gaps.items()})
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    assert not llm_fp4.on_a_real_model(twin, TINY).passed


def test_the_fold_changes_no_bit(twin):
    found = llm_fp4.exactness(twin, TINY)
    assert "differ by 0 at most" in found.here
