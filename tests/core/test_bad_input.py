"""Bad input: an error that names the parameter, what was given, what is allowed and what to do; and nothing lost.

One row per case; each is tried on a model, which must be the same bit for bit afterwards.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import HIDDEN, VOCABULARY, batches, build, snapshot
from torch import Tensor, nn

from actkit.core.edit.edits import Replace, Set, apply_edit
from actkit.core.ground.errors import (
    ActkitError,
    CheckpointError,
    CoverageError,
    DataError,
    EditError,
    MemoryLimitError,
    NonFiniteError,
    RecipeError,
    UnsupportedModelError,
)
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint, checksums
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Moments


@dataclass(frozen=True)
class Case:
    """A call on a fresh model that must raise `error` with all `words` in its text."""

    name: str
    call: Callable[[Any, Path], Any]
    error: type[Exception]
    words: tuple[str, ...]
    kind: str = "llama"
    prepare: Callable[[Any], Any] = lambda model: model


def run(recipe: Any, data: Any = "default", **settings: Any) -> Callable[[Any, Path], Any]:
    def call(model: Any, folder: Path) -> Any:
        kind = "mlp" if type(model).__name__ == "Perceptron" else "llama"
        given = batches(kind) if isinstance(data, str) and data == "default" else data
        return apply(model, recipe, given, progress=False, **settings)

    return call


def yaml_recipe(text: str) -> Callable[[Any, Path], Any]:
    def call(model: Any, folder: Path) -> Any:
        path = folder / "recipe.yaml"
        path.write_text(text)
        return apply(model, path, batches("llama"), progress=False)

    return call


def recipe(*transforms: Any) -> dict[str, Any]:
    return {"actkit": 1, "transforms": list(transforms)}


def never_called(model: Any) -> Any:
    """A model that fails if it is called: the error must come before any work."""
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    return model


def poke(name: str, value: float) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = value
        return model

    return change


def already(given: Any) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        apply(model, given, batches("llama"), progress=False)
        return model

    return change


def ids(**change: Any) -> list[dict[str, Tensor]]:
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    return [{**batch, **change}]


def infinite(model: Any) -> Any:
    """Weights that are finite, but whose products overflow float32."""
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.fill_(3e38)
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    return model


EDIT_OF_TIED = Set("lm_head.weight", torch.zeros(VOCABULARY, HIDDEN))
IDS = torch.ones(2, 4, dtype=torch.long)
LONG = torch.ones(1, 33, dtype=torch.long)

CASES = [
    # data
    Case(
        "no data", run("teal", None), DataError, ("data", "Teal calibrates on data", "none was given", "pass batches")
    ),
    Case("empty list", run("teal", []), DataError, ("data", "0 batches were given", "pass batches")),
    Case("empty generator", run("teal", iter(())), DataError, ("0 batches were given",)),
    Case("text", run("teal", "Once upon a time"), DataError, ("data", "a text was given", "actkit.apply")),
    Case("a batch of nothing", run("teal", [object()]), DataError, ("data", "a batch is a object", "give a tensor")),
    Case(
        "all padding",
        run("teal", ids(attention_mask=torch.zeros(2, 4, dtype=torch.long))),
        DataError,
        ("attention_mask", "every token of a batch is masked", "at least one real token"),
    ),
    Case(
        "longer than the context",
        run("teal", [{"input_ids": LONG}]),
        DataError,
        ("33 tokens", "the model's context is 32", "cut them"),
    ),
    Case(
        "recording longer than the context",
        lambda model, folder: record(model, {"mlp.hidden": Moments()}, [{"input_ids": LONG}]),
        DataError,
        ("33 tokens", "is 32", "cut them"),
    ),
    Case(
        "quality beyond the context",
        lambda model, folder: measure_quality(model, [{"input_ids": IDS}, {"input_ids": LONG}]),
        DataError,
        ("33 tokens", "is 32", "cut them"),
        prepare=never_called,
    ),
    Case(
        "ids in a list",
        run("teal", [{"input_ids": [[1, 2], [3, 4]]}]),
        DataError,
        ("data: input_ids is a list", "torch.tensor"),
    ),
    Case(
        "a mask in a list",
        run("teal", [{"input_ids": IDS, "attention_mask": [[1] * 4] * 2}]),
        DataError,
        ("data: attention_mask is a list", "torch.tensor"),
    ),
    Case(
        "ids in an array",
        run("teal", [{"input_ids": IDS.numpy()}]),
        DataError,
        ("data: input_ids is a ndarray", "torch.tensor"),
    ),
    Case(
        "a batch that is a list",
        run("teal", [[[1, 2], [3, 4]]]),
        DataError,
        ("data: a batch is a list", "torch.tensor"),
    ),
    Case(
        "tokens of another vocabulary",
        run("teal", ids(input_ids=torch.full((2, 4), VOCABULARY))),
        DataError,
        ("vocabulary mismatch", "the data hold token 50", "0 to 49", "own tokenizer"),
    ),
    Case(
        "negative tokens",
        run("teal", ids(input_ids=torch.full((2, 4), -100))),
        DataError,
        ("the data hold token -100", "0 to 49"),
    ),
    Case(
        "recording another vocabulary",
        lambda model, folder: record(model, {"mlp.hidden": Moments()}, ids(input_ids=torch.full((2, 4), 99))),
        DataError,
        ("token 99", "0 to 49"),
    ),
    # numbers
    *(
        Case(
            f"{value} in a weight",
            run(method),
            NonFiniteError,
            ("model.layers.1.mlp.up_proj.weight", "NaN or Inf", "weights first"),
            prepare=poke("model.layers.1.mlp.up_proj.weight", value),
        )
        for value in (float("nan"), float("inf"), float("-inf"))
        for method in ("teal", recipe({"rtn": {"group_size": -1}}))
    ),
    Case(
        "overflow at calibration",
        run("teal"),
        NonFiniteError,
        ("blocks.1.mlp.hidden", "NaN or Inf in document", "position", "channel"),
        prepare=infinite,
    ),
    Case(
        "NaN in the data",
        run("teal", [torch.full((2, HIDDEN), float("nan"))]),
        NonFiniteError,
        ("layer.input:up", "NaN or Inf"),
        kind="mlp",
    ),
    # recipes
    Case("unknown method", run("awk"), RecipeError, ("'awk' is not known", "Did you mean awq", "Known are")),
    Case("not a transform", run(recipe("act_linear")), RecipeError, ("'act_linear' is not known",)),
    Case("two methods in one entry", run(recipe({"teal": {}, "rtn": {}})), RecipeError, ("each entry is one method",)),
    Case(
        "unknown setting",
        run(recipe({"teal": {"sparsety": 0.5}})),
        RecipeError,
        ("teal", "sparsety: no such setting", "allowed are sparsity, mode"),
    ),
    Case(
        "out of bounds",
        run(recipe({"teal": {"sparsity": 1.5}})),
        RecipeError,
        ("teal", "sparsity: 1.5 was given", "less than 1"),
    ),
    Case(
        "wrong choice",
        run(recipe({"rtn": {"group_axis": "diagonal"}})),
        RecipeError,
        ("group_axis: 'diagonal' was given", "'input' or 'output'"),
    ),
    Case("settings as a list", run(recipe({"teal": [0.5]})), RecipeError, ("teal", "settings are [0.5]", "mapping")),
    Case("settings as a number", run(recipe({"teal": 0})), RecipeError, ("teal", "settings are 0", "mapping")),
    Case("an empty recipe", run(recipe()), RecipeError, ("lists no transform", "give at least one")),
    Case("an empty list", run([]), RecipeError, ("lists no transform",)),
    Case("a list of other things", run([3]), RecipeError, ("int was given in the list", "allowed are transforms")),
    Case("a number", run(3), RecipeError, ("recipe: a int was given", "give transforms")),
    Case(
        "newer recipe", run({**recipe("teal"), "actkit": 2}), RecipeError, ("version 2 was given", "reads `actkit: 1`")
    ),
    Case(
        "unknown key", run({**recipe("teal"), "extra": 1}), RecipeError, ("unknown key extra", "actkit and transforms")
    ),
    Case("YAML that is none", yaml_recipe("a: [b"), RecipeError, ("recipe.yaml is not valid YAML",)),
    Case("YAML of a list", yaml_recipe("- teal"), RecipeError, ("expected the keys",)),
    Case("an empty file", yaml_recipe(""), RecipeError, ("expected the keys",)),
    Case(
        "YAML with a bad value",
        yaml_recipe(yaml.safe_dump(recipe({"teal": {"sparsity": -1}}))),
        RecipeError,
        ("sparsity: -1 was given", "greater than or equal to 0"),
    ),
    Case("no such file", run("nowhere/recipe.yaml"), RecipeError, ("there is no file nowhere/recipe.yaml",)),
    # orders
    Case(
        "twice in one recipe",
        run("teal,teal"),
        RecipeError,
        ("Teal cannot follow Teal", "was applied already", "undo it first"),
    ),
    Case(
        "twice in a row",
        run("teal"),
        RecipeError,
        ("Teal cannot follow Teal", "undo it first, or load the original model"),
        prepare=already("teal"),
    ),
    Case("the same slot", run("teal,wina"), RecipeError, ("Wina cannot follow Teal", "select slot")),
    Case(
        "an order that does not work",
        run(recipe({"teal": {}}, {"awq": {"group_size": -1}})),
        RecipeError,
        ("Awq cannot follow Teal", "put it first"),
    ),
    Case(
        "after one that is on the model",
        run(recipe({"awq": {"group_size": -1}})),
        RecipeError,
        ("Awq cannot follow Teal",),
        prepare=already("teal"),
    ),
    Case(
        "groups that do not fit",
        run(recipe({"rtn": {"group_size": 7}})),
        ValueError,
        ("model.layers.0.self_attn.q_proj", "group_size: 7 does not divide the 16 inputs", "choose a divisor"),
    ),
    # models
    Case(
        "on the meta device",
        run("teal"),
        UnsupportedModelError,
        ("meta device", "load the weights first"),
        prepare=lambda model: model.to("meta"),
    ),
    Case(
        "compiled",
        lambda model, folder: apply(torch.compile(model), "teal", batches("llama"), progress=False),
        UnsupportedModelError,
        ("torch.compile", "transform first"),
    ),
    Case(
        "no model", lambda model, folder: apply("llama", "teal", []), TypeError, ("model: str was given", "actkit.load")
    ),
    Case(
        "one side of a tie",
        lambda model, folder: apply_edit(model, EDIT_OF_TIED),
        EditError,
        ("lm_head.weight is tied to model.embed_tokens.weight", "untie"),
        kind="tied",
    ),
    Case(
        "a module of a tie",
        lambda model, folder: apply_edit(model, Replace("lm_head", ActLinear.of(model.lm_head, select=Threshold(0.1)))),
        EditError,
        ("is tied to", "untie"),
        kind="tied",
    ),
    Case("nothing known of it", run("teal", None), DataError, ("data", "none was given"), kind="mlp"),
    Case(
        "nothing to trace it with",
        run(recipe({"rtn": {"group_size": -1}}), None),
        CoverageError,
        ("example", "Perceptron", "one batch"),
        kind="mlp",
    ),
    # limits
    Case(
        "too little memory",
        run("teal", max_memory="100 B"),
        MemoryLimitError,
        ("max_memory", "the cap is 100 B", "Give less calibration data, or a higher cap"),
    ),
    Case("memory in bananas", run("teal", max_memory="3 bananas"), ValueError, ("'3 bananas' was given", "'2GB'")),
    Case(
        "too little covered",
        run(recipe({"teal": {"skip": ["gate", "up", "down"]}})),
        CoverageError,
        ("Teal would touch", "min_coverage=50%", "Lower min_coverage"),
    ),
    Case("a share of 200 %", run("teal", min_coverage=2), ValueError, ("min_coverage: 2 was given", "0 to 1")),
    Case("undo by magic", run("teal", undo="magic"), ValueError, ("undo: 'magic' was given", "source, memory, off")),
    Case("undo from no source", run("teal", undo="source"), ValueError, ("undo: 'source' was given", "'memory'")),
    # folders
    Case(
        "an existing folder",
        lambda model, folder: checkpoint.save(model, folder),
        CheckpointError,
        ("exists already", "choose another one, or pass overwrite=True"),
    ),
    Case(
        "saving a model on the meta device",
        lambda model, folder: checkpoint.save(model, folder / "new"),
        CheckpointError,
        ("meta device", "load the weights first"),
        kind="mlp",
        prepare=lambda model: model.to("meta"),
    ),
    Case(
        "no such folder",
        lambda model, folder: checkpoint.load(folder / "nowhere"),
        CheckpointError,
        ("there is no folder", "give a folder, a hub id"),
    ),
    Case(
        "no tokenizer",
        lambda model, folder: checkpoint.load_tokenizer(folder),
        CheckpointError,
        ("tokenizer", "has none", "--data random"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_clear_error_and_nothing_lost(case, tmp_path):
    model = build("llama", tie_word_embeddings=True) if case.kind == "tied" else build(case.kind)
    model = case.prepare(model)
    meta = any(parameter.is_meta for parameter in model.parameters())
    before = None if meta else snapshot(model)
    started = time.perf_counter()
    with pytest.raises(case.error) as caught:
        case.call(model, tmp_path)
    text = str(caught.value)
    for word in case.words:
        assert word in text, text
    assert time.perf_counter() - started < 5
    if before is not None:
        assert snapshot(model) == before
    assert not (tmp_path / "new").exists()
    if case.error not in (ValueError, TypeError):
        assert issubclass(case.error, ActkitError)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A machine without a network: names do not resolve, connections are refused."""
    attempts: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        attempts.append(args)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return attempts


