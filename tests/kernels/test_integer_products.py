"""Products in integers against float64, within the rounding of the activations that the format promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import integer_weight, nibbles

from actkit.kernels import integer_dots, pack_quantized
from actkit.kernels.numba_integer import ROWS, group_dots, record_dots, scratch
from actkit.kernels.quantized import BLOCK, outputs_of

pytestmark = pytest.mark.skipif(not integer_dots.available(), reason="this processor has no products of bytes")
LARGEST = 127 * 256


class Case:
    """A weight, packed and in float64, and which of its inputs are active."""

    def __init__(self, out_features, in_features, bits, axis, groups, zeros, keep, seed=0):
        codes, scale, zero, self.weight = integer_weight(out_features, in_features, bits, axis, groups, zeros, seed)
        self.codes, self.scale, self.axis, self.keep = codes, scale, axis, keep
        self.zero = torch.full_like(scale, 2 ** (bits - 1)) if zero is None else zero.float()
        self.packed = pack_quantized(
            nibbles(codes) if bits <= 4 else codes,
            scale,
            zero,
            bits=bits,
            group_axis=axis,
            in_features=in_features,
            threads=1,
        )

    def product(self, x):
        layout, n = self.packed.layout, len(self.keep)
        dtype = np.uint8 if layout.stored_bits == 4 else np.int8
        buffer = self.packed.buffer.numpy().view(dtype)
        indices, values = np.zeros(layout.in_features, np.int32), np.zeros((1, layout.in_features), np.float32)
        indices[:n], values[0, :n] = self.keep, x[self.keep]
        out = np.full((1, layout.n_tiles * layout.tile), np.nan, np.float32)
        memory, stored, block_bytes = scratch(), (0,) * layout.zeros, BLOCK * layout.stored_bits // 8
        for t in range(layout.n_tiles):
            if layout.by_input:
                zeros = np.empty((0, 0, 0), dtype) if self.packed.zero is None else self.packed.zero.numpy().view(dtype)
                shape = (layout.tile, block_bytes, layout.group)
                scales = self.packed.scale.numpy()
                group_dots(
                    buffer, scales, zeros, t, indices, values, n, out, shape, np.float32(layout.middle), stored, memory
                )
            else:
                shape = (layout.tile, block_bytes, layout.code_bytes, layout.zeros_at)
                record_dots(buffer, t, indices, values, n, out, shape, np.int32(layout.middle), stored, memory)
        return outputs_of(torch.from_numpy(out), layout)[0]

    def bound(self, x):
        """The most that rounding of activations can do, [out]: half a unit per input, in each block of ROWS."""
        x, (n_out, n_in) = x.double(), self.weight.shape
        across = n_in // self.scale.shape[1] if self.axis == "input" else n_out // self.scale.shape[0]
        scale = self.scale.double().repeat_interleave(across, 1 if self.axis == "input" else 0)  # [out, in]
        zero = self.zero.double().repeat_interleave(across, 1 if self.axis == "input" else 0)
        distance = (self.codes.double() - zero).abs()
        total = torch.zeros(n_out, dtype=torch.float64)
        kept = torch.tensor(self.keep, dtype=torch.long)
        runs = [kept] if self.axis == "output" else [kept[kept // across == g] for g in range(n_in // across)]
        for run in runs:
            for block in run.split(ROWS) if len(run) else ():
                factor = scale[:, block] if self.axis == "output" else torch.ones(n_out, len(block)).double()
                unit = (x[block].abs() * factor).amax(1) / LARGEST
                outer = 1.0 if self.axis == "output" else scale[:, block[0]]
                total += 0.5 * unit * distance[:, block].sum(1) * outer
        size = self.weight.double()[:, kept].abs() @ x[kept].abs()
        return 1.01 * total + 2e-6 * size + 1e-28

    def check(self, x):
        y = self.product(x)
        kept = torch.tensor(self.keep, dtype=torch.long)
        expected = self.weight.double()[:, kept] @ x.double()[kept]
        assert ((y.double() - expected).abs() <= self.bound(x)).all()
        return y


@settings(deadline=None, max_examples=60)
@given(
    blocks=st.integers(1, 5),
    groups=st.integers(1, 3),
    other=st.integers(1, 300),
    bits=st.sampled_from([2, 4, 5, 8]),
    axis=st.sampled_from(["output", "input"]),
    zeros=st.booleans(),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_float64_product(blocks, groups, other, bits, axis, zeros, density, seed):
    n_out, n_in = (BLOCK * blocks, other) if axis == "output" else (other, 40 * blocks * groups)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.nonzero(torch.rand(n_in, generator=generator) < density)[:, 0].tolist()
    case = Case(n_out, n_in, bits, axis, blocks if axis == "output" else groups, zeros, keep, seed)
    case.check(torch.randn(n_in, generator=generator))


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("kind", ["zeros", "one", "one-signed", "tiny", "denormal", "an outlier", "alternating"])
def test_unusual_activations(axis, kind):
    n = 384
    x = torch.zeros(n)
    if kind == "one":
        x[200] = -3.0
    elif kind == "one-signed":
        x = torch.rand(n) + 0.5
    elif kind == "tiny":
        x = torch.randn(n) * 1e-25
    elif kind == "denormal":
        x = torch.randn(n) * 1e-40
    elif kind == "an outlier":
        x = torch.randn(n)
        x[17] = 1e20
    elif kind == "alternating":
        x = torch.ones(n)
        x[::2] = -1
    y = Case(256, n, 4, axis, 2 if axis == "output" else 3, True, list(range(n))).check(x)
    assert bool(y.isfinite().all())
    if kind == "zeros":
        assert not y.any()


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(axis, value):
    x = torch.randn(256)
    x[100] = value
    case = Case(128, 256, 4, axis, 1, False, list(range(256)))
    assert not case.product(x).isfinite().any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums_do_not_overflow(bits):
    case = Case(128, 512, bits, "output", 1, True, list(range(512)))
    case.codes[:] = 2**bits - 1
    case.zero[:] = 0
    weight = case.codes.double() * case.scale.double().repeat_interleave(128, 0)
    stored = nibbles(case.codes) if bits == 4 else case.codes
    arguments = {"bits": bits, "group_axis": "output", "in_features": 512, "threads": 1}
    case.packed, case.weight = pack_quantized(stored, case.scale, case.zero.to(torch.uint8), **arguments), weight
    case.check(1 / case.scale[0])  # all activations are the largest of their block


def test_several_tiles_and_the_same_bits_in_every_run():
    case = Case(128 * 60, 150, 4, "output", 60, True, list(range(0, 150, 2)))
    assert case.packed.layout.n_tiles > 1
    x = torch.randn(150)
    assert torch.equal(case.check(x), case.check(x))
