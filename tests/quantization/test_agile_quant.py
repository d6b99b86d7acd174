"""Static inputs, operands and attention weights against formulas written by hand; stacked, saved, loaded, refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import actkit
from actkit.core.edit.edits import get_module
from actkit.core.grids.powers import PowerGrid
from actkit.core.ground.errors import ExportError, RecipeError, UnsupportedModelError
from actkit.core.layers.attention_rounding import CHILD, AttentionRounding
from actkit.core.measure.decoding import choose_engine
from actkit.core.model.anatomy import anatomy, forms_weights
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.quantization.agile_quant.agile_quant import AgileQuant
from actkit.quantization.gptq import Gptq
from actkit.quantization.noisyquant import NoisyQuant
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.rotate import Rotate
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.sparsity.teal import Teal
from actkit.testing import check_transform, tiny_batches, tiny_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SOFTMAX = AgileQuant(bits=None, attention_bits=None)


def largest(model: Any, batches: Any, site: str) -> torch.Tensor:
    """The largest magnitude of each channel at a site."""
    return record(model, {site: Sample(10_000)}, batches, progress=False)[site].rows.abs().amax(0)


def static(x: torch.Tensor, scale: torch.Tensor, bits: int = 8) -> torch.Tensor:
    return (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def by_hand(scales: dict[str, torch.Tensor] | None, *, softmax: bool = True) -> Any:
    """An attention function of transformers, spelled out."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        if scales is not None:
            given = {"query": query, "key": key, "value": value}
            query, key, value = (static(x, scales[name][:, None, None]) for name, x in given.items())
        readers = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(readers, 1) for each in (key, value))
        scores = query @ key.mT * scaling
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        chances = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
        if softmax:
            exponents = torch.round(-torch.log2(chances))
            chances = torch.where(exponents >= 15, 0.0, 2.0**-exponents)
        return (chances @ value).transpose(1, 2).contiguous(), None

    return attention


def attending(model: Any, function: Any) -> Any:
    AttentionInterface.register("agile_by_hand", function)
    AttentionMaskInterface.register("agile_by_hand", sdpa_mask)
    model.set_attn_implementation("agile_by_hand")
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_attention_weights_are_those_of_the_formula(kind: str) -> None:
    model, other = tiny_model(kind), tiny_model(kind)
    before = model(IDS).logits
    apply(model, SOFTMAX, tiny_batches(kind), progress=False)
    expected = attending(other, by_hand(None))(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(IDS).logits, before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_operands_are_those_of_the_formula() -> None:
    """Static scales per head, found behind the rotary embedding; two query heads read one key."""
    model, batches = tiny_model("llama", num_hidden_layers=1), tiny_batches("llama")
    scales = {}
    for name, heads in (("query", 4), ("key", 2), ("value", 2)):
        each = largest(model, batches, f"blocks.0.attention.{name}").view(heads, -1).amax(-1)
        scales[name] = each / 127.5
    other = copy.deepcopy(model)
    apply(model, AgileQuant(bits=None, softmax="none"), batches, min_coverage=0.0, progress=False)
    expected = attending(other, by_hand(scales, softmax=False))(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not forms_weights(model)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "gpt2"])
