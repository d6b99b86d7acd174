"""Search and learned rounding against brute force and the sheet; the ranges behind norms; the promises."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actkit.core.edit.edits import apply_edit, get_module
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.measure.fresh import FreshProcess
from actkit.core.model.anatomy import Linear, anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import save
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.functions.reconstruct_mlp import ReconstructMlp
from actkit.quantization.aphq_vit.aphq_vit import AphqVit, channel_ranges
from actkit.quantization.aphq_vit.candidates import candidates
from actkit.quantization.aphq_vit.operands import search_product
from actkit.quantization.aphq_vit.rounding import (
    DroppedInputs,
    LearnedRounding,
    inverse_rounding,
    rounding,
    search,
)
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures

FAST: dict[str, Any] = {"steps": 4, "rows": 2, "search_rows": 32, "rounds": 1}
WEIGHTS, INPUTS = IntegerGrid(3, -1), IntegerGrid(3, -1, scope="tensor")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(out_features: int = 6, in_features: int = 16) -> Linear:
    module = torch.nn.Linear(in_features, out_features)
    with torch.no_grad():
        module.weight.copy_(normal(out_features, in_features, seed=1))
    return Linear("layer", "layer", module)


# -- the search --------------------------------------------------------------------------------------------------------


def test_the_search_finds_what_brute_force_finds() -> None:
    """One round: each row of the weight with exact inputs, then the inputs with that weight."""
    linear, x = layer(), normal(40, 16).relu() + 0.1
    weight = linear.weight.detach()
    found = search([linear], x, WEIGHTS, INPUTS, rounds=1)
    ((scale, zero),) = found.weights
    for row in range(6):
        tried = [(float(s[row]), float(z[row])) for s, z in candidates(weight, WEIGHTS)]
        errors = [
            float(((quantized(weight[row].double(), s, z) - weight[row].double()) @ x.double().t()).square().sum())
            for s, z in tried
        ]
        chosen = errors[tried.index((float(scale[row]), float(zero[row])))]
        assert chosen == pytest.approx(min(errors), rel=1e-6)
    rounded = WEIGHTS.fake(weight, scale, zero)
    tried = [(float(s), float(z)) for s, z in candidates(x.reshape(1, -1), INPUTS)]
    errors = [float((quantized(x, s, z) @ rounded.t() - x @ weight.t()).square().sum()) for s, z in tried]
    assert tried[errors.index(min(errors))] == (float(found.scale), float(found.zero))
    assert float(found.zero) == 0  # nothing below 0


def quantized(x: Tensor, scale: float, zero: float) -> Tensor:
    return (torch.clamp(torch.round(x / scale) + zero, 0, 7) - zero) * scale


def test_candidates_go_from_the_middle_to_all_values() -> None:
    x = normal(3, 200)
    tried = list(candidates(x, WEIGHTS))
    assert len(tried) == 128
    spans = (x.quantile(0.9, 1) - x.quantile(0.1, 1), x.amax(1) - x.amin(1))
    torch.testing.assert_close(tried[0][0].flatten() * 7, spans[0])
    torch.testing.assert_close(tried[-1][0].flatten() * 7, spans[1])
    assert all(bool(((zero >= 0) & (zero <= 7) & (zero == zero.round())).all()) for _, zero in tried)


def test_a_dead_input_and_a_constant_row_are_no_trouble() -> None:
    linear = layer()
    with torch.no_grad():
        linear.module.weight[0] = 0.0
    found = search([linear], torch.zeros(8, 16), WEIGHTS, INPUTS, rounds=2)
    assert torch.isfinite(found.scale).all() and torch.isfinite(found.weights[0][0]).all()


# -- learned rounding --------------------------------------------------------------------------------------------------


def test_it_begins_with_the_weight_itself() -> None:
    linear = layer()
    part = search([linear], normal(40, 16), IntegerGrid(8, -1), INPUTS, rounds=1)
    learned = LearnedRounding([part], IntegerGrid(8, -1), INPUTS)
    soft = learned.tensors()["layer.storage.tensor"].detach()
    scale, zero = part.weights[0]
    inside = ((linear.weight / scale + zero) > 0) & ((linear.weight / scale + zero) < 255)
    assert float(inside.float().mean()) > 0.9
    assert float((soft - linear.weight.detach()).abs()[inside].max()) < 1e-6


def test_shares_are_inverted() -> None:
    share = torch.linspace(0, 0.999, 50)
    torch.testing.assert_close(rounding(inverse_rounding(share)), share, atol=1e-6, rtol=0)
    assert bool((rounding(torch.tensor([-9.0, 9.0])) == torch.tensor([0.0, 1.0])).all())


def test_the_penalty_is_that_of_the_sheet() -> None:
    linear = layer()
    learned = LearnedRounding([search([linear], normal(40, 16), WEIGHTS, INPUTS, 1)], WEIGHTS, INPUTS, strength=0.01)
    shares = torch.clamp(1.2 * torch.sigmoid(learned.raw[0].detach()) - 0.1, 0, 1)
    assert learned.penalty(0.19) == 0
    for progress, beta in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        expected = 0.01 * (1 - (2 * shares - 1).abs() ** beta).sum()
        assert float(learned.penalty(progress).detach()) == pytest.approx(float(expected), rel=1e-5)


def test_what_is_stored_is_what_was_learned() -> None:
    """Codes up where V is not negative, clamped behind the zero point."""
    linear = layer()
    part = search([linear], normal(40, 16), WEIGHTS, INPUTS, 1)
    learned = LearnedRounding([part], WEIGHTS, INPUTS)
    with torch.no_grad():
        learned.raw[0].copy_(normal(6, 16, seed=3))
        learned.scales[0].mul_(1.5)
    (edit,) = learned.edits()
    scale, zero = part.weights[0]
    steps = torch.floor(linear.weight.detach() / scale) + (learned.raw[0].detach() >= 0)
    expected = (torch.clamp(steps + zero, 0, 7) - zero) * scale
    assert isinstance(edit.module, ActLinear) and isinstance(edit.module.storage, IntegerWeight)
    torch.testing.assert_close(edit.module.dequantized(), expected)
    torch.testing.assert_close(edit.module.inputs.scale, part.scale * 1.5)
    learned._hard = True
    torch.testing.assert_close(learned.tensors()["layer.storage.tensor"].detach(), expected)


def test_a_share_of_the_inputs_is_rounded_while_it_learns() -> None:
    inputs = DroppedInputs(INPUTS, torch.tensor([0.5]), torch.tensor([3.0]), keep=0.25)
    inputs.generator = torch.Generator().manual_seed(0)
    x = normal(100, 16)
    with torch.no_grad():
        every = inputs(x)
    some = inputs(x)
    rounded = some == every
    assert 0.2 < float(rounded.float().mean()) < 0.32 and bool((rounded | (some == x)).all())


# -- what attention multiplies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 1])
def test_each_head_takes_the_pair_that_errs_least_on_its_product(heads: int) -> None:
    """One round by brute force: queries beside exact keys, then keys beside those queries; `heads` of the keys."""
    query, key = [normal(3, 2, 5, 4, seed=s) for s in (1, 2)], [normal(3, heads, 5, 4, seed=s) for s in (3, 4)]
    query[0][:, 1] *= 5
    (q_scale, q_zero), (k_scale, k_zero) = search_product(query, key, lambda a, b: a @ b.mT, INPUTS, rounds=1)
    assert q_scale.shape == (2, 1, 1) and k_zero.shape == (heads, 1, 1)

    def error(chosen: list[tuple[float, float]], more: dict[int, tuple[float, float]], head: int) -> float:
        total, shared = 0.0, head // (2 // heads)
        for q, k in zip(query, key, strict=True):
            rounded = quantized(q[:, head].double(), *chosen[head])
            read = quantized(k[:, shared].double(), *more[shared]) if more else k[:, shared].double()
            total += float((rounded @ read.mT - q[:, head].double() @ k[:, shared].double().mT).square().sum())
        return total

    found = [(float(q_scale[h]), float(q_zero[h])) for h in range(2)]
    rows = torch.cat([q.transpose(0, 1).flatten(1) for q in query], 1)
    for head in range(2):
        tried = [(float(s[head]), float(z[head])) for s, z in candidates(rows, INPUTS)]
        least = min(error({head: each}, {}, head) for each in tried)  # type: ignore[arg-type]
        assert error(found, {}, head) == pytest.approx(least, rel=1e-5)
    rows = torch.cat([k.transpose(0, 1).flatten(1) for k in key], 1)
    for shared in range(heads):
        readers = [head for head in range(2) if head // (2 // heads) == shared]
        tried = [(float(s[shared]), float(z[shared])) for s, z in candidates(rows, INPUTS)]
        errors = [sum(error(found, {shared: each}, head) for head in readers) for each in tried]
        chosen = {shared: (float(k_scale[shared]), float(k_zero[shared]))}
        assert sum(error(found, chosen, head) for head in readers) == pytest.approx(min(errors), rel=1e-5)


def test_attention_multiplies_codes_of_each_head() -> None:
    """Written out for one block in float64, beside what the model's attention gives."""
    model, batches = tiny_model("vit"), tiny_batches("vit")
    apply(model, AphqVit(bits=8, input_bits=3, **FAST), batches, progress=False)
    assert model.config._attn_implementation == "actkit_rounded_cache"
    attention: Any = model.vit.layers[0].attention
    rounds = attention.attention_rounding.rounds
    heads = model.config.num_attention_heads
    assert all(each.scale.shape == (heads, 1, 1) for each in rounds.values())
    assert not rounds["weights"].zero.any() and rounds["query"].zero.any()
    x = normal(2, 5, model.config.hidden_size)

    def rounded(name: str, value: Tensor) -> Tensor:
        scale, zero = rounds[name].scale.double(), rounds[name].zero.double()
        return (torch.clamp(torch.round(value / scale) + zero, 0, 7) - zero) * scale

    def operand(name: str, made_by: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            flat = made_by(x).double()
        return rounded(name, flat.unflatten(-1, (heads, -1)).transpose(1, 2))

    query, key = operand("query", attention.q_proj), operand("key", attention.k_proj)
    weights = rounded("weights", torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1))
    mixed = (weights @ operand("value", attention.v_proj)).transpose(1, 2).flatten(2)
    seen: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        attention(x)
    torch.testing.assert_close(seen[0].double(), mixed, atol=1e-5, rtol=1e-5)


