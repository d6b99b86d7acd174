"""PanGu-pi's parts: nothing changes when they go in; diversity and bounds against projections, SVDs and plain sums."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actkit.core.ground.errors import DataError, RecipeError
from actkit.core.layers.activations import Activation
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.functions.pangu_pi.add_nonlinearity import AddNonlinearity, without_nonlinearity
from actkit.functions.pangu_pi.collapse import attention_factor, collapse_bound, lipschitz_of, spread_of
from actkit.functions.pangu_pi.diversity import distance, diversity
from actkit.functions.pangu_pi.series import SeriesActivation
from actkit.functions.pangu_pi.shortcut import AugmentedAttention, AugmentedResidual, AugmentedShortcut
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_transform, tiny_batches, tiny_model

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def noisy(model: nn.Module) -> nn.Module:
    """As if the added parts had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SeriesActivation | AugmentedShortcut):
                for parameter in module.parameters(recurse=True):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# -- series and shortcut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["silu", "gelu", "tanh", "gelu_tanh"])
def test_the_start_is_the_function_to_the_bit(name: str, dtype: torch.dtype):
    for terms in (1, 2, 4):
        series = SeriesActivation(name, terms, channels=6)
        torch.testing.assert_close(series(X.to(dtype)), Activation(name)(X.to(dtype)), rtol=0, atol=0)


def test_a_series_is_the_sum_written_out():
    series = noisy(nn.Sequential(SeriesActivation("silu", 3, channels=6)))[0]
    expected = sum(torch.nn.functional.silu(series.scale[i] * X + series.shift[i]) for i in range(3))
    torch.testing.assert_close(series(X), expected)
    torch.manual_seed(0)
    mean = SeriesActivation("silu", 3, start="paper", normalize=True)
    expected = sum(torch.nn.functional.silu(a * X) for a in mean.scale) / 3
    torch.testing.assert_close(mean(X), expected)
    assert float((mean.scale - 1).detach().abs().max()) < 0.1


def test_terms_at_0_learn():
    series = SeriesActivation("silu", 2, channels=6)
    series(X).sum().backward()
    torch.testing.assert_close(series.scale.grad[1], X.sum(0) / 2)  # silu'(0) = 1/2


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SeriesActivation("silu", 0), "terms: 0 was given"),
        (lambda: SeriesActivation("silu", channels=0), "channels: 0 was given"),
        (lambda: SeriesActivation("silu", start="zero"), "start: 'zero' was given"),
        (lambda: SeriesActivation("silu", normalize=True), "'paper', also with normalize=True"),
        (lambda: SeriesActivation("relu"), "the slope 0 at 0"),
        (lambda: SeriesActivation("sigmoid"), "gives 0.5 for 0"),
        (lambda: SeriesActivation(nn.Softmax(-1)), "a Softmax mixes channels"),
        (lambda: AugmentedShortcut(8, ratio=9), "ratio: 9 was given for 8 features"),
        (lambda: AugmentedShortcut(8, ratio=2, paths=0), "paths: 0 was given"),
        (lambda: AddNonlinearity(series=0), "series"),
    ],
)
def test_errors(make: Any, text: str):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_relu_takes_the_paper_s_start():
    assert SeriesActivation("relu", start="paper")(X).shape == X.shape


def test_a_shortcut_begins_at_0_and_is_a_small_mlp():
    zero, drawn = AugmentedShortcut(6, ratio=2, paths=2), AugmentedShortcut(6, ratio=2, paths=2, zero=False)
    assert not zero(X).any()
    expected = sum(
        torch.nn.functional.gelu(X @ down.weight.t()) @ up.weight.t() for down, up in zip(drawn.down, drawn.up)
    )
    torch.testing.assert_close(drawn(X), expected)
    assert sum(p.numel() for p in drawn.parameters()) == 2 * 2 * 6 * 3


