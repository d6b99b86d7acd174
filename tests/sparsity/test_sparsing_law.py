"""PerplexitySparsity: the search against closed forms, what it puts into models, and that it stacks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import CoverageError, DataError, RecipeError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.functions.swap import Swap
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.sparsing_law.cett import cett, cett_thresholds
from actkit.sparsity.sparsing_law.perplexity_sparsity import PerplexitySparsity
from actkit.sparsity.sparsing_law.shared_cett import SharedCett, in_float32, largest_cett, output_layers
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model

LENGTHS = ((20, 14, 20), (18, 20))


def labelled(kind: str) -> list[Any]:
    """Batches with the classes that the tiny model itself finds likeliest, so that dropping neurons hurts."""
    model, batches = tiny_model(kind), tiny_batches(kind, lengths=LENGTHS)
    with torch.no_grad():
        return [{**batch, "labels": model(**batch).logits.argmax(-1)} for batch in batches]


def own_words(kind: str) -> list[Any]:
    """Token batches whose labels are the tiny model's likeliest next tokens."""
    model, found = tiny_model(kind), []
    for batch in tiny_batches(kind, lengths=LENGTHS):
        with torch.no_grad():
            likely = model(**batch).logits.argmax(-1)
        labels = torch.cat([batch["input_ids"][:, :1], likely[:, :-1]], dim=1)
        found.append({**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)})
    return found


