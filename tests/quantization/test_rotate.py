"""Rotations against dense matrices and an attention by hand; what stacks on them, what knows them, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import actkit
from actkit.core.edit.rotating import why_no_residual
from actkit.core.ground.errors import EditError, ExportError, RecipeError, UnsupportedModelError
from actkit.core.layers.cache_rounding import CHILD
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.hadamard import Rotation, hadamard
from actkit.core.layers.linear import ActLinear
from actkit.core.measure.decoding import choose_engine
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.plan import turns
from actkit.core.recipe.runner import apply
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Gram
from actkit.quantization.ends import Ends
from actkit.quantization.gptq import Gptq
from actkit.quantization.noisyquant import NoisyQuant
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.rotate import Rotate
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth
from actkit.runtime.decoder import supports
from actkit.sparsity.teal import Teal
from actkit.testing import check_transform, tiny_batches, tiny_model
from actkit.zoo.outliers import outlier_twin
from representative import architectures

LOCAL = ("R2", "R3", "R4")
RTN = RoundToNearest(bits=4, group_size=8)


def with_gains(kind: str, **settings: Any) -> Any:
    """A tiny model whose norms multiply by something."""
    model = tiny_model(kind, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def dense(rotation: Rotation) -> Tensor:
    """R, float64."""
    return torch.diag(rotation.signs.double()) @ hadamard(rotation.size).double() / rotation.size**0.5


@torch.no_grad()
@pytest.mark.parametrize("sites", [("R1",), ("R2",), ("R3",), ("R4",), ("R1", *LOCAL)])
@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "phi3", "gemma", "gemma3_text", "gpt2", "opt"])
def test_the_function_stays(kind: str, sites: tuple[Any, ...]) -> None:
    if "R1" in sites and kind in ("gemma3_text", "gpt2", "opt"):
        sites = tuple(site for site in sites if site != "R1") or ("R2",)
    model, batches = with_gains(kind), tiny_batches(kind)
    before = [model(**batch).logits for batch in batches]
    report = apply(model, Rotate(sites=sites), progress=False).report
    for batch, expected in zip(batches, before, strict=True):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert not report.skipped and report.values[-1][2]["difference"] < 1e-5


def test_weights_are_those_of_the_dense_products() -> None:
    model, other = with_gains("mistral"), with_gains("mistral")
    rotate = Rotate(sites=("R1", "R2", "R4"), seed=3)
    apply(model, rotate, progress=False)
    block = anatomy(other).block(0)
    residual = dense(Rotation.drawn(16, "3 R1 "))
    head = dense(Rotation.drawn(4, "3 R2 model.layers.0"))
    hidden = dense(Rotation.drawn(24, "3 R4 model.layers.0.mlp.down_proj"))
    old, new = other.model.layers[0], model.model.layers[0]
    gains = old.input_layernorm.weight.double(), old.post_attention_layernorm.weight.double()
    heads, shared = torch.block_diag(*[head] * 4), torch.block_diag(*[head] * 2)
    expected = {
        "self_attn.q_proj": old.self_attn.q_proj.weight.double() * gains[0] @ residual,
        "self_attn.v_proj": shared.mT @ (old.self_attn.v_proj.weight.double() * gains[0] @ residual),
        "self_attn.o_proj": residual.mT @ old.self_attn.o_proj.weight.double() @ heads,
        "mlp.up_proj": old.mlp.up_proj.weight.double() * gains[1] @ residual,
        "mlp.down_proj": residual.mT @ old.mlp.down_proj.weight.double() @ hidden,
    }
    for path, weight in expected.items():
        found = new.get_submodule(path)
        found = found.dequantized() if isinstance(found, ActLinear) else found.weight
        torch.testing.assert_close(found.double(), weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(new.input_layernorm.weight, torch.ones(16)) and block.attention is not None
    ends = other.model.embed_tokens.weight.double() @ residual
    torch.testing.assert_close(model.model.embed_tokens.weight.double(), ends, rtol=1e-5, atol=1e-6)
    last = other.lm_head.weight.double() * other.model.norm.weight.double() @ residual
    torch.testing.assert_close(model.lm_head.weight.double(), last, rtol=1e-5, atol=1e-6)
    assert all(type(module).__module__.startswith(("torch", "transformers")) for module in (model.lm_head, model.model))


@torch.no_grad()
def test_tied_ends_stay_tied_and_a_gain_of_zero_is_kept(tmp_path: Path) -> None:
    model, batch = with_gains("llama"), tiny_batches("llama")[0]
    model.model.norm.weight[3] = 0.0
    before = model(**batch).logits
    apply(model, Rotate(sites=("R1",)), progress=False)
    assert model.model.embed_tokens.storage is model.lm_head.storage
    actkit.save(model, tmp_path / "rotated")
    again = actkit.load(tmp_path / "rotated")
    assert again.model.embed_tokens.storage.tensor is again.lm_head.storage.tensor
    torch.testing.assert_close(again(**batch).logits, before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rounded_keys_are_rotated_first() -> None:
    """Against an attention spelled out: (q R) round(k R)^T, of each head."""
    model, other, batch = with_gains("llama"), with_gains("llama"), tiny_batches("llama", lengths=((9, 9),))[0]
    apply(model, [Rotate(sites=("R3",)), QuantizeCache(bits=4)], progress=False)
    turns = [dense(getattr(layer.self_attn, CHILD).rotation).float() for layer in model.model.layers]

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 7
        return torch.round(x / scale) * scale

    def by_hand(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        turn, readers = turns[module.layer_idx], query.shape[1] // key.shape[1]
        key, value = rounded(key @ turn).repeat_interleave(readers, 1), rounded(value).repeat_interleave(readers, 1)
        scores = query @ turn @ key.mT * scaling
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (torch.softmax(scores.masked_fill(ahead, -torch.inf), -1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("rotated_by_hand", by_hand)
    other.set_attn_implementation("rotated_by_hand")
    ids = batch["input_ids"]
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_a_rotated_layer_multiplies_is_observed() -> None:
    """The sum of products of the rotated inputs is R^T (X^T X) R."""
    model, batches = with_gains("llama"), tiny_batches("llama")
    site = Site("mlp.hidden", 1)
    before = record(model, {site: Gram()}, batches, progress=False)[site].value
    apply(model, Rotate(sites=("R4",)), progress=False)
    down = model.model.layers[1].mlp.down_proj
    (read,) = [each.site for each in anatomy(model).block(1).linear_inputs() if each.linears[0].role == "down"]
    assert read == Site("layer.output", path="model.layers.1.mlp.down_proj.inputs.rotation")
    found = record(model, {read: Gram()}, batches, progress=False)[read].value
    turn = dense(down.inputs.rotation)
    torch.testing.assert_close(found.double(), turn.mT @ before.double() @ turn, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_rotate_gptq_quantize_cache(kind: str, tmp_path: Path) -> None:
    model, batches = with_gains(kind), tiny_batches(kind)
    if kind == "mixtral":
        model.set_experts_implementation("eager")
    actkit.save(model, tmp_path / "original")
    model = actkit.load(tmp_path / "original")
    before = [model(**batch).logits for batch in batches]
    recipe = [Rotate(), Gptq(bits=8, group_size=8), RoundInputs(bits=8), QuantizeCache(bits=8)]
    applied = apply(model, recipe, batches, progress=False)
    for layer in anatomy(model).block(0).linears():
        assert {"weight", "inputs"} <= set(layer.module.filled_slots)
        assert (layer.module.inputs.rotation is not None) == (layer.role == "down")
        assert layer.module.inputs.grid is not None
    outputs = [model(**batch).logits for batch in batches]
    for found, expected in zip(outputs, before, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.1
    actkit.save(model, tmp_path / "small")
    again = actkit.load(tmp_path / "small")
    assert all(torch.equal(again(**batch).logits, y) for batch, y in zip(batches, outputs, strict=True))
    applied.undo()
    assert all(torch.equal(model(**batch).logits, y) for batch, y in zip(batches, before, strict=True))
    assert not hasattr(model.model.layers[0].self_attn, CHILD)


@torch.no_grad()
def test_static_and_noisy_inputs_are_found_behind_the_rotation() -> None:
    model, batches = with_gains("llama"), tiny_batches("llama")
    recipe = [Rotate(sites=("R4",)), RTN, RoundInputs(bits=8, per="tensor"), NoisyQuant(n_grid=4, rows=64)]
    apply(model, recipe, batches, progress=False)
    down = model.model.layers[0].mlp.down_proj
    seen: list[Tensor] = []
    handle = down.inputs.rotation.register_forward_hook(lambda *given: seen.append(given[2]))
    for batch in batches:
        model(**batch)
    handle.remove()
    reach = max(float(x.abs().max()) for x in seen)
    assert 0.5 < float(down.inputs.scale) * 127 / reach < 1.5 and down.inputs.shift is not None


@torch.no_grad()
def test_rounding_loses_less_behind_a_rotation_if_channels_are_large() -> None:
    twin = outlier_twin(with_gains("llama"), channels=1, factor=40.0)
    batches = tiny_batches("llama", lengths=((9, 9), (9, 9)))
    before = [twin(**batch).logits for batch in batches]
    errors = []
    rounding = [RoundToNearest(bits=8, group_size=-1), RoundInputs(bits=4)]
    for recipe in (rounding, [Rotate(), *rounding]):
        applied = apply(twin, recipe, batches, undo="memory", progress=False)
        pairs = zip(batches, before, strict=True)
        errors.append(sum(float((twin(**batch).logits - y).square().sum()) for batch, y in pairs))
        applied.undo()
    assert errors[1] < 0.7 * errors[0]


@torch.no_grad()
def test_embedding_and_head_are_rounded_behind_a_rotation() -> None:
    model, batch = with_gains("llama"), tiny_batches("llama")[0]
    before = model(**batch).logits
    recipe = [Rotate(sites=("R1",)), RoundToNearest(bits=8, group_size=8, embedding=Ends(bits=8))]
    apply(model, recipe, progress=False)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, QuantizedEmbedding) and embedding.storage is head.storage
    assert embedding.storage.kind == "integer" and embedding.rotation is not None and head.inputs.rotation is not None
    assert float((model(**batch).logits - before).norm() / before.norm()) < 0.05


def test_a_layer_that_rotates_its_inputs_selects_none() -> None:
    with pytest.raises(ValueError, match="they are rotated, and some are selected"):
        apply(with_gains("llama"), [Rotate(sites=("R4",)), Teal(sparsity=0.5)], tiny_batches("llama"), progress=False)


def test_what_decodes_and_what_is_written_knows_rotations(tmp_path: Path) -> None:
    reasons = {
        ("R4",): "down_proj rotates its inputs, which the decoder does not",
        ("R1",): "lm_head rotates its inputs, which the decoder does not",
    }
    for sites, reason in reasons.items():
        model = with_gains("llama")
        apply(model, Rotate(sites=sites), progress=False)
        assert reason in str(supports(model))
        apply(model, RTN, progress=False)
        for format in ("compressed-tensors", "gguf"):
            with pytest.raises(ExportError, match=r"it is rotated as the model runs .*readers without actkit drop"):
                actkit.export(model, tmp_path / "plain", format)
    model = with_gains("llama")
    apply(model, Rotate(sites=("R3",)), progress=False)
    assert supports(model) is None  # it cancels
    apply(model, QuantizeCache(bits=8), progress=False)
    assert "queries and keys are rotated before they are rounded" in str(supports(model))
    assert choose_engine(model, capacity=16).name == "transformers"
    merged = with_gains("mistral")
    apply(merged, [Rotate(sites=("R1", "R2")), RoundToNearest(bits=8, group_size=-1, symmetric=True)], progress=False)
    assert supports(merged) is None
    actkit.export(merged, tmp_path / "merged", "compressed-tensors")


def test_the_decoder_computes_a_model_with_rotated_keys() -> None:
    model = with_gains("mistral", sliding_window=None)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **settings)
    apply(model, Rotate(sites=("R1", "R2", "R3")), progress=False)
    assert choose_engine(model, capacity=32).name == "decoder"
    assert torch.equal(model.generate(ids, **settings), expected)


def test_sites_that_a_model_lacks_are_refused() -> None:
    cases = {
        "gemma3_text": ("R1", r"post_attention_layernorm stands behind attention or MLP"),
        "olmo2": ("R1", r"post_attention_layernorm stands behind attention or MLP"),
        "gpt2": ("R1", r"is a LayerNorm, which subtracts the mean"),
        "qwen2_moe": ("R1", r"is not described whole"),
        "bert": ("R3", r"nothing that R3 rotates: it keeps no cache"),
        "mlp": ("R4", r"nothing that R4 rotates: no MLP is described here"),
    }
    for kind, (site, reason) in cases.items():
        with pytest.raises(UnsupportedModelError, match=rf"{reason}.*Leave {site} out of sites"):
            apply(tiny_model(kind), Rotate(sites=(site,)), tiny_batches(kind), progress=False)


def test_sizes_without_a_hadamard_matrix_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"R2 of model.layers.0: size: 6 channels .*2\^k x 12, 20, 28, 36"):
        apply(tiny_model("llama", head_dim=6), Rotate(sites=("R2",)), progress=False)
    with pytest.raises(UnsupportedModelError, match=r"R4 of model.layers.0: size: 22 channels"):
        apply(tiny_model("llama", intermediate_size=22), Rotate(sites=("R4",)), progress=False)


def test_it_is_walked_alone() -> None:
    """What calibrates behind it sees no block before all of them are rotated."""
    assert turns([Smooth(), Rotate(), RTN, QuantizeCache()]) == [range(1), range(1, 2), range(2, 4)]
    assert turns([Smooth(), RTN]) == [range(2)]


def test_it_stands_before_what_rounds() -> None:
    with pytest.raises(RecipeError, match=r"Rotate cannot follow RoundToNearest: .* put it first"):
        apply(tiny_model("llama"), [RTN, Rotate()], progress=False)
    with pytest.raises(UnsupportedModelError, match="its keys are rotated or rounded already"):
        apply(tiny_model("llama"), [QuantizeCache(), Rotate(sites=("R3",))], progress=False)
    with pytest.raises(UnsupportedModelError, match="a quantized or unknown embedding"):
        model = tiny_model("llama")
        apply(model, Rotate(sites=("R1",)), progress=False)
        assert "quantized" in str(why_no_residual(anatomy(model)))
        raise UnsupportedModelError(str(why_no_residual(anatomy(model))))


def test_a_model_that_is_not_as_its_row_says_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = with_gains("llama"), tiny_batches("llama")[0]
    real = type(model.model.norm).forward
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: real(self, x) + 0.1 * x.abs())
    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises(EditError, match="the model: Rotate claims to keep what the model computes, and moves"):
            apply(model, Rotate(sites=("R1",)), progress=False)
        assert torch.equal(model(**batch).logits, before)


@torch.no_grad()
def test_smoothing_and_rotating_stack() -> None:
    model, batches = with_gains("llama"), tiny_batches("llama")
    before = model(**batches[0]).logits
    report = apply(model, [Smooth(), Rotate(), RTN], batches, progress=False).report
    assert not report.skipped
    assert torch.isfinite(before).all() and torch.isfinite(model(**batches[0]).logits).all()


@pytest.mark.parametrize("kind", architectures(["llama", "gemma3_text", "mixtral", "gpt2", "bert"]))
def test_it_keeps_its_promises(kind: str) -> None:
    sites: tuple[Any, ...] = {"llama": ("R1", *LOCAL), "mixtral": ("R1", *LOCAL), "bert": ("R2", "R4")}.get(kind, LOCAL)
    check_transform(Rotate(sites=sites), tiny_model(kind), tiny_batches(kind), conflicting=[RTN])


def test_it_compiles_and_exports() -> None:
    model, batches = tiny_model("llama", num_hidden_layers=1), tiny_batches("llama", lengths=((9, 4),))
    check_transform(Rotate(), model, batches, compile_backend="aot_eager", export=True)
