import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check, dequantized, integer_weight, nibbles

from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.weights import IntegerWeight
from actkit.kernels import QuantizedWeight, compact, operators, pack_quantized, quantized_linear

BITS, AXES, ZEROS = [4, 8], ["output", "input"], [False, True]


def stored(codes, bits):
    return nibbles(codes) if bits <= 4 else codes


def packed_of(out_features, in_features, bits, axis, groups, zeros, threads=None, seed=0):
    codes, scale, zero, weight = integer_weight(out_features, in_features, bits, axis, groups, zeros, seed)
    arguments = {"bits": bits, "group_axis": axis, "in_features": in_features, "threads": threads}
    return pack_quantized(stored(codes, bits), scale, zero, **arguments), weight


# -- against float64 ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    group=st.sampled_from([128, 64, 256, 20, 3]),
    groups=st.integers(1, 4),
    other=st.integers(1, 150),
    bits=st.sampled_from([2, 3, 4, 5, 8]),
    axis=st.sampled_from(AXES),
    zeros=st.booleans(),
    rows=st.integers(0, 2),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    select=st.sampled_from(["threshold", "k"]),
    has_bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_sparse_equals_the_float64_product(
    group, groups, other, bits, axis, zeros, rows, sparsity, select, has_bias, threads, seed
):
    length = group * groups
    out_features, in_features = (other, length) if axis == "input" else (length, other)
    packed, weight = packed_of(out_features, in_features, bits, axis, groups, zeros, threads, seed)
    torch.manual_seed(seed)
    x, score = torch.randn(rows, in_features), torch.rand(in_features)
    bias = torch.randn(out_features) if has_bias else None
    scored = x.abs() * score
    if select == "k":
        k = round((1 - sparsity) * in_features)
        keep = torch.zeros_like(x, dtype=torch.bool).scatter_(1, scored.topk(k, dim=1).indices, True)
        y = quantized_linear(x, packed, score, k=k, bias=bias)
    else:
        threshold = scored.quantile(sparsity).item() if x.numel() else 0.0
        keep = scored > threshold
        y = quantized_linear(x, packed, score, threshold, bias=bias)
    assert y.shape == (rows, out_features)
    check(y, x, weight, keep, bias)


@settings(deadline=None, max_examples=40)
@given(
    group=st.sampled_from([128, 64, 384]),
    groups=st.integers(1, 3),
    other=st.integers(1, 150),
    bits=st.sampled_from(BITS),
    axis=st.sampled_from(AXES),
    zeros=st.booleans(),
    rows=st.integers(0, 8),
    has_bias=st.booleans(),
)
def test_dense_equals_the_float64_product(group, groups, other, bits, axis, zeros, rows, has_bias):
    group = 128 if bits == 8 and axis == "output" else group  # each kind of group is compiled: keep them few
    length = group * groups
    out_features, in_features = (other, length) if axis == "input" else (length, other)
    packed, weight = packed_of(out_features, in_features, bits, axis, groups, zeros)
    x, bias = torch.randn(rows, in_features), torch.randn(out_features) if has_bias else None
    y = quantized_linear(x, packed, bias=bias)
    assert y.shape == (rows, out_features)
    check(y, x, weight, bias=bias)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("case", ["none", "one", "five", "all", "denormal", "outlier", "one-signed", "cancel", "zeros"])
