"""R-Sparse's experiments on tiny sizes: they measure what they say, and a condition that does not hold is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from actkit.claims import r_sparse
from actkit.claims.subject import Subject
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.model.anatomy import Linear
from actkit.sparsity.r_sparse.r_sparse import RSparse

TINY = r_sparse.Sizes((0, 1), calibration=64, tokens=32, sequences=1, held_out=2, generations=1, population=2)


@pytest.fixture(scope="module")
def subject(language):
    return Subject("swiglu", calibration=1, split="calibration", held_out=2, model=language)


def test_the_error_is_relative_to_the_product_without_bias():
    rng = np.random.default_rng(0)
    linear = nn.Linear(8, 5)
    layer = ActLinear.of(linear, select=Threshold(0.5))
    x = rng.normal(size=(6, 8)).astype(np.float32)
    weight = linear.weight.detach().numpy()
    expected = [np.linalg.norm(weight @ (r * (abs(r) <= 0.5))) / np.linalg.norm(weight @ r) for r in x]
    found = r_sparse.relative_error(layer, Linear("layer", "layer", linear), torch.from_numpy(x))
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_layer_errors_of_every_mix(subject, sentences):
    encoder = Subject("minilm", calibration=4, split="calibration", held_out=8, model=sentences)
    for each, count in ((subject, 14), (encoder, 12)):
        errors = r_sparse._Errors(each, TINY)
        table = errors.by_seed()[0][0.3]
        assert table.shape == (count, 7) and ((table > 0) & (table < 2)).all() and len(errors.by_seed()) == 2
        mixed, ranks = r_sparse.mixed_is_best(errors), r_sparse.rank_is_worse(errors)
        assert f"of {count} layers" in mixed.here and "2 seeds, 32 held-out tokens" in ranks.here
        best = (table.argmin(1) > 0).double().mean()
        assert mixed.passed == all((t[0.3].argmin(1) > 0).double().mean() >= 0.25 for t in errors.by_seed())
        assert 0 <= best <= 1


def test_conditions_on_layers_can_fail():
    errors = r_sparse._Errors(None, TINY)
    good = torch.linspace(0.1, 0.7, 7).repeat(8, 1)
    good[:2, 1] = 0.0  # a quarter of the layers at alpha 0.9
    errors._found = [dict.fromkeys(r_sparse.BUDGETS, good)] * 2
    assert r_sparse.mixed_is_best(errors).passed and r_sparse.rank_is_worse(errors).passed
    bad = good.clone()
    bad[0, 1] = 1.0
    bad[0, -1] = 0.0
    errors._found = [{0.5: good, 0.4: good, 0.3: good}, {0.5: bad, 0.4: good, 0.3: bad.flip(1)}]
    assert not r_sparse.rank_is_worse(errors).passed
    errors._found = [dict.fromkeys(r_sparse.BUDGETS, torch.linspace(0.1, 0.7, 7).repeat(8, 1))]
    assert not r_sparse.mixed_is_best(errors).passed


def test_the_search_is_judged_on_other_text_in_every_seed(subject, monkeypatch):
    found = r_sparse.search(subject, TINY)
    exact = [subject.perplexity(RSparse(alpha=1.0), seed) for seed in TINY.seeds]
    assert found.passed in (True, False) and "evaluations" in found.here and all(value > 1 for value in exact)

    def perplexity(self, recipe=None, seed=0):
        worse = recipe is not None and isinstance(recipe.alpha, dict) and seed == 1
        return 30.0 + worse

    monkeypatch.setattr(Subject, "perplexity", perplexity)
    assert not r_sparse.search(subject, TINY).passed


def test_the_ends_are_compared(subject, monkeypatch):
    found = r_sparse.ends(subject, TINY)
    assert "rank only" in found.here
    monkeypatch.setattr(Subject, "perplexity", lambda self, recipe=None, seed=0: 30.0)
    assert not r_sparse.ends(subject, TINY).passed
