import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check

from actkit.kernels import dense_linear, operators, pack

DTYPES = [torch.float32, torch.bfloat16]


@settings(deadline=None, max_examples=60)
@given(
    out_features=st.integers(1, 200),
    in_features=st.integers(1, 150),
    rows=st.integers(0, 8),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_float64_product(out_features, in_features, rows, dtype, threads, has_bias, seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(out_features, in_features).to(dtype), torch.randn(rows, in_features)
    bias = torch.randn(out_features) if has_bias else None
    y = dense_linear(x, pack(weight, threads), bias)
    assert y.shape == (rows, out_features)
    check(y, x, weight, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["nothing", "one", "denormal", "outlier", "one-signed"])
def test_extremes(dtype, case):
    torch.manual_seed(0)
    weight, x = torch.randn(1000, 513).to(dtype), torch.randn(8, 513)
    if case == "nothing":
        x = torch.zeros_like(x)
    elif case == "one":
        x[:, 1:] = 0
    elif case == "denormal":
        x *= 1e-40
    elif case == "outlier":
        x[3, 17] = 1e30
    elif case == "one-signed":
        weight, x = weight.abs(), x.abs()
    check(dense_linear(x, pack(weight)), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_and_tiling(dtype):
    weight, x = torch.randn(7000, 77).to(dtype), torch.randn(8, 77)
    whole = dense_linear(x, pack(weight, 1))
    for rows, threads in ((1, 2), (2, 5), (3, 1), (5, 2), (8, 3)):
        packed = pack(weight, threads)
        assert torch.equal(dense_linear(x[:rows], packed), whole[:rows])
        assert torch.equal(dense_linear(x[:rows], packed), dense_linear(x[:rows], packed))


@pytest.mark.parametrize("rows", [1, 3])
def test_nan_and_inf_stay_in_their_row_and_column(rows):
    weight, x = torch.randn(40, 13), torch.ones(rows, 13)
    weight[5, 12] = torch.inf  # the last input: nothing may be multiplied by it a second time
    y = dense_linear(x, pack(weight))
    assert (y[:, 5] == torch.inf).all() and y[:, torch.arange(40) != 5].isfinite().all()
    x[0, 2] = torch.nan
    assert dense_linear(x, pack(weight))[0].isnan().all()
    assert not dense_linear(x, pack(weight))[1:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 6])
def test_shape_and_dtype_follow_x(dtype, rows):
    packed, x, bias = pack(torch.randn(50, 60).bfloat16()), torch.randn(1, rows, 60).to(dtype), torch.randn(50)
    y = dense_linear(x, packed, bias)
    assert (y.shape, y.dtype) == ((1, rows, 50), dtype)
    assert torch.equal(y, dense_linear(x.float(), packed, bias).to(dtype))


@pytest.mark.parametrize("packed", [pack(torch.randn(48, 24)), pack(torch.randn(48, 24).bfloat16())])
@pytest.mark.parametrize("x", [torch.randn(24), torch.randn(2, 3, 24).bfloat16()])
def test_passes_opcheck_and_traces(packed, x):
    torch.library.opcheck(torch.ops.actkit.dense_linear.default, (x, packed.buffer, torch.randn(48), 48))
    torch.library.opcheck(torch.ops.actkit.dense_linear.default, (x, packed.buffer, None, 48))
    traced = torch.compile(lambda x: dense_linear(x, packed) + 1, backend="eager", fullgraph=True)
    assert torch.equal(traced(x), dense_linear(x, packed) + 1)


@pytest.mark.parametrize(
    ("x", "bias", "match"),
    [
        (torch.ones(9, 24), None, "9 rows"),
        (torch.ones(2, 25), None, "25 inputs"),
        (torch.ones(24).double(), None, "float64"),
        (torch.ones(24), torch.ones(47), "bias: shape"),
    ],
)
def test_bad_arguments_are_named(x, bias, match):
    with pytest.raises(ValueError, match=match):
        dense_linear(x, pack(torch.ones(48, 24)), bias)


def test_without_numba_plain_torch_computes(monkeypatch):
    packed, x = pack(torch.randn(48, 24).bfloat16()), torch.randn(5, 24)
    expected = [dense_linear(x, packed, torch.ones(48)), dense_linear(x[0], packed)]
    monkeypatch.setattr(operators, "has_numba", lambda: False)
    operators.engine.cache_clear()
    try:
        found = [dense_linear(x, packed, torch.ones(48)), dense_linear(x[0], packed)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    finally:
        operators.engine.cache_clear()
