"""SVD of whole models: ranks, norms, heads, what stacks on it and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from actkit.compression.cfsp import Cfsp
from actkit.compression.svd import Svd
from actkit.core.ground.errors import RecipeError
from actkit.core.layers.low_rank import decompose, rank_within
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.layers.weights import IntegerWeight
from actkit.core.measure.cost import measure_cost
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.formats.export import export
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.zeroquant_v2.lorc import Lorc
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.testing.models import KINDS
from representative import architectures

RTN = RoundToNearest(bits=8, group_size=-1)
NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "whitened": {"norm": "whiten"},
    "fisher": {"norm": "fisher"},
    "by head": {"per_head": True, "norm": "whiten"},
    "by role": {"rank": {"up": 3, "down": 3}, "algorithm": "random"},
}


def linears(model: Any) -> list[Any]:
    view = anatomy(model)
    return [linear for block in view.blocks for linear in view.block(block.index).linears()]


@pytest.mark.parametrize("kind", architectures(KINDS))
def test_it_keeps_what_a_transform_promises(kind: str) -> None:
    check_transform(Svd(), tiny_model(kind), tiny_batches(kind), conflicting=(RTN, Awq(bits=3, group_size=8)))


@pytest.mark.parametrize("name", NORMS)
def test_other_settings_keep_it_too(name: str) -> None:
    check_transform(Svd(**NORMS[name]), tiny_model("llama"), tiny_batches("llama"), conflicting=(Svd(),))


def test_plain_factors_are_the_closest_and_within_the_budget() -> None:
    model, original = tiny_model("llama"), tiny_model("llama")
    applied = apply(model, Svd(budget=0.4), progress=False)
    for linear, before in zip(linears(model), linears(original), strict=True):
        stored, rank = linear.module.storage, rank_within(before.out_features, before.in_features, 0.4)
        assert isinstance(stored, LowRankWeight) and stored.rank == rank
        left, right = decompose(before.weight, rank).factors()
        torch.testing.assert_close(linear.weight.double(), left @ right, rtol=0, atol=1e-6)
    values = applied.report.values[0][2]
    assert all(each["share"] <= 0.4 for each in values.values()) and "of the numbers" in applied.report.notes[0]
    share = measure_cost(model, progress=False).weight_bytes / measure_cost(original, progress=False).weight_bytes
    assert share < 1


def test_a_whitened_norm_loses_less_of_the_outputs_than_a_plain_one() -> None:
    batches, losses = tiny_batches("llama"), {}
    before = tiny_model("llama")(**batches[0]).logits
    for norm in ("svd", "whiten"):
        model = tiny_model("llama")
        apply(model, Svd(norm=norm, budget=0.6), batches, progress=False)
        losses[norm] = float((model(**batches[0]).logits - before).detach().norm())
    assert losses["whiten"] < losses["svd"]


def test_full_rank_changes_nothing_but_the_last_digits() -> None:
    for kind, settings in (("llama", {}), ("gpt2", {"per_head": True}), ("bert", {"norm": "whiten"})):
        model, batches = tiny_model(kind), tiny_batches(kind)
        before = model(**batches[0])[0]
        block = anatomy(model).blocks[0]
        rank = {x.role: min(x.weight.shape) for x in block.linears()}
        if settings.get("per_head"):
            rank |= {x.role: block.attention.head_dim for x in block.attention.inputs}
        apply(model, Svd(rank=rank, **settings), batches, progress=False)
        torch.testing.assert_close(model(**batches[0])[0], before, rtol=1e-3, atol=1e-4)


def test_heads_have_their_own_factors_also_of_a_fused_layer() -> None:
    for kind in ("llama", "gpt2"):
        model = tiny_model(kind)
        apply(model, Svd(per_head=True, rank=2), progress=False)
        attention = anatomy(model).blocks[0].attention
        for linear in attention.inputs:
            assert linear.module.storage.heads == linear.out_features // attention.head_dim
        assert attention.output.module.storage.heads == 1


def test_a_rank_above_that_of_a_head_or_a_layer_is_refused() -> None:
    size = anatomy(tiny_model("llama")).blocks[0].attention.head_dim
    with pytest.raises(ValueError, match=f"each head of .*q_proj has .* give 1 to {size}"):
        apply(tiny_model("llama"), Svd(per_head=True, rank=size + 1, skip=("up",)), progress=False)
    with pytest.raises(ValueError, match=r"rank: 99 was given, and .* has"):
        apply(tiny_model("llama"), Svd(rank={"down": 99}), progress=False)
    with pytest.raises(ValidationError):
        Svd(rank=0)


def test_heads_that_are_wider_together_than_the_layer_are_warned_of() -> None:
    attention = anatomy(tiny_model("llama")).blocks[0].attention
    applied = apply(tiny_model("llama"), Svd(per_head=True, rank={"query": attention.head_dim}), progress=False)
    wide = attention.heads * attention.head_dim > attention.query.in_features
    assert any("wider together" in note for note in applied.report.notes) == wide


@pytest.mark.parametrize(
    "recipe",
    [
        [Svd(), RTN],
        [Svd(), Wina(sparsity=0.4)],
        [Svd(norm="whiten", per_head=True), Wina(), RTN],
        [Cfsp(sparsity=0.4), Svd(norm="fisher")],
    ],
    ids=["rtn", "wina", "all", "cfsp"],
)  # fmt: skip
def test_it_stacks_and_comes_back(recipe: list[Any], tmp_path: Path) -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    before = model(**batches[0]).logits
    applied = apply(model, recipe, batches, progress=False)
    after = model(**batches[0]).logits
    assert not torch.equal(after, before)
    if RTN in recipe:
        stored = linears(model)[0].module.storage
        assert isinstance(stored.left, IntegerWeight) and isinstance(stored.right, IntegerWeight)
    save(model, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small")(**batches[0]).logits, after)
    applied.undo()
    assert torch.equal(model(**batches[0]).logits, before)


def test_rounding_may_follow_in_a_run_of_its_own(tmp_path: Path) -> None:
    model, together, batches = tiny_model("llama"), tiny_model("llama"), tiny_batches("llama")
    apply(model, Svd(), batches, progress=False)
    save(model, tmp_path / "thin")
    again = load(tmp_path / "thin")
    apply(again, RTN, batches, progress=False)
    apply(together, [Svd(), RTN], batches, progress=False)
    assert torch.equal(again(**batches[0]).logits, together(**batches[0]).logits)


@pytest.mark.parametrize("later", [Awq(bits=3, group_size=8), Svd(), Cfsp()])
def test_what_reads_the_weight_as_one_matrix_is_refused_behind_it(later: Any) -> None:
    with pytest.raises(RecipeError, match=r"weight slot|applied already|apply cfsp first"):
        apply(tiny_model("llama"), [Svd(), later], tiny_batches("llama"), progress=False)
    with pytest.raises(RecipeError, match="weight slot"):
        apply(tiny_model("llama"), [RTN, Svd()], progress=False)
    with pytest.raises(RecipeError, match="kept as two factors already"):
        apply(tiny_model("llama"), [Svd(), RTN, Lorc()], progress=False)


def test_groups_that_do_not_fit_a_factor_are_named() -> None:
    with pytest.raises(ValueError, match="its left factor"):
        apply(tiny_model("llama"), [Svd(rank=3), RoundToNearest(bits=4, group_size=8)], progress=False)


def test_it_may_be_limited_to_some_layers() -> None:
    model = tiny_model("llama")
    apply(model, Svd(only={"up": 0}), progress=False)
    changed = [x.module.storage for x in linears(model) if hasattr(x.module, "storage")]
    assert len(changed) == 1 and isinstance(changed[0], LowRankWeight)


@pytest.mark.slow(reason="transformers saves and loads a folder")
def test_a_dense_export_holds_the_product(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, batches = tiny_model("llama"), tiny_batches("llama")
    apply(model, Svd(), progress=False)
    done = export(model, tmp_path / "plain", format="dense")
    assert any("factors of rank" in text for text in done.dense.values())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain(**batches[0]).logits, model(**batches[0]).logits, rtol=1e-4, atol=1e-5)
