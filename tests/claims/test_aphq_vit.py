"""APHQ-ViT's experiments on tiny sizes: what is measured against sums written out, and what is judged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from actkit.claims import aphq_vit
from actkit.claims.aphq_vit import APH, BOTH, MSE, SEARCHED, Bench, Judged
from actkit.core.edit.edits import get_module
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.quantization.aphq_vit.aphq_vit import AphqVit

TINY = aphq_vit.Sizes(seeds=(0,), images=16, steps=2, rows=8, search_rows=16)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(TINY)


def test_arms_differ_in_what_weighs_the_error(bench: Bench) -> None:
    found = {arm: bench.judge(4, arm, 0) for arm in (SEARCHED, BOTH)}
    assert all(0.3 < each.accuracy <= 1 and each.divergence > 0 for each in found.values())
    assert len({round(each.divergence, 9) for each in found.values()}) == 2
    assert found[BOTH].hidden != found[SEARCHED].hidden
    assert bench.judge(4, BOTH, 0) is found[BOTH]


def test_the_error_of_hidden_units_is_that_of_their_rounding(bench: Bench) -> None:
    model = copy.deepcopy(bench.exact)
    apply(model, AphqVit(steps=0, search_rows=16), bench.calibration(0), progress=False)
    errors = []
    for block in anatomy(model).blocks:
        assert block.mlp is not None
        down, seen = get_module(model, block.mlp.down.path), []
        handle = down.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**bench.batch)
        handle.remove()
        x, scale, zero = seen[0].double(), float(down.inputs.scale), float(down.inputs.zero)
        rounded = (torch.clamp(torch.round(x / scale) + zero, 0, 15) - zero) * scale
        errors.append(float((rounded - x).square().sum() / x.square().sum()))
    assert bench.measured(model).hidden == pytest.approx(sum(errors) / 4, rel=1e-4)


def judged(monkeypatch: pytest.MonkeyPatch, bench: Bench, arms: dict[str, Judged]) -> None:
    monkeypatch.setattr(bench, "judge", lambda bits, arm, seed: arms.get(arm, Judged(0.5, 1.0, 0.1)))


@pytest.mark.parametrize(
    ("accuracy", "divergence", "passed"),
    [(0.8, 0.94, True), (0.796, 0.9, True), (0.79, 0.9, False), (0.9, 0.96, False)],
)
def test_weighing_is_judged_by_accuracy_and_divergence(
    monkeypatch: pytest.MonkeyPatch, bench: Bench, accuracy: float, divergence: float, passed: bool
) -> None:
    judged(monkeypatch, bench, {MSE: Judged(0.8, 1.0, 0.1), APH: Judged(accuracy, divergence, 0.1)})
    assert aphq_vit.weighing(bench).passed is passed


@pytest.mark.parametrize(
    ("accuracy", "hidden", "passed"), [(0.795, 0.06, True), (0.78, 0.06, False), (0.9, 0.08, False)]
)
def test_relu_is_judged_by_accuracy_and_hidden_units(
    monkeypatch: pytest.MonkeyPatch, bench: Bench, accuracy: float, hidden: float, passed: bool
) -> None:
    judged(monkeypatch, bench, {APH: Judged(0.8, 1.0, 0.1), BOTH: Judged(accuracy, 1.0, hidden)})
    assert aphq_vit.relu(bench).passed is passed


@pytest.mark.parametrize(("factor", "passed"), [(1.04, True), (1.06, False)])
def test_measuring_is_judged_at_the_blocks(
    monkeypatch: pytest.MonkeyPatch, bench: Bench, factor: float, passed: bool
) -> None:
    def made_up(model: Any, paths: list[str], data: Any, *, mode: str = "perturb", **_: Any) -> dict[str, list]:
        at_blocks = not any("mlp" in path for path in paths)
        h = torch.rand(1, 5, 8, generator=torch.Generator().manual_seed(0))
        return {path: [h * (factor if mode == "perturb" and at_blocks else 1.0)] for path in paths}

    monkeypatch.setattr(aphq_vit, "perturbation_importance", made_up)
    assert aphq_vit.measuring(bench).passed is passed


@pytest.mark.parametrize(("left", "passed"), [(0.09, True), (0.11, False)])
def test_fitting_is_judged_by_the_cosine(monkeypatch: pytest.MonkeyPatch, left: float, passed: bool) -> None:
    found = iter((0.3, left))
    monkeypatch.setattr(aphq_vit, "distance", lambda subject, recipe: next(found))
    assert aphq_vit.fitting(TINY).passed is passed
