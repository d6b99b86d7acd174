"""The reload proof passes for what was saved and fails for anything else; differences are computed here by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Perceptron
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from actkit.core.edit.edits import Replace, apply_edit, describe
from actkit.core.forward.example import Inputs
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import DataError, FreshProcessError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.layers.weights import IntegerWeight
from actkit.core.measure.fresh import FreshProcess
from actkit.core.measure.proof import prove
from actkit.core.store.checkpoint import load, save
from actkit.core.store.pretrained import record
from actkit.zoo.cnn import DigitsCNN

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def build(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # `model.to` would round the rotary tables too, which a reload computes in float32
    try:
        return _build(kind).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def _build(kind: str) -> Any:
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=50, max_position_embeddings=32))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=100))
    elif kind == "bert":
        model = BertModel(BertConfig(**SMALL, vocab_size=50))
    elif kind == "vit":
        model = ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1))
    else:
        model = DigitsCNN()
    return model


def change(model: nn.Module, path: str) -> nn.Module:
    linear = model.get_submodule(path)
    weight = IntegerWeight.quantize(linear.weight, IntegerGrid(4, 8, "input", symmetric=False))  # type: ignore[arg-type]
    edit = Replace(path, ActLinear.of(linear, weight=weight, select=Threshold(0.01)))
    apply_edit(model, edit)
    record(model, [describe(edit)], [], "test")
    return model


def other_order(model: Any) -> None:
    """The same function, whose sums run in another order: the hidden units of each MLP are permuted."""
    for layer in model.model.layers:
        mlp = layer.mlp
        order = torch.randperm(mlp.down_proj.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight.copy_(linear.weight[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_order_passes_and_other_weights_fail_in_each_dtype(
    dtype: torch.dtype, worker: FreshProcess, tmp_path: Path
) -> None:
    model = build("llama", dtype)
    with torch.no_grad():  # as initialised, the blocks add next to nothing
        for parameter in model.model.layers.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    folder = save(model, tmp_path / "m")
    other_order(model)
    model.set_attn_implementation("eager")  # rounds between its sums, which 16 bits show
    proof = prove(model, folder, process=worker)
    assert proof.passed and not proof.bit_equal and 0 < proof.largest_difference <= proof.tolerance
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.2)
    assert not prove(model, folder, process=worker).passed


TOKENS = {"llama": 64, "gpt2": 128, "bert": 128, "vit": 2, "cnn": 2}  # two rows of min(64, context), or two images


@pytest.mark.parametrize("kind", TOKENS)
def test_a_saved_model_reloads_bit_for_bit(kind: str, worker: FreshProcess, tmp_path: Path) -> None:
    model = build(kind)
    proof = prove(model, save(model, tmp_path / kind), process=worker, base=DigitsCNN if kind == "cnn" else None)
    assert proof.passed and proof.bit_equal and proof.largest_difference == 0
    assert proof.tokens == TOKENS[kind] and proof.dtype == "float32" and proof.threads == torch.get_num_threads()
    assert proof.scale > 0 and proof.tolerance == 0  # nothing differs, so nothing is measured
    assert proof.describe().startswith(f"{tmp_path / kind} reloads: the outputs are equal bit for bit")
    assert "\n" not in proof.describe() and proof.to_dict()["passed"] is True
    assert not worker.closed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_model_reloads(dtype: torch.dtype, worker: FreshProcess, tmp_path: Path) -> None:
    for kind, path, base in (("llama", "model.layers.1.mlp.down_proj", None), ("cnn", "fc1", DigitsCNN)):
        model = change(build(kind, dtype), path)
        proof = prove(model, save(model, tmp_path / kind), process=worker, base=base)
        assert proof.passed and proof.bit_equal, proof.describe()
        assert proof.dtype == str(dtype).removeprefix("torch.")


def test_another_model_fails_by_the_true_difference(worker: FreshProcess, tmp_path: Path) -> None:
    model = build("llama")
    folder = save(model, tmp_path / "m")
    ids = torch.randint(50, (3, 5))
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5])
    batch = {"input_ids": ids, "attention_mask": mask}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3] += 0.05
        expected, found = (m(**batch, use_cache=False).logits for m in (other, model))
    proof = prove(other, folder, batch, process=worker)
    assert not proof.passed and not proof.bit_equal and proof.tokens == 13
    assert proof.largest_difference == pytest.approx(float((expected - found).abs().max()), rel=1e-3)
    assert proof.scale == pytest.approx(float(expected.abs().max()))
    assert "DOES NOT RELOAD" in proof.describe() and "does not hold this model" in proof.reason

    other.load_state_dict(model.state_dict())
    other_order(other)
    proof = prove(other, folder, batch, process=worker)
    assert proof.passed and not proof.bit_equal and 0 < proof.largest_difference <= proof.tolerance
    assert "rounded in another order" in proof.reason


def test_nan_fails_on_either_side(worker: FreshProcess, tmp_path: Path) -> None:
    good, bad = build("llama"), build("llama")
    with torch.no_grad():
        bad.model.norm.weight[0] = torch.nan
    folders = [save(model, tmp_path / name) for model, name in ((good, "good"), (bad, "bad"))]
    for model, folder, where in (
        (bad, folders[0], "in memory"),
        (good, folders[1], "reloaded"),
        (bad, folders[1], "in memory and reloaded"),
    ):
        proof = prove(model, folder, process=worker)
        assert not proof.passed and proof.reason == f"the outputs hold NaN {where}"


def test_other_shapes_fail(worker: FreshProcess, tmp_path: Path) -> None:
    model = build("llama")
    folder = save(BertModel(BertConfig(**SMALL, vocab_size=50)), tmp_path / "bert")
    proof = prove(model, folder, process=worker)
    assert not proof.passed and proof.largest_difference == float("inf")
    assert proof.to_dict()["largest_difference"] is None  # JSON knows no infinity
    assert proof.reason == "outputs are [2, 32, 50] in memory and [2, 32, 16] reloaded"


def test_the_reload_has_the_dtype_threads_and_attention_that_are_reported(worker: FreshProcess, tmp_path: Path) -> None:
    folder = save(build("llama", torch.bfloat16), tmp_path / "m")
    model = load(folder, dtype="float32")
    assert prove(model, folder, process=worker).dtype == "float32" == worker.loaded["dtype"]
    model.set_attn_implementation("eager")  # type: ignore[operator]
    threads = torch.get_num_threads()
    worker.use_threads(threads + 1)
    proof = prove(model, folder, process=worker)
    assert worker.threads == threads + 1 and worker.loaded["threads"] == proof.threads == threads
    worker.use_threads(threads)
    assert proof.passed
    assert proof.bit_equal or "'eager' in memory and by 'sdpa' reloaded" in proof.reason


def test_a_rounded_rotary_table_is_named(worker: FreshProcess, tmp_path: Path) -> None:
    model = build("llama").bfloat16()
    proof = prove(model, save(model, tmp_path / "m"), process=worker)
    assert proof.passed and not proof.bit_equal
    assert "rotary_emb.inv_freq, which is not saved, is bfloat16 in memory and float32 reloaded" in proof.reason


def test_it_starts_a_process_of_its_own_and_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[FreshProcess] = []

    class Known(FreshProcess):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            started.append(self)

    monkeypatch.setattr("actkit.core.measure.proof.FreshProcess", Known)
    model = Perceptron()
    folder = save(model, tmp_path / "mlp")
    with pytest.raises(FreshProcessError, match="pass base="):
        prove(model, folder)
    assert len(started) == 1 and started[0].closed


def test_what_a_model_takes() -> None:
    assert Inputs.of(build("llama")).batch()["input_ids"].shape == (2, 32)
    first, second = (Inputs.of(build("gpt2")).batch(3, 9)["input_ids"] for _ in range(2))
    assert torch.equal(first, second) and first.shape == (3, 9) and int(first.max()) < 50
    assert Inputs.of(build("vit")).batch()["pixel_values"].shape == (2, 1, 8, 8)
    assert Inputs.of(build("cnn")).batch()["pixel_values"].shape == (2, 1, 8, 8)
    mlp = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    assert Inputs.of(mlp).batch().shape == (2, 5)
    changed = nn.Sequential(ActLinear.of(mlp[0], select=Threshold(0.1)), mlp[1], mlp[2])
    assert Inputs.of(changed).batch().shape == (2, 5)
    for takes in (Inputs.of(build("vit")), Inputs.of(build("gpt2"))):
        assert Inputs.from_dict(takes.to_dict()) == takes
    assert Inputs.of(build("gpt2")).causal and not Inputs.of(build("bert")).causal
    with pytest.raises(ValueError, match="length: 33 tokens were asked for, the model's context is 32"):
        Inputs.of(build("llama")).batch(length=33)
    with pytest.raises(DataError, match="pass batch="):
        Inputs.of(nn.Sequential(nn.Conv2d(1, 1, 1))).batch()
