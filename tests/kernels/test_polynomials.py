"""PolyCom's operators against plain autograd in float64, finite differences and themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from actkit.kernels import poly_norm, poly_relu, polynomials

OPERATORS = torch.ops.actkit
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """The formula, with autograd's own gradients."""
    powers = [x ** (len(weight) - i) for i in range(len(weight))]
    return bias + sum(w * p / (p.square().mean(-1, keepdim=True) + eps).sqrt() for w, p in zip(weight, powers))


def plain_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return bias + sum(w * x.relu() ** (len(weight) - i) for i, w in enumerate(weight))


def given(shape: tuple[int, ...], order: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    """x, weight and bias, which want gradients; x holds a zero and a row of them."""
    generator = torch.Generator().manual_seed(order)
    x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    if x.dim() > 1 and len(x) > 1:
        x[0, ..., :1] = 0
        x[-1] = 0
    x = x.to(dtype)
    weight = torch.randn(order, generator=generator, dtype=torch.float64)
    coefficients = dtype if dtype == torch.float64 else torch.float32
    bias = torch.randn(1, generator=generator, dtype=torch.float64).to(coefficients)
    return [tensor.requires_grad_() for tensor in (x, weight.to(coefficients), bias)]


def with_gradients(function: Any, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad.to(y.dtype))]


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 1300), (1, 1), (2048,), (0, 6)])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize(("ours", "plain"), [(poly_norm, plain_norm), (poly_relu, plain_relu)])
def test_float64_agrees_with_plain_autograd(shape: Any, order: int, ours: Any, plain: Any) -> None:
    tensors = given(shape, order)
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for found, expected in zip(with_gradients(ours, tensors, grad), with_gradients(plain, tensors, grad), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("ours", "plain"), [(poly_norm, plain_norm), (poly_relu, plain_relu)])
def test_narrow_dtypes_compute_in_float32(dtype: torch.dtype, ours: Any, plain: Any) -> None:
    tensors = given((6, 700), 3, dtype)
    grad = torch.randn(6, 700, generator=torch.Generator().manual_seed(9)).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    rough = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    pairs = zip(with_gradients(ours, tensors, grad), with_gradients(plain, exact, grad.double()), strict=True)
    for index, (found, expected) in enumerate(pairs):
        assert found.dtype == (dtype if index < 2 else torch.float32)
        rtol = rough if index < 2 else 1e-4  # the sums of the coefficients stay in float32
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("function", [poly_norm, poly_relu])
def test_gradients_are_those_of_differences(function: Any) -> None:
    x, weight, bias = given((3, 8), 3)
    x = (x.detach() + 0.05 * x.detach().sign()).requires_grad_()  # away from the kink
    x = torch.where(x == 0, 0.3, x).detach().requires_grad_()
    assert torch.autograd.gradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_reference_is_the_same(dtype: torch.dtype) -> None:
    """What runs beside the CPU, and without Numba."""
    x, weight, bias = (tensor.detach() for tensor in given((5, 600), 3, dtype))
    grad = torch.randn(5, 600, generator=torch.Generator().manual_seed(9)).to(dtype)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    y, scales = OPERATORS.poly_norm(x, weight, bias, 1e-6)
    for pair in (
        zip((y, scales), polynomials.reference_norm(x, weight, bias, 1e-6)),
        zip(
            OPERATORS.poly_norm_backward(grad, x, scales, weight),
            polynomials.reference_norm_backward(grad, x, scales, weight),
        ),
        zip([OPERATORS.poly_relu(x, weight, bias)], [polynomials.reference_relu(x, weight, bias)]),
        zip(OPERATORS.poly_relu_backward(grad, x, weight), polynomials.reference_relu_backward(grad, x, weight)),
    ):
        for found, expected in pair:
            torch.testing.assert_close(found, expected, **close)


def test_registration() -> None:
    x, weight, bias = given((4, 6), 3, torch.float32)
    torch.library.opcheck(OPERATORS.poly_norm.default, (x, weight, bias, 1e-6))
    torch.library.opcheck(OPERATORS.poly_relu.default, (x, weight, bias))


@pytest.mark.parametrize(("function", "more"), [(poly_norm, 1), (poly_relu, 0)])
def test_only_the_input_and_three_numbers_per_row_are_saved(function: Any, more: int) -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x, weight, bias = given((16, 128), 3, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(x, weight, bias)
    assert sorted(tuple(tensor.shape) for tensor in saved) == sorted([(16, 128), (3,), *[(16, 3)] * more])
    assert next(tensor for tensor in saved if tensor.shape == (16, 128)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("function", [poly_norm, poly_relu])
def test_equal_bits_twice_and_with_any_number_of_threads(function: Any) -> None:
    tensors = given((300, 1000), 3, torch.float32)  # enough for several threads
    grad = torch.randn(300, 1000, generator=torch.Generator().manual_seed(9))
    first, threads = with_gradients(function, tensors, grad), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for found, expected in zip(with_gradients(function, tensors, grad), first, strict=True):
                assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(threads)


def test_large_values_and_nan() -> None:
    """1e4 cubed and squared again is 1e24, which 16 bits would not hold; NaN and Inf are seen."""
    weight, bias = torch.full((3,), 1 / 3), torch.zeros(1)
    for dtype in (torch.bfloat16, torch.float16):
        y = poly_norm(torch.tensor([[1e4, -1e4, 5e3, 1.0]], dtype=dtype), weight, bias)
        assert bool(y.isfinite().all())
    broken = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    assert poly_norm(broken, weight, bias).isnan().any(1).tolist() == [True, False]
    assert poly_relu(broken, weight, bias).isnan().tolist() == [[False, True], [False, False]]


def test_strides() -> None:
    x, weight, bias = given((6, 8), 3)
    for function, plain in ((poly_norm, plain_norm), (poly_relu, plain_relu)):
        torch.testing.assert_close(function(x.t(), weight, bias), plain(x.t(), weight, bias), rtol=1e-10, atol=1e-10)