def test_extremes(bits, axis, zeros, case):
    torch.manual_seed(0)
    out_features, in_features = 1024, 512
    codes, scale, zero, _ = integer_weight(out_features, in_features, bits, axis, 8, zeros)
    x, threshold, smallest = torch.randn(1, in_features), 0.0, 1e-42
    middle = 2 ** (bits - 1)
    if case == "none":
        threshold = 100.0
    elif case in ("one", "five"):
        x[:, 1 if case == "one" else 5 :] = 0
    elif case == "denormal":
        x *= 1e-40
        smallest += in_features * 2**bits * 1.5e-45  # x * scale is a multiple of 1.4e-45 before it meets the code
    elif case == "outlier":
        x[0, 17] = 1e30
    elif case == "one-signed":
        codes, zero, x = codes | middle, None, x.abs()
    elif case == "cancel":  # a column of exact zeros under a huge input must give exactly nothing
        codes, zero = codes.clone(), None
        codes[:, 17] = middle
        x[0, 17] = 1e30
    elif case == "zeros":
        codes, zero = torch.full_like(codes, middle), None
        x = x.abs() * 1e20
    weight = dequantized(codes, scale, zero, bits, axis)
    packed = pack_quantized(stored(codes, bits), scale, zero, bits=bits, group_axis=axis)
    y = quantized_linear(x, packed, threshold=threshold)
    check(y, x, weight, x.abs() > threshold, smallest=smallest)
    if case == "zeros":
        assert not y.any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
def test_tiles_wider_than_the_widest(bits, axis):
    packed, weight = packed_of(13_056, 20, bits, axis, 102 if axis == "output" else 4, True, threads=1)
    assert packed.buffer.shape[0] == 3
    x = torch.randn(2, 20)
    check(quantized_linear(x, packed, threshold=0.5), x, weight, x.abs() > 0.5)
    x = torch.randn(7, 20)
    check(quantized_linear(x, packed), x, weight)


# -- packing -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    group=st.integers(1, 200),
    groups=st.integers(1, 4),
    other=st.integers(1, 60),
    bits=st.integers(2, 8),
    axis=st.sampled_from(AXES),
    zeros=st.booleans(),
    threads=st.integers(1, 3),
)
def test_packing_loses_nothing(group, groups, other, bits, axis, zeros, threads):
    length = group * groups
    out_features, in_features = (other, length) if axis == "input" else (length, other)
    packed, weight = packed_of(out_features, in_features, bits, axis, groups, zeros, threads)
    assert (packed.out_features, packed.in_features) == (out_features, in_features)
    torch.testing.assert_close(packed.dense().double(), weight, rtol=1e-7, atol=0)
    for part in (packed.buffer, packed.scale, packed.zero):
        assert part is None or (part.is_contiguous() and part.data_ptr() % 64 == 0)
    record = packed.buffer.shape[2]
    assert record % 64 == 0 and record % 512


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [64, -1])
def test_takes_what_the_quantizer_stores(axis, bits, symmetric, group):
    held = IntegerWeight.quantize(torch.randn(192, 128), IntegerGrid(bits, group, axis, symmetric))
    packed = pack_quantized(held.kernel_codes(), held.scales(), held.zero, bits=bits, group_axis=axis)
    assert torch.equal(packed.dense(), held.dequantize())


def test_four_bits_at_groups_of_128_take_little_more_than_four_bits():
    packed, _ = packed_of(4096, 256, 4, "output", 32, False, threads=2)
    assert packed.nbytes * 8 / (4096 * 256) < 4.4


GOOD = {"codes": torch.zeros(64, 32, dtype=torch.uint8), "scale": torch.ones(1, 32), "bits": 8, "group_axis": "output"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"bits": 1}, "bits: 1"),
        ({"bits": 9}, "bits: 9"),
        ({"group_axis": "row"}, "group_axis: 'row'"),
        ({"codes": torch.zeros(64, dtype=torch.uint8)}, "codes"),
        ({"codes": torch.zeros(64, 32)}, "float32"),
        ({"codes": torch.zeros(0, 32, dtype=torch.uint8)}, "non-empty"),
        ({"codes": torch.full((64, 32), 32, dtype=torch.uint8), "bits": 5}, "largest is 32"),
        ({"scale": torch.ones(1, 31)}, "in_features: 31"),
        ({"scale": torch.ones(3, 32)}, "equal size"),
        ({"scale": torch.ones(32)}, "two axes"),
        ({"scale": torch.ones(1, 32).double()}, "float64"),
        ({"scale": torch.full((1, 32), torch.inf)}, "not finite"),
        ({"scale": torch.ones(1, 32, device="meta")}, "meta"),
        ({"zero": torch.zeros(2, 32, dtype=torch.uint8)}, "zero"),
        ({"zero": torch.zeros(1, 32)}, "zero"),
        ({"zero": torch.full((1, 32), 200, dtype=torch.uint8), "bits": 7}, "below 128"),
        ({"threads": 0}, "threads: 0"),
        ({"in_features": 30}, "in_features: 30"),
        ({"group_axis": "input"}, "equal size"),
    ],
)
def test_a_weight_that_cannot_be_packed_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        pack_quantized(**{**GOOD, **arguments})


