"""The operator of rationals: its two implementations against each other, its registration, threads and what it saves.

Its values and gradients against the formula and autograd in float64 stand in `tests/core/test_univariate.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actkit.kernels import rational, rationals
from actkit.kernels.rationals import Kind

OPERATORS = torch.ops.actkit
SHAPES = [(7, 8), (3, 4, 1304), (1, 4), (2048,), (0, 8), (5, 0)]


def given(
    shape: tuple[int, ...],
    tops: int,
    bottoms: int,
    dtype: torch.dtype = torch.float64,
    degrees: tuple[int, int] = (5, 4),
) -> list[Tensor]:
    """x, with zeros, and coefficients, with zeros."""
    generator = torch.Generator().manual_seed(len(shape))
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    x[..., :1] = 0
    numerator, denominator = (
        torch.randn(rows, length, generator=generator, dtype=torch.float64)
        for rows, length in ((tops, degrees[0] + 1), (bottoms, degrees[1]))
    )
    denominator[:, -1] = 0
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(dtype), numerator.to(wide), denominator.to(wide)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tops", "bottoms"), [(1, 4), (4, 1), (4, 4), (1, 1)])
@pytest.mark.parametrize("degrees", [(5, 4), (3, 2), (7, 6), (5, 6)])
@pytest.mark.parametrize("kind", ["A", "B"])
def test_the_reference_is_the_same(
    shape: tuple[int, ...], tops: int, bottoms: int, degrees: tuple[int, int], kind: Kind
) -> None:
    """What runs beside the CPU, and without Numba."""
    tensors, absolute = given(shape, tops, bottoms, degrees=degrees), kind == "A"
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found, expected = OPERATORS.rational(*tensors, absolute), rationals.reference(*tensors, absolute)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(
        OPERATORS.rational_backward(grad, *tensors, absolute),
        rationals.reference_backward(grad, *tensors, absolute),
        strict=True,
    )
    for ours, other in pairs:
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["A", "B"])
def test_narrow_dtypes_compute_in_float32(dtype: torch.dtype, kind: Kind) -> None:
    tensors = [each.requires_grad_() for each in given((6, 704), 1, 4, dtype)]
    exact = [each.detach().double().requires_grad_() for each in tensors]
    grad = torch.randn(6, 704, generator=torch.Generator().manual_seed(9)).to(dtype)
    y, precise = rational(*tensors, kind), rational(*exact, kind)
    rough = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), precise, rtol=rough, atol=rough)
    ours = torch.autograd.grad(y, tensors, grad)
    for index, (found, expected) in enumerate(zip(ours, torch.autograd.grad(precise, exact, grad.double()))):
        assert found.dtype == tensors[index].dtype
        tolerance = 1e-4 if index else rough
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["A", "B"])
def test_gradients_are_those_of_differences(kind: Kind) -> None:
    x, numerator, denominator = given((3, 8), 1, 2)
    x = torch.where(x.abs() < 0.1, 0.3, x)  # away from the kinks
    denominator = torch.where(denominator == 0, 0.2, denominator)
    tensors = [each.requires_grad_() for each in (x, numerator, denominator)]
    assert torch.autograd.gradcheck(lambda *given: rational(*given, kind), tensors)
    assert torch.autograd.gradgradcheck(lambda *given: rational(*given, kind), tensors)


def test_registration() -> None:
    tensors = [each.requires_grad_() for each in given((4, 8), 1, 2, torch.float32)]
    for absolute in (True, False):
        torch.library.opcheck(OPERATORS.rational.default, (*tensors, absolute))


@pytest.mark.parametrize("kind", ["A", "B"])
def test_equal_bits_twice_and_with_any_number_of_threads(kind: Kind) -> None:
    tensors = [each.requires_grad_() for each in given((300, 512), 1, 8, torch.float32)]
    grad = torch.randn(300, 512, generator=torch.Generator().manual_seed(9))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            y = rational(*tensors, kind)
            found.append([y.detach(), *torch.autograd.grad(y, tensors, grad)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_a_program_without_actkit_is_exported() -> None:
    x, numerator, denominator = given((4, 8), 1, 2, torch.float32)

    class Function(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rational(x, numerator, denominator)

    program = torch.export.export(Function(), (x,))
    assert "actkit" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), rational(x, numerator, denominator))
