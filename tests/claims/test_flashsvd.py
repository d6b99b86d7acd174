"""FlashSVD's experiments on small shapes: what they say is what they measured, and a wrong tile is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from actkit.claims import flashsvd
from actkit.compression.flashsvd.memory import block_peaks

SIZES = flashsvd.Sizes(rows=4, length=64, rounds=1)
RANKS: dict[str, Any] = {"query": 4, "key": 4, "value": 4, "output": 16, "up": 16, "down": 16}


@pytest.fixture(scope="module")
def arms() -> flashsvd.Arms:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 256, "num_hidden_layers": 2}
    return flashsvd.Arms(BertModel(BertConfig(**shape, vocab_size=1000)), RANKS, None, SIZES)


def test_batches_are_padded_where_they_say(arms: flashsvd.Arms) -> None:
    right, left, odd = (arms.batch(how)["attention_mask"] for how in ("right", "left", "odd"))
    assert right[:, 0].all() and left[:, -1].all() and not right[1:, -1].any() and not left[1:, 0].any()
    assert torch.equal(right.sum(1), left.sum(1)) and right[0].all() and odd.shape[1] % 64


def test_what_is_said_is_what_was_measured(arms: flashsvd.Arms) -> None:
    found = flashsvd.same(arms)
    assert found.passed and found.here.count("(") == 3
    peaks = [max(block_peaks(model, arms.batch("right")).values()) for model in (arms.plain, arms.tiled)]
    assert f"blocks {peaks[1] / peaks[0]:.3f} x" in flashsvd.smaller(arms).here
    assert flashsvd.meaning(arms).passed


def test_a_wrong_tile_is_noticed(arms: flashsvd.Arms) -> None:
    block = next(module for module in arms.tiled.modules() if type(module).__name__ == "FlashBlock")
    weight = block.inner.intermediate.dense.storage.left.tensor
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        assert not flashsvd.same(arms).passed
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1
