"""CATS' experiments on tiny sizes: they measure what they say, and a condition that does not hold is reported so."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import cats
from actkit.claims.subject import Subject
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.cats.gate_sparsity import gate_sparsity

TINY = cats.Sizes(seeds=(0, 1), calibration=1, held_out=2, sentences=4, steps=2, rows=2, validation=2, rates=(1e-3,))


@pytest.fixture(scope="module")
def subject(language):
    return Subject("swiglu", calibration=1, split="calibration", held_out=2, model=language)


def fixed(relu: float, ours: float, dense: float = 20.0):
    """In place of Subject.perplexity: the dense model's, that with ReLU, and that of CATS."""

    def perplexity(self, recipe=None, seed=0):
        return dense if recipe is None else ours if isinstance(recipe, Cats) else relu

    return perplexity


def test_quality_is_judged_at_one_half(subject, monkeypatch):
    found = cats.quality(subject, TINY)
    dense, half = subject.perplexity(), [subject.perplexity(Cats(sparsity=0.5), seed) for seed in TINY.seeds]
    assert f"perplexity {dense:.2f}" in found.here and f"{max(half) / dense - 1:+.1%} at most" in found.here
    assert found.passed == (max(half) <= 1.03 * dense)
    for ours, passed in ((20.59, True), (20.61, False)):
        monkeypatch.setattr(Subject, "perplexity", fixed(30.0, ours))
        assert cats.quality(subject, TINY).passed is passed


def test_relu_is_compared_at_its_own_share_of_zeros(subject, monkeypatch):
    found = cats.substitution(subject, TINY)
    share = cats.sparsity_under(subject, cats.RELU, subject.calibration(0)).zeros
    assert 0.3 < share < 1 and "zeros: perplexity" in found.here
    assert f"{subject.perplexity(cats.RELU):.2f} with ReLU" in found.here
    for ours, passed in ((24.0, True), (24.1, False)):
        monkeypatch.setattr(Subject, "perplexity", fixed(30.0, ours))
        assert cats.substitution(subject, TINY).passed is passed


def test_control_looks_at_every_layer(subject, monkeypatch):
    found = cats.control(subject, cats.Sizes(seeds=(0,)))
    assert "0.9: layers" in found.here and "of the MLPs' weights" in found.here
    model = subject.model
    assert gate_sparsity(model, subject.held_out, progress=False).zeros == 0  # nothing is left of it
    monkeypatch.setattr(cats, "CONTROLLED", (0.5,))
    within = cats.sparsity_under(subject, Cats(sparsity=0.5), subject.held_out)
    off = max(abs(layer.zeros - 0.5) for layer in within.layers)
    found = cats.control(subject, cats.Sizes(seeds=(0,)))
    assert found.passed == (off <= 0.02) and f"{100 * off:.1f} points" in found.here


def test_both_sides_are_trained_alike_and_the_subject_is_left_alone(subject, monkeypatch):
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    found = cats.tuning(subject, TINY)
    assert "CATS: " in found.here and "ReLU: " in found.here and "learning rate 0.001" in found.here
    after = subject.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

    class Run:
        before, validation, zeros = 3.0, 1.0, 0.7

        def __init__(self, subject, transform, rate, seed, sizes):
            self.loss = 3.0 - (isinstance(transform, Cats) and seed == 0) * 0.1

    monkeypatch.setattr(cats, "Tuned", Run)
    assert not cats.tuning(subject, TINY).passed  # a tie in the second seed
    assert cats.tuning(subject, cats.Sizes(seeds=(0,))).passed


def test_embeddings(sentences):
    subject = Subject("minilm", calibration=4, split="calibration", held_out=4, model=sentences)
    found = cats.embeddings(subject, TINY)
    assert found.here.startswith("cosine 0.9") and "2 calibration seeds" in found.here
