"""Agile-Quant's experiments on tiny sizes, and what is judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actkit.claims import agile_quant
from actkit.claims.agile_quant import COLUMN, RANDOM, START
from actkit.claims.subject import Subject
from actkit.quantization.agile_quant.pruned_quality import PrunedQuality

TINY = agile_quant.Sizes(seeds=(0, 1), calibration=1, held_out=1, prompts=1, tokens=64, width=32)


@pytest.fixture(scope="module")
def natural(language):
    return Subject("swiglu", calibration=1, split="train", held_out=1, model=language)


@pytest.mark.parametrize(("powers", "even", "passed"), [(107, 110, True), (107.1, 110, False), (99, 100, False)])
def test_attention_weights_are_judged_by_the_gaps(natural, monkeypatch, powers, even, passed):
    def perplexity(self: Any, recipe: Any = None, seed: int = 0) -> float:
        return 100.0 if recipe is None else even if recipe.softmax == "uniform" else powers

    monkeypatch.setattr(Subject, "perplexity", perplexity)
    assert agile_quant.attention_weights(natural).passed is passed


def test_only_attention_weights_are_rounded(natural):
    found = agile_quant.attention_weights(natural).here
    assert "powers of two" in found and "even steps" in found


def test_everything_is_rounded_in_every_arm(natural, monkeypatch):
    measured = agile_quant.everything(natural, TINY)
    assert measured.here.count("(") == 1  # all sites has a spread over the seeds
    monkeypatch.setattr(Subject, "perplexity", lambda self, recipe=None, seed=0: 100.0 if recipe is None else 110.0)
    assert agile_quant.everything(natural, TINY).passed
    monkeypatch.setattr(Subject, "perplexity", lambda self, recipe=None, seed=0: 100.0 if recipe is None else 110.1)
    assert not agile_quant.everything(natural, TINY).passed


@pytest.mark.parametrize(
    ("start", "random", "all_", "passed"),
    [(2.9, 2.95, 3.1, True), (2.9, 2.95, 2.9, True), (2.9, 2.85, 3.1, False), (3.05, 3.1, 2.9, False)],
)
def test_pruning_is_judged_over_kept_tokens_and_says_all(natural, monkeypatch, start, random, all_, passed):
    def found(model: Any, text: Any, before: Any, blocks: int, sparsity: float, score: Any, positions: Any = "") -> Any:
        kept = {START: start, COLUMN: 3.0, RANDOM: random}[score]
        return PrunedQuality(all_, kept, 3.0, 3.0, 100, 90, sparsity)

    monkeypatch.setattr(agile_quant, "_pruned", found)
    measured = agile_quant.pruned(natural, TINY)
    assert measured.passed is passed
    assert ("comes from leaving out hard ones" in measured.here) is (all_ > 3.0)
    assert ("in 4 of 4 cases" in measured.here) is (all_ < 3.0)


def test_prompts_are_really_pruned(natural):
    torch.manual_seed(0)
    here = agile_quant.pruned(natural, agile_quant.Sizes(seeds=(0,), calibration=1, held_out=1, prompts=1)).here
    assert all(f"{share:.0%}: start_token" in here for share in agile_quant.SPARSITIES)


@pytest.mark.parametrize("blocks", [6, 8, 30])
def test_the_schedules_reach_their_sparsity(blocks):
    for sparsity in agile_quant.SPARSITIES:
        schedule = agile_quant.schedule(blocks, sparsity)
        assert schedule.sparsity(blocks) == pytest.approx(sparsity) and min(schedule.shares) >= blocks // 3


def test_the_time_is_measured_and_judged(monkeypatch):
    assert "ms" in agile_quant.time_to_first_token(TINY).here
    for faster, passed in ((1.2, True), (1.19, False)):
        given = iter([faster, 1.0, 1.0, 1.0] * (agile_quant.REPEATS + 1))
        monkeypatch.setattr(agile_quant, "_seconds", lambda call, given=given: next(given))
        assert agile_quant.time_to_first_token(TINY).passed is passed
