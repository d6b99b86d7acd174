"""Adapters by name, and how they are trained: kept alone, or merged into a folder that loads as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import actkit
from actkit.core.ground.errors import CheckpointError, RecipeError
from actkit.core.ground.yaml_files import parse_call
from actkit.finetuning.adapters import AdaptedLayer, Lora, parse_adapter
from actkit.finetuning.eva import Eva
from actkit.finetuning.low_rank_training import train_adapter
from actkit.testing import tiny_batches, tiny_model

pytest.importorskip("peft")


def tuned(layers: dict[str, AdaptedLayer], model: Any = None, **settings: Any) -> tuple[Any, Any]:
    model = tiny_model("llama") if model is None else model
    defaults: dict[str, Any] = {"steps": 3, "learning_rate": 1e-2, "progress": False}
    given = tiny_batches("llama")
    return model, train_adapter(model, given, validation=list(given), layers=layers, **{**defaults, **settings})


def test_names() -> None:
    assert parse_adapter("lora:rank=4,roles=[query, value]") == Lora(rank=4, roles=("query", "value"))
    assert parse_adapter({"eva": {"rho": 1.5}}) == Eva(rho=1.5)
    assert parse_adapter(Lora()) == Lora() and parse_adapter("lora") == Lora()
    assert parse_call("lora:rank=4", "adapter") == {"lora": {"rank": 4}}
    for given, text in {
        "loro": "adapters: 'loro' is not known. Did you mean lora",
        "lora:rang=2": "adapter: lora: rang: no such setting; allowed are rank, alpha, roles",
        "lora:rank=0": "adapter: lora: rank: 0 was given",
        "eva:rho=0.5": "adapter: eva: rho: 0.5 was given",
        "eva:tau=0.9": "adapter: eva: tau: no such setting",
    }.items():
        with pytest.raises(RecipeError, match=text):
            parse_adapter(given)
    with pytest.raises(RecipeError, match="give an adapter, its name, or"):
        parse_adapter({"lora": {}, "eva": {}})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "mlp"])
def test_all_linear_layers_of_the_blocks_are_adapted(kind: str) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind)
    layers = Lora(rank=2, alpha=6.0).layers(model, batches)
    assert set(layers.values()) == {AdaptedLayer(2, 6.0)}
    view = actkit.core.model.anatomy.anatomy(model, batches[0])
    assert set(layers) == {linear.path for block in view.blocks for linear in block.linears()}


def test_a_start_is_where_a_layer_begins() -> None:
    model = tiny_model("llama")
    path = "model.layers.0.mlp.down_proj"
    start = torch.eye(24)[:3]
    before = model.get_submodule(path).weight.detach().clone()
    _, trained = tuned({path: AdaptedLayer(3, 6.0, start)}, model)
    change = model.get_submodule(path).weight.detach() - before
    assert trained.trainable == 3 * (16 + 24)
    moved = change.norm(dim=0)
    assert moved[:3].min() > 3 * moved[3:].max() > 0  # A has moved a little in three steps


def test_each_layer_has_its_rank_and_alpha() -> None:
    paths = [f"model.layers.{index}.mlp.{name}_proj" for index in (0, 1) for name in ("up", "down")]
    ranks = (1, 2, 2, 5)
    layers = {path: AdaptedLayer(rank, 2.0 * rank) for path, rank in zip(paths, ranks, strict=True)}
    model = tiny_model("llama")
    weights = {path: model.get_submodule(path).weight.detach().clone() for path in paths}
    _, trained = tuned(layers, model)
    assert trained.trainable == sum(ranks) * (16 + 24)
    for path, rank in zip(paths, ranks, strict=True):
        change = model.get_submodule(path).weight.detach() - weights[path]
        assert int(torch.linalg.matrix_rank(change.double(), rtol=1e-4)) == rank


def test_merged_into_a_folder(tmp_path: Path) -> None:
    layers = Lora(rank=2).layers(tiny_model("llama"), tiny_batches("llama"))
    model, trained = tuned(layers, out=tmp_path / "merged")
    loaded = actkit.load(tmp_path / "merged")
    assert trained.folder == tmp_path / "merged" and type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert json.loads((tmp_path / "merged" / "training.json").read_text())["steps"] == 3
    with pytest.raises(CheckpointError, match="exists already"):
        tuned(layers, out=tmp_path / "merged")
    tuned(layers, out=tmp_path / "merged", overwrite=True, merge=False)  # now it is an adapter
    with pytest.raises(CheckpointError, match="exists already"):
        tuned(layers, out=tmp_path / "merged", merge=False)
    tuned(layers, out=tmp_path / "merged", overwrite=True)


def test_a_failure_leaves_model_and_folder_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    layers = Lora(rank=2).layers(model, tiny_batches("llama"))
    with pytest.raises(ValueError, match="learning_rate"):
        tuned(layers, model, learning_rate=-1.0, out=tmp_path / "out", merge=False)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match="layers: none were given"):
        tuned({})
    with pytest.raises(ValueError, match=r"start of shape \[2, 16\]; give \[2, 24\]"):
        tuned({"model.layers.0.mlp.down_proj": AdaptedLayer(2, 4.0, torch.zeros(2, 16))})
    rounded = actkit.apply(tiny_model("llama"), {"actkit": 1, "transforms": [{"rtn": {"bits": 8}}]}, progress=False)
    with pytest.raises(ValueError, match="has a weight that cannot be trained and merged"):
        Lora().layers(rounded.model, tiny_batches("llama"))
    with pytest.raises(ValueError, match="3-D parameters"):
        Lora().layers(tiny_model("mixtral"), tiny_batches("mixtral"))


def test_the_verb(tmp_path: Path) -> None:
    actkit.save(tiny_model("llama"), tmp_path / "base")
    data = {"data": tiny_batches("llama"), "validation": list(tiny_batches("llama")), "steps": 2}
    given = {**data, "learning_rate": 0.01}
    kept = actkit.train(tmp_path / "base", out=tmp_path / "adapter", adapter="eva:rank=2", **given)
    merged = actkit.train(tmp_path / "base", out=tmp_path / "merged", adapter="eva:rank=2", merge=True, **given)
    assert kept.validation == pytest.approx(merged.validation)
    x = tiny_batches("llama")[0]
    found = [actkit.load(tmp_path / name)(**x).logits for name in ("adapter", "merged")]
    assert torch.allclose(*found, atol=1e-5)
    with pytest.raises(ValueError, match="merge: it was given without an adapter"):
        actkit.train(tmp_path / "base", out=tmp_path / "none", merge=True, **given)
    with pytest.raises(ValueError, match="merge: False was given without out="):
        actkit.train(tmp_path / "base", adapter="lora", **given)
