"""Adapters, quantized layers of other packages and models that their config does not build: refused by name, first."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batches, build, run
from torch import nn

import actkit
from actkit.core.ground.errors import CheckpointError, UnsupportedModelError
from actkit.core.layers.foreign_layers import refuse_foreign_layers
from actkit.core.measure.evaluation import evaluate
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.train.training import train
from actkit.formats.export import export

RTN = {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8}}]}
SYMMETRIC = {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8, "symmetric": True}}]}


def refused(model: nn.Module, folder: Path, match: str, error: Any = UnsupportedModelError) -> None:
    """Every verb that reads weights refuses the model, and nothing is written."""
    given = batches("llama")
    calls = [
        lambda: anatomy(model),
        lambda: apply(model, RTN, given, min_coverage=0.0, progress=False),
        lambda: actkit.swap(model, "silu", "relu"),
        lambda: actkit.profile(model, given),
        lambda: actkit.show(model),
        lambda: save(model, folder / "saved"),
        lambda: export(model, folder / "exported"),
        lambda: train(model, given, validation=given, steps=1, out=folder / "trained"),
    ]
    for call in calls:
        with pytest.raises(error, match=match):
            call()
    assert not any(folder.iterdir())


def adapted(inside: bool) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (peft.inject_adapter_in_model if inside else lambda c, m: peft.get_peft_model(m, c))(
            config, build("llama")
        )


def test_a_peft_model_is_to_be_merged_first(tmp_path):
    model = adapted(inside=False)
    refused(model, tmp_path, r"it is a PeftModel.* Merge it first: model = model\.merge_and_unload\(\)")
    evaluate(model, batches("llama"), generation=False, resamples=20, progress=False)  # runs as it is
    before = run(model, batches("llama")[0])
    merged = model.merge_and_unload()
    loaded = load(save(merged, tmp_path / "merged"))
    assert torch.allclose(run(loaded, batches("llama")[0]), before, atol=1e-5)


def test_layers_with_an_adapter_are_named(tmp_path):
    model = adapted(inside=True)
    where = r"model: an adapter layer of PEFT \(Linear\) stands at model\.layers\.0\.self_attn\.q_proj\. Merge it"
    refused(model, tmp_path, where)
    before = run(model, batches("llama")[0])
    for block in model.model.layers:  # what the text advises
        block.self_attn.q_proj.merge()
        block.self_attn.q_proj = block.self_attn.q_proj.get_base_layer()
    loaded = load(save(model, tmp_path / "merged"))
    assert torch.allclose(run(loaded, batches("llama")[0]), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_torchs_dynamic_quantization(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(build("llama"), {nn.Linear}, dtype=torch.qint8)
    where = r"the Linear at model\.layers\.0\.self_attn\.q_proj is quantized \(torch\.ao\.nn\).* Give the original"
    refused(model, tmp_path, where)
    with pytest.raises(UnsupportedModelError, match=where):
        evaluate(model, batches("llama"), progress=False)


class Packed(nn.Linear):
    """As bitsandbytes, transformers' GgufLinear and others keep a weight: bytes."""


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.int32])
def test_weights_that_are_codes(dtype, tmp_path):
    model = build("llama")
    packed = Packed(4, 4)
    packed.weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    model.model.layers[1].mlp.up_proj = packed
    refused(model, tmp_path, rf"the Packed at model\.layers\.1\.mlp\.up_proj is quantized \(weight is {dtype}\)")


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_transformers_loads_with_its_codes(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = build("llama")
    apply(model, SYMMETRIC, None, min_coverage=0.0, progress=False)
    export(model, tmp_path / "out", proof=False)
    packed = type(build("llama")).from_pretrained(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(packed, tmp_path / "empty", r"is quantized \(weight_packed is torch\.int32\)")
    assert torch.equal(run(load(tmp_path / "out"), batches("llama")[0]), run(model, batches("llama")[0]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "mixtral"])
def test_models_of_ours_have_no_foreign_layers(kind):
    model = build(kind)
    refuse_foreign_layers(model)
    refuse_foreign_layers(apply(model, RTN, batches(kind), min_coverage=0.0, progress=False).model)


# -- models that their config does not build ---------------------------------------------------------------------------


def narrowed() -> Any:
    """A hidden unit of one block is taken away, as by pruning by hand."""
    model = build("llama")
    mlp = model.model.layers[1].mlp
    for name, rows, columns in (("gate_proj", -1, None), ("up_proj", -1, None), ("down_proj", None, -1)):
        weight = getattr(mlp, name).weight[:rows, :columns].clone()
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight)
        setattr(mlp, name, layer)
    return model


def test_a_model_narrowed_by_hand_is_not_saved(tmp_path):
    model = narrowed()
    where = r"up_proj\.weight is \(31, 16\), by the config \(32, 16\).* Change model\.config with the tensors"
    with pytest.raises(CheckpointError, match=where):
        save(model, tmp_path / "model")
    apply(model, {"actkit": 1, "transforms": [{"rtn": {"bits": 8, "group_size": -1}}]}, progress=False)
    # the replaced layers say their own shapes, so that this one loads
    assert torch.equal(run(load(save(model, tmp_path / "model")), batches("llama")[0]), run(model, batches("llama")[0]))

    model = build("llama")
    model.resize_token_embeddings(60)  # which changes the config too
    assert load(save(model, tmp_path / "wider")).config.vocab_size == 60
    model.lm_head = nn.Identity()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not there, by the config \(60, 16\)"):
        save(model, tmp_path / "headless")
    model = build("llama")
    model.config.hidden_size = 17
    with pytest.raises(CheckpointError, match="no LlamaForCausalLM can be built from this model's config"):
        save(model, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "wider"]


def test_a_changed_model_narrowed_beside_its_edits_is_not_saved(tmp_path):
    model = build("llama")
    apply(model, RTN, None, min_coverage=0.0, progress=False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:-3].clone())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \(47, 16\), by the config \(50, 16\)"):
        save(model, tmp_path / "model")
