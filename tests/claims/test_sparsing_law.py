"""Sparsing Law's experiments on tiny sizes, and their conditions on made-up figures."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch

from actkit.claims import sparsing_law as claim
from actkit.claims.subject import Subject
from actkit.core.train.training import train
from actkit.sparsity.sparsing_law.laws import relu_law, silu_law
from actkit.sparsity.sparsing_law.ppl_sparsity import ppl_sparsity
from actkit.sparsity.sparsing_law.shared_cett import Root

TINY = claim.Sizes(
    calibration=1, held_out=1, sample=64, gelu=1, law=8, checkpoints=5, stable=2, shape=1, shapes=((16, 2),), rows=32
)
TOKENS = np.geomspace(1e5, 2.5e6, 12)


@pytest.fixture(scope="module")
def case(language):
    subject = Subject("swiglu", calibration=1, split="calibration", held_out=1, model=language)
    with ExitStack() as stack:
        text = claim.Text(subject.model, subject.calibration(0), subject.held_out)
        yield claim.Case("cut", lambda: text, TINY, stack)


def test_the_metric_is_measured_on_held_out_text_at_equal_shares(case, monkeypatch):
    before = {name: value.clone() for name, value in case.text.model.state_dict().items()}
    found = claim.metric([case])
    exact = ppl_sparsity(case.text.model, case.text.calibration, held_out=case.text.held_out, sample=64, progress=False)
    assert f"({exact.held_out.ratio:.1%} active" in found.here and "FAT" in found.here and "top-k" in found.here
    after = case.text.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    better = claim.activation_ratio(case.text.model, case.text.held_out, progress=False)  # dense: nothing is better
    monkeypatch.setattr(claim, "activation_ratio", lambda *args, **kwargs: better)
    assert not claim.metric([case]).passed


def test_the_order_needs_five_points():
    class Fixed:
        def __init__(self, ratio):
            self.search, self.ratio = self, ratio

        def root(self, p):
            return Root(0.1, 0.1, True, ())

        def at(self, cett):
            return self

    assert claim.order(Fixed(0.05), Fixed(0.1001)).passed
    assert not claim.order(Fixed(0.05), Fixed(0.0999)).passed
    assert not claim.order(Fixed(0.4), Fixed(0.1)).passed


def test_consistency_is_judged_by_rise_and_by_monotony(case, monkeypatch):
    found = claim.consistent([case])
    assert "cut: x 1.0" in found.here
    monkeypatch.setattr(case, "_roots", {p: Root(0.0, 0.0, True, ()) for p in claim.PERCENTAGES})
    assert not claim.consistent([case]).passed  # x 1.00000


def test_snapshots_are_the_weights_after_the_given_steps():
    model = claim.small_models.language_model("relu", hidden=16, intermediate=24, layers=1)
    batches = claim.small_models.text(model, "train", 64)
    snapshots = claim.Snapshots(steps=(2, 3))
    settings = {"validation": batches[:1], "schedule": "constant", "keep": "last", "progress": False, "warmup": 0.0}
    train(model, batches[1:], steps=3, rules=[snapshots], **settings)
    assert sorted(snapshots.kept) == [2, 3]
    assert all(torch.equal(tensor, snapshots.kept[3][name]) for name, tensor in model.state_dict().items())
    shorter = claim.small_models.language_model("relu", hidden=16, intermediate=24, layers=1)
    train(shorter, batches[1:], steps=2, **settings)
    assert all(torch.equal(tensor, snapshots.kept[2][name]) for name, tensor in shorter.state_dict().items())


def test_a_run_shares_the_cett_of_its_last_checkpoints(monkeypatch):
    small = partial(claim.small_models.language_model, hidden=16, intermediate=24, layers=1)
    monkeypatch.setattr(claim.small_models, "language_model", small)
    tokens, ratios, cett = claim.run_of_checkpoints("relu", TINY)
    assert tokens == [step * 2048.0 for step in (1, 2, 3, 5, 8)]
    assert 0 < cett <= 1 and all(0 <= ratio <= 1 for ratio in ratios)


def test_the_laws_are_told_apart():
    falling, rising = relu_law(TOKENS / 1e9, 0.9, -2.5, 3e3, 0.1), silu_law(TOKENS / 1e9, 0.5, 1e-3, 0.5)
    assert claim.judged("relu", TOKENS, falling, "").passed
    assert claim.judged("silu", TOKENS, rising, "").passed
    for name, ratios in (("relu", rising), ("silu", falling)):
        found = claim.judged(name, TOKENS, ratios, "")
        assert not found.passed and "not reproduced at this scale" in found.here
    noise = falling + np.random.default_rng(0).normal(0, 0.03, len(TOKENS))
    assert not claim.judged("relu", TOKENS, noise, "").passed


def test_the_condition_on_shapes():
    shapes = [4.0, 13.7, 32, 88, 256]
    found = claim.judged_shape(shapes, [0.02, 0.03, 0.05, 0.1, 0.1])
    assert found.passed and "bottleneck" in found.here
    assert not claim.judged_shape(shapes, [0.1, 0.1, 0.05, 0.03, 0.02]).passed


def test_every_statement_is_judged(monkeypatch, language):
    called = []
    for name in ("metric", "order", "consistent", "law", "shape"):
        monkeypatch.setattr(claim, name, lambda *args, name=name: called.append(name) or claim.Measurement(name, True))
    outcome = claim.run(progress=False, sizes=TINY)
    assert outcome.passed and outcome.slug == "sparsing-law"
    assert {c.statement for c in outcome.claims} == {s.statement for s in claim.STATEMENTS}
    assert called == ["metric", "order", "consistent", "law", "law", "shape"]
