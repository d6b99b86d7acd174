"""LSSA and LSSAR against a few lines of float64: padding, cache, windows, grouped queries; and as transforms."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
)

import actkit
from actkit.core.edit.edits import ATTENTION, Configure, apply_edit
from actkit.core.ground.errors import EditError, UnsupportedModelError
from actkit.core.measure.decoding import choose_engine
from actkit.core.measure.fresh import FreshProcess
from actkit.core.recipe.runner import apply
from actkit.functions.softplus_attention.attention import MappedAttention
from actkit.functions.softplus_attention.entropy import attention_entropy
from actkit.functions.softplus_attention.layer import SoftplusAttention
from actkit.functions.softplus_attention.length_curve import extrapolation_curve, passkeys
from actkit.functions.softplus_attention.lssar import Lssa, Lssar
from actkit.functions.softplus_attention.weights import attention_weights, reweighted, softplus_attention
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.sparsity.spark.sparkify import spark_lm
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.testing.transforms import CHECKS

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def oracle(query: Tensor, key: Tensor, value: Tensor, visible: Any, power: float | None) -> Tensor:
    """The formulas of the sheet, row by row, in Python's order; visible(i) lists the keys of row i."""
    query, key, value = query.double(), key.double(), value.double()
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for b, h, i in ((b, h, i) for b in range(len(query)) for h in range(query.shape[1]) for i in range(query.shape[2])):
        group, keys = h * key.shape[1] // query.shape[1], visible(b, i)
        if not keys:
            continue
        cosines = torch.stack([F.cosine_similarity(query[b, h, i], key[b, group, j], dim=0, eps=0) for j in keys])
        mapped = (1 + (math.log(query.shape[-1]) * math.log(len(keys)) * cosines).exp()).log()
        weights = mapped / (mapped.sum() + 1e-8)
        if power is not None:
            above = (weights * len(keys) - (0 if len(keys) <= 3 else 1)).clamp(min=0) ** power
            weights = above / above.sum()
        out[b, h, i] = sum(w * value[b, group, j] for w, j in zip(weights, keys, strict=True))
    return out


def vectors(queries: int = 9, keys: int = 9, heads: int = 4, shared: int = 2, size: int = 8, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, queries, size), (2, shared, keys, size), (2, shared, keys, size))
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("power", [None, 1, 3, 15])
def test_against_the_formulas(power: float | None) -> None:
    query, key, value = vectors()
    found = softplus_attention(query, key, value, is_causal=True, power=power)
    assert (found - oracle(query, key, value, lambda b, i: range(i + 1), power)).abs().max() < 1e-10
    found = softplus_attention(query[:, :, -2:], key, value, is_causal=True, power=power)  # a cache
    assert (found - oracle(query[:, :, -2:], key, value, lambda b, i: range(8 + i), power)).abs().max() < 1e-10
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    window = torch.ones(9, 9).tril().triu(-3).bool()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = softplus_attention(query, key, value, padded[:, None, None] & window, power=power)
    assert "read no key" in str(caught[0].message)

    def visible(b: int, i: int) -> list[int]:
        return [j for j in range(max(0, i - 3), i + 1) if padded[b, j]]

    assert (found - oracle(query, key, value, visible, power)).abs().max() < 1e-10
    assert not found[0, :, :2].any()  # nothing is visible there


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = vectors()
    whole = softplus_attention(query, key, value, is_causal=True, power=15)
    monkeypatch.setattr("actkit.functions.softplus_attention.weights.CHUNK", 200)
    assert torch.allclose(softplus_attention(query, key, value, is_causal=True, power=15), whole, atol=1e-13)
    mixed, weights = softplus_attention(query, key, value, is_causal=True, power=15, return_weights=True)
    assert weights.shape == (2, 4, 9, 9) and torch.allclose(weights.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
    assert torch.allclose(mixed, whole)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "relu"])
