"""AWQ's experiments on tiny sizes: they measure what they say, and a condition that does not hold is reported so."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from actkit.claims import awq
from actkit.claims.subject import Subject
from actkit.core.anatomy import anatomy
from actkit.core.capture import record
from actkit.core.edits import temporarily
from actkit.core.statistics import Moments
from actkit.zoo.off_grid import off_grid_twin
from actkit.zoo.outliers import outlier_twin

TINY = awq.Sizes(seeds=(0, 1), calibration=1, held_out=2, sentences=4, search=64, grid=2, draws=2)


@pytest.fixture(scope="module")
def natural(language):
    return Subject("swiglu", calibration=1, split="train", held_out=2, model=language)


@pytest.fixture(scope="module")
def encoder(sentences):
    return Subject("minilm", calibration=4, split="train", held_out=4, model=sentences)


def test_arms_have_a_value_per_seed_and_are_remembered(natural, monkeypatch):
    rounded, scaled, clipped = awq.arms(natural, TINY, 3, TINY.seeds)
    assert (len(rounded), len(scaled), len(clipped)) == (1, 2, 2)
    assert len({natural.perplexity(), *rounded, *scaled, *clipped}) == 6
    monkeypatch.setattr(Subject, "_perplexity", lambda self: pytest.fail("measured again"))
    assert awq.arms(natural, TINY, 3, TINY.seeds) == (rounded, scaled, clipped)


def arms_of(monkeypatch, rounded: float, *clipped: float) -> None:
    monkeypatch.setattr(awq, "arms", lambda *_: ([rounded], list(clipped), list(clipped)))
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)


@pytest.mark.parametrize(
    ("rounded", "clipped", "passed"),
    [
        (32.0, (31.0, 31.2), True),
        (32.0, (31.3, 31.2), False),  # more than 0.6 of the gap is left
        (32.0, (30.0, 32.1), False),  # worse than rounding in one seed
        (29.0, (28.0, 28.0), False),  # no gap to close
    ],
)
def test_the_condition_on_the_twin(natural, monkeypatch, rounded, clipped, passed):
    twin = Subject("swiglu", calibration=1, split="train", held_out=2, model=outlier_twin(natural.model))
    arms_of(monkeypatch, rounded, *clipped)
    found = awq.on_the_twin(twin, natural, TINY)
    assert found.passed is passed and "of the gap is left" in found.here


@pytest.mark.parametrize(("clipped", "passed"), [((31.0, 31.2), True), ((31.3, 31.2), False), ((30.0, 32.1), False)])
def test_the_condition_on_the_off_grid_twin(natural, monkeypatch, clipped, passed):
    twin = Subject("swiglu", calibration=1, split="train", held_out=2, model=off_grid_twin(natural.model))
    monkeypatch.setattr(awq, "arms", lambda *_, scaled: ([32.0], list(clipped)))
    monkeypatch.setattr(Subject, "perplexity", lambda *_: 30.0)
    found = awq.on_the_off_grid_twin(twin, natural, TINY)
    assert found.passed is passed and "twin, 3 bits: rounded 32.00" in found.here
    largest = []
    for block in natural.model.model.layers:
        outputs = []
        handle = block.register_forward_hook(lambda *given, to=outputs: to.append(given[-1][0]))
        with torch.no_grad():
            natural.model(**natural.calibration(0)[0])
        handle.remove()
        magnitude = (outputs[0] if outputs[0].dim() == 3 else outputs[0][None]).abs()
        largest.append(float(magnitude.max() / magnitude.median()))
    said = float(re.search(r"between blocks is ([\d,]+) times", found.here)[1].replace(",", ""))
    assert said == pytest.approx(max(largest), rel=0.02)


def test_a_twin_with_another_function_fails(natural, monkeypatch):
    other = outlier_twin(natural.model)
    other.model.layers[0].input_layernorm.weight.data.mul_(1.1)
    twin = Subject("swiglu", calibration=1, split="train", held_out=2, model=other)
    arms_of(monkeypatch, 32.0, 30.1, 30.1)
    assert not awq.on_the_twin(twin, natural, TINY).passed


@pytest.mark.parametrize(("clipped", "passed"), [((30.2, 30.4), True), ((30.2, 30.5), False)])
def test_the_condition_on_the_natural_model(natural, monkeypatch, clipped, passed):
    arms_of(monkeypatch, 30.0, *clipped)
    assert awq.on_the_natural_model(natural, TINY).passed is passed


def test_kept_columns_are_exact_and_the_others_rounded(natural):
    inputs = [each for block in anatomy(natural.model).blocks for each in block.linear_inputs()]
    seen = record(natural.model, {each.site: Moments() for each in inputs}, natural.calibration(0), progress=False)
    sites = {linear.path: each.site for each in inputs for linear in each.linears}
    for by in ("activation", "weight", "random", "nothing"):
        edits = awq.kept_exact(natural, by, 0)
        assert [edit.path for edit in edits] == list(sites)
        for edit in edits:
            weight = natural.model.get_submodule(edit.path).weight.detach().numpy()
            changed = edit.module.dequantized().detach().numpy()
            exact = set(np.flatnonzero((changed == weight).all(0)))
            count = 0 if by == "nothing" else round(0.01 * weight.shape[1])
            assert len(exact) == count
            groups = changed.reshape(len(weight), -1, 64)
            if by == "nothing":
                assert max(len(np.unique(group)) for row in groups[:8] for group in row) <= 8
            if by == "activation":
                assert exact == set(seen[sites[edit.path]].mean_abs.topk(count).indices.tolist())
            if by == "weight":
                assert exact == set(np.argsort(-np.linalg.norm(weight, axis=0))[:count])


def test_the_distance_is_that_of_the_mean_embeddings(encoder):
    edits = awq.kept_exact(encoder, "nothing", 0)

    def embeddings():
        found = []
        for batch in encoder.held_out:
            with torch.no_grad():
                hidden = encoder.model(**batch).last_hidden_state.double()
            mask = batch["attention_mask"][..., None].double()
            found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found)

    before = embeddings()
    with temporarily(encoder.model, edits):
        after = embeddings()
    expected = float((1 - (before * after).sum(1)).mean())
    assert encoder.edited_distance(edits) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(embeddings(), before)


def test_saliency_reports_all_choices(natural, encoder, monkeypatch):
    for subject in (natural, encoder):
        here = awq.saliency(subject, TINY).here
        assert "by activation" in here and "2 draws" in here and "nothing kept" in here
    monkeypatch.setattr(awq, "kept_exact", lambda subject, by, seed: by)
    errors = {"activation": 0.41, "weight": 0.5, "random": 0.6, "nothing": 0.6}
    monkeypatch.setattr(Subject, "edited_distance", lambda self, by: errors[by])
    assert not awq.saliency(encoder, TINY).passed  # 0.82 x
    errors["activation"] = 0.39
    assert awq.saliency(encoder, TINY).passed
