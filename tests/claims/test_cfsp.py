"""CFSP's experiments on tiny sizes: the arms cut as much as each other, and what they say is what they measured."""

from __future__ import annotations

import pytest

from actkit.claims import cfsp
from actkit.claims.subject import Subject
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply

TINY = cfsp.Sizes(seeds=(0, 1), sparsities=(0.5,), calibration=1, held_out=2, rounds=1)


@pytest.fixture(scope="module")
def subject(language):
    return Subject("swiglu", calibration=1, split="train", held_out=2, model=language)


def test_arms_cut_as_much_as_each_other(subject):
    widths = {}
    for name, arm in cfsp.ARMS.items():
        applied = apply(subject.model, arm.model_copy(update={"sparsity": 0.5}), subject.calibration(0), progress=False)
        widths[name] = sum(block.mlp.width for block in anatomy(subject.model).blocks)
        applied.undo()
    blocks = len(anatomy(subject.model).blocks)
    assert max(widths.values()) - min(widths.values()) <= blocks


def test_what_is_said_is_what_was_measured(subject):
    found = cfsp.chosen(subject, TINY)
    random = cfsp.perplexities(subject, TINY, "random", 0.5)
    ours = cfsp.perplexities(subject, TINY, cfsp.BOTH, 0.5)
    ratio = sum(ours) / sum(random)
    assert found.here.startswith(f"{ratio:.3f} x random") and found.passed == (ratio <= 0.85)
    assert f"{subject.perplexity():.2f}" in found.here
    gain = sum(ours) / sum(cfsp.perplexities(subject, TINY, cfsp.FINE, 0.5))
    shared = cfsp.shared_out(subject, TINY)
    assert f"{gain:.4f} x at 50%" in shared.here and shared.passed == (gain <= 1.01)
