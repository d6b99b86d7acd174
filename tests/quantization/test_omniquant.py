"""Learned clipping against the release's formulas and closed forms; learned scales against folding; the promises."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from actkit.core.edit.edits import apply_edit, temporarily
from actkit.core.edit.folding import fold, fold_query_key
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.cache_rounding import CacheRounding
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.model.anatomy import anatomy, equalization_sets, query_key_set
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save
from actkit.quantization.omniquant import (
    Equivalent,
    LearnedClipping,
    LearnedPair,
    LearnedSet,
    LearnedThrough,
    OmniQuant,
)
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.testing.transforms import equal, outputs
from representative import architectures

FAST: dict[str, Any] = {"group_size": 8, "epochs": 2, "scale_dtype": "float32"}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def released(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Groups [rows, groups, size] by the formulas of the sheet, in float64."""
    ends = torch.sigmoid(high) * weight.amax(-1, True), torch.sigmoid(low) * weight.amin(-1, True)
    scale = ((ends[0] - ends[1]) / (2**bits - 1)).clamp(1e-5, 1e4)
    zero = torch.round((-ends[1] / scale).clamp(-1e4, 1e4))
    return (torch.clamp(torch.round(weight / scale) + zero, 0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipped_ranges_round_as_in_the_release(bits: int) -> None:
    weight = normal(6, 32).double()
    clipping = LearnedClipping(6, 4).double()
    with torch.no_grad():
        clipping.low.copy_(normal(6, 4, 1) + 2)
        clipping.high.copy_(normal(6, 4, 1) + 1)
    grid = IntegerGrid(bits, 8)
    ours = grid.fake(weight, *grid.tracked_parameters(weight, clipping))
    theirs = released(weight.view(6, 4, 8), clipping.low, clipping.high, bits).view(6, 32)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_group_of_one_sign_keeps_zero_in_its_range() -> None:
    weight = torch.linspace(0.5, 0.6, 8, dtype=torch.float64)[None]
    clipping = LearnedClipping(1, 1).double()
    grid = IntegerGrid(2, 8)
    ours = grid.fake(weight, *grid.tracked_parameters(weight, clipping))
    step = float(weight.max()) * float(torch.sigmoid(clipping.high.detach())) / 3
    torch.testing.assert_close(ours, torch.round(weight / step).clamp(0, 3) * step)


def test_without_clipping_it_is_rounding_to_nearest() -> None:
    weight, clipping, grid = normal(4, 16), LearnedClipping(4, 2), IntegerGrid(3, 8)
    with torch.no_grad():
        clipping.low.fill_(60.0)
        clipping.high.fill_(60.0)
    assert torch.equal(grid.fake(weight, *grid.tracked_parameters(weight, clipping)), grid.fake(weight))


def test_a_clipped_weight_moves_with_the_end_of_its_range() -> None:
    """It becomes (15 - zero) scale, scale = (high - low) / 15, zero = -low / scale rounded: the slope is known."""
    weight, clipping, grid = normal(3, 8).double(), LearnedClipping(3, 1).double(), IntegerGrid(4, 8)
    with torch.no_grad():
        clipping.high.fill_(0.0)  # half of the range: the largest weight is far outside
    largest = grid.fake(weight, *grid.tracked_parameters(weight, clipping)).max(-1).values
    largest.sum().backward()
    high, low = weight.amax(-1) / 2, weight.amin(-1) * float(torch.sigmoid(torch.tensor(4.0, dtype=torch.float64)))
    zero = -low / (high - low) * 15
    by_high = (15 - torch.round(zero) + zero) / 15  # 1, but for the rounding of zero
    torch.testing.assert_close(clipping.high.grad.flatten(), by_high * weight.amax(-1) / 4, rtol=1e-9, atol=1e-9)


def test_gradients_reach_the_range_of_a_token() -> None:
    """x' = (code - zero) scale: with codes as constants, the slope of the scale is what finite differences say."""
    x = normal(1, 6).double().requires_grad_()
    grid = IntegerGrid(3, -1)
    learned, plain = LearnedThrough(grid), RoundedInputs(grid)
    assert torch.equal(learned(x), plain(x))
    learned(x).square().sum().backward()
    through = x.grad.clone()
    x.grad = None
    plain(x).square().sum().backward()
    assert torch.allclose(x.grad, 2 * plain(x)) and not torch.allclose(through, x.grad)
    # of the inner values, whose codes do not depend on the range's ends, the slope is that of the identity
    inner = x.detach().argsort()[0, 1:-1]
    torch.testing.assert_close(through[0, inner], x.grad[0, inner])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_what_is_learned_with_is_what_is_folded(kind: str) -> None:
    """Scales and shifts as the learner computes them, and as `fold` does, give the same layers."""
    model = tiny_model(kind).eval()
    batches = tiny_batches(kind)
    view = anatomy(model)
    block = view.block(0)
    settings = OmniQuant(bits=8, group_size=-1, equalize=True, clip=False, shift=kind == "gpt2", scale_dtype="float32")
    generator = torch.Generator().manual_seed(1)
    sets = []
    for group in equalization_sets(block):
        if not group.refused and group.consumers[0].role != "down":
            channels = len(group.of_channels(torch.ones(group.consumers[0].in_features)))
            scale = torch.rand(channels, generator=generator) + 0.5
            shift = torch.randn(channels, generator=generator) if kind == "gpt2" and len(sets) != 1 else None
            sets.append(LearnedSet(group, scale, shift))
    assert sets
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
    learned = Equivalent(block, settings, sets)
    with torch.no_grad(), temporarily(model, learned.stand_ins()):
        seen = [functional_call(model, dict(learned.tensors()), (), batch).logits for batch in batches]
    with torch.no_grad():
        for edit in learned.edits():
            apply_edit(model, edit)
        stored = [model(**batch).logits for batch in batches]
    for before, while_learned, after in zip(expected, seen, stored, strict=True):
        torch.testing.assert_close(while_learned, after, rtol=1e-4, atol=1e-5)
        assert float((after - before).abs().median()) < 0.02 * float(before.abs().max())  # 8 bits by rows


def test_exact_without_rounding() -> None:
    """Scales and shifts alone leave the function as it is, to 1e-4."""
    model = tiny_model("gpt2").eval()
    batches = tiny_batches("gpt2")
    expected = [model(**batch).logits for batch in batches]
    block = anatomy(model).block(0)
    with torch.no_grad():
        for group in equalization_sets(block):
            if not group.refused and group.consumers[0].role not in ("down", "output"):
                part = LearnedSet(group, torch.rand(16) + 0.5, torch.randn(16))
                for edit in fold(block, group, part.columns.detach(), part.shift.detach()):
                    apply_edit(model, edit)
        for batch, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"bits": 2}, {"bits": 4, "input_bits": 4}, {"bits": 3, "both_targets": True}])
