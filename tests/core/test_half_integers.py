"""Half-integers against the formula of StatsQ in numpy, and what stores them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from actkit.core.grids.grid import Grid
from actkit.core.grids.half_integers import HalfIntegerGrid
from actkit.core.grids.ranges import Shrunk, min_max, twice_mean
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import HalfIntegerWeight, IntegerWeight, rounded


def statsq(weight: np.ndarray, bits: int) -> np.ndarray:
    """The sheet's formula: W_q = s (round(u n - 0.5) + 0.5) / n, s = 2 mean |W| of a row."""
    n = 2 ** (bits - 1)
    scale = 2 * np.abs(weight).mean(1, keepdims=True)
    unit = np.clip(weight / scale, -1, 1 - 1e-6)
    return scale * (np.round(unit * n - 0.5) + 0.5) / n


def weights(rows: int = 6, columns: int = 24) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_levels_are_those_of_the_formula(bits: int) -> None:
    found = HalfIntegerGrid(bits).fake(weights())
    np.testing.assert_allclose(found.numpy(), statsq(weights().numpy(), bits), rtol=1e-12)
    levels = (found / (2 * weights().abs().mean(1, keepdim=True)) * 2**bits).round().unique()
    assert levels.tolist() == list(range(1 - 2**bits, 2**bits, 2))  # odd: no zero


def test_one_bit_is_a_sign() -> None:
    """The formula would give a third level at the lower end, as it rounds half to even there."""
    found, mean = HalfIntegerGrid(1).fake(weights()), weights().abs().mean(1, keepdim=True)
    torch.testing.assert_close(found, weights().sign() * mean)


@pytest.mark.parametrize("settings", [{}, {"group_size": 8}, {"group_size": 3, "group_axis": "output"}])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7])
def test_codes_stand_for_the_values(bits: int, settings: dict) -> None:
    grid, x = HalfIntegerGrid(bits, **settings), weights().float()
    codes, scale, zero = grid.quantize(x)
    assert zero is None and codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    torch.testing.assert_close(grid.dequantize(codes, scale), grid.fake(x), rtol=0, atol=0)
    assert Grid.from_spec(grid.spec()) == grid


def test_rows_of_zeros_and_small_rows() -> None:
    x = weights().float()
    x[0], x[1] = 0, x[1] * 1e-20
    found = HalfIntegerGrid(3).fake(x)
    assert float(found[0].abs().max()) < 1e-37
    np.testing.assert_allclose(found[1:].numpy(), statsq(x[1:].double().numpy(), 3), rtol=1e-5)


def test_the_gradient_is_that_of_the_values() -> None:
    x = weights().requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64)
    HalfIntegerGrid(2).fake_straight(x).backward(upstream)
    assert torch.equal(x.grad, upstream)  # also of what is clipped
    x.grad = None
    grid = HalfIntegerGrid(2)
    grid.fake(x, grid.parameters(x)[0]).backward(upstream)
    inside = (x / (2 * x.abs().mean(1, keepdim=True))).abs() <= 1
    torch.testing.assert_close(x.grad, torch.where(inside, upstream, 0))


def test_ranges() -> None:
    groups = weights()[:, None]
    assert torch.equal(twice_mean(groups, HalfIntegerGrid(2))[1][..., 0], 2 * groups.abs().mean(-1))
    low, high = Shrunk(0.9)(groups, HalfIntegerGrid(2))
    assert torch.equal(low, min_max(groups, HalfIntegerGrid(2))[0] * 0.9) and torch.equal(
        high[..., 0], groups.amax(-1) * 0.9
    )


@pytest.mark.parametrize(("bits", "container"), [(1, 4), (2, 4), (3, 4), (4, 8), (7, 8)])
def test_a_weight_takes_its_bits_and_others_read_odd_integers(bits: int, container: int) -> None:
    weight = weights(8, 32).float()
    stored = rounded(weight, HalfIntegerGrid(bits))
    assert isinstance(stored, HalfIntegerWeight) and stored.codes.nbytes == 8 * 32 * bits // 8
    torch.testing.assert_close(stored.dequantize(), HalfIntegerGrid(bits).fake(weight), rtol=0, atol=0)
    others = stored.as_others_read()
    assert isinstance(others, IntegerWeight) and others.grid.bits == container and others.grid.symmetric
    odd = others.integers().short() - others.grid.middle
    assert bool((odd % 2 == 1).all()) and int(odd.abs().max()) < 2**bits
    torch.testing.assert_close(others.dequantize(), stored.dequantize(), rtol=0, atol=0)
    again = HalfIntegerWeight.from_spec(stored.spec(), (8, 32), torch.float32)
    again.load_state_dict(stored.state_dict())
    assert torch.equal(again.dequantize(), stored.dequantize())


def test_the_kernel_multiplies_them() -> None:
    linear = nn.Linear(32, 8)
    layer = ActLinear.of(linear, weight=rounded(linear.weight, HalfIntegerGrid(2)))
    x = torch.randn(1, 32)
    with torch.no_grad():
        expected = layer(x)
        assert layer.pack() and layer._packed is not None
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
