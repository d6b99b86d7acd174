"""AF-KAN's experiments on tiny sizes: the splits, the models' sizes, and what is judged."""

from __future__ import annotations

import pytest
import torch

from actkit.claims import af_kan
from actkit.claims.af_kan import BESIDE, MATCHED, MLP, MODELS, OURS, WIDE, Bench


@pytest.fixture
def bench() -> Bench:
    made = Bench(af_kan.Sizes(seeds=(0, 1), epochs=1, factors=(0.95,)))
    for name in MODELS:
        for seed, more in ((0, -0.5), (1, 0.5)):
            made._accuracies[name, seed] = {OURS: 95.0, MLP: 96.0, MATCHED: 93.0, WIDE: 96.5}.get(name, 90.0) + more
        made.seconds[name] = [1.0, 1.0]
    return made


def test_splits_have_equal_shares_of_each_class() -> None:
    x, y, test, labels = af_kan.split(0)
    assert len(x) == len(y) and len(test) == len(labels) and len(x) + len(test) == 1797 and x.shape[1] == 64
    assert float(x.min()) == 0 and float(x.max()) == 1
    whole, part = (each.bincount().double() for each in (torch.cat((y, labels)), labels))
    assert bool(((part / whole - 0.2).abs() < 0.01).all())
    assert not torch.equal(af_kan.split(1)[2][:50], test[:50]) and torch.equal(af_kan.split(0)[2], test)


def test_sizes_are_those_of_the_conditions() -> None:
    sizes = {name: af_kan.count(make) for name, make in MODELS.items()}
    assert (sizes[OURS], sizes[MLP], sizes[MATCHED], sizes[WIDE]) == (2600, 2560, 3201, 15_594)
    assert {sizes[name] for name in BESIDE} == {2600}


@pytest.mark.parametrize(
    ("name", "accuracy", "passed"), [(OURS, 95.0, True), (OURS, 94.9, False), (MATCHED, 93.1, False)]
)
def test_the_size_is_judged_by_means(bench: Bench, name: str, accuracy: float, passed: bool) -> None:
    for seed, more in ((0, -0.5), (1, 0.5)):
        bench._accuracies[name, seed] = accuracy + more
    found = af_kan.at_an_mlps_size(bench)
    assert found.passed is passed and "1.0 x the MLP's time" in found.here and "with ReLU 90.00" in found.here


@pytest.mark.parametrize(("accuracy", "passed"), [(96.5, True), (96.6, False)])
def test_fewer_parameters_are_judged_by_means(bench: Bench, accuracy: float, passed: bool) -> None:
    for seed, more in ((0, -0.5), (1, 0.5)):
        bench._accuracies[WIDE, seed] = accuracy + more
    assert af_kan.with_fewer(bench).passed is passed


def test_a_training_learns_and_is_the_same_twice() -> None:
    bench = Bench(af_kan.Sizes(seeds=(0,), epochs=2, factors=(0.95,)))
    first = bench.train(MODELS[MLP], af_kan.split(0), 0.95, 0)
    assert 30 < first <= 100 and bench.train(MODELS[MLP], af_kan.split(0), 0.95, 0) == first
    assert bench.factor == 0.95


def test_the_interval_is_student_s() -> None:
    low, high = af_kan.interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0) and high - low == pytest.approx(2 * 4.303 / 3**0.5, rel=1e-3)
