"""EdgeMoE's experiments on a tiny mixture, and what is judged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actkit.claims import edgemoe
from actkit.claims.edgemoe import Mixture, Sizes
from actkit.sparsity.edgemoe.path_predictor import PathPredictor
from actkit.sparsity.edgemoe.simulate import Simulated
from actkit.testing import tiny_model

TINY = Sizes(seeds=(0, 1), calibration=4, tuning=1, test=2, widths=1, threads=20, logits=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture")
    tiny_model("mixtral", initializer_range=0.3, num_hidden_layers=4).save_pretrained(path)
    return path


@pytest.fixture
def mixture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mixture:
    from transformers import MixtralForCausalLM

    def text(self: Mixture, rows: int, seed: int, split: str) -> list[Any]:
        generator = torch.Generator().manual_seed(100 * seed + len(split))
        return [{"input_ids": torch.randint(3, 40, (rows, 24), generator=generator)}]

    monkeypatch.setattr(Mixture, "text", text)
    monkeypatch.setattr(edgemoe, "PRELOADS", ((1, 0.3), (2, 0.5)))
    monkeypatch.setattr(edgemoe.zoo, "load", lambda name: MixtralForCausalLM.from_pretrained(folder).eval())
    monkeypatch.setattr(edgemoe.zoo, "path", lambda name: folder)
    return Mixture(TINY)


def test_every_claim_is_measured_on_a_tiny_mixture(mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgemoe, "Mixture", lambda sizes: mixture)
    outcome = edgemoe.run(progress=False, sizes=TINY)
    assert [claim.statement for claim in outcome.claims] == [each.statement for each in edgemoe.STATEMENTS]
    found = {claim.statement: claim for claim in outcome.claims}
    assert found[edgemoe.EXACT.statement].passed, found[edgemoe.EXACT.statement].here
    assert "8 of 8 tokens one by one equal" in found[edgemoe.EXACT.statement].here


def test_the_budget_is_a_quarter_and_an_expert_in_eight_bits_takes_two_milliseconds(mixture: Mixture) -> None:
    sizes = mixture.sizes_of(8)
    assert mixture.budget == pytest.approx(0.25 * sum(sizes.values()), rel=0.01)
    assert sizes[0, 0] / mixture.bandwidth == pytest.approx(0.002)
    assert mixture.sizes_of(dict.fromkeys(mixture.names, 4))[3, 3] < 0.6 * sizes[3, 3]


@pytest.mark.parametrize(("ours", "oracle", "passed"), [(85, 60, True), (85.1, 60, False), (50, 60, False)])
def test_the_runtime_is_judged_by_lru_and_bounded_by_belady(
    ours: float, oracle: float, passed: bool, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulated(self: Mixture, widths: Any, traces: Any, **given: Any) -> Simulated:
        time = oracle if given.get("policy") == "belady" else 100.0 if "policy" in given else ours
        return Simulated(time, 0.3, 10, 1000, 1, 1.0, 100)

    monkeypatch.setattr(Mixture, "simulated", simulated)
    assert edgemoe.runtime(mixture).passed is passed


@pytest.mark.parametrize(("second", "passed"), [(85.0, True), (85.1, False)])
def test_the_whole_is_judged_in_every_seed(
    second: float, passed: bool, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mixture, "plan", lambda self, seed: {"seed": seed})
    monkeypatch.setattr(Mixture, "one_width", lambda self, seed: 8)

    def simulated(self: Mixture, widths: Any, traces: Any, **given: Any) -> Simulated:
        return Simulated(100.0 if "policy" in given else (80.0, second)[widths["seed"]], 0.3, 1, 1, 1, 1.0, 1)

    monkeypatch.setattr(Mixture, "simulated", simulated)
    assert edgemoe.whole(mixture).passed is passed


@pytest.mark.parametrize(("plan", "passed"), [((8, 4), True), ((8, 8), False)])
def test_widths_are_judged_against_the_best_one_width(
    plan: tuple[int, int], passed: bool, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(mixture.names)
    widths = {name: plan[i % 2] for i, name in enumerate(names)}
    monkeypatch.setattr(Mixture, "plan", lambda self, seed: widths)
    monkeypatch.setattr(
        Mixture, "loss", lambda self, batches, found=None: 1.02 if found and min(found.values()) < 8 else 1
    )
    assert mixture.one_width(0) == 8
    assert edgemoe.bits(mixture).passed is passed


@pytest.mark.parametrize(("covered", "right", "passed"), [(0.6, 0.4, True), (0.59, 0.4, False), (0.7, 0.39, False)])
def test_paths_are_judged_by_coverage_and_accuracy(
    covered: float, right: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = SimpleNamespace(
        coverage=lambda traces: covered, accuracy=lambda traces, order: right if order == 2 else 0.3
    )
    assert edgemoe.paths(SimpleNamespace(predictor=predictor, test=[])).passed is passed  # type: ignore[arg-type]


def test_threads_are_judged_by_the_simulation(
    mixture: Mixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mixture.__dict__["test"] = [np.zeros((20, 4, 2), dtype=int) + np.array([0, 1])]
    mixture.__dict__["predictor"] = PathPredictor.fit(mixture.test, 4)
    monkeypatch.setattr(Mixture, "preloads", lambda self, widths: {"preload": 1, "least": 0.5})
    monkeypatch.setattr(Mixture, "simulated", lambda self, *_, **__: SimpleNamespace(token_ms=100.0))
    for found, passed in ((125.0, True), (74.0, False), (126.0, False)):
        monkeypatch.setattr(edgemoe, "_replayed", lambda *_, found=found, **__: found)
        assert edgemoe.threads(mixture, tmp_path).passed is passed
