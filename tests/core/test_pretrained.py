"""Changed transformers models: a model type of their own, Auto classes, `save_pretrained`, and no silent loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import KINDS, batches, bits, build, run
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.modules import is_pretrained
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint, pretrained
from actkit.core.store.checkpoint import MANIFEST

STACK = {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8}}, {"teal": {"sparsity": 0.4}}]}
AUTO = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "mixtral": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
}


def changed(kind: str) -> Any:
    return apply(build(kind), STACK, batches(kind), progress=False).model


def outputs(model: Any, kind: str) -> list[bytes]:
    return [bits(run(model, batch)) for batch in batches(kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_auto_classes(kind, tmp_path):
    model = changed(kind)
    base = type(build(kind))
    assert isinstance(model, base)
    assert type(model).__name__ == f"Actkit{base.__name__}"
    assert model.config.model_type == f"actkit_{kind}"
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == f"actkit_{kind}"
    assert config["architectures"] == [f"Actkit{base.__name__}"]
    assert not [path for path in (tmp_path / "model").glob("*.safetensors") if not path.name.startswith("actkit-")]
    auto = getattr(transformers, AUTO[kind])
    loaded, info = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    for found in (loaded, type(model).from_pretrained(tmp_path / "model")):
        assert type(found) is type(model)
        assert outputs(found, kind) == outputs(model, kind)
    half = auto.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with pytest.raises((CheckpointError, OSError, ValueError)):  # not as the model that it was
        base.from_pretrained(tmp_path / "model")


def test_registered_in_advance(tmp_path):
    changed("llama").save_pretrained(tmp_path / "model")
    pretrained.register(("llama", "no_such_type"))
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert isinstance(config, LlamaConfig)
    assert config.model_type == "actkit_llama"
    assert pretrained.base_type("actkit_llama") == pretrained.base_type("llama") == "llama"


def test_without_actkit_it_fails(tmp_path):
    """In one fresh process: plain transformers refuses each folder; with actkit registered it loads."""
    expected = {}
    for kind in KINDS:
        model = changed(kind)
        model.save_pretrained(tmp_path / kind)
        expected[kind] = run(model, batches(kind)[0]).double().sum().item()
    script = """
import json, sys, transformers
found = {"refused": {}, "sums": {}}
for kind, auto in json.loads(sys.argv[2]).items():
    folder = f"{sys.argv[1]}/{kind}"
    for name in (auto, "AutoModel", json.load(open(folder + "/actkit.json"))["base_class"]):
        try:
            getattr(transformers, name).from_pretrained(folder)
            found["refused"][f"{kind} {name}"] = None
        except Exception as error:
            found["refused"][f"{kind} {name}"] = f"{type(error).__name__}: {error}"
assert "actkit" not in sys.modules
import actkit.core.store.pretrained
sys.path.insert(0, sys.argv[3])
from tiny_models import batches, run
for kind, auto in json.loads(sys.argv[2]).items():
    model = getattr(transformers, auto).from_pretrained(f"{sys.argv[1]}/{kind}")
    found["sums"][kind] = run(model, batches(kind)[0]).double().sum().item()
print(json.dumps(found))
"""
    arguments = [str(tmp_path), json.dumps(AUTO), str(Path(__file__).parent)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["refused"]) == 3 * len(KINDS)
    for attempt, error in found["refused"].items():
        assert error is not None, f"{attempt} loaded a changed model in silence"
    for kind in KINDS:
        assert f"actkit_{kind}" in found["refused"][f"{kind} AutoModel"], "the error names the unknown type"
        assert found["sums"][kind] == pytest.approx(expected[kind], rel=1e-5, abs=1e-5)


def test_save_pretrained_is_right_or_raises(tmp_path):
    model = changed("llama")
    build("llama").save_pretrained(tmp_path / "plain")
    before = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        model.save_pretrained(tmp_path / "plain")
    assert {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()} == before
    for options in ({"push_to_hub": True}, {"variant": "fp16"}, {"state_dict": {"a": 1}}):
        with pytest.raises(CheckpointError, match=f"{next(iter(options))}: not supported"):
            model.save_pretrained(tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()
    folder = tmp_path / "model"
    folder.mkdir()  # as a training loop makes it
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    (folder / "tokenizer.json").write_text("{}")
    model.save_pretrained(folder)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert outputs(checkpoint.load(folder), "llama") == outputs(model, "llama")
    model.save_pretrained(tmp_path / "other_rank", is_main_process=False)
    assert not (tmp_path / "other_rank").exists()


def test_options_that_would_be_ignored_are_refused(tmp_path):
    model = changed("llama")
    model.save_pretrained(tmp_path / "model")
    for options in ({"device_map": "auto"}, {"state_dict": {"a": 1}}):
        with pytest.raises(CheckpointError, match=f"{next(iter(options))}: not supported"):
            type(model).from_pretrained(tmp_path / "model", **options)


def test_undo_gives_the_class_back(tmp_path):
    applied = apply(build("gpt2"), STACK, batches("gpt2"), progress=False)
    model = applied.undo()
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.config.model_type == "gpt2"
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / MANIFEST).exists()
    assert outputs(type(model).from_pretrained(tmp_path / "plain"), "gpt2") == outputs(model, "gpt2")


def test_generation_settings_are_kept(tmp_path):
    model = changed("llama")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.generation_config.max_new_tokens == 7
    ids = batches("llama")[0]["input_ids"]
    assert torch.equal(loaded.generate(ids, do_sample=False), model.generate(ids, do_sample=False))


class OwnLlama(LlamaForCausalLM):
    """A user's own subclass, which transformers does not know."""


def test_a_class_of_ones_own_needs_a_base(tmp_path):
    torch.manual_seed(0)
    config = build("llama").config
    model = OwnLlama(config).eval()
    apply(model, STACK, batches("llama"), progress=False)
    assert isinstance(model, OwnLlama)
    checkpoint.save(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"'OwnLlama' is not a model class of transformers.*base="):
        checkpoint.load(tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model", base=lambda: OwnLlama(build("llama").config))
    assert isinstance(loaded, OwnLlama)
    assert outputs(loaded, "llama") == outputs(model, "llama")


def test_names_resolve_among_transformers_classes_only():
    assert pretrained.class_by_name("LlamaForCausalLM") is LlamaForCausalLM
    for name in ("LlamaConfig", "os", "AutoModel", "no.such", "__class__"):
        with pytest.raises(CheckpointError, match="is not a model class of transformers"):
            pretrained.class_by_name(name)
    assert is_pretrained(build("llama"))
    assert not is_pretrained(torch.nn.Linear(1, 1))
    assert issubclass(pretrained.model_class(LlamaForCausalLM), PreTrainedModel)
