"""PLM's experiments on tiny sizes: they measure what they say, and a condition that does not hold is reported so."""

from __future__ import annotations

import pytest

from actkit.claims import plm

SHAPE = {
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
TINY = plm.Sizes(
    seeds=(0,), shape=SHAPE, prompt=3, decoded=5, contexts=(16, 32), rounds=2, layers=1, steps=4, rows=2, held_out=2
)


@pytest.fixture(scope="module")
def arms() -> plm.Arms:
    return plm.Arms(TINY)


def test_arms_have_equally_many_weights(arms: plm.Arms) -> None:
    counts = {sum(p.numel() for p in plm.fresh(arm, 0, TINY).parameters()) for arm in ("squared ReLU", "SwiGLU")}
    assert len(counts) == 1


def test_zeros_and_losses_are_judged_both(arms: plm.Arms, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plm.sparse(arms)
    assert "in the quarters of the training" in found.here and len(arms.course[0]) == 4
    assert not found.passed  # 4 steps leave about half of the units at 0
    monkeypatch.setattr(plm, "ZEROS", 0.0)
    monkeypatch.setattr(plm, "LOSS", 10.0)
    assert plm.sparse(arms).passed
    monkeypatch.setattr(plm, "LOSS", -10.0)
    assert not plm.sparse(arms).passed


def test_the_caches_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer heads the ratio is another one than the published model's, so the claim says no."""
    found = plm.same(TINY)
    assert "576 and 640 numbers per token and layer" in found.here and not found.passed


def test_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plm.timed(TINY)
    assert "medians of 2 interleaved steps" in found.here and "90.00% of the bytes" in found.here
    assert not found.passed
