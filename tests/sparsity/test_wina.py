"""WINA against brute force, its theorem, its invariance, and the release's rule for which matrices get norms."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import RecipeError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold, TopK
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Linear, anatomy
from actkit.core.recipe.runner import apply
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.wina import Wina, column_norms
from actkit.testing import tiny_batches, tiny_model

ORDINARY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def orthogonal_columns(out: int, width: int, seed: int = 0) -> Tensor:
    """A float64 weight [out, width] with orthogonal columns of log-normal norms."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(out, width, generator=generator, dtype=torch.float64))
    return basis * torch.randn(width, generator=generator, dtype=torch.float64).exp()


def handle(weight: Tensor) -> Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight.float())
    return Linear("layer", "layer", module)


def masks(x: Tensor, k: int, score: Tensor | None) -> Tensor:
    return TopK(k, score).mask(x)


# -- the theorem -------------------------------------------------------------------------------------------------------


def test_orthogonal_columns_make_it_the_best_of_all_masks() -> None:
    """Brute force over all masks of each size, in = 12, for every one of 20 tokens."""
    weight = orthogonal_columns(16, 12)
    score = column_norms([handle(weight)])
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for k in (2, 6, 9):
        kept = torch.tensor(list(combinations(range(12), k)))
        every = torch.zeros(len(kept), 12, dtype=torch.float64).scatter_(1, kept, 1.0)
        errors = ((x[:, None] * (1 - every)) @ weight.T).square().sum(-1)  # [tokens, masks]
        mine = ((x * ~masks(x.float(), k, score)) @ weight.T).square().sum(-1)
        torch.testing.assert_close(mine, errors.min(1).values, rtol=1e-9, atol=1e-15)


def test_it_never_loses_to_magnitude_on_orthogonal_columns() -> None:
    weight = orthogonal_columns(64, 48, seed=2)
    score = column_norms([handle(weight)])
    x = torch.randn(500, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for k in (16, 24, 36):
        mine = ((x * ~masks(x.float(), k, score)) @ weight.T).norm(dim=-1)
        teal = ((x * ~masks(x.float(), k, None)) @ weight.T).norm(dim=-1)
        assert (mine <= teal * (1 + 1e-6)).all()
        assert (mine < teal).float().mean() > 0.9


def test_rescaling_an_input_against_its_column_changes_no_mask() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(32, 24, generator=generator), torch.randn(100, 24, generator=generator)
    scale = 2.0 ** torch.randint(-6, 7, (24,), generator=generator)  # powers of two: no rounding
    before = masks(x, 12, column_norms([handle(weight)]))
    after = masks(x / scale, 12, column_norms([handle(weight * scale)]))
    assert torch.equal(before, after)
    assert not torch.equal(masks(x, 12, None), masks(x / scale, 12, None))


def test_column_norms_are_those_of_the_stacked_matrices() -> None:
    weights = [torch.randn(out, 24, dtype=torch.float64) for out in (16, 8, 8)]
    expected = torch.cat(weights).norm(dim=0)
    torch.testing.assert_close(column_norms([handle(w) for w in weights]).double(), expected, rtol=1e-6, atol=0)
    zero = torch.randn(8, 4)
    zero[:, 2] = 0
    assert not TopK(3, column_norms([handle(zero)])).mask(torch.full((1, 4), 9.0))[0, 2]


# -- what it puts into a model -----------------------------------------------------------------------------------------


def test_joint_norms_share_one_mask_and_each_has_its_own() -> None:
    for norms in ("joint", "each"):
        original, model = tiny_model("llama"), tiny_model("llama")
        apply(model, Wina(norms=norms), tiny_batches("llama"), progress=False)
        attention, block = model.model.layers[0].self_attn, original.model.layers[0].self_attn
        weights = [block.get_submodule(n).weight.detach() for n in ORDINARY[:3]]
        for name, weight in zip(ORDINARY[:3], weights, strict=True):
            select = attention.get_submodule(name).select
            expected = (torch.cat(weights) if norms == "joint" else weight).norm(dim=0)
            torch.testing.assert_close(select.score, expected)
        thresholds = {float(attention.get_submodule(n).select.threshold) for n in ORDINARY[:3]}
        assert len(thresholds) == (1 if norms == "joint" else 3)


def test_release_norms_go_to_key_and_gate_only() -> None:
    model = tiny_model("llama")
    apply(model, Wina(norms="release"), tiny_batches("llama"), progress=False)
    weighted = {n for n, m in model.named_modules() if isinstance(m, ActLinear) and m.select.score is not None}
    assert weighted == {f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.k_proj", "mlp.gate_proj")}


def test_thresholds_are_quantiles_of_the_scores() -> None:
    original, model = tiny_model("llama"), tiny_model("llama")
    batches = tiny_batches("llama", lengths=((30, 11, 25), (28, 9)))
    apply(model, Wina(sparsity=0.65), batches, progress=False)
    found: list[Tensor] = []
    down = original.model.layers[0].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            original(**batch)
    hook.remove()
    real = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(found, batches, strict=True)])
    expected = torch.quantile(real.abs() * down.weight.norm(dim=0), 0.65)
    select = model.model.layers[0].mlp.down_proj.select
    assert isinstance(select, Threshold)
    assert float(select.threshold) == pytest.approx(float(expected), rel=1 / 512 + 0.01)