def test_other_kinds(kind: Any) -> None:
    query, key, value = vectors(shared=4)
    visible = torch.ones(9, 9).tril().bool()
    weights = attention_weights(query, key, visible, kind)
    scores, counts = query @ key.mT / 8**0.5, torch.arange(1, 10, dtype=torch.float64)[:, None]
    expected = {
        "softmax": lambda: scores.masked_fill(~visible, -torch.inf).softmax(-1),
        "sigmoid": lambda: (1 / (1 + counts * (-scores).exp())) * visible,
        "relu": lambda: scores.clamp(min=0) / counts * visible,
    }[kind]()
    assert torch.allclose(weights, expected, atol=1e-12)
    if kind == "softmax":
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert torch.allclose(weights @ value, mixed, atol=1e-12)
    sharp = attention_weights(query, key, visible, kind, power=15)
    assert torch.allclose(sharp.sum(-1), (weights.sum(-1) > 0).double(), atol=1e-6)  # ReLU may leave nothing
    assert (sharp.amax(-1) >= weights.amax(-1) / weights.sum(-1).clamp(min=1e-9) - 1e-6)[..., 4:].all()


def test_safe_power() -> None:
    """The largest is divided out: as the plain power where that holds, finite where it does not; equal rows stay."""
    weights = torch.rand(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = weights / weights.sum(-1, keepdim=True)
    counts = torch.full((5, 1), 40.0, dtype=torch.float64)
    plain = (weights * 40 - 1).clamp(min=0) ** 15
    assert torch.allclose(reweighted(weights, counts, 15), plain / plain.sum(-1, keepdim=True), atol=1e-6)
    single = torch.zeros(1, 100_000)
    single[0, 7] = 1
    assert torch.isinf((single * 100_000) ** 15).any()
    assert torch.equal(reweighted(single, torch.full((1, 1), 100_000.0), 15), single)
    even = torch.full((1, 8), 1 / 8)
    assert torch.equal(reweighted(even, torch.full((1, 1), 8.0), 15), even)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_inputs_stay_finite(dtype: torch.dtype) -> None:
    query, key, value = (1e4 * each.to(dtype) for each in vectors())
    for power in (None, 15):
        found = softplus_attention(query, key, value.sign(), is_causal=True, power=power)
        assert found.dtype == dtype and torch.isfinite(found).all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = softplus_attention(query, key, value.sign(), is_causal=True, power=power)
        assert torch.allclose(again.float(), found.float(), atol=2e-2)  # the last product alone is autocast's


def test_gradients() -> None:
    query, key, value = (each[:, :, :5].requires_grad_() for each in vectors())
    for power in (None, 3):
        assert torch.autograd.gradcheck(
            lambda q, k, v, power=power: softplus_attention(q, k, v, is_causal=True, power=power), (query, key, value)
        )


# -- in a model --------------------------------------------------------------------------------------------------------


def mistral(window: int | None = None) -> Any:
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window, max_position_embeddings=64)
    config.initializer_range = 0.4
    return MistralForCausalLM(config).eval()


def by_hand(model: Any, ids: Tensor, power: float | None, window: int | None, real: Tensor | None = None) -> Tensor:
    """The model's logits with attention by the oracle, on the states that its own modules give."""
    base = model.model
    hidden = base.embed_tokens(ids).double()
    model = model.double()
    real = torch.ones_like(ids).bool() if real is None else real.bool()
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    cos, sin = base.rotary_emb(hidden, positions)

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]

    def visible(b: int, i: int) -> list[int]:
        return [j for j in range(0 if window is None else max(0, i - window + 1), i + 1) if real[b, j]]

    for layer in base.layers:
        x, attention = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (
            getattr(attention, f"{name}_proj")(x).view(*ids.shape, -1, 8).transpose(1, 2) for name in ("q", "k", "v")
        )
        mixed = oracle(turned(q), turned(k), v, visible, power)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits = model.lm_head(base.norm(hidden))
    model.float()
    return logits


