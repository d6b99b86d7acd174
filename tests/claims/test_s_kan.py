"""S-KAN's experiments on tiny sizes: sizes, the course of an arm, and what is judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actkit.claims import s_kan
from actkit.claims.s_kan import ARMS, MLP, OURS, POOLED, TARGETS, Bench, Fit, points

TINY = s_kan.Sizes(seeds=(0,), steps=10, points=40, image_seeds=(0,), epochs=1)


def filled(**errors: float) -> Bench:
    bench = Bench(TINY)
    for target in TARGETS:
        for arm in ARMS:
            bench._fits[target, arm, 0] = Fit(errors.get(arm, 1.0), 100, 0.001)
    return bench


def test_targets_are_finite_and_points_differ_by_split_and_seed() -> None:
    for target, (inputs, _) in TARGETS.items():
        train, validation, test = points(target, 0, 40)
        assert train[0].shape == (40, inputs) and len(validation[0]) == 8 and test[1].shape == (40, 1)
        assert all(bool(torch.isfinite(y).all()) for _, y in (train, validation, test))
        assert not torch.equal(train[0], test[0]) and not torch.equal(train[0], points(target, 1, 40)[0][0])


@pytest.mark.parametrize("arm", ["cheby", OURS, MLP])
def test_an_arm_is_fitted_and_pruned_exactly(arm: str) -> None:
    found = Bench(TINY).fit("x y", arm, 0)
    assert found.error > 0 and found.parameters > 0 and found.changed < 1e-3
    if arm == MLP:
        assert found.parameters >= Bench(TINY).fit("x y", OURS, 0).parameters


@pytest.mark.parametrize(
    ("errors", "passed"),
    [
        ({OURS: 0.5, MLP: 1.0}, True),
        ({OURS: 1.0, MLP: 2.0}, False),  # no better rank than the first basis
        ({OURS: 0.9, MLP: 1.0}, False),  # not so much better than the MLP
        ({OURS: 0.5, MLP: 1.0, "cheby": 0.3}, False),
    ],
)
def test_ranks_and_means_are_judged(errors: dict[str, float], passed: bool) -> None:
    assert s_kan.functions(filled(**errors)).passed is passed


@pytest.mark.parametrize(
    ("parameters", "changed", "passed"), [(110, 0.0099, True), (111, 0.0, False), (90, 0.01, False)]
)
def test_pruning_is_judged_by_the_worst(parameters: int, changed: float, passed: bool) -> None:
    bench = filled()
    bench._fits["kinks", OURS, 0] = Fit(1.0, parameters, changed)
    assert s_kan.pruning(bench).passed is passed


def test_images_are_judged_against_the_best_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    for ours, passed in ((94.5, True), (94.4, False)):
        given: dict[Any, float] = {**dict.fromkeys(POOLED, 90.0), "rbf": 95.0, None: ours}
        monkeypatch.setattr(s_kan, "accuracy", lambda basis, seed, epochs, given=given: given[basis])
        assert s_kan.images(TINY).passed is passed


def test_convolutions_learn() -> None:
    assert s_kan.accuracy(None, 0, 2) > 30
