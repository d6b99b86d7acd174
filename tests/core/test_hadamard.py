"""Hadamard matrices against scipy's and their definition, rotations against dense products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from actkit.core.layers.hadamard import Rotation, hadamard, odd_orders, orders


@pytest.mark.parametrize("size", [1, 2, 8, 128, 512])
def test_powers_of_two_are_scipys(size: int) -> None:
    np.testing.assert_array_equal(hadamard(size).numpy(), linalg.hadamard(size))


@pytest.mark.parametrize("size", [12, 20, 28, 36, 24, 48, 72, 384, 576, 640, 1536, *odd_orders()])
def test_rows_are_orthogonal(size: int) -> None:
    matrix = hadamard(size).double()
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.mT, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 4, 12, 24, 128, 576])
def test_a_rotation_is_the_dense_product(size: int) -> None:
    rotation = Rotation.drawn(size, "0 R1")
    dense = torch.diag(rotation.signs.double()) @ hadamard(size).double() / size**0.5
    x = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation(x), x @ dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotation.inverted()(x), x @ dense.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotation.rows(x.mT), dense.mT @ x.mT, rtol=1e-12, atol=1e-12)
    narrow = rotation(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow, (x.bfloat16().double() @ dense).bfloat16(), rtol=1e-2, atol=1e-2)


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(576)
    x[7] = 100.0
    torch.testing.assert_close(Rotation.drawn(576, "")(x).abs(), torch.full((576,), 100 / 24))


def test_signs_follow_from_the_text_for_ever() -> None:
    """The first bits of SHAKE-256 of "0 R1", as any implementation gives them."""
    assert Rotation.drawn(8, "0 R1").signs.tolist() == [1, -1, -1, 1, 1, 1, -1, 1]
    assert not torch.equal(Rotation.drawn(64, "0 R1").signs, Rotation.drawn(64, "1 R1").signs)
    assert 0.4 < Rotation.drawn(4096, "0 R1").signs.eq(1).float().mean() < 0.6


def test_factors_stay_small() -> None:
    assert orders(1536) == (64, 2, 12) and orders(576) == (16, 36) and orders(640) == (32, 20)


@pytest.mark.parametrize("size", [0, 3, 6, 688, 11008])
def test_other_sizes_are_refused_and_the_possible_ones_listed(size: int) -> None:
    with pytest.raises(ValueError, match=rf"size: {size} channels were given, .* 2\^k x 12, 20, 28, 36, 44, 60"):
        Rotation(torch.ones(size))
