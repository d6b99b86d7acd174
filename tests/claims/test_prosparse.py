"""ProSparse's experiments on tiny sizes: they measure what they say, and a condition that does not hold is reported."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from torch import nn

from actkit.claims import prosparse
from actkit.claims.prosparse import Arm, Arms, Sizes, next_factor

TINY = Sizes(
    seeds=(0, 1), peak=20.0, start=8, steps=10, tries=2, training=64, validation=16, held_out=16, hidden=32, layers=2
)


def test_all_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prosparse, "GRID", (0.01, 0.1))
    outcome = prosparse.run(progress=False, sizes=TINY)
    assert [claim.statement for claim in outcome.claims] == [each.statement for each in prosparse.STATEMENTS]
    assert "(a)" in outcome.claims[0].here and "2 seeds" in outcome.claims[0].here
    assert outcome.claims[1].here.count(" gave ") == 2
    assert outcome.claims[2].here.startswith("t ")


def test_the_schedule_of_c_and_the_rule_of_b() -> None:
    rule = Arms.rule.fget(SimpleNamespace(sizes=Sizes(peak=4.0)))  # type: ignore[attr-defined]
    factors = [rule.factor(step / 300) for step in range(300)]
    assert factors[:60] == [0.0] * 60 and factors[60:75] == [0.1] * 15
    assert factors[150:180] == pytest.approx([1.0] * 30) and factors[270:] == pytest.approx([4.0] * 30)
    assert factors == sorted(factors)
    constant = [prosparse.constant_factor(0.7).factor(step / 300) for step in range(300)]
    assert constant == [0.0] * 60 + [0.7] * 240


def test_three_tries_meet_a_sparsity_that_is_straight_in_the_log_of_the_factor() -> None:
    def found(factor: float) -> float:
        return 0.8 + 0.03 * math.log2(factor)

    for wanted in (0.77, 0.8, 0.9):
        tried: list[tuple[float, float]] = []
        for _ in range(3):
            tried.append(((factor := next_factor(tried, wanted, 1.3)), found(factor)))
        assert abs(tried[-1][1] - wanted) < 0.02 or tried[-1][0] == tried[-2][0] * 4
        assert tried[1][0] in (2.6, 0.65)
    assert next_factor([(1.0, 0.8), (2.0, 0.8)], 0.9, 1.0) == 4.0  # no slope: on in the same direction
    assert next_factor([(1.0, 0.8), (2.0, 0.79)], 0.7, 1.0) == 1.0


def arms(**changed: list[Arm]) -> SimpleNamespace:
    """Arms with given outcomes: c is 12 points sparser than a, as sparse as b, and a little better."""
    model = nn.Identity()
    given = {
        "relu": [Arm(model, 0.70, 30.0)] * 2,
        "constant": [Arm(model, 0.82, 32.0)] * 2,
        "rising": [Arm(model, 0.82, 31.9)] * 2,
    }
    return SimpleNamespace(**{**given, **changed}, swiglu=model, test=[], tried=[(1.0, 0.82)], sizes=Sizes())


def test_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prosparse, "perplexity", lambda model, batches: 29.0)
    model = nn.Identity()
    assert prosparse.sparser(arms()).passed and prosparse.progressive(arms()).passed
    less = [Arm(model, 0.82, 31.9), Arm(model, 0.795, 31.9)]  # in one seed
    assert not prosparse.sparser(arms(rising=less)).passed
    assert not prosparse.progressive(arms(rising=less)).passed  # no longer matched, though better
    assert not prosparse.progressive(arms(rising=[Arm(model, 0.82, 32.1)] * 2)).passed
    denser = [Arm(model, 0.80, 40.0)] * 2
    assert not prosparse.progressive(arms(constant=denser)).passed


@pytest.mark.parametrize(("gain", "cost", "passed"), [(0.01, 1.004, True), (0.0, 1.0, False), (0.01, 1.006, False)])
def test_condition_of_the_threshold(monkeypatch: pytest.MonkeyPatch, gain: float, cost: float, passed: bool) -> None:
    point = SimpleNamespace(threshold=0.02, sparsity=0.8)
    sweep = SimpleNamespace(choose=lambda max_loss: point)
    monkeypatch.setattr(prosparse, "sweep_threshold", lambda *_, **__: sweep)
    monkeypatch.setattr(prosparse, "apply", lambda *_, **__: SimpleNamespace(undo=lambda: None))
    monkeypatch.setattr(prosparse, "sparsity", lambda *_: 0.82 + gain)
    monkeypatch.setattr(prosparse, "perplexity", lambda *_: 31.9 * cost)
    given = arms()
    given.validation = []
    assert prosparse.threshold(given).passed is passed  # type: ignore[arg-type]
