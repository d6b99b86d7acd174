"""Recipes with stages by name: from the command line and from Python, with text as data."""

import json
import sys

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import actkit
from actkit import verbs
from actkit.cli.main import main
from actkit.core.edit import changes
from actkit.core.ground.errors import DataError, RecipeError
from actkit.core.recipe.stage import Train
from actkit.core.train import staged_run
from actkit.functions.swap import Swap
from actkit.sparsity.prosparse.fatrelu import FatRelu
from actkit.sparsity.wina.wina import Wina
from actkit.testing import tiny_model
from actkit.verbs import apply_and_save

SIZES = ["--length", 16, "--batch-size", 2, "--seed", 5, "--threads", 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    path = tmp_path_factory.mktemp("models") / "random"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    actkit.load_tokenizer("swiglu").save_pretrained(path)
    return path


@pytest.fixture
def texts(tmp_path):
    """Documents to train on, and others."""
    for name in ("train", "held_out"):
        lines = [{"text": f"{name}: the number {number} follows {number - 1} at once."} for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.fixture
def recipe(texts):
    stages = [
        {"apply": [{"swap": {"where": "silu", "new": "relu"}}]},
        {
            "train": {
                "rules": [{"activation_penalty": {"weight": 0.1}}],
                "steps": 3,
                "data": str(texts / "train.jsonl"),
                "validation": str(texts / "held_out.jsonl"),
                "sequences": 6,
                "learning_rate": 0.01,
            }
        },
        {"apply": [{"fatrelu": {"threshold": 0.01}}, {"wina": {"sparsity": 0.25}}]},
    ]
    path = texts / "recipe.yaml"
    path.write_text(yaml.safe_dump({"actkit": 1, "stages": stages}))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["actkit", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return call


def test_stopped_and_resumed_on_the_command_line(run, folder, recipe, texts, monkeypatch):
    command = ["apply", folder, "--recipe", recipe, "--sequences", 4, *SIZES]
    code, _, err = run(*command, "--out", texts / "whole", "--no-proof")
    assert code == 0, err
    assert "stage 1 of 3: apply Swap" in err and "stage 2 of 3: train steps=3" in err and "trained: 3 steps" in err

    def pressed(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staged_run, "train", pressed)
        code, text, err = run(*command, "--out", texts / "out")
    assert (code, text) == (130, "") and "go on with the same command and --resume" in err
    code, _, err = run(*command, "--out", texts / "out")
    assert code == 1 and "holds the state of a run that was not finished" in err
    code, text, err = run(*command, "--out", texts / "out", "--resume", "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result["proof"]["bit_equal"] and not (texts / "out.stages").exists()
    assert [next(iter(stage)) for stage in result["report"]["stages"]] == ["apply", "train", "apply"]
    assert "train.jsonl, train split, 6 rows" in result["report"]["stages"][1]["train"]["data"]
    assert any("stage 1 of 3 was finished before" in note for note in result["report"]["notes"])

    whole, resumed = actkit.load(texts / "whole"), actkit.load(texts / "out")
    assert whole.dtype == torch.float32  # trained, so opened in it
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    code, text, _ = run("show", texts / "out", "--json")
    recorded = json.loads(text)["recipe"]
    assert [next(iter(entry)) for entry in recorded] == ["swap", "train", "fatrelu", "wina"]
    settings = recorded[1]["train"]
    assert (settings["length"], settings["batch_size"], settings["seed"], settings["sequences"]) == (16, 2, 5, 6)
    code, text, err = run(*command, "--out", texts / "out", "--overwrite", "--no-proof")
    assert code == 0 and "trained: 3 steps, validation loss" in " ".join(text.split()), err


def test_the_verbs_one_by_one_give_the_same(folder, recipe, texts):
    options = {"length": 16, "batch_size": 2, "seed": 5}
    staged = actkit.apply(folder, recipe, sequences=4, progress=False, **options).model
    tokenizer = actkit.load_tokenizer(folder)
    model = actkit.apply(folder, Swap(where="silu", new="relu"), dtype="float32", progress=False, **options).model
    train = actkit.load_data(texts / "train.jsonl", model, tokenizer, sequences=6, split="train", **options)
    held_out = actkit.load_data(texts / "held_out.jsonl", model, tokenizer, **options)
    rule = {"activation_penalty": {"weight": 0.1}}
    actkit.train(model, train, validation=held_out, rules=rule, steps=3, learning_rate=0.01, seed=5)
    text = actkit.load_data(None, model, tokenizer, sequences=4, split="calibration", **options)
    actkit.apply(model, [FatRelu(threshold=0.01), Wina(sparsity=0.25)], text, progress=False)
    for (name, one), other in zip(staged.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_as_many_rows_are_validated_on_at_most():
    model, read = tiny_model("llama"), {"length": 8, "batch_size": 2}
    whole = verbs._training_data(model, None, "random", None, "", **read)[1]
    batches, held_out = verbs._training_data(model, None, "random", None, "", sequences=3, **read)
    assert (whole.rows, batches.rows, held_out.rows) == (32, 3, 4)
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(held_out, whole, strict=False))


def test_batches_beside_the_recipe(folder, tmp_path):
    model = actkit.load(folder, dtype="float32")
    tokenizer = actkit.load_tokenizer(folder)
    read = {"length": 16, "batch_size": 2}
    text = actkit.load_data(None, model, tokenizer, sequences=6, split="train", **read)
    held_out = actkit.load_data(None, model, tokenizer, sequences=2, split="search", **read)
    trained = actkit.load(folder, dtype="float32")
    actkit.train(trained, text, validation=held_out, steps=2)
    recipe = [Train(steps=2)]
    for given in ({"data": text}, {"training": text}):
        ours = actkit.load(folder, dtype="float32")
        applied = actkit.apply(ours, recipe, validation=held_out, progress=False, **given)
        for (name, one), other in zip(trained.state_dict().items(), ours.state_dict().values(), strict=True):
            assert torch.equal(one, other), name
        assert type(ours) is LlamaForCausalLM and applied.report.stages[0]["train"]["data"] == text.description
    with pytest.raises(DataError, match="validation: stage 1 trains on batches without any to validate on"):
        actkit.apply(model, recipe, text)

    mixed = [Swap(where="silu", new="relu"), Train(steps=1), FatRelu(threshold=0.01)]
    saved = apply_and_save(model, mixed, tmp_path / "out", training=text, validation=held_out, proof=False)
    assert any(note.startswith("trained: 1 steps") for note in saved.report.notes)
    assert changes.of(actkit.load(tmp_path / "out")).recipe[1]["train"]["steps"] == 1


def test_one_stage_is_the_old_recipe(folder, tmp_path):
    """The same bytes on disk, but for the time: a stage that applies, and a list of transforms."""
    old = {"actkit": 1, "transforms": [{"rtn": {"bits": 8, "group_size": 16}}]}
    new = {"actkit": 1, "stages": [{"apply": old["transforms"]}]}
    found = []
    for name, recipe in (("old", old), ("new", new)):
        actkit.apply(folder, recipe, out=tmp_path / name, progress=False)
        manifest = json.loads((tmp_path / name / "actkit.json").read_text())
        weights = [path.read_bytes() for path in sorted((tmp_path / name).glob("*.safetensors"))]
        found.append(({key: value for key, value in manifest.items() if key != "written"}, weights))
        assert not (tmp_path / name / "stages.json").exists()
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="resume: it was given for a recipe without stages"):
        actkit.apply(folder, new, out=tmp_path / "third", resume=True)
    with pytest.raises(RecipeError, match=r"it has stages \(train\), and actkit.optimize takes one list"):
        actkit.optimize(folder, out=tmp_path / "report", recipes=[[Train(steps=1)]])


def test_notes_that_are_alike_are_one():
    notes = ["blocks.0.mlp: rounded", "model: 3 of 4 units stay", "blocks.0.act: none", "blocks.1.mlp: rounded"]
    assert verbs.alike(notes) == ["blocks.0.mlp and 1 more: rounded", "model: 3 of 4 units stay", "blocks.0.act: none"]
