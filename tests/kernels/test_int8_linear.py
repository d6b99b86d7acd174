import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actkit.kernels import int8_linear, int8_products, numba_int8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_hand(x, codes, weight_scale, scale, half_range, bias):
    """The header's formulas row by row: codes in float32 as they are found, everything else in float64."""
    rows = []
    for row in x.float():
        step = scale if scale is not None else (row.abs().max() / half_range if row.abs().max() > 0 else torch.ones(()))
        found = torch.round(row / step).clamp(-128, 127).double()
        rows.append((found @ (codes.double() - 128).t()) * step.double() * weight_scale.double())
    y = torch.stack(rows) if rows else torch.zeros(0, len(codes), dtype=torch.float64)
    return y if bias is None else y + bias.double()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(), (0,), (1,), (16,), (17,), (3, 5), (70,)]),
    out_features=st.sampled_from([1, 8, 33, 130]),
    in_features=st.sampled_from([1, 7, 64, 384]),
    dtype=st.sampled_from(DTYPES),
    static=st.booleans(),
    half_range=st.sampled_from([127.0, 127.5]),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_float64_product_of_the_codes(
    shape, out_features, in_features, dtype, static, half_range, biased, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*shape, in_features, generator=generator) * 3).to(dtype)
    x[..., : in_features // 3] = 0
    codes = torch.randint(0, 256, (out_features, in_features), generator=generator, dtype=torch.uint8)
    weight_scale = torch.rand(out_features, generator=generator) * 0.01 + 1e-4
    scale = torch.tensor([0.03]) if static else None
    bias = torch.randn(out_features, generator=generator) if biased else None
    y = int8_linear(x, codes, weight_scale, scale, half_range, bias)
    assert (y.shape, y.dtype) == ((*shape, out_features), dtype)
    expected = by_hand(x.reshape(-1, in_features), codes, weight_scale, scale, half_range, bias).view(y.shape)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=2e-6 * largest + 1e-7)
    assert torch.equal(y, int8_linear(x, codes, weight_scale, scale, half_range, bias))


@pytest.mark.parametrize("fixed", [None, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half_range", [127.0, 127.5])
def test_codes_are_those_of_plain_torch(fixed, dtype, half_range):
    x = torch.randn(100, 301, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3], x[4], x[5, 7] = 0, 1e-42, 1e30
    found, expected = numba_int8.rounded(x, fixed, half_range), int8_products.rounded_reference(x, fixed, half_range)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_without_numba(monkeypatch):
    arguments = (torch.randn(5, 20), torch.randint(0, 256, (7, 20), dtype=torch.uint8), torch.rand(7))
    expected = int8_linear(*arguments, bias=torch.ones(7))
    monkeypatch.setattr(int8_products, "has_numba", lambda: False)
    torch.testing.assert_close(int8_linear(*arguments, bias=torch.ones(7)), expected, rtol=1e-6, atol=1e-6)


def test_a_processor_that_sums_pairs_in_16_bits_is_noticed(monkeypatch):
    """The product is then taken in float64, which holds it exactly too."""
    x, weight = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((20, 64), (9, 64)))
    exact = x.int() @ weight.int().t()
    assert int8_products.is_exact() and torch.equal(int8_products.product(x, weight), exact)
    int8_products.is_exact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(max=2**15 - 1))
    assert not int8_products.is_exact() and torch.equal(int8_products.product(x, weight), exact)
    int8_products.is_exact.cache_clear()


@pytest.mark.parametrize("scale", [None, torch.tensor([0.02])])
def test_values_that_are_not_finite_are_seen(scale):
    x = torch.randn(4, 20)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = int8_linear(x, torch.randint(0, 256, (6, 20), dtype=torch.uint8), torch.ones(6), scale)
    assert y[1].isnan().all() and y[[0, 3]].isfinite().all()
    assert y[2].isnan().all() if scale is None else y[2].isfinite().all()  # a given range holds it


def test_torch_accepts_the_operator():
    arguments = (torch.randn(2, 3, 20), torch.randint(0, 256, (7, 20), dtype=torch.uint8), torch.rand(7))
    for scale, bias in ((None, None), (torch.tensor([0.1]), torch.ones(7))):
        torch.library.opcheck(torch.ops.actkit.int8_linear.default, (*arguments, scale, 127.0, bias))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(2, 9)}, "x: float32 .* was given; give float32, bfloat16 or float16 with 8 inputs"),
        ({"x": torch.zeros(2, 8).double()}, "x: float64"),
        ({"codes": torch.zeros(4, 8)}, "codes: torch.float32 .* was given; give uint8"),
        ({"weight_scale": torch.ones(3)}, "weight_scale: .* was given; give floats"),
        ({"scale": torch.ones(4)}, "scale: .* was given; give floats"),
        ({"bias": torch.ones(5)}, "bias: .* was given; give floats"),
    ],
)
def test_bad_input(change, text):
    good = {"x": torch.zeros(2, 8), "codes": torch.zeros(4, 8, dtype=torch.uint8), "weight_scale": torch.ones(4)}
    with pytest.raises(ValueError, match=text):
        int8_linear(**{**good, **change})
    with pytest.raises(RuntimeError, match="requires a gradient"):
        int8_linear(**{**good, "x": torch.zeros(2, 8, requires_grad=True)})
