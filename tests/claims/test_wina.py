"""WINA's experiments on tiny sizes: they measure what they say, and a condition that does not hold is reported so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from actkit.claims import wina
from actkit.claims.subject import Subject, spread
from actkit.core.recipe.runner import apply
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.r_sparse.r_sparse import RSparse
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.wina import Wina

TINY = wina.Sizes(seeds=(0, 1), calibration=1, greedy=1, held_out=2, tokens=48, step=0.5, layer=(256, 512), rounds=4)


@pytest.fixture(scope="module")
def subject(language):
    return Subject("swiglu", calibration=1, split="calibration", held_out=2, model=language)


def test_perplexity_is_that_of_the_next_token_and_the_model_is_left_as_it_was(subject):
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    total, count = 0.0, 0
    for batch, owners in zip(subject.held_out, subject.held_out.document_ids):
        with torch.no_grad():
            logits = subject.model(**batch).logits.double()
        same = owners[:, 1:] == owners[:, :-1]
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        total, count = total + float(losses[same].sum()), count + int(same.sum())
    assert subject.perplexity() == pytest.approx(np.exp(total / count), rel=1e-5)
    assert subject.perplexity(Teal(sparsity=0.5)) > subject.perplexity()
    after = subject.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "method",
    [Teal(sparsity=0.5), Wina(sparsity=0.4, mode="top_k"), Cats(sparsity=0.5), RSparse(sparsity=0.5, alpha=0.8)],
    ids=lambda method: type(method).__name__,
)
def test_the_edits_of_one_recording_are_those_of_apply(subject, method):
    applied = apply(subject.model, method, subject.calibration(1), undo="memory", progress=False)
    expected = subject._perplexity()
    applied.undo()
    assert subject.perplexity(method, 1) == pytest.approx(expected, rel=1e-6)


def test_calibration_and_measurement_share_no_row_and_seeds_differ(subject):
    def rows(batches):
        return {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}

    assert not rows(subject.calibration(0)) & rows(subject.held_out)
    assert rows(subject.calibration(0)) != rows(subject.calibration(1))


def test_the_error_is_that_of_the_smallest_scores_dropped():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(5, 8)), rng.normal(size=(7, 8))
    norms = np.linalg.norm(weight, axis=0)
    for score in (None, norms):
        expected = []
        for row in x:
            kept = np.argsort(-np.abs(row) * (1 if score is None else score))[: int(8 * (1 - 0.65))]
            masked = np.zeros(8)
            masked[kept] = row[kept]
            expected.append(np.linalg.norm(weight @ (row - masked)) / np.linalg.norm(weight @ row))
        given = None if score is None else torch.from_numpy(score)
        found = wina._error(torch.from_numpy(weight), torch.from_numpy(x), given, 0.65)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_layer_errors_fail_with_norms_that_mean_nothing(subject, monkeypatch):
    found = wina.layer_errors(subject, TINY)
    assert "of 14 layers" in found.here and "2 seeds of 48 tokens" in found.here
    monkeypatch.setattr(wina, "column_norms", lambda linears: torch.rand(linears[0].in_features) + 1e-3)
    assert not wina.layer_errors(subject, TINY).passed


def test_the_theorem_holds_and_its_failure_would_be_seen(monkeypatch):
    assert wina.theorem(TINY).passed
    generator = torch.Generator().manual_seed(0)
    weight = wina._orthogonal(12, generator)
    gram = weight.t() @ weight
    torch.testing.assert_close(gram, gram.diag().diag(), atol=1e-12 * float(gram.max()), rtol=0)
    monkeypatch.setattr(wina, "_orthogonal", lambda n, g: torch.randn(2 * n, n, generator=g, dtype=torch.double))
    assert not wina.theorem(TINY).passed  # columns that are not orthogonal


def test_the_condition_on_perplexities():
    good = {0.5: (31.0, 31.0), 0.65: (40.0, 39.6)}
    assert wina._better([good, good])
    for worse in ({0.5: (31.0, 31.01), 0.65: (40.0, 39.0)}, {0.5: (31.0, 30.0), 0.65: (40.0, 39.61)}):
        assert not wina._better([good, worse])


def test_perplexities_of_both_masks(subject, monkeypatch):
    found = wina.top_k(subject, TINY)
    assert all(f"{p}: TEAL" in found.here for p in TINY.sparsities)
    exact = subject.perplexity(Wina(sparsity=0.65, mode="top_k"))
    assert f"WINA {exact:.2f} (" in found.here
    found = wina.threshold(subject, TINY)
    both = [subject.perplexity(Teal(sparsity=0.5), seed) for seed in TINY.seeds]
    assert f"0.5: TEAL {spread(both)}" in found.here
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)  # no difference at all
    assert not wina.top_k(subject, TINY).passed and not wina.threshold(subject, TINY).passed


def test_greedy_is_judged_in_every_seed(subject, monkeypatch):
    def perplexity(self, recipe, seed):
        return 30.0 - (recipe.allocation == "greedy") * (seed != 1)

    monkeypatch.setattr(Subject, "perplexity", perplexity)
    found = wina.greedy(subject, TINY)
    assert not found.passed and "greedy 29.50 (29.00 to 30.00)" in found.here
    assert wina.greedy(subject, wina.Sizes(seeds=(0, 2))).passed


def test_greedy_runs(subject):
    assert "uniform" in wina.greedy(subject, wina.Sizes(seeds=(0,), step=0.5)).here


def test_the_rotation_is_measured_and_taken_back(subject, monkeypatch):
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    found = wina.rotation(subject)
    assert found.passed and "131,072" in found.here and "of 786,432" in found.here
    after = subject.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    weight = np.random.default_rng(0).normal(size=(6, 4))
    gram = weight.T @ weight
    largest = np.abs(gram - np.diag(np.diag(gram))).max() / np.diag(gram).max()
    assert wina._largest_product(torch.from_numpy(weight)) == pytest.approx(largest)
    monkeypatch.setattr(wina, "_largest_product", lambda weight: 1e-3)
    assert not wina.rotation(subject).passed


def test_speed_reports_both_sparsities(monkeypatch):
    found = wina.speed(TINY)
    assert "0.5: " in found.here and "0.7: " in found.here and "4 interleaved rounds" in found.here
    monkeypatch.setattr(wina, "SPEEDS", {0.5: 1e9})
    assert not wina.speed(TINY).passed


def test_spread():
    assert spread([1.0]) == "1.00"
    assert spread([1.0, 2.0, 3.0], ".1f") == "2.0 (1.0 to 3.0)"
