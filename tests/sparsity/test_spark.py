"""Spark's layers against formulas written out in NumPy, SDPA and transformers; models of them, saved, read, changed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import actkit
from actkit.core.ground.errors import RecipeError
from actkit.core.layers.activations import Activation
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.model.equalization import equalization_sets
from actkit.core.recipe.runner import apply
from actkit.core.train.training import train
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Quantiles
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.spark.spark_attention import SparkAttention
from actkit.sparsity.spark.sparkify import SparkFFN, Sparkify, spark_lm
from actkit.sparsity.spark.statistical_top_k import StatisticalTopK, statistical_topk
from actkit.sparsity.teal import Teal
from actkit.testing import check_transform, tiny_batches, tiny_model

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def _model(**settings) -> nn.Module:
    torch.manual_seed(0)
    model = spark_lm(LlamaConfig(**SIZES), **{"density": 0.25, "attended": 3, **settings}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)  # so that logits are not all alike
    return model


def _tokens(*lengths: int) -> dict[str, Tensor]:
    """Padded on the left."""
    ids = torch.randint(2, 40, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


# -- the MLP -----------------------------------------------------------------------------------------------------------


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_the_mlp_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = SparkFFN(12, 40, 5, 4)
    x = torch.randn(2, 3, 12)
    gate, up, down = (
        each.weight.detach().double().numpy() for each in (layer.gate_proj, layer.up_proj, layer.down_proj)
    )
    given = x.double().numpy()
    before = given[..., :4] @ gate.T
    theta = (
        before.mean(-1, keepdims=True) + before.std(-1, keepdims=True) * 1.1503493803760083
    )  # quantile of 1 - 5 / 40
    expected = (_gelu(np.maximum(before - theta, 0)) * (given[..., 4:] @ up.T)) @ down.T
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_match_gated_has_as_many_weights() -> None:
    with torch.device("meta"):
        layer = SparkFFN.match_gated(2304, 9216)
        assert (layer.d_ff, layer.k, layer.r) == (13824, 1106, 1152)
        assert sum(parameter.numel() for parameter in layer.parameters()) == 3 * 2304 * 9216 == 63_700_992
        assert SparkFFN.match_gated(2304, 9216, r=1024).gate_proj.in_features == 1024
        small = SparkFFN.match_gated(128, 384, 0.1)
        assert (small.d_ff, small.k, small.r) == (576, 58, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_reads_active_neurons_and_computes_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = SparkFFN(96, 320, 26, 48).to(dtype).eval()
    packed = layer.pack()
    for x in torch.randn(5, 96).to(dtype):
        with torch.no_grad():
            expected = layer(x.float() if dtype == torch.float32 else x).float()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(packed.decode(x).float(), expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"x: shape \(1, 96\) was given; give one token, \[96\]"):
        packed.decode(torch.randn(1, 96))
    layer.up_proj = ActLinear.of(layer.up_proj)
    with pytest.raises(ValueError, match="up_proj: a ActLinear stands here"):
        layer.pack()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r: 0 was given; it must lie between 0 and d_model = 8"),
        ({"r": 8}, "r: 8 was given"),
        ({"k": 0}, "k: 0 was given; it must lie between 0 and d_ff = 20"),
        ({"k": 20}, "k: 20 was given"),
        ({"act": "sigmoid"}, "Activation does not map 0 to 0"),
        ({"act": "swish"}, "activation: 'swish' was given, allowed are"),
    ],
)
def test_bad_sizes_of_the_mlp(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparkFFN(**{"d_model": 8, "d_ff": 20, "k": 3, "r": 4, **arguments})
    with pytest.raises(ValueError, match=r"density: 8 was given; it is a share"):
        SparkFFN.match_gated(8, 20, density=8)


# -- attention ---------------------------------------------------------------------------------------------------------


def _attention(**changes) -> SparkAttention:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "heads": 4, "head_dim": 8, "r": 4, "k": 3, "key_value_heads": 2, **changes}
    return SparkAttention(**sizes).double()


def test_attention_is_its_formula_query_by_query() -> None:
    layer = _attention()
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    with torch.no_grad():
        found, weights = layer(x)
        q, k, v = (p(x)[0].view(11, -1, 8).numpy() for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    expected = np.zeros((11, 4, 8))
    for t in range(11):
        for head in range(4):
            keys, values = k[: t + 1, head // 2], v[: t + 1, head // 2]
            scores = keys[:, :4] @ q[t, head, :4] / 2
            if t + 1 > 3:
                theta = _theta(scores, 3)
                scores = np.where(scores > theta, scores, -np.inf)
            chosen = np.exp(scores - scores.max())
            gains = np.log1p(np.exp(keys[:, 4:] @ q[t, head, 4:] / 2))
            row = chosen / chosen.sum() * gains
            np.testing.assert_allclose(weights[0, head, t, : t + 1].numpy(), row, rtol=1e-5, atol=1e-9)
            expected[t, head] = row @ values
    with torch.no_grad():
        torch.testing.assert_close(
            found[0], layer.o_proj(torch.from_numpy(expected.reshape(11, 32))), rtol=1e-5, atol=1e-7
        )
    assert not weights.triu(1).any()


def _theta(scores: np.ndarray, k: int) -> float:
    from scipy.stats import norm

    return scores.mean() + scores.std() * norm.ppf(1 - k / len(scores))


def test_with_all_keys_and_equal_gains_it_is_ordinary_attention() -> None:
    layer = _attention(k=100)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        layer.q_proj.weight.unflatten(0, (4, 8))[:, 4:] = 0  # every key weighs softplus(0)
        found, _ = layer(x)
        q, k, v = (p(x).view(2, 9, -1, 8).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        ordinary = F.scaled_dot_product_attention(q[..., :4], k[..., :4], v, is_causal=True, enable_gqa=True)
        expected = layer.o_proj(ordinary.transpose(1, 2).flatten(2)) * math.log(2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_each_part_is_rotated_as_a_head_of_its_width() -> None:
    layer = _attention(head_dim=16, r=8).float()
    tables = [LlamaRotaryEmbedding(LlamaConfig(hidden_size=w * 4, num_attention_heads=4, head_dim=w)) for w in (16, 8)]
    positions = torch.arange(7)[None]
    x = torch.randn(2, 3, 7, 16)
    found = layer._rotated(x, tables[0](x, positions))
    narrow = tables[1](x, positions)
    for part in (slice(0, 8), slice(8, 16)):
        torch.testing.assert_close(found[..., part], apply_rotary_pos_emb(x[..., part], x[..., part], *narrow)[0])
    uneven = _attention(head_dim=16, r=4).float()  # no table of that width inside: norms are kept, planes are whole
    turned = uneven._rotated(x, tables[0](x, positions))
    planes = turned[..., 4:].unflatten(-1, (2, 6)).norm(dim=-2)
    torch.testing.assert_close(planes, x[..., 4:].unflatten(-1, (2, 6)).norm(dim=-2))


def test_all_forms_of_a_mask_agree_and_padding_is_never_attended() -> None:
    layer = _attention()
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    padding = torch.ones(2, 8, dtype=torch.long)
    padding[1, :3] = 0
    visible = torch.ones(8, 8).tril().bool() & padding.bool()[:, None, None]
    additive = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    with torch.no_grad():
        expected, weights = layer(x, attention_mask=visible)
        for mask in (additive, padding):
            torch.testing.assert_close(layer(x, attention_mask=mask)[0], expected)
        torch.testing.assert_close(layer(x)[0][0], expected[0])
        torch.testing.assert_close(layer(x[1:, 3:])[0][0], expected[1, 3:])
    assert not weights[1, :, 3:, :3].any() and torch.isfinite(expected).all()
    with pytest.raises(ValueError, match="attention_mask: a str was given"):
        layer(x, attention_mask="causal")


def test_no_query_sees_the_future_where_no_score_exceeds_the_threshold() -> None:
    layer = _attention(heads=1, key_value_heads=1)
    query, key = torch.zeros(1, 1, 12, 8, dtype=torch.float64), torch.zeros(1, 1, 12, 8, dtype=torch.float64)
    query[..., 0], key[..., 0] = 1.0, torch.arange(12) * 0.01
    key[0, 0, 0, 0] = -100.0  # lifts the threshold of every later query above its largest score
    weights = layer.weights(query, key, torch.ones(12, 12).tril().bool()[None, None])
    assert not weights.triu(1).any()
    assert weights[0, 0, 11].nonzero().tolist() == [[11]]


def test_a_cache_changes_nothing_and_holds_both_parts_as_views() -> None:
    layer = _attention()
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    cache = DynamicCache()
    with torch.no_grad():
        expected, _ = layer(x)
        found = [layer(x[:, :6], past_key_values=cache)[0]]
        found += [layer(x[:, t : t + 1], past_key_values=cache)[0] for t in range(6, 10)]
    torch.testing.assert_close(torch.cat(found, 1), expected)
    keys = cache.layers[0].keys
    parts = layer.split(keys)
    assert (parts.chooses.shape[-1], parts.weighs.shape[-1]) == (4, 4)
    assert parts.weighs.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 3}, "r: 3 was given with head_dim 8; both must be even"),
        ({"r": 8}, "r: 8 was given"),
        ({"k": 0}, "k: 0 was given; it is a number of keys"),
        ({"key_value_heads": 3}, "key_value_heads: 3 was given; it must divide the 4 heads"),
    ],
)
def test_bad_sizes_of_attention(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _attention(**arguments)


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_model_has_as_many_weights_is_saved_loaded_and_generates(tmp_path: Path) -> None:
    model, batch = _model(), _tokens(12, 7)
    ordinary = _model(density=None, attended=None)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ordinary.parameters())
    assert type(ordinary).__name__ == "LlamaForCausalLM"
    assert model.config.hidden_act == "gelu_pytorch_tanh" and ordinary.config.hidden_act == "silu"
    with torch.no_grad():
        expected = model(**batch).logits
    actkit.save(model, tmp_path / "spark")
    loaded = actkit.load(tmp_path / "spark")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)
        eager = loaded.set_attn_implementation("eager") or loaded(**batch).logits
    torch.testing.assert_close(eager[batch["attention_mask"].bool()], expected[batch["attention_mask"].bool()])
    generated = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=False))
    alone = model.generate(batch["input_ids"][1:, 5:], max_new_tokens=8, do_sample=False)
    assert torch.equal(generated[1, 5 : 5 + alone.shape[1]], alone[0])  # padded after the end


def test_bfloat16_is_kept(tmp_path: Path) -> None:
    model = _model().bfloat16()
    actkit.save(model, tmp_path / "spark")
    loaded = actkit.load(tmp_path / "spark")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.layers[0].mlp.act_fn.density.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(**_tokens(9)).logits, model(**_tokens(9)).logits)


def test_it_trains_and_measures_its_density() -> None:
    model = _model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, [_tokens(12, 12)], validation=[_tokens(12)], steps=3, learning_rate=1e-2, progress=False)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    mean, high = model.model.layers[1].mlp.act_fn.density.tolist()
    assert 0.1 < mean < high < 0.6


def test_new_layers_are_initialised_as_the_others() -> None:
    torch.manual_seed(0)
    layer = spark_lm(LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 256})).model.layers[0]
    for weight in (layer.mlp.gate_proj.weight, layer.mlp.down_proj.weight, layer.self_attn.q_proj.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_bad_settings_of_a_model() -> None:
    with pytest.raises(ValueError, match="mlp_bias: True was given"):
        spark_lm(LlamaConfig(**SIZES, mlp_bias=True))
    with pytest.raises(ValueError, match="act: 'swish' was given, allowed are"):
        spark_lm(LlamaConfig(**SIZES), act="swish")


# -- what actkit says of them, and does to them ------------------------------------------------------------------------


def test_the_anatomy_takes_neither_part_for_an_ordinary_one() -> None:
    view = anatomy(_model())
    block = view.block(1)
    assert block.attention is None and block.mlp is None
    assert {found.refused for found in equalization_sets(block)} == {"what produces this input is not described"}
    groups = [[linear.path.rpartition(".")[2] for linear in inputs.linears] for inputs in block.linear_inputs()]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj"], ["up_proj"], ["down_proj"]]
    assert not [row for row in view.coverage().rows if row.where == "uncovered"]
    with pytest.raises(ValueError, match=r"blocks.1.attention.query is not in this llama model"):
        view.tap(Site("attention.query", 1))
    mixed = anatomy(_model(attended=None)).block(0)
    assert mixed.attention is not None and mixed.mlp is None


def test_sites_are_the_tensors_that_the_layers_read() -> None:
    model, batch = _model(), _tokens(9)
    wanted = ["attention.input", "attention.mixed", "mlp.input", "mlp.hidden"]
    layers = ["self_attn.k_proj", "self_attn.o_proj", None, "mlp.down_proj"]
    seen = record(model, dict.fromkeys(wanted, Quantiles()), [batch], progress=False)
    for name, layer in zip(wanted, layers, strict=True):
        values = []
        module = model.model.layers[0].get_submodule(layer or "mlp")
        handle = module.register_forward_pre_hook(lambda _, args, v=values: v.append(args[0]))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        expected = values[0].abs().flatten().quantile(0.5)
        found = seen[Site(name, 0)].quantile(0.5)
        assert found == pytest.approx(float(expected), rel=0.05), name


def test_teal_over_quantized_weights_has_one_threshold_per_tensor() -> None:
    model, batches = _model(), [_tokens(12, 12, 12)]
    apply(model, [RoundToNearest(group_size=4), Teal(sparsity=0.5)], batches, progress=False)
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    thresholds = [float(layer.select.threshold) for layer in (mlp.gate_proj, mlp.up_proj)]
    assert all(isinstance(layer.select, Threshold) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    inputs = []
    handle = mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(**batches[0])
    handle.remove()
    for part, threshold in zip((inputs[0][..., :8], inputs[0][..., 8:]), thresholds, strict=True):
        assert float((part.abs() > threshold).float().mean()) == pytest.approx(0.5, abs=0.12)
    assert thresholds[0] != thresholds[1]
    assert torch.equal(attention.q_proj.select.threshold, attention.v_proj.select.threshold)


def test_greedy_teal_runs_on_blocks_of_parts_of_their_own() -> None:
    model = _model()
    applied = apply(model, Teal(sparsity=0.3, allocation="greedy", step=0.2), [_tokens(9, 9)], progress=False)
    assert len(applied.report.changed) == 2 * 7


# -- Sparkify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma", "mixtral"])
def test_the_contract_of_transforms(kind: str) -> None:
    check_transform(Sparkify(density=0.2), tiny_model(kind), tiny_batches(kind))


def test_sparkify_puts_the_operator_before_the_activation() -> None:
    model = tiny_model("llama")
    plain = tiny_model("llama").model.layers[0].mlp
    applied = apply(model, Sparkify(density=0.25, first=1), progress=False, min_coverage=0.0)
    x = torch.randn(2, 16)
    with torch.no_grad():
        hidden = F.silu(statistical_topk(plain.gate_proj(x), 6)) * plain.up_proj(x)
        torch.testing.assert_close(model.model.layers[0].mlp(x), plain.down_proj(hidden))
    assert isinstance(model.model.layers[0].mlp.act_fn, StatisticalTopK)
    assert not isinstance(model.model.layers[1].mlp.act_fn, StatisticalTopK)
    assert applied.report.notes == ["model: 75% of the neurons are switched off; train it before you use it"]


def test_sparkify_says_what_it_leaves_alone() -> None:
    applied = apply(tiny_model("gpt2"), Sparkify(), progress=False, min_coverage=0.0)
    assert {reason for _, _, reason in applied.report.skipped} == {"its MLP has no gate"}
    assert not applied.edits
    model = tiny_model("llama")
    model.model.layers[0].mlp.act_fn = Activation("sigmoid")
    applied = apply(model, Sparkify(), progress=False)
    assert [path for path, _, _ in applied.report.skipped] == ["model.layers.0.mlp.act_fn"]
    assert len(applied.edits) == 1


def test_what_sparkify_conflicts_with() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    with pytest.raises(RecipeError, match="Sparkify cannot follow Teal: its thresholds or scales were"):
        apply(model, [Teal(), Sparkify()], batches, progress=False)
    with pytest.raises(RecipeError, match="Sparkify was applied already"):
        apply(model, [Sparkify(), Sparkify(density=0.1)], batches, progress=False)
    for density in (0, 1.1):
        with pytest.raises(RecipeError, match="density"):
            apply(model, {"actkit": 1, "transforms": [{"sparkify": {"density": density}}]}, batches, progress=False)
    apply(model, [Sparkify(density=0.5), RoundToNearest(group_size=8), Teal()], batches, progress=False)