def test_their_scales_are_learned_too() -> None:
    found = {}
    for steps in (0, 40):
        model = tiny_model("vit")
        settings: dict[str, Any] = {**FAST, "steps": steps, "scale_rate": 1e-2}
        apply(model, AphqVit(bits=3, **settings), tiny_batches("vit"), progress=False)
        rounds: Any = model.vit.layers[0].attention.attention_rounding.rounds
        found[steps] = {name: each.scale for name, each in rounds.items()}
    assert all(bool((found[40][name] != found[0][name]).all()) for name in found[0])


def test_a_block_is_searched_on_what_rounded_attention_leaves() -> None:
    """The second block's grids are those of what the finished first block gives it."""
    model, batches = tiny_model("vit"), tiny_batches("vit", lengths=((1,) * 4,))
    exact = copy.deepcopy(model)
    settings: dict[str, Any] = {**FAST, "steps": 0, "reparametrize": False, "search_rows": 4096}
    apply(model, AphqVit(bits=8, input_bits=3, **settings), batches, progress=False)
    site = anatomy(model).block(1).linear_inputs()[0].site
    rows = record(model, {site: Sample(4096)}, batches, progress=False)[site].rows
    (inputs,) = (each for each in anatomy(exact).block(1).linear_inputs() if each.site == site)
    expected = search(inputs.linears, rows, IntegerGrid(8, -1), INPUTS, rounds=1)
    found = get_module(model, inputs.linears[0].path).inputs
    torch.testing.assert_close(found.scale, expected.scale)
    plain = tiny_model("vit")
    apply(plain, AphqVit(bits=8, input_bits=3, operands=False, **settings), batches, progress=False)
    assert not any("attention_rounding" in name for name, _ in plain.named_modules())
    assert not torch.equal(get_module(plain, inputs.linears[0].path).inputs.scale, found.scale)


