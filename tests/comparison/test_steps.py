"""What a step costs: FLOPs by hand, bytes by hand, and times that are taken in turns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actkit.comparison.arms import find, mlp
from actkit.comparison.steps import StepCost, measure_steps
from actkit.functions.pangu_pi.series import SeriesActivation

ROWS, INPUTS, WIDTH, OUTPUTS = 6, 5, 8, 3


def loss(model: nn.Module) -> Tensor:
    return model(torch.linspace(-0.9, 0.9, ROWS * INPUTS).view(ROWS, INPUTS)).square().mean()


def test_flops_and_bytes_are_those_by_hand() -> None:
    found = measure_steps(
        {name: mlp(find(name), INPUTS, WIDTH, OUTPUTS) for name in ("relu", "cheby_kan")}, loss, ROWS, 1e-4
    )
    products = INPUTS * WIDTH + WIDTH * OUTPUTS
    # forward, the gradients of both weights, and of the second layer's inputs; two FLOPs for each product and sum
    assert found["relu"].flops == 2 * (2 * products + WIDTH * OUTPUTS)
    size = 5  # polynomials of degrees 0 to 4
    assert found["cheby_kan"].flops == 2 * size * (2 * products + WIDTH * OUTPUTS)
    kept = INPUTS + WIDTH + OUTPUTS  # the input, the ReLU's output, the output that is squared
    assert found["relu"].saved_bytes == 4 * ROWS * kept
    assert found["cheby_kan"].saved_bytes == 4 * ROWS * kept  # its basis is computed again
    assert found["relu"].function_flops == WIDTH  # one comparison for each


def test_flops_of_functions_are_those_of_their_records() -> None:
    """At every call, by the outermost activation; None where one was not counted."""
    act = nn.SiLU()
    models = {
        "twice": nn.Sequential(nn.Linear(INPUTS, WIDTH), act, nn.Linear(WIDTH, WIDTH), act),
        "series": nn.Sequential(nn.Linear(INPUTS, WIDTH), SeriesActivation("silu", 2)),
        "unknown": nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.RReLU(), nn.ReLU()),
    }
    found = measure_steps(models, loss, ROWS, 1e-4, rounds=1)
    assert {name: each.function_flops for name, each in found.items()} == {
        "twice": 2 * 4 * WIDTH,
        "series": (2 * (4 + 2) + 1) * WIDTH,
        "unknown": None,
    }
    assert StepCost.mean_of([found["twice"], found["unknown"]]).function_flops is None


def test_steps_go_in_turns() -> None:
    calls = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(id(self))
            return super().forward(x)

    models = {name: Watched(INPUTS, 2) for name in "ab"}
    found = measure_steps(models, loss, ROWS, 1e-4, rounds=4)
    timed = calls[:14]
    assert timed == [id(models["a"]), id(models["b"])] * 7  # three rounds that are not timed, and four
    assert all(0 < each.milliseconds <= each.slowest for each in found.values())
    mean = StepCost.mean_of([StepCost(1, 2, 3, 4), StepCost(3, 4, 5, 6)])
    assert mean == StepCost(2, 3, 4, 5) and mean.function_flops is None