def test_learning_pays_on_what_it_learned_from(settings: dict[str, Any]) -> None:
    model, batches = tiny_model("llama").eval(), tiny_batches("llama", lengths=((16,) * 4,) * 2)
    exact = [model.model(**batch).last_hidden_state for batch in batches]

    def error(recipe: Any) -> float:
        changed = copy.deepcopy(model)
        apply(changed, recipe, batches, progress=False)
        states = (changed.model(**batch).last_hidden_state for batch in batches)
        return sum(float((a - b).square().sum()) for a, b in zip(states, exact, strict=True))

    grid = {"bits": settings["bits"], "group_size": 8, "scale_dtype": "float32"}
    nearest: list[Any] = [RoundToNearest(**grid)]
    if "input_bits" in settings:
        nearest.append(RoundInputs(bits=settings["input_bits"], symmetric=False))
    with torch.enable_grad():
        assert error(OmniQuant(**{**FAST, **settings, "epochs": 30})) < 0.95 * error(nearest)


def test_the_report_has_a_curve_for_each_block() -> None:
    report = apply(tiny_model("llama"), OmniQuant(bits=3, **FAST), tiny_batches("llama"), progress=False).report
    found = {path: values for path, method, values in report.values if method == "OmniQuant"}
    assert list(found) == ["model.layers.0", "model.layers.1"]
    assert all(len(values["loss"]) == 2 and 0.9 < values["mean share of a range"] < 1 for values in found.values())


def test_a_cache_may_be_rounded_behind_it() -> None:
    apply(tiny_model("llama"), [OmniQuant(bits=4, input_bits=8, **FAST), QuantizeCache()], tiny_batches("llama"))


@pytest.mark.parametrize("settings", [{"clip": False}, {"shift": True}])
def test_settings_that_learn_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nothing would be learned|no scales are learned"):
        OmniQuant(**settings)