# -- behaviour of the operators ----------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Sets torch's threads and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", AXES)
def test_same_bits_in_every_run_for_any_threads_and_tiles(bits, axis, threads):
    x, many = torch.randn(2, 512), torch.randn(3, 512)
    sparse, dense = [], []
    for count in (2, 1, 2):
        threads(count)
        for tiles in (1, 2, 5):
            packed, _ = packed_of(1280, 512, bits, axis, 10 if axis == "output" else 4, True, tiles)
            sparse.append(quantized_linear(x, packed, threshold=0.3))
            dense.append(quantized_linear(many, packed))
        assert torch.get_num_threads() == count
    for results in (sparse, dense):
        assert all(torch.equal(results[0], result) for result in results)


PACKED = {(bits, axis): packed_of(192, 64, bits, axis, 2, True)[0] for bits in BITS for axis in AXES}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("packed", PACKED.values(), ids=map(str, PACKED))
def test_shape_and_dtype_follow_x(dtype, packed):
    bias = torch.randn(192).bfloat16()
    x = torch.randn(1, 2, 64).to(dtype)
    y = quantized_linear(x, packed, threshold=0.5, bias=bias)
    assert (y.shape, y.dtype) == ((1, 2, 192), dtype)
    assert torch.equal(y, quantized_linear(x.float(), packed, threshold=0.5, bias=bias).to(dtype))
    x = torch.randn(2, 4, 64).to(dtype)
    y = quantized_linear(x, packed, bias=bias)
    assert (y.shape, y.dtype) == ((2, 4, 192), dtype)
    assert torch.equal(y, quantized_linear(x.float(), packed, bias=bias).to(dtype))


def test_layers_share_an_active_set():
    x = torch.randn(1, 2, 64).bfloat16()
    active = compact(x, k=20)
    for packed in PACKED.values():
        assert torch.equal(quantized_linear(active, packed), quantized_linear(x, packed, k=20))


def test_strided_inputs_equal_their_copies():
    packed = PACKED[4, "output"]
    x = torch.randn(2, 128)[:, ::2]
    assert torch.equal(quantized_linear(x, packed, k=9), quantized_linear(x.contiguous(), packed, k=9))
    x = torch.randn(64, 5).t()
    assert torch.equal(quantized_linear(x, packed), quantized_linear(x.contiguous(), packed))


@pytest.mark.parametrize("packed", PACKED.values(), ids=map(str, PACKED))
def test_nan_and_inf_reach_the_output(packed):
    x = torch.ones(1, 64)
    x[0, 3] = torch.nan
    assert quantized_linear(x, packed, threshold=5.0).isnan().all()
    x[0, 3] = torch.inf
    weight = packed.dense()[:, 3]
    y = quantized_linear(x, packed, threshold=5.0)
    assert torch.equal(y[0, weight != 0], (torch.inf * weight)[weight != 0])


@pytest.mark.parametrize("packed", PACKED.values(), ids=map(str, PACKED))
@pytest.mark.parametrize(("threshold", "k"), [(0.5, -1), (-1.0, 5), (-1.0, -1)])
def test_operators_pass_opcheck(packed, threshold, k):
    ops, parts = torch.ops.actkit, (packed.buffer, packed.scale, packed.zero, list(packed.layout))
    x, score, bias = torch.randn(2, 64), torch.rand(64), torch.randn(192)
    torch.library.opcheck(ops.quantized_linear.default, (x, *parts, score, threshold, k, bias))
    torch.library.opcheck(ops.quantized_linear.default, (x[0].bfloat16(), *parts, None, threshold, k, None))
    active = ops.compact(x, None, threshold, k)
    torch.library.opcheck(ops.quantized_active_linear.default, (*active, *parts, bias))


