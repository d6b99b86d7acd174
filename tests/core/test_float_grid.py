"""Values and codes against the formula in NumPy float64, torch's float8 casts and compressed-tensors' FP4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from torch import Tensor

from actkit.core.grids.floats import FloatGrid, fp4, fp8, mxfp4, nvfp4

FORMATS = [(e, m) for e in range(1, 6) for m in range(7) if 3 <= 1 + e + m <= 8]
ONE = torch.ones(1)


def by_hand(x: np.ndarray, exponent_bits: int, mantissa_bits: int, bias: float) -> np.ndarray:
    """LLM-FP4's formula, in float64, with a real exponent bias."""
    largest = (2 - 2.0**-mantissa_bits) * 2.0 ** (2**exponent_bits - 1 - bias)
    x = np.clip(x.astype(np.float64), -largest, largest)
    _, exponent = np.frexp(x * 2.0**bias)  # floor(log2|x| + bias) + 1
    exponent = np.maximum(1, exponent - 1)
    step = 2.0 ** (exponent - mantissa_bits - bias)
    return np.rint(x / step) * step


def samples() -> Tensor:
    """Normal values, every half of a step of E2M1 (ties), powers of two, zeros of both signs."""
    normal = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3
    halves = torch.arange(-64, 65) / 8
    powers = 2.0 ** torch.arange(-20, 12)
    return torch.cat((normal, halves, powers, -powers, 1.97 * powers, torch.tensor([0.0, -0.0])))


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), FORMATS)
def test_values_are_those_of_the_formula(exponent_bits, mantissa_bits):
    grid, x = FloatGrid(exponent_bits, mantissa_bits), samples()
    for bias in (grid.bias, grid.bias + 1, grid.bias - 3):  # exact in float32
        found = grid.fake(x, torch.tensor([2.0 ** (grid.bias - bias)]))
        np.testing.assert_array_equal(found.numpy(), by_hand(x.numpy(), exponent_bits, mantissa_bits, bias))
    bias = torch.tensor([grid.bias + 0.37])
    found = grid.fake(x, grid.scale_of_bias(bias)).numpy()
    close = np.isclose(found, by_hand(x.numpy(), exponent_bits, mantissa_bits, float(bias)), rtol=1e-5, atol=0)
    assert close.mean() > 0.99  # all but values at a tie


@pytest.mark.parametrize(
    ("exponent_bits", "mantissa_bits", "bias", "expected"),
    [
        (2, 1, 1, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        (1, 2, 1, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
        (3, 0, 4, [0, 0.125, 0.25, 0.5, 1, 2, 4, 8]),
    ],
)
def test_the_values_of_four_bits(exponent_bits, mantissa_bits, bias, expected):
    grid = FloatGrid(exponent_bits, mantissa_bits)
    scale = grid.scale_of_bias(torch.tensor([float(bias)]))
    codes = torch.arange(16, dtype=torch.uint8)
    found = grid.dequantize(codes, scale)
    assert found.tolist() == expected + [-value for value in expected]
    again, *_ = grid.quantize(found, scale)
    assert torch.equal(again, codes)


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), FORMATS)
def test_codes_come_back(exponent_bits, mantissa_bits):
    grid = FloatGrid(exponent_bits, mantissa_bits)
    codes = torch.arange(2**grid.bits).byte()
    held = grid.dequantize(codes, 0.7 * ONE)
    assert torch.equal(grid.quantize(held, 0.7 * ONE)[0], codes)
    positive = held[: len(held) // 2]
    assert (positive.diff() > 0).all() and torch.isclose(positive[-1], torch.tensor(0.7 * grid.largest))


@pytest.mark.parametrize(
    ("grid", "dtype"), [(fp8(), torch.float8_e4m3fn), (FloatGrid(5, 2, reserved="top"), torch.float8_e5m2)]
)
def test_eight_bits_are_torchs_casts(grid, dtype):
    x = torch.cat((samples(), samples() * 1e-3, samples() * 30)).clamp(-grid.largest, grid.largest)
    assert grid.largest == torch.finfo(dtype).max
    cast = x.to(dtype)
    assert torch.equal(grid.fake(x, ONE), cast.float())
    codes, *_ = grid.quantize(x, ONE)
    assert torch.equal(codes, cast.view(torch.uint8))
    kept = ~cast.view(torch.uint8).view(dtype).float().isnan()
    assert kept.all() and torch.equal(grid.dequantize(codes, ONE), cast.float())


def test_fp4_is_that_of_compressed_tensors():
    x = samples()
    for scale in (1.0, 0.37, 12.0):
        found = fp4().fake(x, torch.tensor([scale])) / scale
        torch.testing.assert_close(found, cast_to_fp4((x / scale).clone()), rtol=1e-6, atol=0)
    assert torch.equal(fp4().fake(x, ONE), cast_to_fp4(x.clone()))


def test_scales_of_mxfp4_are_those_of_compressed_tensors():
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 256)[:, None]
    x[0, 0], x[1, 0] = 7.0, 6.99  # at 1.75 * 2^k the exponent is one more
    found, _ = mxfp4().parameters(x)
    assert found.shape == (256, 1)
    assert torch.equal(torch.log2(found[:, 0]) + 127, generate_mx_scales(x.abs().amax(1)))
    expected = cast_to_fp4((x / found).clamp(-6, 6)) * found
    assert torch.equal(mxfp4().fake(x), expected)


def test_nvfp4_is_that_of_compressed_tensors():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 64)[:, None]
    args = QuantizationArgs(
        num_bits=4, type="float", group_size=16, strategy="tensor_group", scale_dtype=torch.float8_e4m3fn
    )
    whole = generate_gparam(x.amin(), x.amax())
    groups = x.unflatten(1, (-1, 16))
    local, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=whole)
    found, _ = nvfp4().parameters(x)
    torch.testing.assert_close(found, local.float() / whole, rtol=1e-6, atol=0)
    expected = cast_to_fp4((groups / found[..., None]).clamp(-6, 6)) * found[..., None]
    assert torch.equal(nvfp4().fake(x), expected.flatten(1))


def test_the_range_ends_at_the_largest_value():
    x = samples()
    for exponent_bits, mantissa_bits in FORMATS:
        grid = FloatGrid(exponent_bits, mantissa_bits)
        torch.testing.assert_close(grid.fake(x).abs().max(), x.abs().max(), rtol=1e-6, atol=0)
    assert torch.equal(fp4().fake(torch.zeros(2, 8)), torch.zeros(2, 8))
    tiny = 1e-38 * x
    assert (fp4().fake(tiny) - tiny).abs().max() <= tiny.abs().max() / 6


def test_other_formats_are_refused():
    for exponent_bits, mantissa_bits in ((0, 3), (6, 1), (1, 0), (4, 4), (2, -1)):
        with pytest.raises(ValueError, match=f"exponent_bits, mantissa_bits: {exponent_bits} and {mantissa_bits} were"):
            FloatGrid(exponent_bits, mantissa_bits)
