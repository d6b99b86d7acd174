"""Attention of many tokens against float64: heads that share keys, windows, a cache that is not empty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from actkit.kernels.prompt_attention import attend, available

pytestmark = pytest.mark.skipif(not available(), reason="the processor multiplies no pairs of bfloat16")


def expected(query: Tensor, keys: Tensor, values: Tensor, begin: int, window: int, scaling: float) -> Tensor:
    shared_by = len(query) // len(keys)
    keys, values = (each.double().repeat_interleave(shared_by, 0) for each in (keys, values))
    scores = query.double() @ keys.transpose(1, 2) * scaling
    ahead = torch.arange(scores.shape[2])[None] - (begin + torch.arange(scores.shape[1]))[:, None]
    seen = (ahead <= 0) & (ahead > -window) if window else ahead <= 0
    mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return mixed.transpose(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("heads", "shared_by", "tokens", "size", "begin", "window"),
    [
        (9, 3, 130, 64, 0, 0),
        (4, 1, 17, 96, 0, 0),
        (2, 2, 1, 64, 0, 0),
        (4, 2, 70, 128, 59, 0),
        (4, 4, 100, 32, 0, 7),
        (2, 1, 90, 80, 200, 65),
        (2, 1, 64, 6, 64, 300),
    ],
)
def test_it_is_softmax_attention(heads: int, shared_by: int, tokens: int, size: int, begin: int, window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(heads, tokens, size, generator=generator).bfloat16()
    keys, values = (
        torch.randn(heads // shared_by, begin + tokens, size, generator=generator).bfloat16() for _ in range(2)
    )
    found = attend(query, keys, values, begin, window, np.float32(size**-0.5))
    wanted = expected(query, keys, values, begin, window, size**-0.5)
    assert found.shape == (tokens, heads * size)
    assert (found.double() - wanted).norm() < 5e-3 * wanted.norm()  # half a unit of bfloat16 is 2e-3
    assert (found.double() - wanted).abs().max() < 3e-2


def test_large_scores_do_not_overflow_and_a_window_that_moves_is_followed() -> None:
    """The largest scores, some thousand, are those of other keys; without the largest taken off they would be Inf."""
    query = torch.full((1, 40, 64), 30.0).bfloat16()
    keys = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 4
    values = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = attend(query, keys, values, 0, 5, np.float32(1.0))
    wanted = expected(query, keys, values, 0, 5, 1.0)
    assert (found.double() - wanted).norm() < 5e-3 * wanted.norm()
