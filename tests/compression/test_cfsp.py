"""CFSP against float64 transcriptions of the release's formulas, and what stands behind a narrower model."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import actkit
from actkit.compression.cfsp import Cfsp, allocate, recovery_ranks, split, unit_scores, width
from actkit.core.ground.errors import ExportError, RecipeError
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Moments
from actkit.formats.export import export
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.testing.models import KINDS
from representative import architectures


def as_released(angles: list[float], sparsity: float, units: int, tokens: int) -> list[int]:
    """Keep counts as the release computes them, from sums of angles over tokens."""
    sums = [angle * tokens for angle in angles]
    mean = sum(sums) / len(sums)
    scores = [1 / (1 + math.exp(-(own - mean) / 1e4)) for own in sums]
    middle = sum(scores) / len(scores)
    if max(scores) / middle * (1 - sparsity) >= 1:
        room = middle * (1 / (1 - sparsity) - 1) / (max(scores) - middle) / 1.05
        scores = [middle + room * (own - middle) for own in scores]
        middle = sum(scores) / len(scores)
    return [int(units * own / middle * (1 - sparsity)) for own in scores]


def test_shares_are_those_of_the_release_for_a_hundred_random_models() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(100):
        blocks = 2 + case % 30
        angles = torch.rand(blocks, generator=generator, dtype=torch.float64) * (0.02 if case % 2 else 0.6)
        sparsity = 0.05 + 0.9 * float(torch.rand(1, generator=generator))
        shares = allocate(angles.tolist(), sparsity)
        assert float(shares.mean()) == pytest.approx(1 - sparsity, abs=1e-9)
        assert float(shares.min()) > 0 and float(shares.max()) < 1
        found = [width(1536, float(share), None, "here") if 1536 * share >= 1 else 0 for share in shares]
        # a share next to a whole number may fall on its other side
        assert all(abs(a - b) <= 1 for a, b in zip(found, as_released(angles.tolist(), sparsity, 1536, 131_072)))


def test_a_steepness_of_zero_and_equal_scores_give_every_block_the_same() -> None:
    assert allocate([0.1, 0.5, 0.2], 0.3, steepness=0).tolist() == pytest.approx([0.7] * 3)
    assert allocate([0.2, 0.2], 0.3).tolist() == pytest.approx([0.7] * 2)


def test_the_weights_cancel_in_the_released_score() -> None:
    model = tiny_model("llama")
    view = anatomy(model)
    seen = record(model, {"mlp.hidden": Moments()}, tiny_batches("llama"), progress=False)
    for block in view.blocks:
        mlp, moments = block.mlp, seen[Site("mlp.hidden", block.index)]
        assert mlp is not None and mlp.gate is not None
        size = (moments.variance + moments.mean.square()).sqrt()
        down = mlp.down.weight.detach().double().abs() * size
        parts = [down, mlp.up.weight.detach().double().abs().t(), mlp.gate.weight.detach().double().abs().t()]
        literal = sum(part / part.sum(0, keepdim=True) for part in parts).mean(0) * size
        torch.testing.assert_close(literal, 3 / down.shape[0] * unit_scores(mlp, moments, "released"))
        relative = sum(part / part.sum(1, keepdim=True) for part in parts).mean(0) * size
        torch.testing.assert_close(relative, unit_scores(mlp, moments, "relative"))


@pytest.mark.parametrize("fine", ["released", "relative", "wanda", "magnitude", "random"])
def test_the_best_units_stay_and_the_model_is_the_one_with_the_others_set_to_zero(fine: str) -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    zeroed = tiny_model("llama")
    view, seen = anatomy(zeroed), record(zeroed, {"mlp.hidden": Moments()}, batches, progress=False)
    with torch.no_grad():
        for block in view.blocks:
            mlp = block.mlp
            scores = unit_scores(mlp, seen[Site("mlp.hidden", block.index)], fine)
            worst = scores.argsort(descending=True, stable=True)[mlp.width - mlp.width // 4 :]
            mlp.down.module.weight[:, worst] = 0
    applied = apply(model, Cfsp(sparsity=0.25, coarse="constant", fine=fine), batches, progress=False)
    for block in anatomy(model).blocks:
        assert block.mlp.width == view.blocks[block.index].mlp.width * 3 // 4
        assert all(type(linear.module) is nn.Linear for linear in (*block.mlp.inputs, block.mlp.down))
    torch.testing.assert_close(model(**batches[0]).logits, zeroed(**batches[0]).logits)
    assert applied.report.values[-1][2]["sparsity"] == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "bert", "phi3"])
def test_it_is_saved_loaded_and_undone(kind: str, tmp_path) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind)
    before, state = model(**batches[0])[0], {name: value.clone() for name, value in model.state_dict().items()}
    applied = apply(model, Cfsp(sparsity=0.4), batches, progress=False)
    narrow = model(**batches[0])[0]
    assert not torch.equal(narrow, before)
    save(model, tmp_path / "narrow")
    assert torch.equal(load(tmp_path / "narrow")(**batches[0])[0], narrow)
    applied.undo()
    assert torch.equal(model(**batches[0])[0], before)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", architectures(KINDS))
def test_it_keeps_what_a_transform_promises(kind: str) -> None:
    if kind == "mlp":
        pytest.skip("a plain MLP has no block with a described MLP")
    check_transform(Cfsp(sparsity=0.4), tiny_model(kind), tiny_batches(kind), conflicting=(Cfsp(),))


def test_it_is_undone_from_the_folder_that_the_model_came_from(tmp_path) -> None:
    save(tiny_model("llama"), tmp_path / "base")
    model, batches = load(tmp_path / "base"), tiny_batches("llama")
    before = model(**batches[0]).logits
    applied = apply(model, Cfsp(sparsity=0.4, uniform=True), batches, undo="source", progress=False)
    assert model.config.intermediate_size == model.model.layers[0].mlp.down_proj.in_features
    applied.undo()
    assert torch.equal(model(**batches[0]).logits, before)


@pytest.mark.slow(reason="transformers saves and loads a folder")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_plain_transformers_loads_one_width_and_several_are_refused(kind: str, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, batches = tiny_model(kind), tiny_batches(kind)
    apply(model, Cfsp(sparsity=0.4, uniform=True), batches, progress=False)
    actkit.export(model, tmp_path / "plain", format="transformers")  # another name of "dense"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain(**batches[0]).logits, model(**batches[0]).logits)
    unequal = tiny_model(kind)
    # random weights turn the hidden state alike in every block, so that shares are told apart by force
    apply(unequal, Cfsp(sparsity=0.4, steepness=1000.0), batches, progress=False)
    widths = [block.mlp.width for block in actkit.anatomy(unequal).blocks]
    assert len(set(widths)) == len(widths) == 2
    with pytest.raises(ExportError, match=rf"nearest is {sum(widths) // 2} \(`cfsp: {{uniform: true}}`"):
        export(unequal, tmp_path / "unequal", format="dense")


def test_the_mean_of_the_cut_units_goes_into_the_bias() -> None:
    batches = tiny_batches("gpt2")
    model, by_hand = tiny_model("gpt2"), tiny_model("gpt2")
    seen = record(by_hand, {"mlp.hidden": Moments()}, batches, progress=False)
    apply(by_hand, Cfsp(sparsity=0.5, coarse="constant"), batches, progress=False)
    original = anatomy(tiny_model("gpt2"))
    with torch.no_grad():
        for block in original.blocks:
            moments = seen[Site("mlp.hidden", block.index)]
            _, cut = split(unit_scores(block.mlp, moments, "released"), block.mlp.width // 2)
            added = block.mlp.down.weight[:, cut].double() @ moments.mean[cut]
            by_hand.get_submodule(block.mlp.down.path).bias += added.float()
    apply(model, Cfsp(sparsity=0.5, coarse="constant", compensate=True), batches, progress=False)
    torch.testing.assert_close(model(**batches[0]).logits, by_hand(**batches[0]).logits)


def test_one_width_is_in_the_config_also_if_the_layers_are_rounded_behind_it() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    recipe = [Cfsp(sparsity=0.4, uniform=True), RoundToNearest(bits=8, group_size=-1)]
    apply(model, recipe, batches, progress=False)
    assert model.config.intermediate_size == model.model.layers[0].mlp.down_proj.in_features


def test_a_layer_without_bias_gets_one(tmp_path) -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    apply(model, Cfsp(sparsity=0.5, compensate=True), batches, progress=False)
    assert model.model.layers[0].mlp.down_proj.bias is not None
    save(model, tmp_path / "narrow")
    assert torch.equal(load(tmp_path / "narrow")(**batches[0]).logits, model(**batches[0]).logits)


def test_what_fills_slots_comes_after() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    apply(model, [Cfsp(sparsity=0.5), RoundToNearest(bits=8, group_size=-1)], batches, progress=False)
    assert model.model.layers[0].mlp.up_proj.out_features < model.config.intermediate_size
    with pytest.raises(RecipeError, match="apply cfsp first"):
        apply(tiny_model("llama"), [RoundToNearest(bits=8, group_size=8), Cfsp()], batches, progress=False)


def test_a_model_without_mlps_is_left_as_it_is() -> None:
    model, batches = tiny_model("mlp"), tiny_batches("mlp")
    applied = apply(model, Cfsp(sparsity=0.5), batches, min_coverage=0.0, progress=False)
    assert applied.report.notes[-1].endswith("no units were cut") and not applied.report.changed


def test_widths_in_multiples() -> None:
    assert [width(1536, share, 128, "here") for share in (0.5, 0.54, 0.55, 0.999)] == [768, 768, 896, 1536]
    assert [width(units, 0.61, "auto", "here") for units in (11008, 1536, 384, 48)] == [6656, 960, 240, 29]
    with pytest.raises(RecipeError, match="multiple_of: 64 was given, and here has 48 units"):
        width(48, 0.5, 64, "here")
    with pytest.raises(RecipeError, match="would keep none of its 48 units"):
        width(48, 0.02, None, "here")


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1])
def test_sparsities_out_of_bounds(sparsity: float) -> None:
    with pytest.raises(ValidationError):
        Cfsp(sparsity=sparsity)


def test_ranks_follow_the_scores() -> None:
    ranks = recovery_ranks({0: 0.1, 1: 0.1, 2: 0.3}, 8)
    assert ranks[0] == ranks[1] < 8 < ranks[2] and sum(ranks.values()) == pytest.approx(24, abs=2)
    assert recovery_ranks({0: 0.0, 1: 0.9}, 1)[0] == 1
