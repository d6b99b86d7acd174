"""The course of the learning rate: against torch's own schedulers, and step by step from the formula."""

from __future__ import annotations

import math

import pytest
import torch

from actkit.core.ground.errors import RecipeError
from actkit.core.recipe.schedule import ScheduleSettings
from actkit.core.recipe.stage import Train
from actkit.sparsity.plm.schedule import wsdc_lambda


def steps_of(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_wsdc_is_torchs_schedulers_one_after_the_other(shape: str) -> None:
    warmup, stable, decay, total, lowest = 4, 7, 10, 30, 0.25
    found = steps_of(
        torch.optim.lr_scheduler.LambdaLR(
            optimizer(), wsdc_lambda(warmup, stable, decay, total, min_ratio=lowest, shape=shape)
        ),
        total,
    )
    made, of = optimizer(), torch.optim.lr_scheduler
    falling = (
        of.LinearLR(made, 1.0, lowest, decay)
        if shape == "linear"
        else of.CosineAnnealingLR(made, decay, eta_min=lowest)
    )
    parts = [
        of.LinearLR(made, 1 / warmup, 1.0, warmup - 1),
        of.ConstantLR(made, 1.0, 1),
        falling,
        of.LambdaLR(made, lambda _: lowest),
    ]
    expected = steps_of(of.SequentialLR(made, parts, [warmup, warmup + stable, warmup + stable + decay]), total)
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_root() -> None:
    ratio = wsdc_lambda(0, 2, 4, 8, min_ratio=0.0, shape="1-sqrt")
    assert [ratio(step) for step in range(8)] == pytest.approx(
        [1, 1, 1, 1 - 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0, 0]
    )


def test_shares_are_those_steps() -> None:
    course = ScheduleSettings.parse("wsdc:stable=0.5,decay=0.2,min_ratio=0.1,shape=cosine")
    ratio = wsdc_lambda(10, 50, 20, 100, min_ratio=0.1, shape="cosine")
    assert [course.ratio(step, 100, 0.1) for step in range(100)] == pytest.approx([ratio(step) for step in range(100)])


def test_it_is_written_down() -> None:
    stage = Train(steps=5, schedule={"wsdc": {"stable": 0.5}})
    assert Train(**{**stage.dump(), "rules": ()}).schedule == {"wsdc": {"stable": 0.5}}
    assert Train(steps=5, schedule="linear").dump()["schedule"] == "linear"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("steps", "schedule: 'steps' was given, allowed is cosine, linear, constant, wsdc"),
        ("cosine:stable=1", "cosine: 'stable' is no option of it; it has none"),
        ("wsdc:length=1", "'length' is no option of it; allowed are stable, decay, min_ratio, shape"),
        ("wsdc:stable=2", "stable: 2 was given, allowed is a share"),
        ("wsdc:shape=step", "shape: 'step' was given, allowed are linear, cosine, 1-sqrt"),
        (3, "schedule: 3 was given; give a name"),
    ],
)
def test_what_is_refused(source: object, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ScheduleSettings.parse(source)


def test_steps_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="decay: -1 was given"):
        wsdc_lambda(1, 1, -1, 10)
    with pytest.raises(ValueError, match="total: 10 was given; give at least the 11 steps"):
        wsdc_lambda(1, 5, 5, 10)
