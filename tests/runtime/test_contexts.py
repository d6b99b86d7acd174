"""Caches of other widths, and heads that are cut between threads, against transformers' own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from actkit.runtime import tables
from actkit.runtime.decoder import Decoder

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
IDS = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))


def llama(key_value_heads: int = 3, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_key_value_heads": key_value_heads} | changes)).eval()


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=3, sliding_window=17)).eval()


@torch.no_grad()
def stepped(decoder: Decoder) -> torch.Tensor:
    return torch.stack([decoder([token]) for token in IDS[0].tolist()])


@torch.no_grad()
@pytest.mark.parametrize(("heads", "threads"), [(3, 2), (1, 2), (3, 1), (2, 2)])
def test_heads_that_are_cut(heads: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token's keys from 2 on are shared out; equal to whole heads but for the order of sums."""
    model = llama(heads)
    expected, whole = model(IDS).logits[0], stepped(Decoder(model, threads=threads))
    monkeypatch.setattr(tables, "CUT_FROM", 2)
    cut = Decoder(model, threads=threads)
    assert bool(cut._plan.cut_from) == (heads % threads > 0)
    found = stepped(cut)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    cut.reset()
    for end in (30, 31, 40):
        torch.testing.assert_close(cut(IDS[0, cut.position : end].tolist()), expected[end - 1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_heads_that_are_cut_see_their_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mistral()
    monkeypatch.setattr(tables, "CUT_FROM", 2)
    torch.testing.assert_close(stepped(Decoder(model, threads=2)), model(IDS).logits[0], rtol=1e-4, atol=1e-4)


def rounded(cache: str, x: torch.Tensor) -> torch.Tensor:
    if cache == "bfloat16":
        return x.bfloat16().float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


@torch.no_grad()
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_narrow_caches(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own attention over keys and values that were rounded so; in steps, with cut heads, as a prompt."""

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **settings: Any) -> Any:
        return sdpa_attention_forward(module, query, rounded(cache, key), rounded(cache, value), *args, **settings)

    AttentionInterface.register("rounded_cache", attend)
    AttentionMaskInterface.register("rounded_cache", sdpa_mask)
    model, other = llama(), llama()
    other.set_attn_implementation("rounded_cache")
    expected, exact = other(IDS).logits[0], model(IDS).logits[0]
    assert (expected - exact).norm() > 1e-3 * exact.norm()
    for cut in (False, True):
        if cut:
            monkeypatch.setattr(tables, "CUT_FROM", 2)
        decoder = Decoder(model, threads=2, cache=cache)
        found = stepped(decoder)
        assert (found - expected).norm() < 0.1 * (expected - exact).norm()
        decoder.reset()
        for end in (30, 31, 40):
            prompt = decoder(IDS[0, decoder.position : end].tolist())
            assert (prompt - expected[end - 1]).norm() < 0.2 * (expected[end - 1] - exact[end - 1]).norm()
    share = {"bfloat16": 0.5, "int8": (1 + 4 / model.model.layers[0].self_attn.head_dim) / 4}[cache]
    assert decoder.cache_bytes / Decoder(model).cache_bytes == pytest.approx(share)


@torch.no_grad()
def test_what_a_bfloat16_cache_holds_is_rounded_to_the_nearest() -> None:
    model = llama()
    wide, narrow = Decoder(model), Decoder(model, cache="bfloat16")
    for decoder in (wide, narrow):
        decoder([5])
    for kept, rounded in ((wide._work.keys, narrow._work.keys), (wide._work.cached, narrow._work.cached)):
        first, nearest = (torch.from_numpy(each[0, :, 0].copy()) for each in (kept, rounded))
        assert torch.equal(first.view(torch.float32).bfloat16(), nearest.view(torch.bfloat16))


def test_other_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="give float32, bfloat16, int8, or None"):
        Decoder(llama(), cache="int4")
