"""Stages: their YAML and Python form, what a model's record says of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from actkit.core.edit.changes import methods_of, recipe_of
from actkit.core.ground.errors import RecipeError
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.stage import Apply, Train
from actkit.functions.swap import Swap
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.prosparse.fatrelu import FatRelu
from actkit.sparsity.prosparse.prosparse import ProSparse

TEXT = """
actkit: 1
stages:
  - apply:
      - swap: {where: silu, new: relu}
  - train:
      rules: [{prosparse: {preset: 1b}}]
      steps: 300
      learning_rate: 1.0e-3
      data: corpus.txt
      mixed_precision: no
      max_grad_norm: null
  - apply: [fatrelu, {rtn: {bits: 4}}]
"""
SWAP, RULE = Swap(where="silu", new="relu"), ProSparse(preset="1b")
TRAIN = Train(rules=[RULE], steps=300, learning_rate=1e-3, data="corpus.txt", max_grad_norm=None)


def test_yaml_and_python_are_one_form(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    read = Recipe.of(path)
    made = Recipe([SWAP, TRAIN, FatRelu(), RoundToNearest(bits=4)])
    assert read.stages == made.stages == (Apply(SWAP), TRAIN, Apply(FatRelu(), RoundToNearest(bits=4)))
    assert read.staged and len(read.transforms) == 3 and TRAIN.max_grad_norm is None
    assert Recipe.load(made.save(tmp_path / "again.yaml")).dump() == read.dump()
    assert "train steps=300" in repr(read) and "ProSparse(preset=1b)" in read.label
    read.check()
    assert yaml.safe_load((tmp_path / "again.yaml").read_text())["stages"][1]["train"]["max_grad_norm"] is None


def test_a_list_of_transforms_stays_what_it_was() -> None:
    for source in ([SWAP, FatRelu()], [Apply(SWAP, FatRelu())], {"actkit": 1, "stages": [{"apply": ["fatrelu"]}]}):
        recipe = Recipe.of(source)
        assert not recipe.staged and set(recipe.dump()) == {"actkit", "transforms"} and len(recipe.stages) == 1
        assert recipe.unstaged("anything") is recipe
    assert Recipe.of([Apply(SWAP), Apply(FatRelu())]).staged and Recipe.of(TRAIN).staged
    assert Recipe([]).dump() == {"actkit": 1, "transforms": []}


def test_a_record_is_a_recipe_again() -> None:
    recipe = Recipe([SWAP, TRAIN, FatRelu(), TRAIN])
    assert recipe_of(recipe.entries()) == recipe.dump()
    assert methods_of(recipe.entries()) == ["swap", "prosparse", "fatrelu"]
    plain = Recipe([SWAP, FatRelu()])
    assert recipe_of(plain.entries()) == plain.dump()


def test_what_is_left_open_is_filled_from_the_options() -> None:
    stage = Train(steps=1, batch_size=2)
    assert stage.under(sequences=16, length=32, batch_size=8).reading() == {"length": 32, "batch_size": 2, "seed": 0}
    assert stage.under(seed=5).seed == 5 and Train(steps=1, seed=1).under(seed=5).seed == 1
    options = Train(steps=3, keep="last").options()
    assert options["keep"] == "last" and options["seed"] == 0 and "data" not in options and "length" not in options


BAD: dict[str, tuple[Any, str]] = {
    "no stage": ([], "lists no transform"),
    "another kind": ([{"tune": {}}], r"stage 1: \{'tune': \{\}\} was given; each stage is one of"),
    "two kinds": ([{"apply": ["rtn"], "train": {"steps": 1}}], "stage 1: .* each stage is one of"),
    "a text": (["rtn"], "stage 1: 'rtn' was given; each stage is one of"),
    "an empty apply": ([{"train": {"steps": 1}}, {"apply": []}], r"stage 2 \(apply\): it lists no transform"),
    "an apply of nothing": ([{"apply": None}], r"stage 1 \(apply\): it lists no transform"),
    "an apply that is no list": ([{"apply": "rtn"}], r"stage 1 \(apply\): 'rtn' was given; give a list"),
    "an unknown method": ([{"apply": ["rtm"]}], "'rtm' is not known. Did you mean rtn"),
    "a rule that is applied": ([{"apply": ["prosparse"]}], r"not a transform.*`- train: \{rules: \[prosparse\]"),
    "a train that is no mapping": ([{"train": 300}], r"stage 1 \(train\): the settings are 300; give a mapping"),
    "an unknown key": ([{"train": {"steps": 1, "rate": 1}}], r"stage 1 \(train\): rate: no such setting; allowed are"),
    "no steps": ([{"train": {}}], r"stage 1 \(train\): .*steps and epochs are None and None; give one of the two"),
    "steps and epochs": ([{"train": {"steps": 1, "epochs": 1}}], "steps and epochs are 1 and 1; give one of the two"),
    "steps of 0": ([{"train": {"steps": 0}}], "steps: 0 was given; input should be greater than or equal to 1"),
    "a bad schedule": (
        [{"train": {"steps": 1, "schedule": "up"}}],
        "schedule: 'up' was given, allowed is cosine, linear, constant, wsdc",
    ),
    "an unknown rule": (
        [{"train": {"steps": 1, "rules": ["prospars"]}}],
        r"stage 1 \(train\): .*'prospars' is not known",
    ),
    "a transform as a rule": ([{"train": {"steps": 1, "rules": ["rtn"]}}], "rules: 'rtn' is not a training rule"),
    "a rule's setting": (
        [{"train": {"steps": 1, "rules": [{"prosparse": {"preset": "2b"}}]}}],
        r"stage 1 \(train\): rules: prosparse: preset: '2b' was given",
    ),
    "data that are no name": ([{"train": {"steps": 1, "data": [1]}}], "data: .* a stage names its data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_stages_name_the_setting(case: str) -> None:
    stages, message = BAD[case]
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        Recipe.parse({"actkit": 1, "stages": stages}).check()


def test_bad_recipes_in_python() -> None:
    with pytest.raises(RecipeError, match="expected the keys"):
        Recipe.parse({"actkit": 1, "stages": [], "transforms": []})
    with pytest.raises(RecipeError, match="allowed are actkit and stages"):
        Recipe.parse({"actkit": 1, "stages": [], "steps": 3})
    with pytest.raises(RecipeError, match=r"ProSparse was given in the list.*Train\(rules="):
        Recipe.of([SWAP, RULE])
    with pytest.raises(RecipeError, match=r"stage 2 \(apply\): it lists no transform"):
        Recipe([TRAIN, Apply()]).check()
    with pytest.raises(RecipeError, match=r"it has stages \(apply, train\), and actkit.optimize takes one list"):
        Recipe([SWAP, TRAIN]).unstaged("actkit.optimize")
    with pytest.raises(ValidationError, match="a stage names its data"):
        Train(steps=1, data=[{"input_ids": torch.ones(1, 2)}])
