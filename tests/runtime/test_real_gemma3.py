"""The embedded Gemma 3 270M: what the decoder writes, beside transformers."""

from __future__ import annotations

import pytest
import torch

from actkit.runtime.decoder import Decoder
from actkit.zoo.loading import open_model
from actkit.zoo.packaged import PACKAGED, is_installed

LENGTH = 220


@torch.no_grad()
@pytest.mark.slow(reason="a real model writes 220 tokens twice, in float32")
def test_gemma3_writes_what_transformers_writes() -> None:
    if not is_installed("gemma3"):
        pytest.skip(f"gemma3: its package is not installed; {PACKAGED['gemma3'].install}")
    model, tokenizer = open_model("gemma3", dtype="float32")
    assert tokenizer is not None
    ids = tokenizer("The history of the printing press begins", return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected, start = model(written).logits[0].float(), ids.shape[1]
    decoder = Decoder(model, capacity=written.shape[1])
    assert list(decoder.generate(ids, max_new_tokens=LENGTH, end=())) == written[0, start:].tolist()
    decoder.reset()
    for at, token in enumerate(written[0, :-1].tolist()):
        found = decoder([token])
        assert (found - expected[at]).norm() < 1e-4 * expected[at].norm()
