import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check

from actkit.kernels import ActiveSet, PackedWeight, compact, operators, pack, sparse_linear

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def threads():
    """Sets torch's threads and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=60)
@given(
    out_features=st.integers(1, 200),
    in_features=st.integers(1, 150),
    rows=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    select=st.sampled_from(["threshold", "k"]),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_float64_product(out_features, in_features, rows, dtype, sparsity, select, has_bias, seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(out_features, in_features).to(dtype), torch.randn(rows, in_features)
    bias = torch.randn(out_features) if has_bias else None
    score = torch.rand(in_features)
    scored = x.abs() * score
    if select == "k":
        k = round((1 - sparsity) * in_features)
        keep = torch.zeros_like(x, dtype=torch.bool).scatter_(1, scored.topk(k, dim=1).indices, True)
        y = sparse_linear(x, pack(weight), score, k=k, bias=bias)
    else:
        threshold = scored.quantile(sparsity).item() if x.numel() else 0.0
        keep = scored > threshold
        y = sparse_linear(x, pack(weight), score, threshold, bias=bias)
    assert y.shape == (rows, out_features)
    check(y, x, weight, keep, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["none", "one", "eight", "all", "denormal", "outlier", "one-signed"])
def test_extremes(dtype, case):
    torch.manual_seed(0)
    weight, x = torch.randn(1000, 513).to(dtype), torch.randn(1, 513)
    threshold = 0.0
    if case == "none":
        threshold = 100.0
    elif case in ("one", "eight"):
        x[:, 1 if case == "one" else 8 :] = 0
    elif case == "denormal":
        x *= 1e-40
    elif case == "outlier":
        x[0, 17] = 1e30
    elif case == "one-signed":
        weight, x = weight.abs(), x.abs()
    check(sparse_linear(x, pack(weight), threshold=threshold), x, weight, x.abs() > threshold)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_wider_than_the_widest(dtype):
    weight, x = torch.randn(13_000, 20).to(dtype), torch.randn(2, 20)
    packed = pack(weight, threads=1)
    assert packed.buffer.shape[0] == 3
    check(sparse_linear(x, packed, threshold=0.5), x, weight, x.abs() > 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_run_for_any_threads_and_tiles(dtype, threads):
    weight, x = torch.randn(700, 400).to(dtype), torch.randn(2, 400)
    results = []
    for count in (2, 1, 2):
        threads(count)
        results += [sparse_linear(x, pack(weight, tiles), threshold=0.3) for tiles in (1, 2, 5)]
        assert torch.get_num_threads() == count
    assert all(torch.equal(results[0], result) for result in results)


def test_nothing_given_means_every_input():
    weight, x = torch.randn(50, 60), torch.randn(60)
    y = sparse_linear(x, pack(weight))
    assert y.shape == (50,)
    check(y, x, weight, torch.ones(60, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shape_and_dtype_follow_x(dtype):
    weight, x = torch.randn(50, 60).bfloat16(), torch.randn(1, 2, 60).to(dtype)
    y = sparse_linear(x, pack(weight), threshold=0.5, bias=torch.randn(50).bfloat16())
    assert (y.shape, y.dtype) == ((1, 2, 50), dtype)
    full = sparse_linear(x.float(), pack(weight), threshold=0.5)
    assert torch.equal(sparse_linear(x, pack(weight), threshold=0.5), full.to(dtype))


def test_bfloat16_results_are_rounded_as_torch_rounds():
    halfway = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, 1e-45, 0.0, -0.0])
    weight = torch.cat([halfway, torch.tensor([torch.inf, -torch.inf, torch.nan]), torch.randn(5000)])[:, None]
    y = sparse_linear(torch.ones(1).bfloat16(), pack(weight))
    torch.testing.assert_close(y, weight[:, 0].bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_strided_inputs_equal_their_copies():
    packed = pack(torch.randn(50, 60))
    x, score = torch.randn(2, 120)[:, ::2], torch.rand(120)[::2]
    expected = sparse_linear(x.contiguous(), packed, score.contiguous(), threshold=0.2)
    assert torch.equal(sparse_linear(x, packed, score, threshold=0.2), expected)
    assert torch.equal(sparse_linear(x.t().contiguous().t(), packed, score, threshold=0.2), expected)


def test_layers_share_an_active_set():
    x = torch.randn(1, 2, 60).bfloat16()
    active = compact(x, k=20)
    for out_features in (30, 70):
        packed = pack(torch.randn(out_features, 60).bfloat16())
        assert torch.equal(sparse_linear(active, packed), sparse_linear(x, packed, k=20))


def test_nan_and_inf_reach_the_output_and_only_from_selected_inputs():
    weight, x = torch.randn(40, 16), torch.ones(1, 16)
    x[0, 3] = float("nan")
    assert sparse_linear(x, pack(weight), threshold=5.0).isnan().all()
    assert sparse_linear(x, pack(weight), k=1).isnan().all()
    x[0, 3] = float("inf")
    assert torch.equal(sparse_linear(x, pack(weight), threshold=5.0), torch.inf * weight[:, 3].sign()[None])
    x[0, 3] = 0.0
    weight[:, 3] = float("nan")
    assert sparse_linear(x, pack(weight), threshold=0.0).isfinite().all()


PACKED = pack(torch.randn(48, 24))
BFLOAT = pack(torch.randn(48, 24).bfloat16())


@pytest.mark.parametrize("packed", [PACKED, BFLOAT])
@pytest.mark.parametrize("x", [torch.randn(24), torch.randn(2, 24).bfloat16()])
@pytest.mark.parametrize("score", [None, torch.rand(24)])
@pytest.mark.parametrize(("threshold", "k"), [(0.5, -1), (-1.0, 5), (-1.0, -1)])
def test_operators_pass_opcheck(packed, x, score, threshold, k):
    ops = torch.ops.actkit
    active = ops.compact(x, score, threshold, k)
    torch.library.opcheck(ops.compact.default, (x, score, threshold, k))
    bias = torch.randn(48)
    torch.library.opcheck(ops.active_linear.default, (*active, packed.buffer, bias, 48))
    torch.library.opcheck(ops.sparse_linear.default, (x, packed.buffer, score, threshold, k, None, 48))


def test_traces_in_one_graph():
    def layer(x):
        return sparse_linear(x, BFLOAT, threshold=0.5, bias=torch.ones(48)) + 1

    x = torch.randn(1, 24)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_a_gradient_is_refused_with_the_way_out():
    x = torch.randn(24, requires_grad=True)
    with pytest.raises(RuntimeError, match="no_grad"):
        sparse_linear(x, PACKED, threshold=0.5)
    with pytest.raises(RuntimeError, match="no_grad"):
        sparse_linear(torch.randn(24), PACKED, bias=torch.nn.Parameter(torch.zeros(48)))
    with torch.no_grad():
        assert sparse_linear(x, PACKED, threshold=0.5).shape == (48,)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"x": torch.ones(3, 24)}, "3 rows"),
        ({"x": torch.ones(25)}, "25 inputs"),
        ({"x": torch.ones(24).double()}, "float64"),
        ({"threshold": -1.0}, "threshold: -1.0"),
        ({"k": -1}, "k: -1"),
        ({"score": torch.ones(24)}, "nothing would be selected"),
        ({"bias": torch.ones(47)}, "bias: shape"),
        ({"packed": PackedWeight(torch.ones(1, 24, 64).half(), 48)}, "float16"),
        ({"packed": PackedWeight(torch.ones(24, 64), 48)}, "pack"),
        ({"packed": PackedWeight(torch.ones(1, 24, 64), 65)}, "out_features: 65"),
        ({"x": compact(torch.ones(24)), "k": 3}, "already selected"),
        ({"x": compact(torch.ones(23))}, "23 inputs"),
    ],
)
def test_bad_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        sparse_linear(**{"x": torch.ones(24), "packed": PACKED, **arguments})


def test_indices_beyond_the_weight_are_refused():
    active = compact(torch.ones(24))
    wrong = [active._replace(counts=active.counts + 1), active._replace(values=active.values[:, :5])]
    for index in (-1, 24):
        wrong.append(active._replace(indices=active.indices.clone().fill_(index)))
    for broken in wrong:
        with pytest.raises(ValueError, match="no active set"):
            sparse_linear(broken, PACKED)


def test_a_forked_process_is_told_to_spawn(monkeypatch):
    from actkit.kernels import process

    sparse_linear(torch.ones(24), PACKED)
    monkeypatch.setattr(process, "_started_in", os.getpid() + 1)
    with pytest.raises(RuntimeError, match="spawn"):
        sparse_linear(torch.ones(24), PACKED)


def forget_engines():
    for cached in (operators.engine, operators.has_numba):
        cached.cache_clear()


def test_without_numba_plain_torch_computes_after_one_warning(monkeypatch):
    x = torch.randn(2, 24)
    expected = [sparse_linear(x, BFLOAT, threshold=0.5), sparse_linear(x, PACKED, k=5)]
    sets = [compact(x, threshold=0.5), compact(x, k=5)]
    monkeypatch.setitem(sys.modules, "actkit.kernels.numba_cpu", None)
    monkeypatch.delattr("actkit.kernels.numba_cpu")
    forget_engines()
    try:
        with pytest.warns(UserWarning, match="Install numba") as caught:
            found = [sparse_linear(x, BFLOAT, threshold=0.5), sparse_linear(x, PACKED, k=5)]
        assert len(caught) == 1
        for ours, plain in zip(sets, [compact(x, threshold=0.5), compact(x, k=5)]):
            assert isinstance(plain, ActiveSet)
            assert all(torch.equal(a, b) for a, b in zip(ours[:3], plain[:3]))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    finally:
        forget_engines()


def test_numba_is_imported_and_the_environment_touched_only_on_use():
    code = """
import os, sys
import torch
environment = dict(os.environ)
from actkit import kernels
packed = kernels.pack(torch.ones(4, 4))
assert "numba" not in sys.modules
torch.set_num_threads(1)
kernels.sparse_linear(torch.ones(4), packed, threshold=0.0)
assert "numba" in sys.modules and dict(os.environ) == environment
assert torch.get_num_threads() == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)
