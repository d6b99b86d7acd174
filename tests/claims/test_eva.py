"""EVA's experiments on tiny sizes: what they say was measured, and arms differ in nothing but the start."""

from __future__ import annotations

import copy

import pytest
import torch

from actkit.claims import eva
from actkit.claims.small_models import language_model
from actkit.claims.subject import Subject
from actkit.finetuning.eva import Eva

pytest.importorskip("peft")
TINY = eva.Sizes(seeds=(0, 1), rates=(1e-3, 1e-2), steps=3, early=2, rows=2, length=16, held_out=4)


@pytest.fixture(scope="module")
def subject(sentences):
    return Subject("minilm", calibration=12, split="train", held_out=12, model=copy.deepcopy(sentences))


def test_directions_are_measured_on_text_that_they_were_not_made_from(subject):
    found = eva.explains(subject)
    assert found.passed and "exact PCA" in found.here
    names = {text for batches in (subject.calibration(0), subject.held_out) for text in [batches.description]}
    assert len(names) == 2
    plan = Eva(rank=8, rho=1, batches=10**6).plan(subject.model, subject.calibration(0), progress=False)
    each = plan.inputs[-1]
    path = next(iter(each.ranks))
    rows = eva.inputs(subject.model, [path], subject.calibration(0))[path]
    assert len(rows) == each.tokens
    cosines = (eva.principal(rows, 8) @ each.directions.t()).diagonal().abs()
    assert cosines.min() > 0.9999


def test_moved_ranks_explain_more(subject):
    found = eva.shares(subject)
    assert found.passed and "ranks of" in found.here


def test_the_arms_read_the_same_text_and_what_is_said_is_what_was_measured():
    model = language_model(hidden=32, intermediate=64, layers=2)
    before = copy.deepcopy(model.state_dict())
    found = eva.sooner(model, TINY)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "step 2: EVA, rho" in found.here and "of 2 seeds" in found.here
    texts = [eva.topics(model, ("train",), TINY, 6, seed) for seed in (0, 0, 1)]
    assert texts[0].fingerprint == texts[1].fingerprint != texts[2].fingerprint
    test = eva.topics(model, ("test",), TINY, None)
    assert {len(test), len(texts[0])} == {2, 3}
    assert not any(eva.half(each.name) for each in eva.documents("train") if each.name.startswith("topics."))
