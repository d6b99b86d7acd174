"""Rounded keys and values against an attention written by hand, with and without a cache, saved, loaded, undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import actkit
from actkit.core.edit.edits import Insert, apply_edit
from actkit.core.ground.errors import EditError, ExportError, UnsupportedModelError
from actkit.core.layers.cache_rounding import CHILD, CacheRounding
from actkit.core.recipe.runner import apply
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.quantization.rotate import Rotate
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.testing import check_transform, tiny_batches, tiny_model


def by_hand(bits: int) -> Any:
    """An attention function of transformers, spelled out: softmax(q k'^T s) v', causal."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        return torch.round(x / scale) * scale

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        readers = query.shape[1] // key.shape[1]
        key, value = (rounded(each).repeat_interleave(readers, 1) for each in (key, value))
        scores = query @ key.mT * scaling
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + scores.shape[-1] - scores.shape[-2])
        chances = torch.softmax(scores.masked_fill(ahead, -torch.inf), -1)
        return (chances @ value).transpose(1, 2).contiguous(), None

    return attention


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_keys_and_values_are_those_of_the_formula(kind: str, bits: int) -> None:
    model, other = tiny_model(kind), tiny_model(kind)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    before = model(ids).logits
    apply(model, QuantizeCache(bits=bits), progress=False)
    AttentionInterface.register("rounded_by_hand", by_hand(bits))
    other.set_attn_implementation("rounded_by_hand")
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids).logits, before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_floats_are_those_of_torchs_cast_by_the_largest_of_calibration() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    batches = [{"input_ids": torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))}]
    largest: dict[tuple[int, str], float] = {}

    def seen(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        for name, x in (("key", key), ("value", value)):
            place = (module.layer_idx, name)
            largest[place] = max(largest.get(place, 0.0), float(x.abs().max()))
        return sdpa_attention_forward(module, query, key, value, mask, **settings)

    def cast(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        rounded = []
        for name, x in (("key", key), ("value", value)):
            scale = largest[module.layer_idx, name] / 448
            rounded.append((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
        return sdpa_attention_forward(module, query, *rounded, mask, **settings)

    AttentionInterface.register("seen_by_hand", seen)
    AttentionInterface.register("cast_by_hand", cast)
    other.set_attn_implementation("seen_by_hand")
    for batch in batches:
        other(**batch)
    other.set_attn_implementation("cast_by_hand")
    apply(model, QuantizeCache(format="fp8"), batches, progress=False)
    rounding = getattr(model.model.layers[1].self_attn, CHILD)
    assert float(rounding.key) == pytest.approx(largest[1, "key"] / 448)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)


def test_floats_are_saved_kept_from_the_decoder_and_refused_behind_a_rotation(tmp_path: Any) -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    apply(model, QuantizeCache(format="fp8"), batches, progress=False)
    actkit.save(model, tmp_path / "small")
    again = actkit.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)
    assert getattr(again.half().model.layers[0].self_attn, CHILD).key.dtype == torch.float32
    assert "fp8" in str(Decoder.supports(model))
    with pytest.raises(UnsupportedModelError, match=r"keys of this .* are rotated"):
        apply(tiny_model("llama"), [Rotate(sites=("R3",)), QuantizeCache(format="fp8")], batches, progress=False)
    with pytest.raises(ValueError, match="bits: 4 was given with format: fp8"):
        QuantizeCache(bits=4, format="fp8")


@torch.no_grad()
def test_a_step_with_the_cache_is_the_pass_without_it() -> None:
    model = tiny_model("llama")
    apply(model, QuantizeCache(bits=4), progress=False)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    start = model(ids[:, :5], use_cache=True)
    step = model(ids[:, 5:], past_key_values=start.past_key_values, use_cache=True)
    torch.testing.assert_close(step.logits[0], model(ids).logits[0, 5:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_is_left_out() -> None:
    model = tiny_model("llama")
    apply(model, QuantizeCache(), progress=False)
    ids = torch.tensor([[0, 0, 3, 1, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    padded = model(ids, attention_mask=mask, position_ids=torch.tensor([[0, 0, 0, 1, 2]])).logits[0, 2:]
    torch.testing.assert_close(padded, model(ids[:, 2:]).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["memory", "source"])
def test_it_is_saved_loaded_and_undone(mode: str, tmp_path: Any) -> None:
    actkit.save(tiny_model("llama"), tmp_path / "original")
    model, batch = actkit.load(tmp_path / "original"), tiny_batches("llama")[0]
    before = model(**batch).logits
    applied = apply(model, [RoundToNearest(bits=8, group_size=8), QuantizeCache(bits=4)], undo=mode, progress=False)
    assert any("stays wide" in note for note in applied.report.notes)
    actkit.save(model, tmp_path / "small")
    again = actkit.load(tmp_path / "small")
    assert isinstance(getattr(again.model.layers[0].self_attn, CHILD), CacheRounding)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    with pytest.raises(ExportError, match="actkit_rounded_cache"):
        actkit.export(model, tmp_path / "plain", "compressed-tensors")
    applied.undo()
    assert torch.equal(model(**batch).logits, before)
    assert not hasattr(model.model.layers[0].self_attn, CHILD) and model.config._attn_implementation == "sdpa"


def test_what_keeps_no_cache_or_attends_otherwise_is_refused() -> None:
    for kind in ("bert", "vit"):
        with pytest.raises(UnsupportedModelError, match=r"cache of .* is not rounded: it keeps no cache"):
            apply(tiny_model(kind), QuantizeCache(), tiny_batches(kind), progress=False)
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="its attention is 'eager'"):
        apply(model, QuantizeCache(), progress=False)
    assert not hasattr(model.model.layers[0].self_attn, CHILD)


def test_nothing_is_inserted_over_something() -> None:
    model = tiny_model("llama")
    with pytest.raises(EditError, match=r"insert model.layers.0.mlp: something is there already"):
        apply_edit(model, Insert("model.layers.0.mlp", CacheRounding()))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral"])
def test_it_keeps_its_promises(kind: str) -> None:
    check_transform(QuantizeCache(), tiny_model(kind), tiny_batches(kind))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_floats_keep_the_promises_too(kind: str) -> None:
    check_transform(QuantizeCache(format="fp8"), tiny_model(kind), tiny_batches(kind))
