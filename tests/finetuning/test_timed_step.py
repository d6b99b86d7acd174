"""Steps in a fresh process against the same steps in this one, and what they take against counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from actkit.core.ground.errors import FreshProcessError
from actkit.core.measure.fresh import FreshProcess
from actkit.core.store.checkpoint import load, save
from actkit.finetuning.timed_step import Way, stepping, take_steps, time_step
from actkit.testing import tiny_batches, tiny_model
from actkit.zoo.cnn import DigitsCNN

BATCH = {"pixel_values": torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(8)}
PARTS = ("forward_seconds", "backward_seconds", "optimizer_seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("llama"), tmp_path_factory.mktemp("timed") / "llama")


def rows() -> dict[str, Any]:
    batch = tiny_batches("llama")[0]
    return batch | {"labels": batch["input_ids"]}


def test_the_steps_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = DigitsCNN()
    torch.manual_seed(0)
    plain = DigitsCNN()
    found = take_steps(model, BATCH, way={}, steps=3)
    plain.train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    F.cross_entropy(plain(BATCH["pixel_values"]), BATCH["labels"])  # the pass that is metered moves statistics too
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(BATCH["pixel_values"]), BATCH["labels"])
        loss.backward()
        optimizer.step()
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    numbers = sum(each.numel() for each in plain.parameters())
    assert found["trainable"] == numbers
    assert 8 * numbers <= found["optimizer_bytes"] <= 8 * numbers + 64 * len(list(plain.parameters()))
    assert all(len(found[part]) == 3 and min(found[part]) > 0 for part in PARTS)


WAYS = {
    "all": Way(),
    "LoRA": Way(adapter="lora:rank=2"),
    "LIFT": Way(rules=("lift:lora_rank=1,rank_filter=2",)),
    "codes": Way(rules=({"s2a": {"head": ["*norm*"]}},)),
    "norms": Way(trainable=("*norm*",), optimizer="sgd"),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_are_prepared_and_put_back(name: str) -> None:
    model, way = tiny_model("llama").eval(), WAYS[name]
    classes = {path: type(module) for path, module in model.named_modules()}
    numbers = sum(each.numel() for each in model.parameters())
    losses = []
    with stepping(model, rows(), way) as step:
        assert step.kept_bytes() > 0
        for _ in range(3):
            step()
            losses.append(step.loss)
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        adapters = [path for path, _ in model.named_parameters() if "lora_A" in path]
        state: Any = step.optimizer
        if name == "LIFT":
            assert step.optimizer_bytes() == state.memory() < 4 * numbers
    assert losses[-1] < losses[0] and bool(adapters) == (name == "LoRA")
    assert trained == numbers if name == "all" else 0 < trained < numbers
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert all(each.requires_grad for each in model.parameters()) and not model.training


def test_a_fresh_process_takes_them_and_measures_its_own_memory(worker: FreshProcess, folder: Path) -> None:
    batch = rows()
    peaks = {}
    for name, way in {"one": Way(adapter="lora:rank=2"), "checkpointed": Way(checkpointing=True)}.items():
        here = take_steps(load(folder), batch, way=vars(way), steps=2)
        worker.load(folder)
        found = time_step(worker, batch, way, steps=2)
        assert found["loss"] == pytest.approx(here["loss"], rel=1e-5)
        same = ("kept_bytes", "optimizer_bytes", "trainable")
        assert [found[key] for key in same] == [here[key] for key in same]
        peaks[name] = found["peak_bytes"]
        assert all(len(found[part]) == 2 for part in PARTS) and found["resident_bytes"] > 50e6
    if Path("/proc/self/clear_refs").exists():
        assert min(peaks.values()) > 50e6


def test_the_peak_is_that_of_the_request(worker: FreshProcess, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save(DigitsCNN().eval(), tmp_path / "cnn")
    worker.load(tmp_path / "cnn", base=DigitsCNN)
    large = {"pixel_values": torch.rand(6000, 1, 8, 8), "labels": torch.arange(6000) % 10}
    found, kept = time_step(worker, large), time_step(worker, BATCH)
    if Path("/proc/self/clear_refs").exists():
        assert found["peak_bytes"] - found["resident_bytes"] > 0.9 * found["kept_bytes"] > 20e6
        assert kept["peak_bytes"] < found["peak_bytes"] - 20e6
        assert worker.memory()["peak_bytes"] >= found["peak_bytes"]  # since the load, of all requests


def test_what_cannot_be_trained_is_said(worker: FreshProcess, folder: Path) -> None:
    worker.load(folder)
    batch = rows()
    with pytest.raises(ValueError, match="steps: 0 was given"):
        time_step(worker, batch, steps=0)
    with pytest.raises(FreshProcessError, match=r"nothing.*fits no parameter"):
        time_step(worker, batch, Way(trainable=("nothing",)))
    with pytest.raises(FreshProcessError, match="call: the fresh process reports ModuleNotFoundError"):
        worker.call("actkit.nothing:here", batch)
    assert time_step(worker, batch)["trainable"] > 0  # it goes on
