"""The Triton kernels of rationals and PolyNorm, in Triton's interpreter on the CPU: against what runs in plain torch.

What a GPU makes of them is not tested here.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from test_polynomials import given as polynomial
from test_rationals import given as quotient
from torch import Tensor

from actkit.kernels import operators, polynomials, rationals

triton = pytest.importorskip("triton", reason="the package triton is missing; pip install 'actkit[dev]'")


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is taken for one of a GPU."""
    assert triton.knobs.runtime.interpret, "Triton was imported before tests/conftest.py asked for its interpreter"
    for module in (rationals, polynomials):
        monkeypatch.setattr(module, "runs_in_triton", lambda x: x.numel() > 0)


def agree(found: Any, expected: Any, tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(9)).to(like.dtype)


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize("degrees", [(5, 4), (3, 2), (7, 6)])
@pytest.mark.parametrize(("tops", "bottoms"), [(1, 4), (4, 1), (4, 4), (1, 1)])
@pytest.mark.parametrize("shape", [(7, 8), (3, 4, 1304), (2048,), (0, 8)])
def test_rationals(shape: Any, tops: int, bottoms: int, degrees: Any, kind: str) -> None:
    """Groups that do not fill a tile, and those that need several; zeros, at which |.| has no derivative."""
    tensors, absolute = quotient(shape, tops, bottoms, degrees=degrees), kind == "A"
    agree([rationals._elsewhere(*tensors, absolute)], [rationals.reference(*tensors, absolute)], 1e-12)
    grad = noise(tensors[0])
    found = rationals._elsewhere_backward(grad, *tensors, absolute)
    agree(found, rationals.reference_backward(grad, *tensors, absolute), 1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 1300), (1, 1), (2048,), (0, 6)])
def test_normalised_polynomials(shape: Any, order: int) -> None:
    x, weight, bias = (each.detach() for each in polynomial(shape, order))
    found, expected = (f(x, weight, bias, 1e-6) for f in (polynomials._norm_elsewhere, polynomials.reference_norm))
    agree(found, expected, 1e-12)
    given = (noise(x), x, expected[1], weight)
    agree(polynomials._norm_backward_elsewhere(*given), polynomials.reference_norm_backward(*given), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # numpy, in which it is interpreted, has no bfloat16
def test_narrow_dtypes_compute_in_float32(dtype: torch.dtype) -> None:
    """The plain form rounds the input's gradient in the same way, and coefficients not at all."""
    rough = 1e-5 if dtype == torch.float32 else 2e-3
    x, a, b = quotient((6, 704), 1, 4, dtype)
    agree([rationals._elsewhere(x, a, b, True)], [rationals.reference(x, a, b, True)], rough)
    found = rationals._elsewhere_backward(noise(x), x, a, b, True)
    agree(found, rationals.reference_backward(noise(x), x, a, b, True), rough)
    x, weight, bias = (each.detach() for each in polynomial((6, 700), 3, dtype))
    y, scales = polynomials._norm_elsewhere(x, weight, bias, 1e-6)
    agree((y, scales), polynomials.reference_norm(x, weight, bias, 1e-6), rough)
    given = (noise(x), x, scales, weight)
    agree(polynomials._norm_backward_elsewhere(*given), polynomials.reference_norm_backward(*given), rough)


def test_equal_bits_twice() -> None:
    x, a, b = quotient((300, 512), 1, 8, torch.float32)
    first, again = (rationals._elsewhere_backward(noise(x), x, a, b, True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_strides() -> None:
    x, a, b = quotient((8, 6), 1, 2)
    agree([rationals._elsewhere(x.t(), a, b, True)], [rationals.reference(x.t(), a, b, True)], 1e-12)
    x, weight, bias = (each.detach() for each in polynomial((8, 6), 3))
    found = polynomials._norm_elsewhere(x.t(), weight, bias, 1e-6)
    agree(found, polynomials.reference_norm(x.t(), weight, bias, 1e-6), 1e-12)


def test_rows_that_are_too_long_run_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    module: ModuleType = import_module("actkit.kernels.triton_polynomials")
    monkeypatch.setattr(module, "LONGEST", 4)
    assert not polynomials._in_triton(torch.zeros(2, 5)) and polynomials._in_triton(torch.zeros(2, 4))


def test_who_runs_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values on a GPU; without the package a warning says what that costs."""

    class Of:
        def __init__(self, device: str, count: int = 3) -> None:
            self.is_cuda, self.count = device == "cuda", count

        def numel(self) -> int:
            return self.count

    assert [operators.runs_in_triton(each) for each in (Of("cuda"), Of("cpu"), Of("cuda", 0))] == [True, False, False]  # type: ignore[arg-type]
    monkeypatch.setattr(operators, "find_spec", lambda name: None)
    operators.has_triton.cache_clear()
    with pytest.warns(UserWarning, match="the package triton is missing; on this GPU"):
        assert not operators.runs_in_triton(Of("cuda"))  # type: ignore[arg-type]
    operators.has_triton.cache_clear()
