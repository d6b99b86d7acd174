"""Codes for the backward pass: the published table of GELU, brute force, autograd, and sizes in bytes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from actkit.core.layers import known_functions as known
from actkit.core.layers.activation_function import ActivationFunction
from actkit.core.layers.packed_codes import AffineCodes, DerivativeCode, _best_intervals, pack, unpack

FEWBIT = (  # the 3-bit table of GELU in skolai/fewbit
    (-2.398, -0.711, -0.326, 0.0, 0.326, 0.711, 2.398),
    (-0.003, -0.089, 0.125, 0.372, 0.628, 0.875, 1.089, 1.003),
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(boundaries: Any, levels: Any, density: str) -> float:
    """Mean square error of GELU's slope, by a fine sum of its own."""
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    normal = torch.exp(-(x**2) / 2)
    weight = {"normal": normal / normal.sum(), "uniform": torch.full_like(x, 1 / len(x))}
    weight["mixed"] = (weight["normal"] + weight["uniform"]) / 2
    slope = torch.special.ndtr(x) + x * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    edges = torch.tensor(boundaries, dtype=torch.float64)
    chosen = torch.tensor(levels, dtype=torch.float64)[torch.bucketize(x, edges)]
    return float((weight[density] * (slope - chosen) ** 2).sum())


@pytest.mark.parametrize("density", ["normal", "uniform", "mixed"])
def test_three_bits_are_no_worse_than_the_published_table(density: Any) -> None:
    code = DerivativeCode.fit(known.GELU, 3, density)
    ours = error(code.boundaries, code.levels, density)
    assert ours <= error(*FEWBIT, density)
    assert math.sqrt(ours) == pytest.approx(code.rmse, rel=0.02)


@pytest.mark.parametrize(
    ("function", "bits", "rmse"),
    [
        (known.GELU, 1, 0.196),
        (known.GELU, 2, 0.089),
        (known.GELU, 3, 0.044),
        (known.GELU, 4, 0.0245),
        (known.SILU, 4, 0.0225),
        (known.HARDSWISH, 4, 0.0335),
    ],
)
def test_errors_are_at_most_those_known(function: ActivationFunction, bits: int, rmse: float) -> None:
    code = DerivativeCode.fit(function, bits, "normal")
    assert code.rmse <= rmse + 5e-4 and len(code.levels) == 2**bits and code.bits == bits


def test_no_other_intervals_are_better() -> None:
    generator = np.random.default_rng(0)
    values, weight = generator.normal(size=9), generator.random(9) + 0.1

    def cost(starts: tuple[int, ...]) -> float:
        total = 0.0
        for start, end in itertools.pairwise((*starts, 9)):
            own = weight[start:end]
            total += (own * (values[start:end] - np.average(values[start:end], weights=own)) ** 2).sum()
        return total

    for count in range(1, 6):
        found = tuple(_best_intervals(values, weight, count))
        best = min(cost((0, *rest)) for rest in itertools.combinations(range(1, 9), count - 1))
        assert found[0] == 0 and len(found) == count and cost(found) == pytest.approx(best)


@pytest.mark.parametrize(
    ("call", "function"),
    [
        (F.relu, known.RELU),
        (F.relu6, known.RELU6),
        (F.leaky_relu, known.LEAKY_RELU),
        (F.hardsigmoid, known.HARDSIGMOID),
        (lambda x: x.clamp(-1, 1), known.HARDTANH),
    ],
)
def test_two_slopes_are_one_bit_and_exact(call: Any, function: ActivationFunction) -> None:
    code = DerivativeCode.fit(function, 4)
    assert code.bits == 1 and code.rmse == 0
    x = torch.cat([4 * drawn(1001), torch.tensor([0.0, -0.0, 6.0, 3.0, -3.0, 1.0, -1.0])]).requires_grad_()
    (expected,) = torch.autograd.grad(call(x).sum(), x)
    packed = code.encode(x)
    assert packed.nbytes == math.ceil(len(x) / 8)
    torch.testing.assert_close(code.decode(packed, x.shape, x.dtype), expected, rtol=1e-6, atol=1e-8)


def test_half_precision_is_compared_in_full() -> None:
    code = DerivativeCode.fit(known.SILU, 4)
    x = (3 * drawn(64, 33)).bfloat16()
    assert torch.equal(code.encode(x), code.encode(x.float()))
    assert code.encode(x).nbytes == math.ceil(x.numel() / 2)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 64)])
def test_any_shape_comes_back(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert packed.nbytes == math.ceil(codes.numel() * bits / 8)
    assert torch.equal(unpack(packed, codes.numel(), bits).view(shape), codes)


@pytest.mark.parametrize("shape", [(7, 130), (5, 64), (3,), (2, 3, 32)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_within_half_a_step(shape: tuple[int, ...], bits: int) -> None:
    x, codes = 100 * drawn(*shape), AffineCodes(bits, 64)
    kept = codes.encode(x)
    flat = torch.cat([x.flatten(), x.flatten()[-1:].expand(-x.numel() % 64)]).view(-1, 64)
    step = (flat.amax(1) - flat.amin(1)) / (2**bits - 1)
    error = (codes.decode(kept, x.shape, x.dtype) - x).abs().flatten()
    bound = step.repeat_interleave(64)[: len(error)] / 2 + 2e-3 * float(x.abs().max())  # ends in 16 bits
    assert bool((error <= bound).all())
    assert kept[0].nbytes == math.ceil(x.numel() * bits / 8)


def test_values_beyond_16_bits_and_constant_ones_are_kept() -> None:
    x = torch.cat([torch.full((64,), 3e8), -1e9 * torch.ones(64), torch.zeros(64)])
    codes = AffineCodes()
    torch.testing.assert_close(codes.decode(codes.encode(x), x.shape, x.dtype), x, rtol=1e-3, atol=0)
    zeros = torch.zeros(130)
    assert torch.equal(codes.decode(codes.encode(zeros), zeros.shape, zeros.dtype), zeros)


def test_rows_keep_mean_and_deviation() -> None:
    x, codes = 5 + drawn(9, 48), AffineCodes(2, 64, rows=True)
    found = codes.decode(codes.encode(x), x.shape, x.dtype)
    for each in (torch.mean, lambda x, axis: torch.std(x, axis, correction=0)):
        torch.testing.assert_close(each(found, -1), each(x, -1), rtol=1e-5, atol=1e-5)


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    x = drawn(64)
    torch.manual_seed(0)
    codes = AffineCodes(2, 64, "stochastic")
    found = torch.stack([codes.decode(codes.encode(x), x.shape, x.dtype) for _ in range(2000)])
    assert float((found.mean(0) - x).abs().max()) < 0.1
    nearest = AffineCodes(2, 64)
    assert float((nearest.decode(nearest.encode(x), x.shape, x.dtype) - x).abs().max()) > 0.5


def test_bad_values_are_refused() -> None:
    for make in (lambda: AffineCodes(9), lambda: DerivativeCode.fit(known.GELU, 0)):
        with pytest.raises(ValueError, match=r"bits: [09] was given, allowed are 1 to 8"):
            make()
    with pytest.raises(ValueError, match="group: 1 was given"):
        AffineCodes(group=1)
    with pytest.raises(ValueError, match="the slope of 'softmax' is not known"):
        DerivativeCode.fit(known.SOFTMAX)
    steep = ActivationFunction(
        name="log", function=torch.log, derivative=lambda x: x.clamp(min=0).reciprocal(), limits=(-math.inf, math.inf),
        pieces=known.TANH.pieces,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"the slope of 'log' at -8 is not finite|at -7\.99"):
        DerivativeCode.fit(steep)