# -- in models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "vit", "gemma3_text", "falcon"])
def test_insertion_changes_no_output(kind: str):
    model, batch = tiny_model(kind), tiny_batches(kind)[0]
    expected = tiny_model(kind)(**batch)[0]
    before = sum(p.numel() for p in model.parameters())
    applied = apply(model, AddNonlinearity(ratio=4), progress=False)
    torch.testing.assert_close(model(**batch)[0], expected, rtol=0, atol=0)
    assert len(applied.edits) == 4
    added = sum(p.numel() for p in model.parameters()) - before
    assert added == 2 * (2 * 2 * 24 + 2 * 16 * 4)  # two blocks: 2 terms, a and b, of 24 units; 16 -> 4 -> 16
    noisy(model)
    assert not torch.equal(model(**batch)[0], expected)


def test_the_shortcut_reads_the_norm_and_goes_to_the_residual():
    model, batch = tiny_model("llama", num_hidden_layers=1), tiny_batches("llama")[0]
    apply(model, AddNonlinearity(series=1, ratio=4), progress=False)
    noisy(model)
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda m, a, o: seen.update(x=a[0], normed=o))
    layer.post_attention_layernorm.register_forward_hook(lambda m, a, o: seen.update(sum=a[0]))
    layer.self_attn.inner.register_forward_hook(lambda m, a, o: seen.update(attention=o[0]))
    model(**batch)
    expected = seen["x"] + seen["attention"] + layer.self_attn.shortcut(seen["normed"])
    torch.testing.assert_close(seen["sum"], expected)
    assert isinstance(layer.self_attn, AugmentedAttention)


def test_in_bert_the_shortcut_goes_to_the_residual_inside_of_the_attention():
    model, batch = tiny_model("bert", num_hidden_layers=1), tiny_batches("bert")[0]
    apply(model, AddNonlinearity(series=1, ratio=4), progress=False)
    noisy(model)
    output = model.bert.encoder.layer[0].attention.output
    assert isinstance(output, AugmentedResidual)
    seen: dict[str, Tensor] = {}
    output.inner.LayerNorm.register_forward_hook(lambda m, a, o: seen.update(sum=a[0]))
    output.inner.dense.register_forward_hook(lambda m, a, o: seen.update(attention=o))
    output.register_forward_hook(lambda m, a, o: seen.update(x=a[1]))
    model(**batch)
    torch.testing.assert_close(seen["sum"], seen["attention"] + seen["x"] + output.shortcut(seen["x"]))


def test_tokens_see_no_later_tokens_and_the_cache_works():
    model = noisy(apply(tiny_model("llama"), AddNonlinearity(ratio=4), progress=False).model)
    ids = torch.randint(3, 40, (1, 8), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 5:] = 7
    whole = model(ids).logits
    torch.testing.assert_close(model(other).logits[:, :5], whole[:, :5])
    cached = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=cached.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 5:])


def test_the_anatomy_is_as_before():
    model = tiny_model("llama")
    before = anatomy(model).block(0)
    apply(model, AddNonlinearity(ratio=4), progress=False)
    after = anatomy(model).block(0)
    assert after.mlp.path == before.mlp.path and after.attention.heads == before.attention.heads
    assert after.attention.path == f"{before.attention.path}.inner"
    assert before.attention.norm is not None and after.attention.norm is None  # the shortcut reads the norm too


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_add_nonlinearity_passes(kind: str):
    checks = check_transform(AddNonlinearity(ratio=4), tiny_model(kind), tiny_batches(kind))
    found = {check.name: check.outcome for check in checks}
    held = {name for name, outcome in found.items() if outcome == "holds"}
    assert {"the same result twice", "exact means exact", "save and load", "undo is exact"} <= held
    assert "the identity setting changes nothing" in held


def test_rounding_on_top_is_saved_and_loaded(tmp_path: Path):
    model = noisy(apply(tiny_model("llama"), AddNonlinearity(ratio=4), progress=False).model)
    apply(model, RoundToNearest(bits=8, group_size=8), progress=False)
    checkpoint.save(model, tmp_path / "folder")
    batch = tiny_batches("llama")[0]
    loaded = checkpoint.load(tmp_path / "folder")
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_what_cannot_take_a_series_is_left_with_the_reason():
    applied = apply(tiny_model("llama", hidden_act="relu"), AddNonlinearity(ratio=4), progress=False)
    assert any("the slope 0 at 0" in reason for _, _, reason in applied.report.skipped)
    with pytest.raises(RecipeError, match=r"ratio: 17 was given, and .* reads 16 channels"):
        apply(tiny_model("llama"), AddNonlinearity(ratio=17), progress=False)


