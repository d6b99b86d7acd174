"""Every task trains every kind of arm that it takes, the same for the same seed, and scores what it says."""

from __future__ import annotations

import math

import pytest
import torch

from actkit.comparison.arms import find
from actkit.comparison.tasks import TASKS, Text, count

ARMS = {
    "digits-mlp": ["relu", "bspline_kan", "s_kan"],
    "digits-cnn": ["crrelu", "series:relu", "group_rational", "avg", "poset:N"],
    "digits-vit": ["poly_norm", "swiglu", "s_kan"],
    "text": ["silu", "gr_kan", "lssar"],
    "formulas": ["tanh", "s_kan"],
    "tabular": ["selu", "af_kan"],
}


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in ARMS.items() for name in names])
def test_a_training(task: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "held_out", 16)
    made, arm = TASKS[task](), find(name)
    assert arm.kind in made.kinds
    part = made.parts[0]
    before = torch.get_rng_state()
    found = [made.trained(made.fresh(arm, 8, part, 3), part, made.rates[1], 3, 3) for _ in range(2)]
    assert found[0] == found[1]  # all that is drawn follows from the seed
    assert torch.equal(torch.get_rng_state(), before)
    assert math.isfinite(found[0].validation) and math.isfinite(found[0].score)
    if made.unit == "%":
        assert 0 <= found[0].score <= 100
    parameters = made.parameters(arm, 8, part)
    assert parameters is not None and found[0].parameters <= parameters
    assert (found[0].parameters < parameters) == (name == "s_kan")
    loss, rows = made.step(part)
    assert rows and math.isfinite(float(loss(made.fresh(arm, 8, part, 3)).detach()))


@pytest.mark.parametrize("task", TASKS)
def test_arms_of_a_seed_share_what_they_do_not_change(task: str) -> None:
    made = TASKS[task]()
    part = made.parts[-1]
    one, other = (made.fresh(find(name), 8, part, 1).state_dict() for name in ("silu", "relu"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert count(made.fresh(find("silu"), 9, part, 1)) > count(made.fresh(find("silu"), 8, part, 1))
    another = made.fresh(find("silu"), 8, part, 2).state_dict()
    assert any(not torch.equal(value, another[key]) for key, value in one.items())


def test_a_part_of_a_task_is_cut_by_its_seed() -> None:
    made = TASKS["tabular"]()
    (x, labels), *_ = made.splits("wine", 0)  # type: ignore[attr-defined]
    assert len(x) == len(labels) == int(0.6 * 178)
    assert torch.allclose(x.mean(0), torch.zeros(13), atol=1e-5)
    again = made.splits("wine", 1)[0][1]  # type: ignore[attr-defined]
    assert not torch.equal(labels, again)