def test_blocks_without_attention_say_so() -> None:
    report = apply(tiny_model("mlp"), AphqVit(**FAST, loss="mse"), tiny_batches("mlp"), progress=False).report
    assert any("no attention is described" in str(each) for each in report.skipped)


# -- the norms ---------------------------------------------------------------------------------------------------------


def test_norms_give_all_channels_one_range() -> None:
    """The function stays as it is to 1e-5, and the channels' ranges become one."""
    model = tiny_model("vit")
    batches = tiny_batches("vit", lengths=((1,) * 8,))
    with torch.no_grad():
        model.vit.layers[0].layernorm_before.weight[3] *= 20
        model.vit.layers[0].layernorm_before.bias[5] += 9
        before = model(**batches[0]).logits
    view = anatomy(model)
    block = view.block(0)
    wanted = AphqVit(input_bits=4, search_rows=512).observe(block)
    seen = record(model, wanted, batches, progress=False)
    with torch.no_grad():
        for edit in AphqVit(input_bits=4)._reparametrized(block, seen):
            apply_edit(model, edit)
        torch.testing.assert_close(model(**batches[0]).logits, before, atol=1e-5, rtol=1e-5)
    site = next(iter(wanted))
    rows = record(model, {site: Sample(512)}, batches, progress=False)[site].rows
    low, scale = channel_ranges(rows, 4)
    torch.testing.assert_close(low, low.mean().expand_as(low), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(scale, scale.mean().expand_as(scale), atol=1e-4, rtol=1e-3)


def test_a_channel_takes_the_range_that_errs_least() -> None:
    rows = normal(300, 2) * torch.tensor([1.0, 10.0]) + torch.tensor([0.0, 50.0])
    low, scale = channel_ranges(rows, 3)
    for channel in range(2):
        x = rows[:, channel].double()
        middle, half = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2
        errors = {}
        for t in torch.linspace(0.3, 1, 40).tolist():
            step = 2 * half * t / 7
            codes = torch.clamp(torch.round((x - middle + half * t) / step), 0, 7)
            errors[t] = float((codes * step + middle - half * t - x).square().sum())
        best = min(errors, key=errors.__getitem__)
        assert float(scale[channel]) == pytest.approx(float(2 * half * best / 7), rel=1e-6)
        assert float(low[channel]) == pytest.approx(float(middle - half * best), rel=1e-6)


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["aph", "ph", "brecq", "mse"])
def test_learning_pays_on_what_it_learned_from(importance: str) -> None:
    settings: dict[str, Any] = {"bits": 3, "input_bits": 8, "importance": importance, "keep": 1.0, **FAST}
    batches = tiny_batches("vit", lengths=((1,) * 8,) * 2)
    report = apply(tiny_model("vit"), AphqVit(**{**settings, "steps": 300, "rows": 8}), batches, progress=False).report
    found = [values for _, method, values in report.values if method == "AphqVit"]
    assert len(found) == 2
    for values in found:
        assert values["learned"] < 0.97 * values["nearest"] and 0 < values["flipped"] < 0.5


