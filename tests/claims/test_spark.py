"""Spark's experiments on tiny sizes: they measure what they say, and a condition that does not hold is reported so."""

from __future__ import annotations

import math

import pytest
import torch

from actkit.claims import spark
from actkit.core.model.anatomy import anatomy

TINY = spark.Sizes(
    seeds=(0, 1),
    draws=20,
    timed=(4, 256),
    rounds=2,
    layers=1,
    steps=2,
    attention_steps=1,
    rows=2,
    attended=8,
    held_out=2,
)


@pytest.fixture(scope="module")
def arms() -> spark.Arms:
    return spark.Arms(TINY)


def test_counts_hold_for_normal_rows_and_would_fail_for_another_threshold(monkeypatch):
    found = spark.counts(TINY)
    assert found.passed and "5%: 20 of 20 rows" in found.here and "log-normal" in found.here
    monkeypatch.setattr(spark, "threshold", lambda x, k: torch.zeros(len(x), 1))
    assert not spark.counts(TINY).passed


def test_the_bound():
    assert spark.bound(0.5, 4096) == pytest.approx(
        4 * math.sqrt(math.log(6000) / 4096) * (1 + math.sqrt(2 * math.log(2)))
    )
    assert spark.bound(0.01, 4096) == spark.bound(0.99, 4096)


def test_speed_reports_and_judges_the_medians(monkeypatch):
    assert "2 interleaved rounds" in spark.speed(TINY).here
    monkeypatch.setattr(spark, "FASTER", 1e9)
    assert not spark.speed(TINY).passed


def test_arms_have_equally_many_weights_and_differ_as_they_say():
    names = ("SwiGLU", "top-k", "Spark", "ordinary attention", "Spark attention")
    models = {name: spark.fresh(name, 0, TINY) for name in names}
    assert len({sum(p.numel() for p in model.parameters()) for model in models.values()}) == 1
    read = {name: anatomy(model).block(0) for name, model in models.items()}
    assert [name for name in names if read[name].mlp is None] == ["Spark"]
    assert [name for name in names if read[name].attention is None] == ["Spark attention"]
    assert models["top-k"].model.layers[0].mlp.act_fn.k == pytest.approx(0.08 * 384)
    assert models["Spark"].model.layers[0].mlp.k == 46


def test_trained_arms_are_compared_in_every_seed(arms, monkeypatch):
    found = spark.against_dense(arms)
    assert found.here.count(", SwiGLU") == 1 and found.here.count("differences") == 1
    losses = {"Spark": [5.0, 5.0], "SwiGLU": [5.0, 4.95], "top-k": [5.0, 4.99]}
    monkeypatch.setattr(spark.Arms, "losses", lambda self, arm: losses[arm])
    assert spark.against_dense(arms).passed and not spark.against_top_k(arms).passed
    losses["SwiGLU"] = [4.91, 5.5]
    assert not spark.against_dense(arms).passed


def test_density_is_judged_by_layer_and_seed(arms, monkeypatch):
    found = spark.density(arms)
    assert "Spark: " in found.here and "top-k: " in found.here
    shares = {("Spark", 0): [0.08, 0.11], ("Spark", 1): [0.05, 0.12]}
    monkeypatch.setattr(spark, "_densities", lambda arms, arm, seed: shares.get((arm, seed), [0.5, 0.5]))
    assert spark.density(arms).passed
    shares["Spark", 1] = [0.08, 0.121]
    assert not spark.density(arms).passed


def test_attended_keys_are_counted_for_every_query(arms, monkeypatch):
    assert "differences" in spark.attention(arms).here
    found = spark.attended(arms)
    assert f"of {2 * 256 * 4:,} are above 16" in found.here
    monkeypatch.setattr(spark, "_attended", lambda model, batches: [torch.tensor([8, 16, 17])])
    assert not spark.attended(arms).passed
    monkeypatch.setattr(spark, "_attended", lambda model, batches: [torch.tensor([8, 16, 16])])
    assert spark.attended(arms).passed