@pytest.mark.parametrize("kind", architectures(["llama", "mixtral", "vit", "gemma3_text", "gpt2", "bert"]))
def test_it_keeps_its_promises(kind: str) -> None:
    transform = OmniQuant(bits=4, input_bits=8, **{**FAST, "epochs": 1})
    check_transform(
        transform, tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(), Wina(), RoundInputs()]
    )


# -- keys and values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "qwen3"])
def test_with_a_rounded_cache_scales_between_query_and_key_are_learned(kind: str, tmp_path: Path) -> None:
    batches = tiny_batches(kind, lengths=((9, 9, 9), (8, 8)))
    model = tiny_model(kind)
    applied = apply(model, OmniQuant(bits=8, cache_bits=4, **FAST), batches, undo="memory", progress=False)
    pairs = [block.attention for block in anatomy(model).blocks if block.attention is not None]
    assert all(pair.module.cache_rounding.bits == 4 for pair in pairs)  # type: ignore[union-attr]
    learned = [
        values["largest over smallest scale of keys"] for _, _, values in applied.report.values if len(values) > 2
    ]
    if kind == "qwen3":
        assert any("no scale is learned between query and key: query and key go" in n for n in applied.report.notes)
    else:
        assert len(learned) == len(pairs) and min(learned) > 1.001
    loss = [values["loss"] for _, _, values in applied.report.values]
    assert all(curve[-1] < 1.05 * curve[0] for curve in loss)
    save(model, tmp_path / "saved")
    equal(outputs(load(tmp_path / "saved"), batches), outputs(model, batches), "loaded again")
    applied.undo()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon"])
def test_what_is_learned_for_query_and_key_is_what_is_folded(kind: str) -> None:
    """With weights left in float, the block's learned tensors are those of the folded model."""
    model = tiny_model(kind)
    block = anatomy(model).block(0)
    found = query_key_set(block)
    assert found is not None and found.refused is None
    pair = LearnedPair(found)
    with torch.no_grad():
        pair.raw.copy_(torch.rand(len(pair.raw), generator=torch.Generator().manual_seed(0)) + 0.5)
    settings = OmniQuant(bits=8, clip=True, cache_bits=4, **FAST)
    learned = Equivalent(block, settings, [], pair)
    by_path = {linear.path: rows.detach() for linear, rows in pair.rows()}
    with torch.no_grad():
        tensors = learned.tensors()
    with temporarily(model, fold_query_key(found, pair.channels.detach())):
        for linear in {each.path: each for each in (found.query, found.key)}.values():
            index = [each.path for each in learned.linears].index(linear.path)
            grid = settings.grid
            weight = linear.weight.detach().float()
            expected = grid.fake(weight, *grid.tracked_parameters(weight, learned.clipping[index]))
            torch.testing.assert_close(
                tensors[f"{linear.path}.storage.tensor"], expected.detach(), rtol=1e-4, atol=1e-4
            )
            if linear.bias is not None:
                torch.testing.assert_close(tensors[f"{linear.path}.bias"], linear.bias.detach())
    assert set(by_path) == {found.query.path, found.key.path}


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"cache_bits: the cache of .* is not rounded: it keeps no cache"):
        apply(tiny_model("vit"), OmniQuant(cache_bits=8, **FAST), tiny_batches("vit"), progress=False)


def test_gradients_reach_the_scale_of_a_key_through_its_range() -> None:
    """k' = step round(k s / step), step = max|k s| / 7: its slope in s is that of the step, times the code's error."""
    keys = normal(1, 1, 5, 8).double()
    rounding = CacheRounding(4)
    scale = torch.ones(8, dtype=torch.float64, requires_grad=True)
    (rounding(keys * scale) / scale).square().sum().backward()
    at = keys.abs().amax(-1, keepdim=True) / 7
    codes = torch.round(keys / at)
    largest = keys.abs().argmax(-1)[0, 0]
    rounded = codes * at
    # straight through: d rounded_i = k_i ds_i + (codes_i - k_i / at) d at,  d at = |k_m| ds_m / 7
    slope = torch.zeros(8, dtype=torch.float64)
    for t in range(5):
        m = int(largest[t])
        own = 2 * rounded[0, 0, t]
        slope += own * keys[0, 0, t] - own * rounded[0, 0, t]  # of the numerator, and of the division by s
        slope[m] += float((own * (codes[0, 0, t] - keys[0, 0, t] / at[0, 0, t])).sum()) * float(at[0, 0, t])
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, slope, rtol=1e-6, atol=1e-8)