def hidden(model: Any, path: str, batches: list[Any]) -> Tensor:
    """What the layer at `path` reads, at real tokens: [tokens, neurons]."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
    hook.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(found, batches, strict=True)])


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_the_root_of_a_power(p: float, power: float) -> None:
    """rise = 5 c^power has its root at (ln(1 + p / 100) / 5)^(1 / power)."""
    found = largest_cett(lambda c: 5 * c**power, p)
    expected = (math.log1p(p / 100) / 5) ** (1 / power)
    assert found.reached
    assert expected * (1 - 0.01) ** (1 / power) <= found.low <= expected
    assert len(found.trace) <= 12
    sharp = largest_cett(lambda c: 5 * c**power, p, tolerance=1e-6)
    assert sharp.low == pytest.approx(expected, abs=1e-6)


def test_a_jump_shrinks_the_bracket_and_a_flat_rise_is_flagged() -> None:
    jump = largest_cett(lambda c: 0.0 if c < 0.3 else 2.0, 1.0)
    assert jump.low < 0.3 <= jump.high <= jump.low + 1e-6 and jump.reached
    steep = largest_cett(lambda c: 1e-9 + (c > 0.3) * 1e6, 1.0)
    assert steep.low <= 0.3 <= steep.high <= steep.low + 1e-6 and max(len(jump.trace), len(steep.trace)) <= 40
    flat = largest_cett(lambda c: 1e-4 * c, 1.0)
    assert (flat.low, flat.reached, len(flat.trace)) == (1.0, False, 1)
    falling = largest_cett(lambda c: -c, 1.0)  # the model gets better
    assert (falling.low, falling.reached) == (1.0, False)
    wavy = largest_cett(lambda c: c**2 + 0.002 * math.sin(200 * c), 1.0)
    assert wavy.low**2 + 0.002 * math.sin(200 * wavy.low) == pytest.approx(math.log1p(0.01), rel=0.01)


def test_bad_bounds_of_the_search() -> None:
    for p in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="p: "):
            largest_cett(lambda c: c, p)
    with pytest.raises(ValueError, match="tolerance: 1"):
        largest_cett(lambda c: c, 1.0, tolerance=1.0)
    for settings in ({"p": 0}, {"p": math.inf}, {"cett": 1.5}, {"sample": 0}, {"method": "x"}, {"tolerance": 0}):
        with pytest.raises(ValidationError, match=next(iter(settings))):
            PerplexitySparsity(**settings)
    with pytest.raises(ValidationError, match="it is a magnitude"):
        PerplexitySparsity(thresholds={"a": -1.0})


# -- what it puts into a model -----------------------------------------------------------------------------------------


def test_every_layer_gets_the_largest_threshold_of_one_cett() -> None:
    original, model, batches = tiny_model("llama"), tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    apply(model, PerplexitySparsity(cett=0.3), batches, min_coverage=0.1, progress=False)
    for index in (0, 1):
        path = f"model.layers.{index}.mlp.down_proj"
        h, weight = hidden(original, path, batches), original.get_submodule(path).weight.detach()
        layer = model.get_submodule(path)
        assert isinstance(layer, ActLinear) and isinstance(layer.select, Threshold)
        torch.testing.assert_close(layer.select.score, weight.norm(dim=0))
        assert float(layer.select.threshold) == cett_thresholds(h, weight, 0.3)
        assert 0.2 < cett(h, weight, float(layer.select.threshold)) <= 0.3
        keep = h.abs() * weight.norm(dim=0) > layer.select.threshold
        torch.testing.assert_close(layer(h), (h * keep) @ weight.T)
    assert sum(isinstance(m, ActLinear) for m in model.modules()) == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "bert", "vit"])
def test_the_rise_of_the_loss_is_at_most_p(kind: str) -> None:
    """The loss by transformers itself, before and after; for gated and plain MLPs, experts and classifiers."""
    batches = labelled(kind) if kind in ("bert", "vit") else own_words(kind)
    model = tiny_model(kind)

    def loss() -> float:
        with torch.no_grad():
            found = [(float(model(**batch).loss), _labels(batch, kind)) for batch in batches]
        return sum(value * count for value, count in found) / sum(count for _, count in found)

    before = loss()
    report = apply(model, PerplexitySparsity(p=1.0), batches, min_coverage=0.0, progress=False).report
    assert loss() - before <= math.log1p(0.01) + 1e-6
    assert "shared CETT" in report.notes[0] and "would not raise" not in report.notes[0]
    selections = [m.select for m in model.modules() if isinstance(m, ActLinear) and m.select is not None]
    assert len(selections) == (8 if kind == "mixtral" else 2)
    assert all(float(select.threshold) > 0 for select in selections)


def _labels(batch: Any, kind: str) -> int:
    return len(batch["labels"]) if kind in ("bert", "vit") else int((batch["labels"][:, 1:] != -100).sum())


def test_experts_are_thresholded_one_by_one_and_unseen_ones_are_said() -> None:
    model, batch = tiny_model("mixtral"), tiny_batches("mixtral", lengths=((1,),))
    report = apply(model, PerplexitySparsity(cett=0.3), batch, min_coverage=0.0, progress=False).report
    assert {reason for _, _, reason in report.skipped} == {
        "it has no threshold: no calibration token reached it, or none was given"
    }
    assert len(report.skipped) == 2 * 4 - 2 * 2  # one token reaches two of four experts in both layers


def test_it_refuses_a_model_without_a_loss_or_an_mlp_by_name() -> None:
    with pytest.raises(DataError, match="BertForSequenceClassification is no language model"):
        apply(tiny_model("bert"), PerplexitySparsity(), tiny_batches("bert"), min_coverage=0.0, progress=False)
    with pytest.raises(CoverageError, match="no MLP was found in TinyMlp"):
        apply(tiny_model("mlp"), PerplexitySparsity(cett=0.1), tiny_batches("mlp"), min_coverage=0.0, progress=False)
    with pytest.raises(CoverageError, match="Lower min_coverage"):
        settings = {"min_coverage": 0.5, "progress": False}
        apply(tiny_model("llama"), PerplexitySparsity(cett=0.1), tiny_batches("llama"), **settings)


def test_a_16_bit_model_is_searched_in_float32_and_left_as_it_is() -> None:
    model, batches = tiny_model("llama").bfloat16(), own_words("llama")
    with in_float32(model, batches[0]) as view:
        assert view.model is not model
        assert {p.dtype for p in view.model.parameters()} == {torch.float32}
        search = SharedCett(view, batches, progress=False)
        thresholds = search.thresholds(largest_cett(search.rise, 1.0).low)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    apply(model, PerplexitySparsity(), batches, min_coverage=0.0, progress=False)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, ActLinear)}
    assert {path: float(m.select.threshold) for path, m in layers.items()} == thresholds
    assert all(m.select.threshold.dtype == torch.float32 and m.weight.dtype == torch.bfloat16 for m in layers.values())


def test_over_a_quantizer_it_is_one_layer_with_dequantized_norms() -> None:
    model, batches = tiny_model("llama"), own_words("llama")
    apply(model, RoundToNearest(bits=4, group_size=8), batches, progress=False)
    before = {down.path: down.weight.detach().clone() for down in output_layers(anatomy(model)).values()}
    states = {path: hidden(model, path, batches) for path in before}
    apply(model, PerplexitySparsity(cett=0.2), batches, min_coverage=0.1, progress=False)
    for path, weight in before.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, ActLinear) and isinstance(layer.storage, IntegerWeight)
        torch.testing.assert_close(layer.select.score, weight.norm(dim=0))
        assert float(layer.select.threshold) == cett_thresholds(states[path], weight, 0.2)
        assert torch.equal(layer.dequantized(), weight)


@pytest.mark.parametrize("first", [Swap(where=("silu",), new="relu"), RoundToNearest(bits=3, group_size=8)])
def test_after_another_method_in_one_recipe_its_plan_is_of_the_changed_model(first: Any, tmp_path: Any) -> None:
    batches, method = own_words("llama"), PerplexitySparsity(p=20.0)
    apart = tiny_model("llama")
    apply(apart, first, batches, progress=False)
    apply(apart, method, batches, progress=False)
    model = tiny_model("llama")
    alone = apply(tiny_model("llama"), method, batches, progress=False).model
    done = apply(model, [first, method], batches, progress=False)
    found, expected, plain = (
        {
            path: float(m.select.threshold)
            for path, m in each.named_modules()
            if isinstance(getattr(m, "select", None), Threshold)
        }
        for each in (model, apart, alone)
    )
    assert len(found) == 2 and found == expected != plain
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    with torch.no_grad():
        for batch in batches:
            wanted = apart(**batch).logits
            assert torch.equal(model(**batch).logits, wanted) and torch.equal(loaded(**batch).logits, wanted)
    done.undo()
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, tiny_model("llama")(**batches[0]).logits)


def test_given_thresholds_are_applied_and_an_unreachable_target_is_said() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    path = "model.layers.1.mlp.down_proj"
    report = apply(model, PerplexitySparsity(thresholds={path: 0.25}), batches, min_coverage=0.0, progress=False).report
    assert float(model.get_submodule(path).select.threshold) == 0.25
    assert [row[0] for row in report.skipped] == ["model.layers.0.mlp.down_proj"]
    model = tiny_model("llama")
    report = apply(model, PerplexitySparsity(p=1e6), batches, min_coverage=0.0, progress=False).report
    assert "dropping every neuron would not raise perplexity by 1000000.0 %" in report.notes[0]


def test_the_share_that_a_cett_leaves_active() -> None:
    with in_float32(tiny_model("llama")) as view, evaluating(view.model):
        batches = tiny_batches("llama", lengths=LENGTHS)
        search = SharedCett(view, batches, progress=False)
        before = forward(view.model, batches[0]).logits
        for share in (0.2, 0.5, 0.8):
            eps = search.thresholds(search.cett_for(share))
            active = [
                hidden(view.model, path, batches).abs() * view.model.get_submodule(path).weight.norm(dim=0) > value
                for path, value in eps.items()
            ]
            assert float(torch.cat(active).float().mean()) == pytest.approx(share, abs=0.02)
        assert torch.equal(forward(view.model, batches[0]).logits, before)


# -- what every transform must satisfy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_it_satisfies_the_contract(kind: str) -> None:
    transform = PerplexitySparsity(p=0.5) if kind == "llama" else PerplexitySparsity(cett=0.2)
    batches = own_words(kind) if kind == "llama" else tiny_batches(kind)
    done = check_transform(transform, tiny_model(kind), batches, conflicting=[Wina()])
    assert {check.name for check in done if check.outcome == "holds"} >= {
        "the identity setting changes nothing",
        "save and load",
        "undo is exact",
        "what it conflicts with is refused",
    }


def test_it_may_not_follow_another_selection() -> None:
    with pytest.raises(RecipeError, match="both fill the select slot"):
        apply(tiny_model("llama"), [Wina(), PerplexitySparsity()], own_words("llama"), progress=False)
