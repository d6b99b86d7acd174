"""Edits are applied, undone bit for bit, described and replayed; what does not fit is refused and changes nothing."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, INNER, batches, build, run, snapshot
from torch import nn

from actkit.core.edit.edits import (
    Configure,
    Note,
    Replace,
    Set,
    apply_edit,
    describe,
    get_tensor,
    replay,
    temporarily,
)
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import EditError, RecipeError
from actkit.core.ground.modules import tied_names
from actkit.core.layers.folding import ScaledActivation
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.layers.weights import IntegerWeight

GATE, UP = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"


def edits(model: nn.Module) -> list[Any]:
    """One of each kind, some on top of others."""
    gate = model.get_submodule(GATE)
    rounded = ActLinear.of(gate, weight=IntegerWeight.quantize(gate.weight, IntegerGrid(4, 8)))
    act = model.get_submodule("model.layers.1.mlp.act_fn")
    return [
        Set(NORM, torch.full((HIDDEN,), 0.5)),
        Set(f"{UP}.weight", torch.ones(INNER, HIDDEN)),
        Replace(GATE, rounded),
        Replace(GATE, ActLinear.of(rounded, select=Threshold(0.3))),
        Replace("model.layers.1.mlp.act_fn", ScaledActivation(act, torch.rand(INNER) + 1)),
        Configure("rms_norm_eps", 1e-3),
        Configure("attn_implementation", "eager"),
    ]


def test_each_edit_does_what_it_says_and_is_undone_bit_for_bit():
    model = build("llama")
    with torch.no_grad():  # bits that arithmetic would lose
        model.get_submodule(UP).weight[0, :3] = torch.tensor([-0.0, 1e-45, float("inf")])
    steps, undos = [snapshot(model)], []
    for edit in edits(model):
        undos.append(apply_edit(model, edit))
        steps.append(snapshot(model))
        assert steps[-1] != steps[-2], edit
    assert (get_tensor(model, NORM) == 0.5).all()
    assert isinstance(model.get_submodule(GATE).select, Threshold)
    assert model.config.rms_norm_eps == 1e-3
    assert model.config._attn_implementation == "eager"
    for undo in reversed(undos):
        assert snapshot(model) == steps.pop()
        undo()
    assert snapshot(model) == steps.pop()


def test_without_memory_there_is_nothing_to_undo():
    model = build("llama")
    for edit in edits(model)[:5]:
        assert apply_edit(model, edit, remember=False) is None


def test_described_edits_rebuild_the_structure():
    changed, plain = build("llama"), build("llama")
    described = []
    for edit in edits(changed):
        apply_edit(changed, edit)
        described.append(describe(edit))
    replay(plain, json.loads(json.dumps(described)))
    plain.load_state_dict(changed.state_dict())
    for batch in batches("llama"):
        assert torch.equal(run(plain, batch), run(changed, batch))
    assert plain.config.to_dict() == changed.config.to_dict()


def test_a_trial_is_taken_back_also_after_an_exception():
    model = build("llama")
    before = snapshot(model)
    with temporarily(model, edits(model)) as tried:
        assert tried is model
        assert snapshot(model) != before
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="measuring failed"):
        with temporarily(model, edits(model)):
            raise RuntimeError("measuring failed")
    assert snapshot(model) == before
    with pytest.raises(EditError, match="no_such"):
        with temporarily(model, [*edits(model), Set("no_such.weight", torch.zeros(1))]):
            raise AssertionError("never reached")
    assert snapshot(model) == before


def test_a_tensor_of_a_packed_layer_is_packed_anew():
    model = nn.Sequential(ActLinear.of(nn.Linear(8, 4), select=Threshold(0.1)))
    x = torch.randn(1, 8)
    model[0].pack()
    undo = apply_edit(model, Set("0.storage.tensor", torch.ones(4, 8)))
    with torch.no_grad():
        expected = torch.where(x.abs() > 0.1, x, 0).sum() + model[0].bias
        torch.testing.assert_close(model(x)[0], expected)
        model[0].pack()
        undo()
        torch.testing.assert_close(model(x), ActLinear.of(model[0])(x))


class Unregistered(nn.Module):
    def spec(self) -> dict[str, Any]:
        return {}


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("settings", "edit", "error", "text"),
    [
        ({}, Set("model.nothing.weight", torch.zeros(1)), EditError, "no module 'model.nothing'"),
        ({}, Set("model.norm.nothing", torch.zeros(1)), EditError, "no parameter or buffer 'model.norm.nothing'"),
        ({}, Set("model.norm.variance_epsilon", torch.zeros(1)), EditError, "no parameter or buffer"),
        ({}, Set("model.rotary_emb.inv_freq", torch.zeros(2)), EditError, "no parameter or buffer"),
        ({}, Set("model.norm.weight", torch.zeros(3)), EditError, r"\(16,\).*\(3,\).*both must agree"),
        ({}, Set("model.norm.weight", torch.zeros(HIDDEN).bfloat16()), EditError, "float32.*bfloat16.*must agree"),
        ({}, Replace("model.nothing", nn.Identity()), EditError, "no module 'model.nothing'"),
        ({}, Replace("", ActLinear.of(nn.Linear(2, 2))), EditError, "the model itself"),
        ({}, Replace("model.norm", Unregistered()), RecipeError, "Unregistered is not registered"),
        ({}, Configure("no_such_key", 1), EditError, "config has no key 'no_such_key'"),
        ({}, Configure("rms_norm_eps", {1, 2}), EditError, "a set was given; give a JSON value"),
        (
            {},
            Note("model.norm", "text"),
            EditError,
            "Note was given, allowed are Replace, ReplaceTied, Restore, Insert",
        ),
        (TIED, Set("lm_head.weight", torch.zeros(50, HIDDEN)), EditError, "tied to model.embed_tokens.weight"),
        (TIED, Set("model.embed_tokens.weight", torch.zeros(50, HIDDEN)), EditError, "tied to lm_head.weight"),
        (TIED, Replace("lm_head", ActLinear.of(nn.Linear(HIDDEN, 50))), EditError, "untie the two"),
        (TIED, Replace("model", ActLinear.of(nn.Linear(HIDDEN, 50))), EditError, "tied"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(settings, edit, error, text):
    model = build("llama", **settings)
    before = snapshot(model)
    with pytest.raises(error, match=text):
        apply_edit(model, edit)
    assert snapshot(model) == before


def test_configure_needs_a_config():
    with pytest.raises(EditError, match="Perceptron has no config"):
        apply_edit(build("mlp"), Configure("hidden_act", "relu"))


def test_a_tie_inside_the_replaced_module_is_no_obstacle():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight

    model = nn.Sequential(Pair(), nn.Linear(4, 4))
    assert tied_names(model) == {"0.first.weight": "0.second.weight", "0.second.weight": "0.first.weight"}
    apply_edit(model, Replace("0", ActLinear.of(nn.Linear(4, 4))))
    with pytest.raises(EditError, match="tied"):
        apply_edit(nn.Sequential(Pair()), Replace("0.first", ActLinear.of(nn.Linear(4, 4))))


def test_a_module_that_stands_in_two_places_is_refused():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(EditError, match=r"0\.weight is tied to 2\.weight"):
        apply_edit(model, Replace("0", ActLinear.of(shared)))


def test_replay_refuses_what_it_does_not_know():
    with pytest.raises(EditError, match="none of replace, insert, resize, set, configure"):
        replay(build("llama"), [{"rotate": "everything"}])
    with pytest.raises(RecipeError, match="'no_such_module' is not known"):
        replay(build("llama"), [{"replace": GATE, "module": "no_such_module", "spec": {}}])


def test_many_edits_cost_little():
    model = nn.Sequential(*(nn.Sequential(*(nn.Linear(2, 2) for _ in range(10))) for _ in range(60)))
    replacing = [
        Replace(path, ActLinear.of(module)) for path, module in model.named_modules() if isinstance(module, nn.Linear)
    ]
    started = time.perf_counter()
    with temporarily(model, replacing):
        pass
    assert len(replacing) == 600
    assert time.perf_counter() - started < 1.0