def test_layers_end_as_integers_with_static_inputs() -> None:
    model = tiny_model("vit")
    apply(model, AphqVit(bits=3, **FAST), tiny_batches("vit"), progress=False)
    layers = [get_module(model, x.path) for block in anatomy(model).blocks for x in block.linears()]
    assert len(layers) == 12 and all(each.storage.grid.bits == 3 and each.inputs.grid.bits == 4 for each in layers)
    assert all(each.inputs.scale.shape == (1,) for each in layers)
    query, key = layers[0].inputs, layers[1].inputs  # which read one tensor
    assert torch.equal(query.scale, key.scale) and torch.equal(query.zero, key.zero)


def test_importance_of_the_changed_model_is_planned_behind_the_mlps() -> None:
    model, batches = tiny_model("vit", hidden_act="gelu"), tiny_batches("vit")
    recipe = [ReconstructMlp(steps=2), AphqVit(**FAST)]
    apply(model, recipe, batches, progress=False)
    assert model.config.hidden_act == "relu"
    for block in anatomy(model).blocks:
        down = get_module(model, block.mlp.down.path)
        assert float(down.inputs.zero) == 0  # what ReLU gives needs no zero point


def test_behind_the_mlps_it_is_saved_loaded_elsewhere_and_undone(tmp_path: Path) -> None:
    model, batches = tiny_model("vit", hidden_act="gelu"), tiny_batches("vit")
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        exact = model(**batches[0]).logits
    applied = apply(model, [ReconstructMlp(steps=2), AphqVit(**FAST)], batches, progress=False)
    with torch.no_grad():
        rounded = model(**batches[0]).logits
    assert not torch.equal(rounded, exact)
    save(model, tmp_path / "stack")
    with FreshProcess() as process:
        process.load(tmp_path / "stack")
        assert torch.equal(process.outputs(batches[0]), rounded)
    applied.undo()
    assert model.config.hidden_act == "gelu"
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], each) for name, each in before.items())
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, exact)