def test_traces_in_one_graph():
    def layer(x):
        return quantized_linear(x, PACKED[4, "output"], threshold=0.5, bias=torch.ones(192)) + 1

    x = torch.randn(1, 64)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_a_gradient_is_refused_with_the_way_out():
    with pytest.raises(RuntimeError, match="no_grad"):
        quantized_linear(torch.randn(64, requires_grad=True), PACKED[4, "output"])
    with pytest.raises(RuntimeError, match="no_grad"):
        quantized_linear(torch.randn(64), PACKED[4, "output"], bias=torch.nn.Parameter(torch.zeros(192)))


SOUND = PACKED[4, "input"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"x": torch.ones(9, 64)}, "9 rows"),
        ({"x": torch.ones(3, 64), "k": 3}, "3 rows"),
        ({"x": torch.ones(65)}, "65 inputs"),
        ({"x": torch.ones(64).double()}, "float64"),
        ({"threshold": -1.0}, "threshold: -1.0"),
        ({"score": torch.ones(64)}, "nothing would be selected"),
        ({"bias": torch.ones(191)}, "bias: shape"),
        ({"packed": QuantizedWeight(SOUND.buffer[:, :-1], SOUND.scale, SOUND.zero, SOUND.layout)}, "pack_quantized"),
        ({"packed": QuantizedWeight(SOUND.buffer, None, SOUND.zero, SOUND.layout)}, "pack_quantized"),
        ({"packed": QuantizedWeight(SOUND.buffer, SOUND.scale, None, SOUND.layout)}, "pack_quantized"),
        ({"packed": QuantizedWeight(SOUND.buffer, SOUND.scale, SOUND.zero, SOUND.layout[:-1])}, "layout: 9"),
        ({"x": compact(torch.ones(64)), "k": 3}, "already selected"),
        ({"x": compact(torch.ones(63))}, "63 inputs"),
    ],
)
def test_bad_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        quantized_linear(**{"x": torch.ones(64), "packed": SOUND, **arguments})


def test_indices_beyond_the_weight_are_refused():
    active = compact(torch.ones(64))
    with pytest.raises(ValueError, match="no active set"):
        quantized_linear(active._replace(indices=active.indices + 1), SOUND)


def test_without_numba_plain_torch_computes(monkeypatch):
    x, many = torch.randn(2, 64), torch.randn(5, 64)

    def results():
        return [quantized_linear(x, p, k=9) for p in PACKED.values()] + [
            quantized_linear(many, p, bias=torch.ones(192)) for p in PACKED.values()
        ]

    expected = results()
    monkeypatch.setattr(operators, "has_numba", lambda: False)
    operators.engine.cache_clear()
    try:
        assert operators.engine("numba_quantized").__name__ == "actkit.kernels.reference"
        torch.testing.assert_close(results(), expected, rtol=1e-5, atol=1e-4)
    finally:
        operators.engine.cache_clear()


def test_narrower_vectors_give_the_same_within_rounding(tmp_path):
    code = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from numba.core.registry import cpu_target
assert "haswell" in cpu_target.target_context.codegen().magic_tuple()
from actkit.kernels import compact, dense_linear, pack, pack_quantized, quantized_linear, sparse_linear
from oracle import check, integer_weight
for bits, axis, zeros in ((4, "output", False), (4, "output", True), (8, "output", False), (4, "input", True)):
    codes, scale, zero, weight = integer_weight(256, 96, bits, axis, 2, zeros)
    codes = codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes
    packed = pack_quantized(codes, scale, zero, bits=bits, group_axis=axis)
    x = torch.randn(2, 96)
    check(quantized_linear(x, packed, threshold=0.5), x, weight, x.abs() > 0.5)
weight = torch.randn(100, 96).bfloat16()
check(sparse_linear(x, pack(weight), threshold=0.5), x, weight, x.abs() > 0.5)
"""
    narrow = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    folder = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", code, folder], check=True, env={**os.environ, **narrow})