def test_parts_are_switched_off_for_a_while():
    model, batch = tiny_model("llama"), tiny_batches("llama")[0]
    expected = model(**batch).logits
    apply(model, AddNonlinearity(ratio=4), progress=False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SeriesActivation):
                module.scale[1] += 0.3
            if isinstance(module, AugmentedShortcut):
                module.up[0].weight += 0.1
    changed = model(**batch).logits
    with without_nonlinearity(model) as ablated:
        torch.testing.assert_close(ablated(**batch).logits, expected)
    with without_nonlinearity(model, series=False) as ablated:
        assert not torch.allclose(ablated(**batch).logits, expected)
    torch.testing.assert_close(model(**batch).logits, changed, rtol=0, atol=0)
    with pytest.raises(DataError, match="has nothing to switch off"):
        with without_nonlinearity(tiny_model("llama")):
            pass


# -- diversity ---------------------------------------------------------------------------------------------------------


def test_distance_is_that_of_a_projection():
    hidden = torch.randn(3, 7, 5, dtype=torch.float64)
    projection = torch.eye(7, dtype=torch.float64) - torch.ones(7, 7, dtype=torch.float64) / 7
    expected = [float(torch.linalg.matrix_norm(projection @ each)) for each in hidden]
    torch.testing.assert_close(distance(hidden), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    best = hidden[0].mean(0, keepdim=True)  # no other row is nearer
    for other in (best + 0.01, best - 0.01):
        assert float((hidden[0] - other).norm()) > float(distance(hidden[0]))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_diversity_against_hidden_states(kind: str):
    """Against transformers' own hidden states, sequence by sequence, in float64."""
    model, batches = tiny_model(kind), tiny_batches(kind, lengths=((9, 6), (7, 7)))
    found = diversity(model, batches, progress=False)
    states: list[list[Tensor]] = [[], []]
    for batch in batches:
        hidden = model(**batch, output_hidden_states=True).hidden_states[:2]  # the last one is behind a norm
        for at in range(2):
            for row, mask in zip(hidden[at], batch["attention_mask"], strict=True):
                states[at].append(row[mask != 0][1:].detach().double())
    for at, place in enumerate((found.at(0, "input"), found.at(0))):
        shares = [torch.linalg.matrix_norm(h - h.mean(0)) / torch.linalg.matrix_norm(h) for h in states[at]]
        assert place.diversity == pytest.approx(float(sum(shares)) / len(shares), rel=1e-6)
        cosines = []
        for h in states[at]:
            likeness = torch.nn.functional.cosine_similarity(h[:, None], h[None], dim=-1)
            cosines.append(float((likeness.sum() - len(h)) / (len(h) * (len(h) - 1))))
        assert place.likeness == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
        together = torch.cat(states[at])
        variances = torch.linalg.svdvals(together - together.mean(0)).square()
        dimension = int((variances.cumsum(0) / variances.sum() < 0.8).sum()) + 1
        assert place.dimension == dimension
    assert [(each.block, each.after) for each in found.places] == [
        (-1, "input"), (0, "attention"), (0, "block"), (1, "attention"), (1, "block"),
    ]  # fmt: skip
    assert found.tokens == sum(map(len, states[0])) and found.at(-1).block == 1


def test_equal_tokens_have_no_diversity():
    model = tiny_model("llama")
    ids = torch.full((1, 6), 5)
    found = diversity(model, [{"input_ids": ids}], progress=False).at(0, "input")
    assert found.diversity == pytest.approx(0, abs=1e-6) and found.likeness == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "batches", "text"),
    [
        ({"share": 0}, None, "share: 0 was given"),
        ({"skip": -1}, None, "skip: -1 was given"),
        ({}, [], "batches: 0 were given"),
        ({}, [{"input_ids": torch.tensor([[5, 6]])}], "a sequence of 2 tokens was given, of which 1 are left"),
    ],
)
def test_errors_of_diversity(settings: Any, batches: Any, text: str):
    batches = tiny_batches("llama") if batches is None else batches
    with pytest.raises(ValueError, match=text):
        diversity(tiny_model("llama"), batches, **settings, progress=False)
    with pytest.raises(DataError, match=r"blocks of this .* are not known"):
        diversity(tiny_model("mlp"), tiny_batches("mlp"), progress=False)


