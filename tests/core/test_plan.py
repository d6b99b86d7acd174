"""What a recipe touches, counted again by hand, and the memory and time that it says it needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import HIDDEN, INNER, LAYERS, batches, bits, build, snapshot
from torch import nn

from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import CoverageError, EditError, MemoryLimitError
from actkit.core.ground.memory import parameter_bytes
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Block, Linear, Site, anatomy
from actkit.core.model.experts import ExpertList
from actkit.core.recipe.plan import Plan, make_plan, turns
from actkit.core.recipe.runner import apply
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Gram, Moments
from actkit.quantization.awq import Awq
from actkit.sparsity.wina.rotate_columns import RotateColumns

EXPERTS = 4
ATTENTION = HIDDEN * (2 * HIDDEN + 2 * HIDDEN // 2)  # query, output; key and value have half the heads
GATED = 3 * HIDDEN * INNER
NORMS, ROUTER = 2 * HIDDEN, EXPERTS * HIDDEN


class Everything(Transform):
    pass


class OnlyAttention(Transform):
    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for linear in block.linears() if linear.role in ("query", "key", "value", "output")]


class OnlyDownOfExperts(Transform):
    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for linear in block.linears() if linear.role == "down"]


class Named(Transform):
    """What is named of each block, by the path inside it."""

    names: tuple[str, ...]

    def targets(self, block: Block) -> Iterable[str]:
        return [f"{block.path}.{name}".removeprefix(".") for name in self.names]


class Nonlinearities(Transform):
    def targets(self, block: Block) -> Iterable[str]:
        return block.nonlinearities()


class Observing(Transform):
    tags: ClassVar[Tags] = Tags(needs_data=True, stream="both", passes=3)

    def observe(self, block: Block) -> dict[Site, Any]:
        return {Site("mlp.hidden", block.index): Gram(), Site("mlp.input", block.index): Moments()}


class Computing(Transform):
    tags: ClassVar[Tags] = Tags(needs_data=True)

    def memory(self, block: Block, length: int) -> int:
        return 1000 + block.linears()[0].in_features


def plan(model: nn.Module, transform: Transform, given: Any = (), **settings: Any) -> Plan:
    return make_plan(
        anatomy(model, given[0] if len(given) else None), [transform], given, **{"min_coverage": 0, **settings}
    )


def test_coverage_of_a_dense_model():
    total = ATTENTION + GATED + NORMS
    assert plan(build("llama"), Everything()).coverage == {"Everything": pytest.approx((ATTENTION + GATED) / total)}
    found = plan(build("llama"), OnlyAttention())
    assert found.coverage == {"OnlyAttention": pytest.approx(ATTENTION / total)}
    names = dict(found.untouched)
    touched = {name for name, _ in build("llama").named_parameters() if "self_attn" in name}
    assert names.keys() == {name for name, _ in build("llama").named_parameters()} - touched
    assert names["lm_head.weight"] == "head"
    assert names["model.norm.weight"] == "head"
    assert names["model.embed_tokens.weight"] == "stem"
    assert names["model.layers.0.input_layernorm.weight"] == "norm"
    assert names["model.layers.1.mlp.up_proj.weight"] == "linear layer that the recipe does not aim at"


def test_experts_count_only_where_they_are_aimed_at():
    total = ATTENTION + EXPERTS * GATED + NORMS + ROUTER
    model = build("mixtral")
    before = snapshot(model)
    for transform, touched in (
        (Everything(), ATTENTION + EXPERTS * GATED),
        (OnlyAttention(), ATTENTION),
        (OnlyDownOfExperts(), EXPERTS * HIDDEN * INNER),
    ):
        assert plan(model, transform).coverage == {type(transform).__name__: pytest.approx(touched / total)}
    untouched = dict(plan(model, OnlyAttention()).untouched)
    assert untouched["model.layers.0.mlp.gate.weight"].startswith("router")
    assert untouched["model.layers.2.mlp.experts.3.up.weight"] == "linear layer that the recipe does not aim at"
    assert snapshot(model) == before
    assert not any(isinstance(module, ExpertList) for module in model.modules())
    with pytest.raises(CoverageError, match="OnlyAttention would touch"):
        plan(model, OnlyAttention(), min_coverage=0.5)
    assert snapshot(model) == before


def test_biases_of_touched_layers_are_not_weights():
    weights = HIDDEN * (4 * HIDDEN + 2 * INNER)
    biases = 3 * HIDDEN + HIDDEN + INNER + HIDDEN
    share = weights / (weights + biases + 2 * NORMS)
    assert plan(build("gpt2"), Everything()).coverage["Everything"] == pytest.approx(share)


@pytest.mark.parametrize("rounded", [True, False])
def test_changed_layers_count_as_before(rounded):
    model = build("llama")
    expected = plan(model, Everything()).coverage
    for linear in [linear for block in anatomy(model).blocks for linear in block.linears()]:
        stored = IntegerWeight.quantize(linear.weight, IntegerGrid(4, -1)) if rounded else None
        parent, _, name = linear.path.rpartition(".")
        setattr(model.get_submodule(parent), name, ActLinear.of(linear, weight=stored))
    assert plan(model, Everything()).coverage == expected


def test_convolutions_count_against_the_share():
    given = batches("conv")
    dense = (4 * 64 * INNER) + INNER * 10
    total = dense + INNER + 10 + 4 * 9 + 4
    found = plan(build("conv"), Everything(), given)
    assert found.coverage == {"Everything": pytest.approx(dense / total)}
    assert ("conv.weight", "convolution") in found.untouched


def test_parameters_and_modules_may_be_aimed_at():
    total = ATTENTION + GATED + NORMS
    for names, touched in (
        (("input_layernorm.weight",), HIDDEN),
        (("input_layernorm", "input_layernorm.weight"), HIDDEN),
        (("mlp",), GATED),
        (("mlp.act_fn",), GATED),
        (("mlp.act_fn", "self_attn.q_proj", "post_attention_layernorm.weight"), GATED + HIDDEN * HIDDEN + HIDDEN),
        (("self_attn",), ATTENTION),
    ):
        found = plan(build("llama"), Named(names=names))
        assert found.coverage == {"Named": pytest.approx(touched / total)}, names
        untouched = {name for name, _ in found.untouched}
        assert ("model.layers.0.mlp.up_proj.weight" in untouched) == (touched < GATED)
    with pytest.raises(EditError, match=r"the model has no module 'model\.layers\.0\.mlp\.nothing'"):
        plan(build("llama"), Named(names=("mlp.nothing",)))


def test_an_activation_counts_for_the_layers_that_it_stands_between():
    assert plan(build("llama"), Nonlinearities()).coverage["Nonlinearities"] == pytest.approx(
        GATED / (ATTENTION + GATED + NORMS)
    )
    experts = EXPERTS * GATED / (ATTENTION + EXPERTS * GATED + NORMS + ROUTER)
    assert plan(build("mixtral"), Nonlinearities()).coverage["Nonlinearities"] == pytest.approx(experts)
    given = batches("conv")  # a module between a convolution and a linear layer, and between two linear layers
    weights = 4 * 64 * INNER + INNER * 10 + 4 * 9
    assert plan(build("conv"), Nonlinearities(), given).coverage["Nonlinearities"] == pytest.approx(
        weights / (weights + INNER + 10 + 4)
    )
    given = batches("mlp")  # its functions are no modules
    assert plan(build("mlp"), Nonlinearities(), given).coverage["Nonlinearities"] > 0.9


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_methods_say_which_norms_they_change(kind):
    """The parameters that AWQ and the rotation touch are those that differ afterwards, but for biases."""
    for method in (Awq(bits=4, group_size=-1), RotateColumns()):
        model, given = build(kind), batches(kind)
        said = {name for name, _ in plan(model, method, given).untouched}
        before = {name: bits(tensor) for name, tensor in model.named_parameters() if "norm" in name}
        apply(model, method, given, min_coverage=0, progress=False)
        after = dict(model.named_parameters())
        changed = {name for name in before if name not in after or bits(after[name]) != before[name]}
        assert changed and changed == before.keys() - said, type(method).__name__


def test_memory_by_hand():
    given = batches("llama", padding=False)
    tokens = 2 * 6 + 2 * 7
    found = dict(plan(build("llama"), Observing(), given).memory)
    # measured on the longest batch and scaled, so at least the true number
    hidden = 4 * tokens * HIDDEN * 4
    assert found["hidden states (2 streams, old and new)"] == pytest.approx(hidden, abs=16)
    assert found["statistics of one block"] == Gram().memory(INNER) + Moments().memory(HIDDEN)
    assert plan(build("llama"), Everything(), given).memory == []
    assert plan(build("llama"), Everything(), given).seconds == 0


def test_memory_that_a_method_says_it_computes_with():
    given = batches("llama", padding=False)
    assert dict(plan(build("llama"), Computing(), given).memory)["what a method computes with"] == 1000 + HIDDEN


def test_time_is_counted_in_passes(monkeypatch):
    given = batches("llama", padding=False)
    ticks = iter(range(1000))
    monkeypatch.setattr("actkit.core.recipe.blockwise.time.perf_counter", lambda: float(next(ticks)))
    # a pass of the longest batch (14 of 26 tokens) takes 1 tick; 1 to record, 2 streams, 3 of the transform
    assert plan(build("llama"), Observing(), given).seconds == pytest.approx(26 / 14 * (1 + 2 + 3))


class Stepping(Observing):
    def passes(self, tokens, rows):
        return tokens / rows


def test_a_method_that_goes_by_rows_knows_how_many_there_are(monkeypatch):
    given = batches("llama", padding=False)
    rows = sum(len(batch["input_ids"]) for batch in given)
    ticks = iter(range(1000))
    monkeypatch.setattr("actkit.core.recipe.blockwise.time.perf_counter", lambda: float(next(ticks)))
    assert plan(build("llama"), Stepping(), given).seconds == pytest.approx(26 / 14 * (1 + 2 + 26 / rows))


class InTurn(Observing):
    tags: ClassVar[Tags] = Tags(needs_data=True, stream="original", passes=3, plans_in_turn=True)


def test_who_plans_in_turn_begins_a_walk_of_its_own(monkeypatch):
    model, given = build("llama"), batches("llama", padding=False)
    assert turns([InTurn(), Everything(), InTurn(), InTurn()]) == [range(2), range(2, 3), range(3, 4)]
    assert turns([]) == []
    ticks = iter(range(1000))
    monkeypatch.setattr("actkit.core.recipe.blockwise.time.perf_counter", lambda: float(next(ticks)))
    found = make_plan(anatomy(model), [Observing(), InTurn()], given, min_coverage=0)
    assert found.seconds == pytest.approx(26 / 14 * (1 + 2 + 3 + 1 + 1 + 3))


def test_the_cap():
    given = batches("llama")
    needed = plan(build("llama"), Observing(), given).bytes
    assert plan(build("llama"), Observing(), given, max_memory=needed).bytes == needed
    with pytest.raises(MemoryLimitError, match="the cap is 1 KB; largest is"):
        plan(build("llama"), Observing(), given, max_memory="1KB")
    for wrong in ("many", -1, "3 bananas"):
        with pytest.raises(ValueError, match=r"memory: .* was given; give bytes"):
            plan(build("llama"), Everything(), max_memory=wrong)


def test_in_words():
    rows = [("a.weight", "norm"), ("b.weight", "norm"), ("c.weight", "head")]
    lines = Plan({"Awq": 0.987}, rows, [("hidden states", 2_000_000), ("statistics", 500_000)], 12.3).lines()
    assert lines == [
        "Awq touches 99% of the parameters inside blocks",
        "left alone: 2 parameters (norm)",
        "left alone: 1 parameter (head)",
        "memory beside the model: 2.5 MB (hidden states 2 MB, statistics 500 KB)",
        "time: about 12 s",
    ]
    assert Plan().lines() == []


def test_parameter_bytes_count_ties_once():
    model = build("llama", tie_word_embeddings=True)
    per_block = ATTENTION + GATED + NORMS
    assert parameter_bytes(model) == 4 * (LAYERS * per_block + 50 * HIDDEN + HIDDEN)
    layer = ActLinear.of(nn.Linear(8, 4), weight=IntegerWeight.quantize(torch.ones(4, 8), IntegerGrid(4)))
    assert parameter_bytes(layer) == 4 * 4 + 4 * (4 + 1) + 4 * 4
