"""How a user meets the errors of core, the room `store`: one function per way, which raises it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import Perceptron, batches, build
from transformers import AttentionInterface

from actkit.core.layers.activations import Activation
from actkit.core.model.sites import Joined, Site
from actkit.core.store import activation_store, checkpoint, checksums
from actkit.core.store.activation_store import ActivationStore, harvest
from actkit.core.store.deltas import Delta, Dense
from actkit.core.store.quantized_source import _values
from actkit.core.store.tensor_files import read_values, write_values
from actkit.core.store.transformers_folder import remote_class, stored_dtype
from actkit.core.watch.capture import record
from actkit.core.watch.joined import Difference
from actkit.core.watch.statistics import AbsMax
from actkit.zoo.cnn import DigitsCNN
from error_proofs import Place, changed, proof, raising

DELTA = Delta({"0.weight": Dense(torch.zeros(3))}, "1" * 64)

proof(lambda p: DELTA.add_to(build("mlp")))


proof(lambda p: DELTA.add_to(build("mlp"), check=False))


proof(lambda p: DELTA + Delta({}, "2" * 64))


proof(lambda p: DELTA + Delta({"0.weight": Dense(torch.zeros(4))}))


proof(lambda p: DELTA.low_rank(0))


proof(lambda p: Delta.between(build("mlp"), build("llama")))


proof(lambda p: (save_file({"x": torch.zeros(1)}, p.path / "x.safetensors"), Delta.load(p.path / "x.safetensors")))


proof(lambda p: Delta.load(p.path / "none.safetensors"))


def resized(**values: Any) -> Any:
    model = build("llama")
    model.config.update(values)
    return model


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-9])
    return path.parent


def tuned(p: Place, **values: Any) -> Path:
    """A plain model with another config.json."""
    folder = p.copy("plain")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))
    return folder


proof(lambda p: (p.file("x", "thesis.txt"), checkpoint.save(changed(), p.path, overwrite=True)))


proof(lambda p: checkpoint.save(changed(), p.path))


proof(
    lambda p: (
        p.patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9)),
        checkpoint.save(changed(), p.path / "new"),
    )
)


proof(lambda p: checkpoint.save(build("mlp").to("meta"), p.path / "new"))


@proof
def other_module(p: Place) -> None:
    model = changed()
    model.model.layers[0].mlp.up_proj = Activation("relu")
    checkpoint.save(model, p.path / "new")


proof(lambda p: (p.file("x", "a\\b"), checksums.write(p.path)))


proof(lambda p: checkpoint.read_manifest(p.path))


proof(lambda p: checkpoint.load(p.manifest(lambda m: m.update(schema=99))))


proof(lambda p: checkpoint.load(p.manifest(lambda m: m.pop("edits"))))


proof(lambda p: ((folder := p.copy()) / checkpoint.MANIFEST).write_text("[]") and checkpoint.load(folder))


proof(lambda p: ((folder := p.copy()) / checkpoint.MANIFEST).write_text("{") and checkpoint.load(folder))


proof(
    lambda p: (
        folder := p.copy(),
        weights(folder).write_bytes(b"x" * weights(folder).stat().st_size),
        checkpoint.load(folder),
    )
)


proof(lambda p: (folder := p.copy(sums=True), (folder / checksums.NAME).write_bytes(b"\xff"), checkpoint.load(folder)))


proof(lambda p: (folder := p.copy(), weights(folder).unlink(), checkpoint.load(folder)))


proof(lambda p: (folder := p.copy(sums=True), weights(folder).unlink(), checkpoint.load(folder)))


proof(lambda p: checkpoint.load(cut(weights(p.copy()))))


proof(lambda p: checkpoint.load(cut(weights(p.copy(sums=True)))))


proof(lambda p: (folder := p.copy(sums=True), cut(folder / checksums.NAME), checkpoint.load(folder)))


proof(lambda p: checkpoint.load(p.manifest(lambda m: m["tied"].update(alias="nothing"))))


proof(lambda p: checkpoint.load(p.manifest(lambda m: m["edits"].append({"run": "rm"}))))


proof(
    lambda p: (
        folder := p.copy(),
        (folder / "config.json").write_text('{"hidden_size": "wide"}'),
        checkpoint.load(folder),
    )
)


proof(lambda p: checkpoint.load(p.manifest(lambda m: m.update(base_class="os.system"))))


proof(lambda p: checkpoint.load(p.copy("own")))


proof(lambda p: (folder := p.copy("plain"), weights(folder).unlink(), checkpoint.load(folder)))


proof(lambda p: checkpoint.load(tuned(p, model_type="of_tomorrow")))


proof(lambda p: checkpoint.load(tuned(p, architectures=["Mine"], auto_map={"AutoModel": "mine.Mine"})))


proof(lambda p: checkpoint.load(tuned(p, architectures=["Mine"])))


proof(lambda p: remote_class({"AutoConfig": "mine.Mine"}, None, p.path, True))


proof(lambda p: (p.file("{}", "adapter_config.json"), checkpoint.load(p.path)))


proof(lambda p: checkpoint.load(tuned(p, quantization_config={"quant_method": "gptq"})))


proof(lambda p: list(_values("layer.", {"weight_packed": torch.ones(1)}, {})))


proof(lambda p: stored_dtype({"a.weight": ("F8_E4M3", 1)}, p.path))


proof(lambda p: checkpoint.load(cut(weights(p.copy("plain")))))


proof(lambda p: checkpoint.load(p.path))


proof(lambda p: checkpoint.load(p.path / "nowhere"))


proof(
    lambda p: (
        p.patch.setattr("huggingface_hub.snapshot_download", raising(OSError("no network"))),
        checkpoint.load("a/b"),
    )
)


proof(lambda p: checkpoint.load_tokenizer(p.path))


proof(lambda p: type(changed()).from_pretrained(p.copy(), device_map="auto"))


proof(lambda p: write_values(p.path, {"a": object()}))


proof(lambda p: write_values(p.path, {"a": {1: 2}}))


proof(lambda p: read_values(p.path))


proof(lambda p: checkpoint.save(resized(hidden_size=17), p.path / "new"))


proof(lambda p: checkpoint.save(resized(vocab_size=51), p.path / "new"))


@proof
def attention_of_ones_own_saved(p: Place) -> None:
    p.patch.setitem(AttentionInterface._global_mapping, "sdpa", build)
    checkpoint.save(build("llama"), p.path / "new")


@proof
def a_module_of_ones_own_saved(p: Place) -> None:
    model = build("llama")
    model.model.norm = Perceptron()
    checkpoint.save(model, p.path / "new")


proof(lambda p: checkpoint.load(p.copy("own"), base=lambda: 3))


proof(lambda p: checkpoint.load(p.own_model({"name": "no_such_model", "spec": {}})))


proof(lambda p: checkpoint.load(p.own_model({"name": "digits_cnn", "spec": {"channels": 3}})))


@proof
def a_spec_that_is_no_json(p: Place) -> None:
    model = DigitsCNN()
    model.settings = {"channels": (1, 2)}
    checkpoint.save(model, p.path / "new")


def store(p: Place) -> Path:
    harvest(build("llama"), "block.output", batches("llama"), p.path / "acts", progress=False)
    return p.path / "acts"


proof(lambda p: ActivationStore.open(p.path))


@proof
def a_harvest_that_was_killed(p: Place) -> None:
    (store(p) / "shard-00000.json").unlink()
    ActivationStore.open(p.path / "acts")


@proof
def a_damaged_index(p: Place) -> None:
    (store(p) / "store.json").write_text("{}")
    ActivationStore.open(p.path / "acts")


proof(lambda p: harvest(build("llama"), "mlp.hidden", batches("llama"), store(p), progress=False))


proof(lambda p: ActivationStore.open(store(p)).check(build("gpt2")))


proof(lambda p: harvest(build("llama"), "mlp.hidden", batches("llama"), p.path / "a", max_disk=1, progress=False))


@proof
def no_room_for_a_store(p: Place) -> None:
    p.patch.setattr(activation_store.shutil, "disk_usage", lambda path: type("Free", (), {"free": 1}))
    store(p)


@proof
def a_disk_that_fills_up(p: Place) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    p.patch.setattr(activation_store, "save_file", full)
    store(p)


def shard(p: Place) -> Path:
    return store(p) / "shard-00000.safetensors"


@proof
def a_shard_that_was_cut(p: Place) -> None:
    path = shard(p)
    path.write_bytes(path.read_bytes()[:-5])
    list(ActivationStore.open(path.parent).read("blocks.0.block.output"))


@proof
def a_shard_that_was_changed(p: Place) -> None:
    path = shard(p)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    ActivationStore.open(path.parent).verify()


@proof
def a_shard_that_is_gone(p: Place) -> None:
    path = shard(p)
    path.unlink()
    ActivationStore.open(path.parent)


@proof
def a_shard_whose_description_is_damaged(p: Place) -> None:
    path = shard(p)
    path.with_suffix(".json").write_text("{")
    ActivationStore.open(path.parent)


@proof
def a_shard_of_another_kind(p: Place) -> None:
    path = shard(p)
    path.write_bytes(b"?" * path.stat().st_size)
    list(ActivationStore.open(path.parent).read("blocks.0.block.output"))


proof(lambda p: record(build("llama"), {"block.output": AbsMax()}, [], store=ActivationStore.open(store(p))))


@proof
def joined_sites_of_a_store(p: Place) -> None:
    joined = Joined(Site("block.output", 0), Site("block.output", 1))
    record(build("llama"), {joined: Difference()}, store=ActivationStore.open(store(p)))


proof(lambda p: record(build("llama"), {"mlp.hidden": AbsMax()}, store=ActivationStore.open(store(p))))


@proof
def joined_sites_to_keep(p: Place) -> None:
    harvest(build("llama"), [Joined(Site("block.output", 0), Site("block.output", 1))], batches("llama"), p.path / "a")


proof(lambda p: ActivationStore.open(store(p)).batches("blocks.0.block.output", 9999))


proof(lambda p: ActivationStore.open(store(p)).context("blocks.0.block.output", 9999))