def test_inputs_are_those_of_the_formula(kind: str, bits: int) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind)
    before = {}
    for inputs in anatomy(model).block(0).linear_inputs()[:1]:
        before[inputs.linears[0].path] = largest(model, batches, str(inputs.site))
    settings: dict[str, Any] = {"bits": bits, "attention_bits": None, "softmax": "none"}
    apply(model, AgileQuant(**settings), batches, progress=False)
    for path, values in before.items():
        layer = get_module(model, path)
        x = torch.randn(30, layer.in_features, generator=torch.Generator().manual_seed(0)) * 1.5 * values
        scale = values / (2 ** (bits - 1) - 0.5)
        torch.testing.assert_close(layer.inputs(x), static(x, scale, bits), rtol=1e-5, atol=1e-6)
        expected = torch.nn.functional.linear(static(x, scale, bits), layer.dequantized(), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert layer.inputs.describe() == f"inputs rounded to {bits} bits by a scale for each channel"


@torch.no_grad()
def test_trip_has_one_scale_but_for_powers_of_two() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    applied = apply(model, AgileQuant(act_scale="trip"), batches, progress=False)
    for linear in anatomy(model).block(0).linears():
        inputs = linear.module.inputs  # type: ignore[union-attr]
        steps = torch.log2(inputs.scale / inputs.scale.max())  # type: ignore[union-attr, operator]
        assert torch.equal(steps, steps.round()) and float(steps.min()) >= -3
        assert inputs.zero.shape == (1,)  # type: ignore[union-attr]
        assert torch.equal(inputs(torch.zeros(1, linear.in_features)), torch.zeros(1, linear.in_features))
    assert any("channels by factor 2^0: " in note for note in applied.report.notes)


@torch.no_grad()
def test_weights_can_be_read_and_are_powers_of_two() -> None:
    model = apply(tiny_model("llama"), SOFTMAX, tiny_batches("llama"), progress=False).model
    assert forms_weights(model)
    site = "blocks.1.attention.weights"
    values = record(model, {site: Sample(1000)}, tiny_batches("llama"), progress=False)[site].rows
    positive = values[values > 0]
    exponents = -torch.log2(positive)
    assert torch.equal(exponents, exponents.round()) and int(exponents.max()) <= 14
    uniform = AgileQuant(bits=None, attention_bits=None, softmax="uniform")
    model = apply(tiny_model("llama"), uniform, tiny_batches("llama"), progress=False).model
    values = 15 * record(model, {site: Sample(1000)}, tiny_batches("llama"), progress=False)[site].rows
    torch.testing.assert_close(values, values.round(), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_step_with_the_cache_is_the_pass_without_it(kind: str) -> None:
    model = apply(tiny_model(kind), AgileQuant(), tiny_batches(kind), progress=False).model
    start = model(IDS[:, :5], use_cache=True)
    step = model(IDS[:, 5:], past_key_values=start.past_key_values, use_cache=True)
    torch.testing.assert_close(step.logits[0], model(IDS).logits[0, 5:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_is_left_out() -> None:
    model = apply(tiny_model("llama"), AgileQuant(), tiny_batches("llama"), progress=False).model
    ids, mask = torch.tensor([[0, 0, 3, 1, 4]]), torch.tensor([[0, 0, 1, 1, 1]])
    padded = model(ids, attention_mask=mask, position_ids=torch.tensor([[0, 0, 0, 1, 2]])).logits[0]
    assert torch.isfinite(padded).all()
    torch.testing.assert_close(padded[2:], model(ids[:, 2:]).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["memory", "source"])
def test_behind_gptq_it_is_saved_loaded_and_undone(mode: str, tmp_path: Any) -> None:
    actkit.save(tiny_model("llama"), tmp_path / "original")
    model, batches = actkit.load(tmp_path / "original"), tiny_batches("llama")
    before = model(**batches[0]).logits
    recipe = [Gptq(bits=4, group_size=8), AgileQuant(act_scale="trip")]
    applied = apply(model, recipe, batches, undo=mode, progress=False)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.storage.grid.bits == 4 and layer.inputs.scale.shape == (16,)
    actkit.save(model, tmp_path / "small")
    again = actkit.load(tmp_path / "small")
    assert torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)
    rounding = getattr(again.model.layers[0].self_attn, CHILD)
    assert isinstance(rounding, AttentionRounding) and rounding.weights == PowerGrid(4)
    for exported in (model, apply(tiny_model("llama"), SOFTMAX, batches, progress=False).model):
        with pytest.raises(ExportError):
            actkit.export(exported, tmp_path / "plain", "compressed-tensors")
    applied.undo()
    assert torch.equal(model(**batches[0]).logits, before)
    assert not hasattr(model.model.layers[0].self_attn, CHILD) and model.config._attn_implementation == "sdpa"


def test_the_decoder_leaves_it_to_transformers() -> None:
    for settings in (
        {},
        {"bits": None},
        {"bits": None, "softmax": "none"},
        {"softmax": "none", "attention_bits": None},
    ):
        model = apply(tiny_model("llama"), AgileQuant(**settings), tiny_batches("llama"), progress=False).model
        with pytest.raises(UnsupportedModelError, match="rounds"):
            Decoder(model, capacity=8)
        engine = choose_engine(model, capacity=8)
        assert engine.name == "transformers" and "rounds" in engine.reason


@torch.no_grad()
def test_a_model_in_16_bits() -> None:
    model, batches = tiny_model("llama").bfloat16(), tiny_batches("llama")
    apply(model, AgileQuant(), batches, progress=False)
    rounding = getattr(model.model.layers[0].self_attn, CHILD)
    assert rounding.query.dtype == torch.float32 and model(IDS).logits.dtype == torch.bfloat16
    assert rounding.to(torch.bfloat16).query.dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "mixtral", "bert", "mlp"])
def test_it_keeps_its_promises(kind: str) -> None:
    transform = AgileQuant()
    if kind == "mlp":
        with pytest.raises(UnsupportedModelError, match="its class computes attention by itself"):
            apply(tiny_model(kind), transform, tiny_batches(kind), progress=False)
        transform = AgileQuant(attention_bits=None, softmax="none")
    check_transform(transform, tiny_model(kind), tiny_batches(kind), conflicting=[RoundInputs()])


def test_it_compiles_and_exports() -> None:
    model, batches = tiny_model("llama", num_hidden_layers=1), tiny_batches("llama", lengths=((9, 4),))
    checks = check_transform(AgileQuant(act_scale="trip"), model, batches, compile_backend="aot_eager", export=True)
    found = {check.name: check.outcome for check in checks}
    assert found["it compiles"] == found["it exports"] == "holds"


def test_what_is_refused() -> None:
    batches = tiny_batches("llama")
    for settings in ({"bits": 1}, {"softmax_bits": 7}, {"bits": None, "attention_bits": None, "softmax": "none"}):
        with pytest.raises(ValidationError):
            AgileQuant(**settings)
    for stack in ([RoundInputs(), AgileQuant()], [AgileQuant(), RoundInputs()]):
        with pytest.raises(RecipeError):
            Recipe(stack).check()
    for stack in ([Gptq(), AgileQuant()], [RoundToNearest(), AgileQuant()], [AgileQuant(), Teal()]):
        Recipe(stack).check()
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="its attention is 'eager'"):
        apply(model, AgileQuant(), batches, progress=False)
    cache, rotated = QuantizeCache(), Rotate(sites=("R3",))
    for first, second in ((cache, AgileQuant()), (AgileQuant(), cache), (rotated, AgileQuant())):
        model = apply(tiny_model("llama"), first, batches, progress=False).model
        with pytest.raises(UnsupportedModelError, match=r"its queries, keys (and|or) values"):
            apply(model, second, batches, progress=False)
    only = AgileQuant(bits=None, attention_bits=None)
    for first, second in ((cache, only), (only, cache), (rotated, only), (only, rotated)):
        apply(apply(tiny_model("llama"), first, batches, progress=False).model, second, batches, progress=False)
    applied = apply(tiny_model("llama"), [Rotate(sites=("R4",)), AgileQuant()], batches, progress=False)
    assert [row[2] for row in applied.report.skipped] == [
        "the layer rotates its inputs, whose ranges are not known"
    ] * 2
    applied = apply(tiny_model("llama"), [AgileQuant(), NoisyQuant(rows=8)], batches, min_coverage=0.0, progress=False)
    assert len(applied.report.skipped) == 14
    assert all("have several scales" in row[2] for row in applied.report.skipped)


class OwnAttention(torch.nn.Module):
    """Attends without asking transformers."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj
        self.head_dim = inner.head_dim

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.o_proj(self.q_proj(hidden_states)), None


def test_an_attention_that_asks_nobody_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn = OwnAttention(model.model.layers[1].self_attn)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.self_attn does not call transformers' attention function"
    ):
        apply(model, AgileQuant(), tiny_batches("llama"), progress=False)
    assert model.config._attn_implementation == "sdpa"
