"""A decoder whose cache holds 8-bit codes against the model that rounds its keys and values, token by token."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build

from actkit.core.recipe.runner import apply
from actkit.quantization.quantize_cache import QuantizeCache
from actkit.runtime.decoder import Decoder


@torch.no_grad()
def test_logits_are_those_of_the_rounded_model() -> None:
    model = build("llama")
    plain = Decoder(model, threads=1, capacity=32)
    apply(model, QuantizeCache(), progress=False)
    decoder = Decoder(model, threads=1, capacity=32)
    ids = torch.randint(1, 40, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits[0]
    found = decoder(ids[0, :20].tolist())  # as a prompt, then token by token
    torch.testing.assert_close(found, expected[19], rtol=2e-3, atol=2e-4)
    for at in range(20, 24):
        torch.testing.assert_close(decoder([int(ids[0, at])]), expected[at], rtol=2e-3, atol=2e-4)
    size = model.model.layers[0].self_attn.head_dim
    assert decoder.cache_bytes / plain.cache_bytes == pytest.approx((1 + 4 / size) / 4)
    wide = plain(ids[0].tolist())
    assert float((wide - expected[23]).abs().max()) > 5 * float((decoder_again(model, ids) - expected[23]).abs().max())


def decoder_again(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """All tokens one by one."""
    decoder = Decoder(model, threads=1, capacity=32)
    for token in ids[0].tolist():
        logits = decoder([token])
    return logits


def test_other_codes_are_refused() -> None:
    model = build("llama")
    apply(model, QuantizeCache(bits=4), progress=False)
    assert "rounded to 4 bits" in str(Decoder.supports(model))
    changed = build("llama")
    apply(changed, QuantizeCache(), progress=False)
    del changed.model.layers[1].self_attn.cache_rounding
    assert "not at all" in str(Decoder.supports(changed))
    changed.set_attn_implementation("sdpa")  # keys and values are as they are again
    assert Decoder.supports(changed) is None