# -- the bound ---------------------------------------------------------------------------------------------------------


def test_no_attention_exceeds_its_factor():
    """Random attentions of several heads, without norms, in float64; also with residual and shortcut."""
    torch.manual_seed(0)
    for _ in range(20):
        heads, n, d = 4, 9, 8
        weights = (3 * torch.randn(heads, n, n, dtype=torch.float64)).softmax(-1)
        values = torch.randn(heads, d // heads, d, dtype=torch.float64)
        output = torch.randn(d, d, dtype=torch.float64)
        x = torch.randn(n, d, dtype=torch.float64)
        mixed = torch.cat([a @ x @ v.t() for a, v in zip(weights, values)], -1) @ output.t()
        factor = attention_factor(weights, values, output)
        assert float(distance(mixed)) <= factor * float(distance(x)) * (1 + 1e-12)
        assert float(distance(x + mixed)) <= (factor + 1) * float(distance(x)) * (1 + 1e-12)


def test_lambda_is_an_eigenvalue():
    weights = torch.randn(2, 6, 6, dtype=torch.float64).softmax(-1)
    centre = torch.eye(6, dtype=torch.float64) - 1 / 6
    expected = max(float(torch.linalg.eigvalsh(a.t() @ centre @ a).max()) for a in weights)
    assert spread_of(weights) == pytest.approx(expected, rel=1e-12)
    assert spread_of(torch.full((1, 4, 4), 0.25)) == pytest.approx(0, abs=1e-12)  # all tokens become equal at once


def test_factors_of_a_model():
    model = tiny_model("llama", attn_implementation="eager")
    model.set_attn_implementation("eager")
    batch = {"input_ids": torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))}
    plain = collapse_bound(model, batch)
    weights = model(**batch, output_attentions=True).attentions
    for block, layer, attention in zip(plain.blocks, model.model.layers, weights, strict=True):
        heads = layer.self_attn.v_proj.weight.view(2, 4, 16)
        values = heads.repeat_interleave(2, 0).double()
        expected = attention_factor(attention, values, layer.self_attn.o_proj.weight.double())
        assert block.attention == pytest.approx(expected, rel=1e-6) and block.augmented == block.residual
    apply(model, AddNonlinearity(ratio=4), progress=False)
    assert collapse_bound(model, batch).blocks[0].augmented == plain.blocks[0].residual  # zeros add nothing
    noisy(model)
    assert collapse_bound(model, batch).blocks[0].augmented > plain.blocks[0].residual


def test_factors_of_mlps():
    model = tiny_model("gpt2", attn_implementation="eager")
    model.set_attn_implementation("eager")
    batch = {"input_ids": torch.randint(3, 40, (1, 7), generator=torch.Generator().manual_seed(0))}
    found = collapse_bound(copy.deepcopy(model), batch).blocks[0].mlp
    mlp = model.transformer.h[0].mlp
    norms = [float(torch.linalg.matrix_norm(layer.weight.double(), 2)) for layer in (mlp.c_fc, mlp.c_proj)]
    assert found == pytest.approx(lipschitz_of(Activation("gelu_tanh")) * math.prod(norms), rel=1e-6)
    x = torch.randn(5, 16)
    assert float(distance(mlp(x)).detach()) <= found * float(distance(x))
    assert lipschitz_of(Activation("relu")) == 1 and lipschitz_of(Activation("silu")) == pytest.approx(1.0998, abs=1e-4)


def test_the_bound_needs_attention_weights_and_no_padding():
    with pytest.raises(ValueError, match="set_attn_implementation"):
        collapse_bound(tiny_model("llama"), {"input_ids": torch.full((1, 4), 5)})
    model = tiny_model("llama")
    padded = {"input_ids": torch.full((2, 4), 5), "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}
    with pytest.raises(DataError, match="it has padding"):
        collapse_bound(model, padded)
