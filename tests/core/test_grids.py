"""What all grids share: which values share a scale, given parameters, gradients, ranges, files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from actkit.core.grids.floats import FloatGrid, fp4, mxfp4, nvfp4
from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.powers import PowerGrid
from actkit.core.grids.ranges import LeastSquares, Percentile, min_max
from actkit.core.grids.scales import holds
from actkit.core.layers.weights import IntegerWeight

KINDS = {
    "int8 per token": IntegerGrid(8),
    "int4 in groups": IntegerGrid(4, 8, symmetric=True),
    "int8 per tensor": IntegerGrid(8, scope="tensor"),
    "int6, half a step": IntegerGrid(6, symmetric=True, half_step=True),
    "int4, 16-bit scales": IntegerGrid(4, 8, scale_dtype="bfloat16"),
    "int4 along outputs": IntegerGrid(4, 2, "output"),
    "fp4": fp4(),
    "fp4 along outputs": FloatGrid(2, 1, 2, "output"),
    "e3m0 per tensor": FloatGrid(3, 0, scope="tensor"),
    "mxfp4": mxfp4(),
    "nvfp4": nvfp4(),
    "powers of two": PowerGrid(4),
}


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def grid(request: pytest.FixtureRequest) -> Grid:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 6, 32), (6, 32), (2, 3, 4, 64)])
def test_fake_keeps_shape_and_dtype_and_is_what_codes_stand_for(grid: Grid, shape, dtype):
    x = values(*shape, dtype=dtype)
    rounded = grid.fake(x)
    assert rounded.shape == x.shape and rounded.dtype == dtype
    codes, scale, zero = grid.quantize(x)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and int(codes.max()) < 2**grid.bits
    if dtype != torch.float64:
        assert torch.equal(rounded, grid.dequantize(codes, scale, zero).to(dtype))
    parameters = grid.parameters(x)
    assert torch.equal(grid.fake(x, *parameters), rounded)
    tracked = x.clone().requires_grad_()
    assert torch.equal(grid.fake(tracked).detach(), rounded)  # a straight-through gradient changes no value
    assert torch.equal(grid.fake(rounded.float(), *parameters), grid.fake(rounded.float(), *parameters))


def test_a_token_is_rounded_alike_in_any_batch(grid: Grid):
    x = values(3, 6, 32)
    if grid.scope == "group" and grid.group_axis == "input" and grid.scale_dtype != "e4m3":
        assert torch.equal(grid.fake(x)[1, 2], grid.fake(x[1, 2]))
        assert torch.equal(grid.fake(x).flatten(0, 1), grid.fake(x.flatten(0, 1)))


def test_what_shares_a_scale():
    x = values(5, 7, 16)
    assert IntegerGrid(8).parameters(x)[0].shape == (5, 7, 1)
    assert IntegerGrid(8, 4).parameters(x)[0].shape == (5, 7, 4)
    scale, zero = IntegerGrid(8, scope="tensor").parameters(x)
    assert scale.shape == zero.shape == (1,)
    torch.testing.assert_close(scale.item(), float(x.max() - x.min()) / 255, rtol=1e-6, atol=0)
    assert IntegerGrid(8, scope="tensor").parameter_shape(3, 5) == (1,)
    assert IntegerGrid(8, 3, scope="tensor").fits(3, 5) is None


def test_given_parameters_are_shared_in_any_way():
    """One for all, one for each channel, one for each part of the channels: each against its own slice."""
    x = values(4, 6)
    channels = torch.rand(6) + 0.1
    grid = IntegerGrid(4, symmetric=True)
    one = grid.fake(x, channels[:1])
    assert torch.equal(one, ((x / channels[0]).round() + 8).clamp(0, 15).sub(8) * channels[0])
    each = grid.fake(x, channels)
    parts = grid.fake(x, channels[:3])
    for c in range(6):
        assert torch.equal(each[:, c], grid.fake(x[:, c : c + 1], channels[c : c + 1])[:, 0])
        assert torch.equal(parts[:, c], grid.fake(x[:, c : c + 1], channels[c // 2 : c // 2 + 1])[:, 0])
    tensor = replace(grid, scope="tensor")
    assert torch.equal(tensor.fake(x, channels), each)  # what is given is taken, whatever would be found


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_those_of_torchs_learned_quantizer(symmetric):
    x = (3 * values(8, 16)).requires_grad_()
    scale, zero = (
        torch.tensor([0.31], requires_grad=True),
        torch.tensor([8.0 if symmetric else 5.0], requires_grad=True),
    )
    weights = values(8, 16).cos()
    expected = torch.autograd.grad(
        (torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, 15, 1.0) * weights).sum(), (x, scale, zero)
    )
    grid = IntegerGrid(4, symmetric=symmetric)
    given = (scale,) if symmetric else (scale, zero)
    found = torch.autograd.grad((grid.fake(x, *given) * weights).sum(), (x, *given))
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs.reshape(mine.shape), rtol=1e-4, atol=1e-4)


def test_a_scale_found_from_the_values_is_a_constant():
    x = values(4, 16).requires_grad_()
    fp4().fake(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_gradients_of_a_float_grid_are_those_of_the_formula():
    """x' = q s: inside of the range dx' = dx + (q - x/s) ds, outside dx' = +-largest ds."""
    x, scale = (3 * values(64)).double().requires_grad_(), torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    grid = fp4()
    rounded = grid.fake(x, scale)
    dx, ds = torch.autograd.grad(rounded.sum(), (x, scale))
    inside = x.abs() <= 6 * scale
    assert 0 < inside.sum() < 64
    assert torch.equal(dx, inside.double())
    torch.testing.assert_close(ds, ((rounded / scale) - torch.where(inside, x / scale, 0.0)).sum().reshape(1))


