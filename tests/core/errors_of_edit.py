"""How a user meets the errors of core, the room `edit`: one function per way, which raises it."""

from __future__ import annotations

import torch
from tiny_models import HIDDEN, build

from actkit.core.edit.edits import (
    Configure,
    Insert,
    Replace,
    Set,
    apply_edit,
    describe_module,
    get_module,
    get_tensor,
    replay,
)
from actkit.core.edit.folding import fold, fold_query_key
from actkit.core.ground import registry
from actkit.core.layers.activations import Activation
from actkit.core.layers.cache_rounding import CacheRounding
from actkit.core.model.anatomy import anatomy, equalization_sets, query_key_set
from actkit.core.recipe.runner import apply
from error_proofs import Place, points, proof

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


def folding(number: int, *values: torch.Tensor) -> list[object]:
    block = anatomy(build("llama")).block(0)
    return list(fold(block, equalization_sets(block)[number], *values))


proof(lambda p: folding(0, torch.ones(HIDDEN), torch.ones(HIDDEN)))


proof(lambda p: folding(1, torch.arange(1.0, HIDDEN + 1)))


@proof
def between_query_and_key_of_different_pairs(place: Place) -> None:
    found = query_key_set(anatomy(build("llama")).block(0))
    assert found is not None
    list(fold_query_key(found, torch.arange(1.0, len(found.ties) + 1)))


@proof
def between_query_and_key_that_are_filled(place: Place) -> None:
    model = build("llama")
    apply(model, {"actkit": 1, "transforms": [{"rtn": {"group_size": 8}}]}, progress=False)
    found = query_key_set(anatomy(model).block(0))
    assert found is not None
    list(fold_query_key(found, torch.ones(len(found.ties))))


proof(lambda p: apply_edit(build("llama"), Insert("model.layers.0.mlp", CacheRounding())))


@proof
def rows_would_be_mixed(p: Place) -> None:
    p.patch.setattr(Activation, "mixes", ("batch",))
    apply_edit(build("llama"), Replace("model.layers.0.mlp.act_fn", Activation("relu")))
