"""Narrower MLPs under what comes after: in one recipe, in runs of their own, healed between, and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import actkit
from actkit.compression.cfsp import Cfsp
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.measure.fresh import FreshProcess
from actkit.core.recipe.runner import apply
from actkit.finetuning.adapters import parse_adapter
from actkit.finetuning.low_rank_training import train_adapter
from actkit.formats.export import export
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.wina.wina import Wina
from actkit.testing import tiny_batches, tiny_model

STACK: tuple[Any, ...] = (Cfsp(sparsity=0.4), Awq(bits=4, group_size=-1, n_grid=3), Wina(sparsity=0.3))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batches("llama")[0]).logits


def is_whole(model: nn.Module) -> None:
    """All three methods left their mark on the same layer."""
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(down, ActLinear) and down.in_features < 24
    assert down.filled_slots == ("weight", "select") and isinstance(down.storage, IntegerWeight)


def test_in_one_recipe(tmp_path: Path, worker: FreshProcess) -> None:
    model = tiny_model("llama")
    apply(model, list(STACK), tiny_batches("llama"), progress=False)
    is_whole(model)
    actkit.save(model, tmp_path / "stack")
    worker.load(tmp_path / "stack")
    assert torch.equal(worker.outputs(tiny_batches("llama")[0]), outputs(model))


def test_in_three_runs_without_the_folders_before(tmp_path: Path, worker: FreshProcess) -> None:
    model: nn.Module = tiny_model("llama")
    for index, method in enumerate(STACK):
        apply(model, method, tiny_batches("llama"), progress=False)
        expected = outputs(model)
        actkit.save(model, tmp_path / f"run {index}")
        model = actkit.load(tmp_path / f"run {index}")
        assert torch.equal(outputs(model), expected)
        if index:
            (tmp_path / f"run {index - 1}").rename(tmp_path / f"away {index - 1}")
    is_whole(model)
    worker.load(tmp_path / "run 2")
    assert torch.equal(worker.outputs(tiny_batches("llama")[0]), outputs(model))


def test_after_a_recovery_by_eva(tmp_path: Path, worker: FreshProcess) -> None:
    pytest.importorskip("peft")
    model, batches = tiny_model("llama"), tiny_batches("llama")
    apply(model, STACK[0], batches, progress=False)
    cut = outputs(model)
    layers = parse_adapter("eva:rank=2").layers(model, batches)
    given: dict[str, Any] = {"validation": list(batches), "steps": 3, "learning_rate": 1e-2, "progress": False}
    train_adapter(model, batches, layers=layers, out=tmp_path / "healed", **given)
    healed = actkit.load(tmp_path / "healed")
    assert not torch.equal(outputs(healed), cut)
    apply(healed, list(STACK[1:]), batches, progress=False)
    is_whole(healed)
    actkit.save(healed, tmp_path / "final")
    worker.load(tmp_path / "final")
    assert torch.equal(worker.outputs(batches[0]), outputs(healed))


@pytest.mark.slow(reason="transformers loads each export in a process of its own")
@pytest.mark.parametrize("format", ["dense", "compressed-tensors", "gguf"])
def test_one_width_is_exported(format: str, tmp_path: Path) -> None:
    if format == "gguf":
        pytest.importorskip("gguf")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=128)).eval()  # type: ignore[arg-type]
    batches = [{"input_ids": torch.randint(128, (2, 8))}]
    rounding = [] if format == "dense" else [RoundToNearest(bits=8, group_size=32, symmetric=True)]
    apply(model, [Cfsp(sparsity=0.5, uniform=True, multiple_of=32), *rounding], batches, progress=False)
    assert model.config.intermediate_size == 64
    exported = export(model, tmp_path / "plain", format)  # which compares what transformers finds there
    assert exported.reading is not None