def test_a_model_that_is_not_there_is_said_at_once(no_network):
    started = time.perf_counter()
    with pytest.raises(
        CheckpointError, match=r"no folder 'nobody/nothing', and the hub cannot be reached .*local folder"
    ):
        checkpoint.load("nobody/nothing")
    assert time.perf_counter() - started < 3
    attempts = len(no_network)
    for name in ("nothing", "a/b/c", "./nothing", "/nothing", "~/nothing"):
        with pytest.raises(CheckpointError, match="there is no folder"):
            checkpoint.load(name)
    assert len(no_network) == attempts, "what can be no hub id was asked for"


def test_a_name_that_the_hub_does_not_take(no_network):
    with pytest.raises(CheckpointError, match="no such model"):
        checkpoint.load("-bad-/-name-")


def test_a_checkpoint_of_a_newer_version(tmp_path):
    model = apply(build("llama"), "teal", batches("llama"), progress=False).model
    folder = checkpoint.save(model, tmp_path / "model")
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    (folder / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "schema": checkpoint.SCHEMA + 1}))
    checksums.write(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for read in (checkpoint.load, checkpoint.read_manifest):
        with pytest.raises(CheckpointError, match=r"schema 3 is newer than this actkit reads \(2\); upgrade actkit"):
            read(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_transforms_that_do_not_read_weights_of_experts_leave_ties(tmp_path):
    """Embeddings that are tied stay tied through a recipe, a save and a load."""
    model = build("llama", tie_word_embeddings=True)
    apply(model, "teal", batches("llama"), progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "model"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_recipe_survives_its_file(tmp_path):
    given = Recipe.of("rtn,teal")
    assert Recipe.load(given.save(tmp_path / "recipe.yaml")).transforms == given.transforms
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"bytes\.yaml is not valid YAML"):
        Recipe.load(tmp_path / "bytes.yaml")


def test_modules_that_nobody_can_load_are_refused_before_they_stand_there():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RecipeError, match=r"Tanh is not registered: add .* entry-point group actkit\.modules"):
        apply_edit(model, Replace("0", nn.Tanh()))
    assert isinstance(model[0], nn.Linear)