def test_a_learned_range_has_gradients():
    high = torch.tensor([[[2.0]]], requires_grad=True)
    for grid in (IntegerGrid(4), IntegerGrid(4, symmetric=True, scale_dtype="bfloat16"), fp4()):
        scale, zero = grid.from_range(-high, high)
        rounded = grid.fake(values(1, 8) * 2, scale[0], None if zero is None else zero[0])
        (gradient,) = torch.autograd.grad(rounded.square().sum(), high)
        assert gradient.isfinite().all() and gradient.abs() > 0


# -- against compressed-tensors, which transformers reads with ---------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_parameters_are_those_of_compressed_tensors(bits, symmetric):
    x = values(64, 16)
    x[3], x[4] = x[3].abs() + 1, -x[4].abs() - 1
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    scale, zero = calculate_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), args)
    mine, own_zero = IntegerGrid(bits, symmetric=symmetric, half_step=True).parameters(x)
    torch.testing.assert_close(mine, scale, rtol=1e-6, atol=0)
    if not symmetric:
        assert torch.equal(own_zero.int() - 2 ** (bits - 1), zero.int())


# -- ranges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.99, 0.9, 0.5])
def test_percentiles_are_those_of_numpy(share):
    x = values(3, 4, 50)
    low, high = Percentile(share)(x, IntegerGrid(8))
    out = 50 * (1 - share)
    np.testing.assert_allclose(low[..., 0], np.percentile(x.numpy(), out, axis=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(high[..., 0], np.percentile(x.numpy(), 100 - out, axis=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [IntegerGrid(3, 8), IntegerGrid(2, symmetric=True), fp4()])
def test_least_squares_is_the_best_of_what_is_tried(grid: Grid):
    x = values(8, 32)
    scale, zero = grid.parameters(x, LeastSquares(20, 0.4))
    error = (grid.fake(x, scale, zero) - x).square().unflatten(-1, (scale.shape[-1], -1)).sum(-1)
    groups = x.unflatten(-1, (scale.shape[-1], -1))
    low, high = min_max(groups, grid)
    tried = []
    for t in np.linspace(1, 0.4, 20):
        s, z = grid.from_range(low * float(t), high * float(t))
        rounded = grid.fake(x, s[..., 0], None if z is None else z[..., 0])
        tried.append((rounded - x).square().unflatten(-1, (scale.shape[-1], -1)).sum(-1))
    torch.testing.assert_close(error, torch.stack(tried).amin(0))
    assert error.sum() < tried[0].sum()


# -- scales of 16 bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_of_16_bits(dtype):
    x = values(16, 64)
    grid = IntegerGrid(4, 16, scale_dtype=dtype)
    codes, scale, zero = grid.quantize(x)
    exact = IntegerGrid(4, 16).quantize(x)[1]
    kind = getattr(torch, dtype)
    assert torch.equal(scale, exact.to(kind).float())  # codes are found with the scale that is stored
    expected = ((x.unflatten(1, (4, 16)) / scale[..., None]).round() + zero.float()[..., None]).clamp(0, 15)
    assert torch.equal(codes, expected.flatten(1).byte())
    assert holds(scale, dtype) and not holds(grid.quantize(1e-7 * x)[1], "float16")
    assert grid.fake(1e-30 * x).isfinite().all() and grid.fake(1e30 * x).isfinite().all()


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_spec_says_all(grid: Grid):
    assert Grid.from_spec(grid.spec()) == grid


def test_one_scale_for_all_is_stored_by_row():
    stored = IntegerWeight.quantize(values(6, 16), IntegerGrid(8, scope="tensor", symmetric=True))
    assert torch.equal(stored.dequantize(), IntegerGrid(8, scope="tensor", symmetric=True).fake(values(6, 16)))
