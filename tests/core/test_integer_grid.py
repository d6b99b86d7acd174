"""Codes, scales and zero points bit for bit against the formulas written out in NumPy float32, group by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.parcels import parcels
from actkit.core.layers.weights import IntegerWeight


def by_hand(weight: np.ndarray, bits: int, size: int, axis: str, symmetric: bool, convention: str):
    """Codes, scales, zeros and the values they stand for, one group at a time."""
    release = convention == "llm-awq"
    rows = weight if axis == "input" else weight.T
    size = rows.shape[1] if size == -1 else size
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    groups = rows.shape[1] // size
    codes, back = np.zeros(rows.shape, np.uint8), np.zeros(rows.shape, np.float32)
    scales, zeros = np.zeros((rows.shape[0], groups), np.float32), np.zeros((rows.shape[0], groups), np.uint8)
    for r in range(rows.shape[0]):
        for g in range(groups):
            part = slice(g * size, (g + 1) * size)
            w = rows[r, part]
            low, high = w.min(), w.max()
            if not release:
                low, high = min(low, np.float32(0)), max(high, np.float32(0))
            span = np.abs(w).max() if symmetric else high - low
            span = max(span, np.float32(1e-5)) if release else span
            scale = span / np.float32(half - 1 if symmetric else levels)
            scale = np.float32(1) if span == 0 else scale
            zero = np.float32(half) if symmetric else np.clip(-np.rint(low / scale), 0, levels)
            code = np.clip(np.rint(w / scale) + zero, 0, levels)
            codes[r, part], scales[r, g], zeros[r, g] = code, scale, zero
            back[r, part] = (code - zero) * scale
    return [x if axis == "input" else np.ascontiguousarray(x.T) for x in (codes, scales, zeros, back)]


@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2])
@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("convention", ["zero_in_range", "llm-awq"])
@pytest.mark.parametrize(("shape", "size"), [((12, 20), -1), ((12, 24), 4), ((7, 9), -1), ((15, 21), 3), ((5, 5), 1)])
def test_codes_are_those_of_the_formula(bits, axis, symmetric, convention, shape, size):
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal(shape, dtype=np.float32)
    weight[0, 0] *= 50  # an outlier
    weight[2] = 0.0  # a row without range
    weight[3] = np.abs(weight[3])  # all of one sign
    weight[4] = -np.abs(weight[4])
    grid = IntegerGrid(bits, size, axis, symmetric, convention)
    codes, scale, zero = grid.quantize(torch.from_numpy(weight))
    expected = by_hand(weight, bits, size, axis, symmetric, convention)
    assert (codes.dtype, scale.dtype) == (torch.uint8, torch.float32)
    np.testing.assert_array_equal(codes.numpy(), expected[0])
    np.testing.assert_array_equal(scale.numpy(), expected[1])
    assert tuple(scale.shape) == grid.parameter_shape(*shape)
    if symmetric:
        assert zero is None
    else:
        np.testing.assert_array_equal(zero.numpy(), expected[2])
    np.testing.assert_array_equal(grid.dequantize(codes, scale, zero).numpy(), expected[3])
    np.testing.assert_array_equal(grid.fake(torch.from_numpy(weight)).numpy(), expected[3])


@pytest.mark.parametrize("axis", ["input", "output"])
def test_a_large_weight_is_rounded_piece_by_piece_alike(axis):
    weight = np.random.default_rng(0).standard_normal((2048, 1280), dtype=np.float32)
    assert len(parcels(torch.from_numpy(weight))) == 3
    grid = IntegerGrid(4, 128, axis)
    for found, expected in zip(
        grid.quantize(torch.from_numpy(weight)), by_hand(weight, 4, 128, axis, False, "zero_in_range")
    ):
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_is_half_to_even(symmetric):
    # scale 1 exactly, so that halves are ties: symmetric 4 bits from max 7, asymmetric 4 bits from the range 15
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5]] if symmetric else [[15.0, 0.5, 1.5, 2.5, 3.5, 0.0]])
    grid = IntegerGrid(4, symmetric=symmetric)
    expected = [7.0, 0.0, 2.0, 2.0, 0.0, -2.0] if symmetric else [15.0, 0.0, 2.0, 2.0, 4.0, 0.0]
    assert grid.fake(weight)[0].tolist() == expected


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("axis", ["input", "output"])
def test_the_error_is_at_most_half_a_step(bits, axis):
    weight = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[:4, :8], weight[:4, 8:16] = weight[:4, :8].abs() + 3, -weight[:4, 8:16].abs() - 3  # groups of one sign
    weight[4:8] *= 1e-9
    weight[8:10] *= 1e9
    weight = weight if axis == "input" else weight.t()
    grid = IntegerGrid(bits, 8, axis)
    scale = grid.quantize(weight)[1].double().repeat_interleave(8, 1 if axis == "input" else 0)
    error = (grid.fake(weight).double() - weight).abs()
    assert (error <= scale * 0.5001).all()


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_scales_and_zero_points_are_those_of_torchs_observer(bits):
    """torch.ao puts 0 into the range of every channel too; each group is a channel of it."""
    weight = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))  # of 64, some 8 have one sign
    weight[5] *= 1e-7
    weight[6] += 10
    observer = PerChannelMinMaxObserver(
        0, torch.quint8, torch.per_channel_affine, quant_min=0, quant_max=2**bits - 1, eps=1e-30
    )
    observer(weight)
    scale, zero = observer.calculate_qparams()
    grid = IntegerGrid(bits, 4)
    _, found_scale, found_zero = grid.quantize(weight)
    torch.testing.assert_close(found_scale[:, 0], scale, rtol=1e-6, atol=0)
    assert torch.equal(found_zero[:, 0].long(), zero.long())
    rounded = torch.fake_quantize_per_channel_affine(weight, scale, zero.int(), 0, 0, 2**bits - 1)
    torch.testing.assert_close(grid.fake(weight), rounded, rtol=1e-5, atol=0)


def test_groups_of_one_sign_and_small_weights_keep_what_they_hold():
    far = torch.tensor([[10.5, 11.0, 11.5, 12.0, 12.5, 13.0, 13.5, 14.0]])
    for weight in (far, -far, 1e-7 * far, -1e-12 * far, torch.full((1, 8), 5.0)):
        for symmetric in (False, True):
            found = IntegerGrid(8, 8, symmetric=symmetric).fake(weight)
            steps = 127 if symmetric else 255
            assert ((found - weight).abs() <= 0.5001 * weight.abs().max() / steps).all()
    release = IntegerGrid(8, 8, convention="llm-awq")
    assert release.fake(far)[0].tolist() == [3.5] * 8  # llm-awq: range 3.5, zero point clamped to 0
    assert not release.fake(1e-9 * far).any()  # below half of 1e-5 / 255


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_zeros_stay_zeros(bits):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    weight[pruned] = 0.0
    weight[0], weight[1] = weight[0].abs(), -weight[1].abs()
    weight[2] = 0.0
    for symmetric in (False, True):
        assert (IntegerGrid(bits, 8, symmetric=symmetric).fake(weight)[pruned] == 0).all()


def test_quantizing_the_rounded_weight_again_changes_nothing():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    grid = IntegerGrid(4, 8, symmetric=True)
    once = grid.fake(weight)
    assert torch.equal(grid.fake(once), once)


def test_bfloat16_is_computed_in_float32():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    grid = IntegerGrid(4, 8)
    rounded = grid.fake(weight)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, grid.fake(weight.float()).bfloat16())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"bits": 1}, r"bits: 1 was given, allowed are 2 to 8"),
        ({"bits": 9}, r"bits: 9"),
        ({"bits": 4, "group_size": 0}, r"group_size: 0 was given"),
        ({"bits": 4, "group_size": -2}, r"group_size: -2"),
        ({"bits": 4, "group_axis": "rows"}, r"group_axis: 'rows' was given, allowed are"),
        ({"bits": 4, "scope": "row"}, r"scope: 'row' was given, allowed are 'group' and 'tensor'"),
        ({"bits": 4, "convention": "awq"}, r"convention: 'awq' was given, allowed are 'zero_in_range' and 'llm-awq'"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        IntegerGrid(**settings)


@pytest.mark.parametrize(
    ("length", "size"), [(4096, 128), (192, 64), (576, 64), (96, 32), (48, 16), (128, -1), (16, -1), (20, -1), (17, -1)]
)
@pytest.mark.parametrize("axis", ["input", "output"])
def test_auto_takes_the_largest_group_that_divides(length, size, axis):
    """As a grid that states that number."""
    shape = (3, length) if axis == "input" else (length, 3)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    auto, stated = IntegerGrid(4, "auto", axis), IntegerGrid(4, size, axis)
    assert auto.of(*shape) == stated and auto.fits(*shape) is None
    assert auto.parameter_shape(*shape) == stated.parameter_shape(*shape)
    assert torch.equal(auto.fake(weight), stated.fake(weight))
    stored = IntegerWeight.quantize(weight, auto)
    assert stored.grid == stated and torch.equal(stored.dequantize(), stated.fake(weight))


@pytest.mark.parametrize(("axis", "length"), [("input", 20), ("output", 12)])
def test_groups_that_do_not_fit(axis, length):
    grid = IntegerGrid(4, 8, axis)
    reason = grid.fits(12, 20)
    assert reason is not None
    assert f"8 does not divide the {length} {axis}s" in reason
    for call in (lambda: grid.quantize(torch.zeros(12, 20)), lambda: grid.parameter_shape(12, 20)):
        with pytest.raises(ValueError, match="group_size"):
            call()
