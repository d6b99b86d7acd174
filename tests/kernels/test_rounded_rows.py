"""Products of many rows in integers, against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actkit.kernels import integer_dots
from actkit.kernels.numba_rounded_rows import RoundedRows, multiply_rounded, span_of, takes
from actkit.kernels.quantized import pack_quantized

pytestmark = pytest.mark.skipif(not integer_dots.available(), reason="the processor has no byte products of AVX-512")


def weight_of(outputs, inputs, group, bits, zeros, seed=0, threads=1):
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (outputs, inputs), generator=made, dtype=torch.uint8)
    scale = torch.rand(outputs, inputs // group, generator=made) + 0.1
    zero = torch.randint(2**bits, scale.shape, generator=made, dtype=torch.uint8) if zeros else None
    stored = codes[:, 0::2] | (codes[:, 1::2] << 4) if bits == 4 else codes
    packed = pack_quantized(stored, scale, zero, bits=bits, group_axis="input", threads=threads)
    each = torch.full_like(scale, 2 ** (bits - 1)) if zero is None else zero
    wide = [t.double().repeat_interleave(group, 1) for t in (each, scale)]
    return packed, (codes.double() - wide[0]) * wide[1]


def rounded(x, span):
    """The inputs as the formula rounds them, float64."""
    parts = []
    for part in x.double().split(span, 1):
        step = part.abs().amax(1, keepdim=True) / 127
        parts.append(torch.where(step > 0, torch.round(part / step) * step, 0.0))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group", "threads"),
    [(1, 128, 32, 32, 1), (70, 300, 192, 64, 2), (5, 40, 256, 128, 1), (130, 513, 576, 576, 3), (7, 1, 16, 16, 1)],
)
def test_products_are_those_of_the_formula(bits, zeros, rows, outputs, inputs, group, threads):
    packed, exact = weight_of(outputs, inputs, group, bits, zeros, threads=threads)
    assert takes(packed)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    x[0, : inputs // 2] = 0
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2))
    span = span_of(packed)
    found = multiply_rounded(RoundedRows(x, span), packed, bias, torch.float32)
    wanted = rounded(x, span) @ exact.t() + bias
    size = (x.double().abs() @ exact.abs().t()).clamp(min=1e-6)  # of what is added up
    assert ((found - wanted).abs() / size).max() < 2e-6


def test_bfloat16_goes_in_and_out():
    packed, _ = weight_of(256, 128, 64, 4, True)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = multiply_rounded(RoundedRows(x, 64), packed, None, torch.bfloat16)
    wide = multiply_rounded(RoundedRows(x.float(), 64), packed, None, torch.float32)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())


def test_what_is_not_finite_is_not_lost():
    packed, _ = weight_of(130, 64, 32, 8, False)
    x = torch.ones(6, 64)
    x[2, 40], x[4, 3] = torch.inf, torch.nan
    found = multiply_rounded(RoundedRows(x, 32), packed, None, torch.float32)
    assert np.array_equal(found.isfinite().all(1).numpy(), [True, True, False, True, False, True])


def test_groups_of_outputs_are_left_to_others():
    codes, scale = torch.zeros(128, 32, dtype=torch.uint8), torch.ones(1, 64)
    assert not takes(pack_quantized(codes, scale, bits=4, group_axis="output"))
