import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE

from actkit.kernels import output_rows, pack_quantized_rows, pack_rows, quantized_output_rows, reference
from actkit.kernels.numba_cpu import array
from actkit.kernels.numba_rows import bundled_units
from actkit.kernels.output_rows import blocks_of, bundle_units


@settings(deadline=None, max_examples=60)
@given(
    out_features=st.integers(1, 80),
    in_features=st.sampled_from([1, 31, 32, 33, 100, 2048]),
    rows=st.integers(0, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_float64_product(out_features, in_features, rows, dtype, share, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    x = torch.randn(rows, in_features, generator=generator)
    chosen = torch.nonzero(torch.rand(out_features, generator=generator) < share)[:, 0].int()
    packed = pack_rows(weight)
    assert torch.equal(packed.dense(), weight)
    y = output_rows(x, packed, chosen)
    kept = weight.double()[chosen.long()]
    assert y.shape == (rows, len(chosen)) and y.dtype == torch.float32
    assert ((y.double() - x.double() @ kept.t()).abs() <= TOLERANCE * (x.double().abs() @ kept.abs().t()) + 1e-42).all()
    assert torch.equal(y, output_rows(x, packed, chosen))


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e30, float("inf"), float("nan")])
def test_unusual_activations(value):
    packed, x = pack_rows(torch.randn(20, 64)), torch.full((64,), value)
    rows = torch.arange(20, dtype=torch.int32)
    expected = reference.output_rows(
        torch.nn.functional.pad(x, (0, packed.buffer.shape[1] - 64))[None], packed.buffer, rows
    )[0]
    smallest = 1e-4 * value if value < float("inf") else 0.0
    torch.testing.assert_close(output_rows(x, packed, rows), expected, rtol=1e-4, atol=smallest, equal_nan=True)


def test_torch_accepts_the_operator():
    packed = pack_rows(torch.randn(10, 20).bfloat16())
    arguments = (torch.randn(2, 20), packed.buffer, torch.tensor([3, 1], dtype=torch.int32), 20)
    torch.library.opcheck(torch.ops.actkit.output_rows.default, arguments)


def test_bad_input():
    packed = pack_rows(torch.randn(4, 8))
    rows = torch.tensor([0], dtype=torch.int32)
    with pytest.raises(ValueError, match="has 8 inputs"):
        output_rows(torch.randn(9), packed, rows)
    with pytest.raises(ValueError, match="at most 8"):
        output_rows(torch.randn(9, 8), packed, rows)
    with pytest.raises(ValueError, match="has 4 outputs"):
        output_rows(torch.randn(8), packed, torch.tensor([4], dtype=torch.int32))
    with pytest.raises(ValueError, match="give int32"):
        output_rows(torch.randn(8), packed, torch.tensor([1]))
    with pytest.raises(ValueError, match="give float32 or bfloat16"):
        pack_rows(torch.randn(4, 8).double())
    with pytest.raises(RuntimeError, match="gradient"):
        output_rows(torch.randn(8, requires_grad=True), packed, rows)


@settings(deadline=None, max_examples=60)
@given(
    units=st.integers(1, 40),
    inputs=st.sampled_from([1, 33, 64, 2048]),
    outputs=st.sampled_from([1, 32, 100, 2048]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_bundled_units_equal_the_float64_product(units, inputs, outputs, dtype, share, seed):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((units, inputs), (outputs, units)))
    x, gate = torch.randn(inputs, generator=generator), torch.randn(units, generator=generator)
    chosen = torch.nonzero(torch.rand(units, generator=generator) < share)[:, 0].int()
    bundle = bundle_units(up, down)
    assert torch.equal(bundle.up(), up) and torch.equal(bundle.down(), down.t())
    given_x = torch.nn.functional.pad(x, (0, bundle.down_at - inputs)).numpy()
    out = torch.full((blocks_of(outputs),), 7.0)
    listed, values = torch.zeros(units, dtype=torch.int32), torch.zeros(units)
    listed[: len(chosen)], values[: len(chosen)] = chosen, gate[chosen.long()]
    bundled_units(array(bundle.buffer), given_x, listed.numpy(), values.numpy(), len(chosen), out.numpy())
    kept, wide = chosen.long(), down.double()[:, chosen.long()]
    dots, sizes = up.double()[kept] @ x.double(), up.double()[kept].abs() @ x.double().abs()
    error = (out[:outputs].double() - wide @ (gate.double()[kept] * dots)).abs()
    assert (error <= 2 * TOLERANCE * (wide.abs() @ (gate.double()[kept].abs() * sizes)) + 1e-42).all()
    assert (out[outputs:] == 0).all()


@settings(deadline=None, max_examples=60)
@given(
    out_features=st.integers(1, 80),
    shape=st.sampled_from([(1, 1), (33, 33), (100, 16), (160, 32), (256, 64), (300, 128), (512, 256), (2048, 2048)]),
    bits=st.sampled_from([2, 4, 8]),
    zeros=st.booleans(),
    rows=st.integers(0, 8),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_integer_rows_equal_the_float64_product(out_features, shape, bits, zeros, rows, share, seed):
    (in_features, group), generator = shape, torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (out_features, in_features), dtype=torch.uint8, generator=generator)
    groups = (out_features, -(-in_features // group))
    scale = torch.rand(groups, generator=generator) * 0.1
    zero = torch.randint(2**bits, groups, dtype=torch.uint8, generator=generator) if zeros else None
    of_input = torch.arange(in_features) // group
    offset = zero[:, of_input].double() if zeros else 2.0 ** (bits - 1)
    weight = (codes.double() - offset) * scale.double()[:, of_input]
    x = torch.randn(rows, in_features, generator=generator)
    chosen = torch.nonzero(torch.rand(out_features, generator=generator) < share)[:, 0].int()
    packed = pack_quantized_rows(codes, scale, zero, bits=bits, group=group)
    torch.testing.assert_close(packed.dense().double(), weight, rtol=1e-6, atol=0)
    y = quantized_output_rows(x, packed, chosen)
    kept = weight[chosen.long()]
    assert y.shape == (rows, len(chosen)) and y.dtype == torch.float32
    assert ((y.double() - x.double() @ kept.t()).abs() <= TOLERANCE * (x.double().abs() @ kept.abs().t()) + 1e-30).all()
    assert torch.equal(y, quantized_output_rows(x, packed, chosen))


def test_torch_accepts_the_operator_for_integer_rows():
    packed = pack_quantized_rows(torch.randint(16, (10, 64), dtype=torch.uint8), torch.rand(10, 2), bits=4, group=32)
    arguments = (torch.randn(2, 64), packed.buffer, torch.tensor([3, 1], dtype=torch.int32), list(packed.layout))
    torch.library.opcheck(torch.ops.actkit.quantized_output_rows.default, arguments)


def test_bad_integer_rows():
    codes, scale = torch.randint(16, (4, 96), dtype=torch.uint8), torch.rand(4, 2)
    with pytest.raises(ValueError, match="group: 48 was given; give 16, 32, 64"):
        pack_quantized_rows(codes, scale, bits=4, group=48)
    with pytest.raises(ValueError, match=r"give finite float32 \(4, 3\)"):
        pack_quantized_rows(codes, scale, bits=4, group=32)
    with pytest.raises(ValueError, match="allowed are 2 to 8 that hold them"):
        pack_quantized_rows(codes + 240, scale, bits=4, group=64)
    packed = pack_quantized_rows(codes, scale, bits=4, group=64)
    with pytest.raises(ValueError, match="has 96 inputs"):
        quantized_output_rows(torch.randn(9), packed, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match="has 4 outputs"):
        quantized_output_rows(torch.randn(96), packed, torch.tensor([4], dtype=torch.int32))
