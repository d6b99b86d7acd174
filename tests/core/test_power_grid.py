"""Powers of two against NumPy in float64; TRIP's factors against FQ-ViT's formula and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.powers import PowerGrid, power_factors

ONE = torch.ones(1)


def weights(rows: int = 64, columns: int = 300) -> torch.Tensor:
    """Rows of attention: flat and sharp ones, exact zeros, a one, exact powers of two."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(rows, columns, generator=generator) * torch.linspace(0.1, 8, rows)[:, None]
    chances = torch.softmax(scores.masked_fill(torch.rand(rows, columns, generator=generator) < 0.2, -torch.inf), -1)
    chances[0] = 0
    chances[0, 0] = 1
    chances[1, :20] = 2.0 ** -torch.arange(20)
    return chances


def by_hand(p: np.ndarray, bits: int, zero: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and codes of the release's formula: q = round(-log2 p), clamped, 0 from the first one without a code."""
    with np.errstate(divide="ignore"):
        q = np.rint(-np.log2(p.astype(np.float64)))
    first = 2**bits - (1 if zero == "last" else 0)  # the first exponent that is 0
    values = np.where(q >= first, 0.0, 2.0 ** -np.clip(q, 0, 2**bits - 1))
    return values, np.where(q >= first, first, np.clip(q, 0, None))


@pytest.mark.parametrize("zero", ["last", "beyond"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_values_and_codes_are_those_of_the_formula(bits, zero):
    grid, p = PowerGrid(bits, zero=zero), weights()
    values, expected = by_hand(p.numpy(), bits, zero)
    codes, _, none = grid.quantize(p, ONE)
    assert none is None
    np.testing.assert_array_equal(grid.fake(p, ONE).numpy(), values)
    np.testing.assert_array_equal(codes.numpy(), expected)
    np.testing.assert_array_equal(grid.dequantize(codes, ONE).numpy(), values)
    assert (
        int(codes.max()) < 2**bits if zero == "last" else int(codes.max()) == 2**bits
    )  # one more than bits tell apart


def test_a_scale_shifts_the_powers():
    grid, x = PowerGrid(4), torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    scale, _ = grid.parameters(x)
    assert torch.equal(scale[..., 0], x.amax(-1))
    rounded = grid.fake(x)
    exponents = torch.log2(rounded[rounded > 0] / scale.expand_as(x)[rounded > 0])
    torch.testing.assert_close(exponents, exponents.round(), rtol=0, atol=1e-6)
    assert torch.equal(grid.fake(2 * x), 2 * rounded)


def test_what_lies_outside():
    grid = PowerGrid(3)
    x = torch.tensor([0.0, -0.0, -1.0, -1e30, 3.0, torch.inf, torch.nan, 1e-38, 1e-45])
    found = grid.fake(x, ONE)
    assert found[:4].tolist() == [0, 0, 0, 0] and found[4:6].tolist() == [1, 1]
    assert found[6].isnan() and found[7:].tolist() == [0, 0]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert grid.fake(x.to(dtype), ONE).dtype == dtype


def test_it_is_read_back_from_its_settings():
    grid = PowerGrid(5, zero="beyond", scope="tensor")
    assert Grid.from_spec(grid.spec()) == grid and "powers of two" in grid.describe()
    for settings in ({"bits": 1}, {"bits": 7}, {"zero": "first"}, {"scale_dtype": "e4m3"}, {"group_size": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            PowerGrid(**{"bits": 4, **settings})


# -- factors -----------------------------------------------------------------------------------------------------------


def test_factors_are_those_of_fq_vit():
    """Its formula in NumPy: s_K from the whole range, candidates s_K / 2^(K - i), one zero point, least squares."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 24, generator=generator) * torch.logspace(-2, 1, 24) + torch.linspace(-0.5, 0.2, 24)
    for bits, powers in ((8, 3), (8, 0), (4, 4)):
        scales, zero, exponents = power_factors(x, x.amin(0), x.amax(0), IntegerGrid(bits, scope="tensor"), powers)
        y = x.double().numpy()
        top = 2**bits - 1
        largest = np.float32((np.float32(y.max()) - np.float32(y.min())) / np.float32(top))
        point = np.clip(np.rint(-np.float32(y.min()) / largest), 0, top)
        candidates = [np.float64(largest) / 2 ** (powers - i) for i in range(powers + 1)]
        rounded = [(np.clip(np.rint(y / s) + point, 0, top) - point) * s for s in candidates]
        errors = np.stack([((each - y) ** 2).sum(0) for each in rounded])
        assert int(zero) == point
        np.testing.assert_array_equal(exponents.numpy(), errors.argmin(0))
        np.testing.assert_allclose(scales.numpy(), np.array(candidates)[errors.argmin(0)], rtol=1e-6)
        chosen = IntegerGrid(bits, scope="tensor").fake(x, scales, zero).double().numpy()
        np.testing.assert_allclose(((chosen - y) ** 2).sum(0), errors.min(0), rtol=1e-3)
        assert powers == 0 or len(set(exponents.tolist())) > 2


def test_a_factor_is_a_shift_of_the_weights_column():
    """What the factors are for: integers times shifted columns, one scale and one zero point for the whole tensor."""
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(50, 12, generator=generator) * torch.logspace(-1, 1, 12)).double()
    weight = torch.randn(7, 12, generator=generator).double()
    grid = IntegerGrid(8, scope="tensor")
    scales, zero, exponents = power_factors(x, x.amin(0), x.amax(0), grid, 3)
    codes = grid.quantize(x, scales, zero)[0].double() - zero
    base = float((scales / 2.0**exponents)[0])
    shifted = weight * 2.0**exponents
    expected = grid.fake(x, scales.double(), zero) @ weight.T
    torch.testing.assert_close(base * (codes @ shifted.T), expected, rtol=1e-6, atol=1e-6)


def test_factors_want_zero_points():
    x = torch.randn(4, 3)
    for grid, powers in ((IntegerGrid(8, symmetric=True), 3), (IntegerGrid(8), -1)):
        with pytest.raises(ValueError, match="powers, grid: "):
            power_factors(x, x.amin(0), x.amax(0), grid, powers)