def test_greedy_with_one_mask_per_matrix_meets_the_target() -> None:
    model = tiny_model("llama")
    settings = Wina(norms="each", allocation="greedy", mode="top_k", step=0.2)
    notes = apply(model, settings, tiny_batches("llama"), progress=False).report.notes
    assert "query" in notes[0] and "key" in notes[0] and "up" in notes[0]
    layers = [m for n, m in model.named_modules() if isinstance(m, ActLinear) and ".0." in n]
    dropped = sum((1 - m.select.k / m.in_features) * m.storage.tensor.numel() for m in layers)
    kept_at_most = 1 / min(m.in_features for m in layers)  # k is rounded down
    share = dropped / sum(m.storage.tensor.numel() for m in layers)
    assert 0.5 - 1e-6 <= share <= 0.5 + kept_at_most


# -- the stack over a quantizer ----------------------------------------------------------------------------------------


def test_over_awq_it_is_one_layer_that_computes_what_is_computed_by_hand() -> None:
    model = tiny_model("llama")
    batches = tiny_batches("llama")
    quantized = tiny_model("llama")
    apply(quantized, Awq(bits=4, group_size=8, n_grid=4), batches, progress=False)
    apply(model, [Awq(bits=4, group_size=8, n_grid=4), Wina(sparsity=0.5)], batches, progress=False)
    x = torch.randn(6, 16)
    for index in (0, 1):
        joint = [quantized.get_submodule(f"model.layers.{index}.self_attn.{n}").dequantized() for n in ORDINARY[:3]]
        score = torch.cat(joint).norm(dim=0)
        for name, weight in zip(ORDINARY[:3], joint, strict=True):
            layer = model.get_submodule(f"model.layers.{index}.self_attn.{name}")
            assert isinstance(layer, ActLinear) and isinstance(layer.storage, IntegerWeight)
            assert not any(isinstance(child, ActLinear) for child in layer.children())
            keep = x.abs() * score > layer.select.threshold
            torch.testing.assert_close(layer(x), (x * keep) @ weight.T, rtol=1e-5, atol=1e-6)
            assert torch.equal(layer.dequantized(), weight)
    assert sum(isinstance(m, ActLinear) for m in model.modules()) == 2 * len(ORDINARY)


def test_a_quantizer_that_moves_scales_may_not_follow() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    with pytest.raises(RecipeError, match=r"Awq cannot follow Wina: it rescales the inputs"):
        apply(model, [Wina(), Awq(group_size=8)], batches, progress=False)
    with pytest.raises(RecipeError, match=r"Wina cannot follow Teal: both fill the select slot"):
        apply(model, [Teal(), Wina()], batches, progress=False)
    apply(
        model, [Wina(), RoundToNearest(group_size=8, scale_dtype="float32")], batches, progress=False
    )  # it moves none
    layer = model.model.layers[0].mlp.up_proj
    plain = tiny_model("llama").model.layers[0].mlp.up_proj.weight.detach()
    torch.testing.assert_close(layer.dequantized(), IntegerGrid(4, 8).fake(plain))
    assert isinstance(layer.select, Threshold)


def test_every_linear_of_other_families_is_reached() -> None:
    for kind in ("bert", "vit", "gpt2", "mixtral"):
        model = tiny_model(kind)
        count = sum(len(block.linears()) for block in anatomy(tiny_model(kind)).blocks)
        apply(model, Wina(), tiny_batches(kind, lengths=((20, 20, 20),) * 3), progress=False)
        changed = sum(isinstance(m, ActLinear) for m in model.modules())
        assert changed == (count if kind != "mixtral" else count + 2 * 4 * 3), kind  # experts are seen once opened
