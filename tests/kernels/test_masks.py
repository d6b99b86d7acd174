"""Masked inputs against NumPy's stable sort, and against what selections compute in plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actkit.core.layers.selections import Threshold, TopK
from actkit.kernels import masked_inputs, operators

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with ties, zeros, infinities and NaN."""
    x = torch.randn(41, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    x[3, width // 2] = torch.nan
    x[4] = 0
    x[5, : width // 2 + 1] = torch.inf
    x[6] = torch.tensor([1.0, -1.0]).repeat(width)[:width].to(dtype)
    x[7] = (x[7] * 2).round()
    return x


def largest(x: torch.Tensor, score: torch.Tensor | None, k: int) -> np.ndarray:
    """The k largest |x| * score of each row, of equal ones the first, by a stable sort; NaN is the largest."""
    scored = x.float().abs().numpy() * (1 if score is None else score.numpy())
    order = np.argsort(-np.where(np.isnan(scored), np.inf, scored), axis=-1, kind="stable")[:, :k]
    keep = np.zeros(scored.shape, bool)
    np.put_along_axis(keep, order, True, axis=-1)
    return keep


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 1000])
@pytest.mark.parametrize("scored", [False, True])
def test_the_k_largest_of_a_row_stay(dtype: torch.dtype, width: int, scored: bool) -> None:
    x = inputs(width, dtype)
    score = torch.rand(width, generator=torch.Generator().manual_seed(1)) if scored else None
    for k in sorted({0, 1, width // 4, width // 2, width - 1, width}):
        keep = torch.from_numpy(largest(x, score, k))
        expected = torch.where(keep, x, torch.zeros((), dtype=dtype))
        assert torch.equal(masked_inputs(x, score, k=k).nan_to_num(7.0), expected.nan_to_num(7.0)), k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("scored", [False, True])
def test_what_is_above_a_threshold_stays(dtype: torch.dtype, threshold: float, scored: bool) -> None:
    x = inputs(65, dtype)
    score = torch.rand(65, generator=torch.Generator().manual_seed(1)) if scored else None
    with np.errstate(invalid="ignore"):
        values = x.float().abs().numpy() * (np.float32(1) if score is None else score.numpy())
        keep = torch.from_numpy(~(values <= np.float32(threshold)))
    expected = torch.where(keep, x, torch.zeros((), dtype=dtype))
    assert torch.equal(masked_inputs(x, score, threshold=threshold).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("selection", [TopK(5), TopK(99), Threshold(0.7), TopK(3, torch.rand(12)), Threshold(0.2)])
def test_selections_use_it_only_without_gradients(selection: Any) -> None:
    x = torch.randn(2, 9, 12)
    with torch.no_grad():
        fast = selection(x)
    slow = selection(x.requires_grad_())
    assert torch.equal(fast, slow) and slow.requires_grad
    slow.sum().backward()
    assert torch.equal(x.grad != 0, slow != 0)


@torch.no_grad()
def test_strides_and_empty_rows() -> None:
    x = torch.randn(6, 8).t()
    assert torch.equal(masked_inputs(x, k=2), masked_inputs(x.contiguous(), k=2))
    assert masked_inputs(torch.empty(0, 8), k=2).shape == (0, 8)
    assert masked_inputs(torch.empty(2, 3, 8, dtype=torch.bfloat16), threshold=1.0).shape == (2, 3, 8)


def test_without_numba_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(33, torch.float32)
    expected = masked_inputs(x, k=9), masked_inputs(x, threshold=0.4)
    monkeypatch.setattr("actkit.kernels.masks.has_numba", lambda: False)
    for found, same in zip((masked_inputs(x, k=9), masked_inputs(x, threshold=0.4)), expected, strict=True):
        assert torch.equal(found.nan_to_num(7.0), same.nan_to_num(7.0))


def test_the_operator_is_sound() -> None:
    x, score = torch.randn(3, 8), torch.rand(8)
    torch.library.opcheck(torch.ops.actkit.masked_inputs.default, (x, score, -1.0, 3))
    torch.library.opcheck(torch.ops.actkit.masked_inputs.default, (x.bfloat16(), None, 0.5, -1))


@pytest.mark.parametrize(
    ("x", "score", "chosen", "text"),
    [
        (torch.ones(2, 4, dtype=torch.float64), None, {"k": 1}, "x: torch.float64"),
        (torch.ones(2, 4), torch.ones(3), {"k": 1}, "score: "),
        (torch.ones(2, 4), None, {}, "threshold, k: "),
        (torch.ones(2, 4), None, {"k": 1, "threshold": 0.5}, "threshold, k: "),
    ],
)
def test_what_it_does_not_take(x: torch.Tensor, score: Any, chosen: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        masked_inputs(x, score, **chosen)


def test_a_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match="gradient"):
        masked_inputs(torch.ones(2, 4, requires_grad=True), k=1)
    assert operators.has_numba()