@pytest.mark.parametrize(("window", "transform"), [(None, Lssa()), (4, Lssar(power=3))])
@torch.no_grad()
def test_a_model_with_padding_window_and_cache(window: int | None, transform: Any) -> None:
    model, ids = mistral(window), torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(1))
    power = getattr(transform, "power", None)
    expected = by_hand(model, ids, power, window)
    apply(model, transform, progress=False)
    scale = expected.abs().max()
    assert (model(ids).logits - expected).abs().max() < 1e-4 * scale
    for side in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[0, : 3 if side == "left" else 0] = 0
        mask[1, 7 if side == "right" else 10 :] = 0
        expected = by_hand(model, ids, power, window, mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(ids, attention_mask=mask, position_ids=positions).logits
        assert ((found - expected).abs() * mask[..., None]).max() < 1e-4 * scale, side
        cache, parts = DynamicCache(config=model.config), []
        for begin, end in ((0, 5), (5, 6), (6, 10)):
            chunk = {"position_ids": positions[:, begin:end], "attention_mask": mask[:, :end]}
            parts.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True, **chunk).logits)
        assert ((torch.cat(parts, 1) - expected).abs() * mask[..., None]).max() < 1e-4 * scale, side


def test_generation_goes_through_it() -> None:
    model = tiny_model("llama")
    apply(model, Lssar(), progress=False)
    assert "computed by 'lssar" in str(Decoder.supports(model))
    assert choose_engine(model, capacity=16).decoder is None
    ids = torch.tensor([[3, 5, 7]])
    found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat((expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("transform", [Lssa(), Lssar(power=3)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_transforms_pass(kind: str, transform: Any) -> None:
    model = tiny_model(kind)
    checks = check_transform(transform, model, tiny_batches(kind), conflicting=(), repeatable=True)
    assert [check.name for check in checks] == list(CHECKS)
    held = {check.name for check in checks if check.outcome == "holds"}
    assert {"the same result twice", "save and load", "undo is exact", "settings are strict"} <= held


def test_stacks_and_loads_in_a_fresh_process(tmp_path: Path, worker: FreshProcess) -> None:
    model, batch = tiny_model("llama"), tiny_batches("llama")[0]
    applied = apply(model, [Lssar(power=3), RoundToNearest(bits=8, group_size=8)], progress=False)
    actkit.save(model, tmp_path / "out")
    loaded = worker.load(tmp_path / "out")
    assert loaded["attention"] == model.config._attn_implementation
    with torch.no_grad():
        assert torch.equal(worker.outputs(batch), model(**batch).logits)
        other = actkit.load(tmp_path / "out")
        again = apply(other, Lssar(power=15), progress=False)  # another power, without training
        assert not torch.equal(other(**batch).logits, model(**batch).logits)
        again.undo()
        assert torch.equal(other(**batch).logits, model(**batch).logits)
    applied.undo()
    assert model.config._attn_implementation == "sdpa"


def test_refused() -> None:
    spark = spark_lm(LlamaConfig(**SIZES), density=0.2, attended=4)
    with pytest.raises(UnsupportedModelError, match="no attention is described"):
        apply(spark, Lssar(), progress=False)
    for first, second in ((QuantizeCache(), Lssar()), (Lssar(), QuantizeCache())):
        model = tiny_model("llama")
        with pytest.raises((EditError, UnsupportedModelError), match=r"would silence|its attention is 'lssar"):
            apply(model, [first, second], progress=False)
        assert model.config._attn_implementation == "sdpa"
    capped = Gemma2ForCausalLM._from_config(
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8), attn_implementation="eager"
    )
    sinks = GptOssForCausalLM(GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2))
    for model, name in ((capped, "softcap"), (sinks, "s_aux")):
        with pytest.raises(UnsupportedModelError, match=f"its scores use '{name}'"):
            apply(model, Lssa(), progress=False)
    with pytest.raises(UnsupportedModelError, match="computes attention by itself"):
        apply(tiny_model("mlp"), Lssa(), tiny_batches("mlp"), progress=False)
    with pytest.raises(ValueError, match="log\\(1\\) = 0"):
        softplus_attention(*vectors(size=1))
    with pytest.raises(UnsupportedModelError, match="adds other numbers"):
        softplus_attention(*vectors(), mask=torch.full((9, 9), -1e4))
    float_mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    assert torch.equal(softplus_attention(*vectors(), mask=float_mask), softplus_attention(*vectors(), is_causal=True))


# -- the layer and the analyses ----------------------------------------------------------------------------------------


def test_layer() -> None:
    torch.manual_seed(0)
    layer, x = SoftplusAttention(16, 4, 2, power=3).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    whole = layer(x)
    assert torch.allclose(layer(x[:, :4]), whole[:, :4])  # causal
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    assert torch.allclose(layer(x, mask)[1, :5], layer(x[1:, :5])[0])
    torch.manual_seed(0)
    still = SoftplusAttention(16, 4, 2, power=3, rope=False).double()
    query, key, value = (
        each(x).view(2, 7, heads, 4).transpose(1, 2)
        for each, heads in ((still.query, 4), (still.key, 2), (still.value, 2))
    )
    expected = oracle(query, key, value, lambda b, i: range(i + 1), 3)
    assert torch.allclose(still(x), still.output(expected.transpose(1, 2).flatten(2)), atol=1e-10)


def test_entropy_by_head() -> None:
    model, batch = tiny_model("llama"), tiny_batches("llama", lengths=((9, 4),))[0]
    found = attention_entropy(model, [batch], progress=False)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions
    real = batch["attention_mask"].bool()
    for block, each in zip(found.blocks, weights, strict=True):
        rows = torch.special.entr(each).sum(-1).transpose(0, 1)[:, real]
        assert torch.allclose(torch.tensor(block.heads, dtype=torch.float32), rows.mean(1), atol=1e-5)
    apply_edit(model, Configure(ATTENTION, {"name": "lssar", "power": 15}))
    sharp = attention_entropy(model, [batch], progress=False)
    assert sharp.attention != found.attention
    assert all(
        low < high for a, b in zip(sharp.blocks, found.blocks, strict=True) for low, high in zip(a.heads, b.heads)
    )


def test_loss_by_length() -> None:
    model, tokens = tiny_model("llama"), torch.randint(40, (3, 33), generator=torch.Generator().manual_seed(0))
    found = extrapolation_curve(model, tokens, [8, 32], last=4, progress=False)
    with torch.no_grad():
        logits = model(tokens[:, 24:32]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 25:].flatten(), reduction="none").view(3, 8)
    assert math.isclose(found.at(8).last.value, float(losses[:, -4:].mean()), rel_tol=1e-5)
    assert math.isclose(found.at(8).mean.value, float(losses.mean()), rel_tol=1e-5)
    assert found.at(8).last.low <= found.at(8).last.value <= found.at(8).last.high and not found.beyond_context
    longer = torch.randint(40, (3, 49), generator=torch.Generator().manual_seed(0))
    beyond = extrapolation_curve(model, longer, [8, 48], beyond_context=True, progress=False)
    assert beyond.beyond_context and "48 *" in [str(cell) for cell in beyond.table().columns[0]._cells]


def test_passkeys() -> None:
    from actkit import zoo

    tokenizer = zoo.tokenizer("swiglu")
    for each in passkeys(tokenizer, "The grass is green. The sky is blue. ", 80, count=3):
        number = tokenizer.decode(each.answer)
        text = tokenizer.decode(each.prompt)
        assert len(each.prompt) == 80 and text.count(f"key is {number}. Remember") == 1 and text.endswith("key is ")


def test_the_table_of_ablations() -> None:
    """Softmax by `mapped_attention` is the model's own, and re-weighting changes it."""
    model, batch = tiny_model("llama"), tiny_batches("llama")[0]
    with torch.no_grad():
        expected = model(**batch).logits
        apply_edit(model, Configure(ATTENTION, MappedAttention().spec()))
        real = batch["attention_mask"].bool()
        assert torch.allclose(model(**batch).logits[real], expected[real], atol=1e-5)
        apply_edit(model, Configure(ATTENTION, {"name": "mapped_attention", "kind": "softmax", "power": 15}))
        assert not torch.allclose(model(**batch).logits[real], expected[real], atol=1e-2)
