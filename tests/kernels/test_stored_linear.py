"""Few rows times codes as they are stored: against float64, with Numba and without, and what ActLinear makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check, integer_weight, nibbles

from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.kernels import stored_codes, stored_linear


@settings(deadline=None, max_examples=30)
@given(
    size=st.sampled_from([2, 6, 32, 40, 128]),
    groups=st.integers(1, 5),
    out_features=st.integers(1, 150),
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
    rows=st.integers(1, 8),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_equals_the_float64_product(size, groups, out_features, bits, zeros, rows, has_bias, seed):
    codes, scale, zero, weight = integer_weight(out_features, size * groups, bits, "input", groups, zeros, seed)
    stored = nibbles(codes) if bits == 4 else codes
    torch.manual_seed(seed)
    x, bias = torch.randn(rows, size * groups), torch.randn(out_features) if has_bias else None
    check(stored_linear(x, stored, scale, zero, bits=bits, bias=bias), x, weight, bias=bias)
    middle = 2 ** (bits - 1)
    plain = stored_codes.stored_reference(x, stored, scale, zero, middle, bits)
    check(plain if bias is None else plain + bias, x, weight, bias=bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_widened_and_rounded_once(dtype):
    codes, scale, _, weight = integer_weight(33, 64, 4, "input", 2, False)
    x = torch.randn(2, 3, 64).to(dtype)
    y = stored_linear(x, nibbles(codes), scale, bits=4)
    exact = x.double() @ weight.t()
    assert y.dtype == dtype and y.shape == (2, 3, 33)
    assert float((y.double() - exact).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())


def test_nan_and_inf_stay_what_they_are():
    codes, scale, _, _ = integer_weight(5, 32, 8, "input", 1, False)
    x = torch.randn(3, 32)
    x[0, 3], x[1, 4] = torch.nan, torch.inf
    y = stored_linear(x, codes, scale, bits=8)
    assert y[0].isnan().all() and not y[1].isfinite().any() and y[2].isfinite().all()


@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "read"),
    [(4, 16, True, True), (4, 16, False, True), (8, -1, True, True), (3, 16, True, False), (4, 3, True, False)],
)
def test_a_layer_reads_few_rows_as_they_are_stored(bits, size, symmetric, read, monkeypatch):
    """With no gradient and up to eight rows; else, or with codes of 3 bits, the weight is widened."""
    calls = []
    monkeypatch.setattr(
        "actkit.kernels.stored_linear", lambda *given, **also: calls.append(1) or stored_linear(*given, **also)
    )
    generator = torch.Generator().manual_seed(0)
    stored = IntegerWeight.quantize(
        torch.randn(20, 48, generator=generator), IntegerGrid(bits, size, "input", symmetric)
    )
    layer = ActLinear(stored, torch.randn(20, generator=generator))
    x = torch.randn(9, 48, generator=generator)
    expected = torch.nn.functional.linear(x, stored.dequantize(), layer.bias)
    with torch.no_grad():
        for rows in (x[:1], x[:8], x):
            before = len(calls)
            assert torch.allclose(layer(rows), expected[: len(rows)], atol=1e-5)
            assert len(calls) - before == int(read and len(rows) <= 8)
    before = len(calls)
    layer(x[:1])
    assert len(calls) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(9, 8)}, "x: torch.float32 .9, 8. was given; .* with 8 inputs.* at most 8 rows"),
        ({"x": torch.ones(1, 6)}, "x: torch.float32 .1, 6. was given"),
        ({"codes": torch.ones(3, 4)}, "codes: torch.float32 .3, 4. of 4 bits was given; give uint8"),
        ({"bits": 3}, "codes: torch.uint8 .3, 4. of 3 bits was given"),
        ({"scale": torch.ones(3, 3)}, "scale: .3, 3. was given; give .3, groups., of which 8 inputs make equal ones"),
        ({"zero": torch.ones(2, 2)}, "zero: .2, 2. was given; give .3, 2."),
        ({"bias": torch.ones(2)}, "bias: .2,. was given; give .3,."),
    ],
)
def test_other_arguments_are_named(change, words):
    given = {"x": torch.ones(1, 8), "codes": torch.ones(3, 4, dtype=torch.uint8), "scale": torch.ones(3, 2), "bits": 4}
    given |= change
    with pytest.raises(ValueError, match=words):
        stored_linear(**given)
