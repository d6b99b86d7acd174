"""Widths against brute force, and parameters against those of the models that are made."""

from __future__ import annotations

import pytest

from actkit.comparison.arms import parse
from actkit.comparison.compare import _widths
from actkit.comparison.tasks import TASKS, count
from actkit.comparison.widths import fits, nearest, width_for_all


@pytest.mark.parametrize("step", [1, 3, 75, 666])
@pytest.mark.parametrize("wanted", [1, 80, 999, 25_510])
def test_the_nearest_width(step: int, wanted: int) -> None:
    width, parameters = nearest(lambda width: step * width + 10, wanted)
    best = min(abs(step * each + 10 - wanted) for each in range(1, wanted + 2))
    assert parameters == step * width + 10 and abs(parameters - wanted) == best


def test_widths_that_cannot_be_are_passed_over() -> None:
    assert nearest(lambda width: 10 * width if width % 8 == 0 else None, 1000) == (96, 960)
    with pytest.raises(ValueError, match="none near"):
        nearest(lambda width: None, 100)
    assert fits(99, 100) and fits(101, 100) and not fits(102, 100)


def test_a_width_for_all_arms() -> None:
    found = width_for_all(lambda width: 7 * width, [lambda width: 450 * width], 60)
    assert found is not None and fits(nearest(lambda width: 450 * width, 7 * found)[1], 7 * found)
    assert width_for_all(lambda width: 7 * width, [lambda width: 10**9 * width], 60) is None


MLPS = "silu,relu,crrelu,poly_norm,series:silu,swiglu,gr_kan,af_kan,relu_kan,bspline_kan,cheby_kan,rbf_kan,s_kan,hqkan"
POOLS = "relu,silu,crrelu,max,avg,poset:12,poset:chain"


@pytest.mark.parametrize(("task", "names"), [("digits-mlp", MLPS), ("formulas", MLPS), ("digits-cnn", POOLS)])
def test_every_arm_has_the_parameters_of_the_baseline(task: str, names: str) -> None:
    arms, made = parse(names), TASKS[task]()
    plan = _widths(arms, made, made.width)
    for part in made.parts[:2]:
        wanted = plan[arms[0]][1][part]
        for arm in arms:
            model = made.fresh(arm, plan[arm][0][part], part, 0)
            assert count(model) == plan[arm][1][part]
            assert abs(count(model) - wanted) <= 0.01 * wanted


@pytest.mark.parametrize("task", ["digits-vit", "text"])
def test_transformers_are_counted_by_their_mlps(task: str) -> None:
    made = TASKS[task]()
    names = "silu,gr_kan,lssar" if task == "text" else "silu,gr_kan"
    for arm in parse(names):
        assert made.parameters(arm, 24, "") == count(made.fresh(arm, 24, "", 0))
