"""A weight of two factors: both products, head by head, stored in any way, under selections and corrections."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.layers.selections import Threshold, TopK
from actkit.core.layers.weights import DenseWeight, IntegerWeight, stored_numbers

OUT, IN, RANK = 24, 32, 8


def weight(heads: int = 1, dtype: torch.dtype = torch.float32) -> LowRankWeight:
    generator = torch.Generator().manual_seed(heads)
    left = torch.randn(OUT, RANK, generator=generator, dtype=torch.float64)
    right = torch.randn(heads * RANK, IN, generator=generator, dtype=torch.float64)
    return LowRankWeight(left.to(dtype), right.to(dtype), heads)


def by_hand(stored: LowRankWeight) -> torch.Tensor:
    left, right = stored.left.dequantize().double(), stored.right.dequantize().double()
    size = OUT // stored.heads
    rows = [left[h * size : h * size + size] @ right[h * RANK : h * RANK + RANK] for h in range(stored.heads)]
    return torch.cat(rows)


@pytest.mark.parametrize("heads", [1, 3])
def test_it_multiplies_as_the_product_does(heads: int) -> None:
    stored, x = weight(heads), torch.randn(2, 5, IN)
    product, bias = by_hand(stored), torch.randn(OUT)
    torch.testing.assert_close(stored.dequantize().double(), product, rtol=1e-5, atol=1e-5)
    for given in (x, x[0, 0], x[:, :0]):
        expected = F.linear(given.double(), product, bias.double())
        torch.testing.assert_close(stored.linear(given, bias).double(), expected, rtol=1e-4, atol=1e-4)
    assert stored.shape == (OUT, IN) and stored.nbytes == 4 * (OUT * RANK + heads * RANK * IN)
    assert stored_numbers(stored) == OUT * RANK + heads * RANK * IN
    assert stored.bytes_read(0.5) == 4 * (OUT * RANK + heads * RANK * IN / 2)


def test_the_product_is_never_formed(monkeypatch) -> None:
    def refuse(self: LowRankWeight) -> torch.Tensor:
        raise AssertionError("the product was formed")

    monkeypatch.setattr(LowRankWeight, "_values", refuse)
    for heads in (1, 3):
        layer = ActLinear(weight(heads), torch.randn(OUT), TopK(9), LowRank(torch.randn(OUT, 2), torch.randn(2, IN)))
        assert not layer.pack()
        layer(torch.randn(1, IN))


@pytest.mark.parametrize("heads", [1, 3])
def test_under_a_selection_and_a_correction(heads: int) -> None:
    stored, x = weight(heads), torch.randn(6, IN)
    for of in ("all", "dropped"):
        correction = LowRank(torch.randn(OUT, 2), torch.randn(2, IN), of=of)  # type: ignore[arg-type]
        layer = ActLinear(stored, None, Threshold(0.5), correction)
        kept = x * (x.abs() > 0.5)
        added = (x if of == "all" else x - kept) @ (correction.left @ correction.right).t()
        expected = kept.double() @ by_hand(stored).t() + added
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 3])
def test_both_factors_are_rounded_and_read_back(heads: int) -> None:
    stored = weight(heads).rounded(IntegerGrid(4, 8))
    assert isinstance(stored.left, IntegerWeight) and isinstance(stored.right, IntegerWeight)
    layer, x = ActLinear(stored), torch.randn(3, IN)
    torch.testing.assert_close(layer(x).double(), x.double() @ by_hand(stored).t(), rtol=1e-4, atol=1e-4)
    again = ActLinear.from_spec(layer.spec())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x)) and again.storage.heads == heads
    assert "factors of rank 8" in stored.describe() and weight().misfit(IntegerGrid(4, 16)) is not None
    assert stored.nbytes < weight(heads).nbytes / 3


@pytest.mark.parametrize("heads", [1, 3])
def test_parts_are_two_matrices_of_the_same_rows(heads: int) -> None:
    stored = weight(heads)
    left, right = stored.factors(range(8, 16))
    torch.testing.assert_close(left @ right, stored.dequantize()[8:16])
    assert right.shape == (RANK, IN)
    left, right = stored.factors()
    torch.testing.assert_close(left @ right, stored.dequantize())
    if heads > 1:
        with pytest.raises(ValueError, match="cut a head of 8"):
            stored.factors(range(4, 8))


def test_dtypes_follow_and_a_plain_layer_has_the_product() -> None:
    layer = ActLinear(weight(3))
    assert layer.bfloat16().storage.dtype == torch.bfloat16
    assert isinstance(layer.dense(), nn.Linear) and layer.filled_slots == ("weight",)
    torch.testing.assert_close(layer.double()(torch.eye(IN, dtype=torch.float64)).t(), layer.weight + 0)


@pytest.mark.parametrize(("left", "right", "heads"), [((6, 2), (3, 4), 1), ((6, 2), (4, 4), 4), ((6, 2), (2, 4), 0)])
def test_factors_that_do_not_fit(left: tuple[int, int], right: tuple[int, int], heads: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        LowRankWeight(DenseWeight(torch.zeros(left)), torch.zeros(right), heads)