def test_without_steps_it_is_the_search_alone() -> None:
    one, other = (tiny_model("vit") for _ in range(2))
    settings = {**FAST, "steps": 0}
    apply(one, AphqVit(**settings), tiny_batches("vit"), progress=False)
    apply(other, AphqVit(**settings, importance="mse", seed=0), tiny_batches("vit"), progress=False)
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_an_importance_of_zero_counts_all_alike() -> None:
    model = tiny_model("vit")
    with torch.no_grad():
        model.classifier.weight.zero_()
    notes = apply(model, AphqVit(**FAST), tiny_batches("vit"), progress=False).report.notes
    assert sum("its importance is 0 everywhere" in note for note in notes) == 2


def test_same_settings_same_codes() -> None:
    found = []
    for seed, _ in product((0, 1), (0, 1)):
        model = tiny_model("vit")
        apply(model, AphqVit(bits=3, **{**FAST, "steps": 40}, seed=seed), tiny_batches("vit"), progress=False)
        found.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0].values(), found[2].values(), strict=True))


@pytest.mark.parametrize("kind", architectures(["vit", "bert", "mlp", "llama", "mixtral", "gpt2"]))
def test_it_keeps_its_promises(kind: str) -> None:
    loss = "mse" if kind in ("mlp",) else "kl"
    transform = AphqVit(**{**FAST, "steps": 2}, loss=loss, mode="hvp")
    check_transform(
        transform, tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(), Wina(), RoundInputs()]
    )


def test_passes_go_by_rows_not_by_tokens() -> None:
    """A step of 8 of 40 rows is a fifth of a pass, forward and back at twice its cost; images have one token each."""
    method = AphqVit(steps=50, rows=8)
    assert method.passes(40 * 256, 40) == method.passes(40, 40) == 4 + 3 * 50 / 5
    assert AphqVit(steps=50, rows=8).passes(512, 2) == 4 + 3 * 50  # a step has no more rows than there are
    assert ReconstructMlp(steps=50, rows=8).passes(40 * 256, 40) == 2 + 3 * 50 / 5
