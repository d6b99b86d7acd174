"""A folder in transformers' own format: its tensors say the dtype, and a class that nothing names is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import bits, build, run
from transformers import LlamaForCausalLM, LlamaModel

import actkit
from actkit.core.ground.errors import CheckpointError
from actkit.core.store.checkpoint import load, save

IDS = {"input_ids": torch.arange(1, 13).view(2, 6)}


def settings(folder: Path, **values: Any) -> Path:
    """Change config.json; None removes a key."""
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    (folder / "actkit.sha256").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("said", ["float32", "bfloat16", None])
def test_as_stored_is_what_the_tensors_are(stored, said, tmp_path):
    model = build("llama").to(stored)
    folder = settings(save(model, tmp_path / "model"), dtype=said, torch_dtype=said)
    loaded = load(folder)
    assert loaded.dtype == loaded.config.dtype == stored
    for name, tensor in loaded.state_dict().items():
        assert bits(tensor) == bits(model.state_dict()[name]), name
    assert load(folder, dtype="float16").dtype == torch.float16
    actkit.apply(loaded, {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8}}]}, progress=False)
    again = load(settings(save(loaded, tmp_path / "changed"), dtype="float64"))
    assert again.dtype == again.config.dtype == stored


def test_the_dtype_is_that_of_most_bytes(tmp_path):
    """Norms in float32 beside 16-bit weights, in several files: read from the headers alone."""
    model = build("llama").to(torch.bfloat16)
    for block in model.model.layers:
        block.input_layernorm.float()
    model.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert load(settings(tmp_path / "model", dtype="float32")).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_keeps_its_head_without_architectures(tied, tmp_path):
    model = build("llama", tie_word_embeddings=tied)
    folder = settings(save(model, tmp_path / "model"), architectures=None)
    loaded = load(folder)
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(run(loaded, IDS), run(model, IDS))
    if not tied:
        (path,) = folder.glob("*.safetensors")
        save_file({k: v for k, v in load_file(path).items() if "lm_head" not in k}, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
            load(folder)


def test_what_may_or_may_not_have_a_head_is_refused(tmp_path):
    bare = build("llama", tie_word_embeddings=True).model
    folder = settings(save(bare, tmp_path / "bare"), architectures=None)
    with pytest.raises(CheckpointError, match=r'names no class in architectures, .* \["LlamaForCausalLM"\] or'):
        load(folder)
    assert type(load(settings(folder, architectures=["LlamaModel"]))) is LlamaModel
    assert type(load(settings(folder, architectures=["LlamaForCausalLM"]))) is LlamaForCausalLM
    with pytest.raises(CheckpointError, match="names the class Mine, which transformers does not have, in archi"):
        load(settings(folder, architectures=["Mine"]))
    bert = settings(save(build("bert"), tmp_path / "bert"), architectures=None)
    with pytest.raises(CheckpointError, match=r"names no class in architectures, .*BertModel"):
        load(bert)
    vit = save(build("vit"), tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"do not fit ViTModel; .*classifier"):
        load(settings(vit, architectures=None))


def test_an_adapter_is_no_model(tmp_path):
    folder = save(build("llama"), tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter .* Merge it first: .*merge_and_unload"):
        load(folder)
    (folder / "config.json").unlink()
    (folder / "actkit.sha256").unlink()
    with pytest.raises(CheckpointError, match=r"holds an adapter .* Merge it first: .*merge_and_unload"):
        load(folder)


def test_float8_without_a_scale_is_refused(tmp_path):
    folder = settings(save(build("llama"), tmp_path / "model"))
    (path,) = folder.glob("*.safetensors")
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is stored in float8, and config\.json does not say how it is scaled"):
        load(folder)
