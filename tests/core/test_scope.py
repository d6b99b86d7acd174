"""`only`: a transform changes the layers that it is limited to, and those as it would without a limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from actkit.core.ground.errors import CoverageError, RecipeError
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.recipe.scope import Scope
from actkit.core.store import checkpoint
from actkit.quantization.awq import Awq
from actkit.quantization.gptq import Gptq
from actkit.quantization.rotate import Rotate
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.wina import Wina
from actkit.testing import tiny_batches, tiny_model

EIGHT = {"bits": 8, "group_size": 8}
FOUR = {"bits": 4, "group_size": 8}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all linear layers of blocks, as numbers."""
    found = {}
    for path, module in model.named_modules():
        if "layers" in path and path.endswith("_proj"):
            found[path] = module.dequantized() if hasattr(module, "dequantized") else module.weight.detach()
    return found


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Any]:
    model = tiny_model("llama")
    return model, tiny_batches(model)


def applied(case: tuple[nn.Module, Any], *transforms: Any) -> nn.Module:
    return apply(case[0], list(transforms), case[1], inplace=False, progress=False).model


def test_each_layer_is_rounded_as_its_own_transform_says(case: tuple[nn.Module, Any]) -> None:
    mixed = applied(
        case,
        RoundToNearest(**EIGHT, only={"down": "all", "query": 0}),
        RoundToNearest(**FOUR, only={"up": "1", "query": [1]}),
    )
    plain = weights(case[0])
    by_bits = {bits: weights(applied(case, RoundToNearest(bits=bits, group_size=8))) for bits in (4, 8)}
    expected = {
        "model.layers.0.self_attn.q_proj": 8,
        "model.layers.1.self_attn.q_proj": 4,
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.1.mlp.down_proj": 8,
        "model.layers.1.mlp.up_proj": 4,
    }
    found = weights(mixed)
    assert set(expected) < set(found)
    for path, weight in found.items():
        source = by_bits[expected[path]] if path in expected else plain
        assert torch.equal(weight, source[path]), path


@pytest.mark.parametrize("method", [Gptq, Awq])
def test_a_block_that_is_left_out_stays_and_the_first_is_as_without_a_limit(
    case: tuple[nn.Module, Any], method: Any
) -> None:
    limited = weights(applied(case, method(**FOUR, only={"block": "0"})))
    whole = weights(applied(case, method(**FOUR)))
    for path, weight in limited.items():
        assert torch.equal(weight, whole[path] if ".0." in path else weights(case[0])[path]), path


def test_a_selection_over_some_layers_saves_and_loads(case: tuple[nn.Module, Any], tmp_path: Any) -> None:
    model = applied(
        case,
        Gptq(**FOUR, only={"up": "all", "gate": "all"}),
        Gptq(**EIGHT, only={"down": "all"}),
        Wina(sparsity=0.25, only={"block": "1"}),
        Teal(sparsity=0.5, only={"query": "0", "output": "0"}),
    )
    selecting = {path for path, module in model.named_modules() if getattr(module, "select", None) is not None}
    assert {path.rsplit(".", 1)[0] for path in selecting} >= {"model.layers.0.self_attn", "model.layers.1.mlp"}
    assert not any("layers.0.mlp" in path or path.endswith(("0.self_attn.k_proj",)) for path in selecting)
    checkpoint.save(model, tmp_path / "mixed")
    loaded = checkpoint.load(tmp_path / "mixed")
    ids = case[1][0]["input_ids"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_recipe_keeps_scopes_and_says_nothing_without_one(tmp_path: Any) -> None:
    recipe = Recipe([RoundToNearest(bits=4, only={"down": [0, 1, 2, 5], "up": "all"})])
    assert Recipe.load(recipe.save(tmp_path / "recipe.yaml")).transforms == recipe.transforms
    assert recipe.dump()["transforms"][0]["rtn"]["only"] == {"down": "0-2, 5", "up": "all"}
    assert "only" not in Recipe([RoundToNearest()]).dump()["transforms"][0]["rtn"]
    assert RoundToNearest() != RoundToNearest(only={"block": 0})


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ({"down": "0-3"}, {"down": "4"}, True),
        ({"down": "0-3"}, {"down": "3"}, False),
        ({"down": "all"}, {"up": "all"}, True),
        ({"down": "all"}, {"up": "0", "down": "7"}, False),
        ({"block": "0"}, {"down": "1"}, True),
        ({"block": "0-1"}, {"down": "1"}, False),
        ({"block": "all"}, {"down": "1"}, False),
    ],
)
def test_which_scopes_are_apart(one: Any, other: Any, apart: bool) -> None:
    assert Scope.parse(one).apart(Scope.parse(other)) == apart == Scope.parse(other).apart(Scope.parse(one))


def test_the_same_layer_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot follow"):
        Recipe([RoundToNearest(only={"down": "0-3"}), Gptq(only={"block": "3"})]).check()
    with pytest.raises(RecipeError, match="cannot follow"):
        Recipe([RoundToNearest(only={"down": "0-3"}), RoundToNearest()]).check()
    Recipe([RoundToNearest(only={"down": "0-3"}), Gptq(only={"block": "4"})]).check()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "give roles of layers"),
        ("0-3", "give roles of layers"),
        ({"dawn": "0"}, "'dawn' was given; allowed are block"),
        ({"block": "0", "down": "1"}, "was given beside"),
        ({"down": ""}, "for the blocks"),
        ({"down": "3-1"}, "for the blocks"),
        ({"down": -1}, "for the blocks"),
        ({"down": [0, True]}, "for the blocks"),
        ({"down": []}, "for the blocks"),
        ({"down": "first"}, "for the blocks"),
    ],
)
def test_a_scope_that_cannot_be_read_is_named(settings: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RoundToNearest(only=settings)


def test_what_cannot_be_limited_says_why(case: tuple[nn.Module, Any]) -> None:
    with pytest.raises(ValidationError, match="give whole blocks"):
        Awq(only={"down": "all"})
    with pytest.raises(ValidationError, match="plans on the whole model"):
        Cats(only={"block": "0"})
    with pytest.raises(ValidationError, match=r"changes all blocks together|plans on the whole model"):
        Rotate(only={"block": "0"})
    with pytest.raises(CoverageError, match="only: block 7 was given, and the model has no such layers; its 2 blocks"):
        applied(case, Teal(sparsity=0.5, only={"block": 7}))
