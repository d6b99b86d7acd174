"""Prompts of bfloat16 models: what lies between the products against float32 arithmetic on the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoded import family

from actkit.runtime import prompt
from actkit.runtime.decoder import Decoder

IDS = torch.randint(300, (1, 60), generator=torch.Generator().manual_seed(0))
FAMILIES = [
    *("llama, biases", "qwen3, windows", "phi3", "granite", "stablelm", "olmo, clamped", "starcoder2", "gemma2"),
    *("olmo2", "gpt_neox", "opt", "cohere2", "nemotron"),
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits[0].float()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pairs", [True, False])
def test_they_lose_no_more_than_in_transformers(name: str, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one part and in two, on one thread and on two, by torch's attention and by ours if the processor can."""
    monkeypatch.setattr(prompt, "available", lambda own=prompt.available: own() if pairs else False)
    model = family(name).bfloat16()
    exact, theirs = logits(copy.deepcopy(model).float()), logits(model)
    allowed = 1.3 * (theirs - exact).norm()
    for threads in (1, 2):
        with Decoder(model, capacity=64, threads=threads) as decoder:
            assert (decoder.all_logits(IDS[0].tolist()) - exact).norm() < allowed
            decoder.reset()
            parts = [decoder.all_logits(part.tolist()) for part in (IDS[0, :23], IDS[0, 23:])]
            assert (torch.cat(parts) - exact).norm() < allowed
