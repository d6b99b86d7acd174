"""The operators of sparse codes against dense masked products in float64, finite differences and themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from actkit.kernels import chosen_products, chosen_sum, largest_of_rows, sparse_codes

OPERATORS = torch.ops.actkit


def given(rows: int = 9, k: int = 3, n: int = 20, channels: int = 11, dtype: Any = torch.float64) -> list[Tensor]:
    """Indices (the first row names one latent twice), values, weight and an input."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(n, (rows, k), generator=generator)
    indices[:1, :2] = n // 2
    found = [
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, k), (n, channels), (rows, channels))
    ]
    return [indices, *(each.requires_grad_() for each in found)]


def dense(indices: Tensor, values: Tensor, n: int) -> Tensor:
    """The code as a matrix."""
    return torch.zeros(len(indices), n, dtype=values.dtype).scatter_add(1, indices, values)


@pytest.mark.parametrize("shape", [(9, 3, 20, 11), (1, 1, 1, 1), (200, 8, 64, 130), (0, 2, 4, 3)])
def test_values_and_gradients_are_those_of_dense_products(shape: tuple[int, ...]) -> None:
    indices, values, weight, x = given(*shape)
    pairs = (
        (chosen_sum(indices, values, weight), dense(indices, values, len(weight)) @ weight, [values, weight]),
        (chosen_products(x, weight, indices), (x @ weight.T).gather(1, indices), [x, weight]),
    )
    for found, expected, wanted in pairs:
        grad = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(each, wanted, grad) for each in (found, expected)]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_of_any_order_are_those_of_differences() -> None:
    indices, values, weight, x = given(4, 2, 6, 5)
    assert torch.autograd.gradcheck(lambda v, w: chosen_sum(indices, v, w), (values, weight))
    assert torch.autograd.gradcheck(lambda y, w: chosen_products(y, w, indices), (x, weight))
    assert torch.autograd.gradgradcheck(lambda v, w: chosen_sum(indices, v, w), (values, weight))
    assert torch.autograd.gradgradcheck(lambda y, w: chosen_products(y, w, indices), (x, weight))


def test_the_gradient_of_a_code_is_as_sparse_as_the_code() -> None:
    """Nothing of [rows, n] is made or kept on the way."""
    indices, values, weight, _ = given(64, 4, 5000, 8, torch.float32)
    sizes: list[int] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, Tensor))
            return result

    with Seen():
        chosen_sum(indices, values, weight).square().sum().backward()
    assert max(sizes) == weight.numel() < 64 * 5000
    assert values.grad is not None and values.grad.shape == (64, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_reference_is_the_same(dtype: torch.dtype) -> None:
    """What runs beside the CPU, and without Numba."""
    indices, values, weight, x = (each.detach() for each in given(dtype=dtype))
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    pairs = (
        (OPERATORS.chosen_sum(indices, values, weight), sparse_codes.reference_sum(indices, values, weight)),
        (OPERATORS.chosen_products(x, weight, indices), sparse_codes.reference_products(x, weight, indices)),
        (OPERATORS.chosen_outer(indices, values, x, 20), sparse_codes.reference_outer(indices, values, x, 20)),
    )
    for found, expected in pairs:
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=close, atol=close)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (50, 7), (64, 64), (3000, 33)])
def test_the_largest_are_those_of_torch(n: int, k: int) -> None:
    x = torch.randn(40, n, generator=torch.Generator().manual_seed(n))
    found, expected = largest_of_rows(x, k), x.topk(k)
    assert torch.equal(x.gather(1, found).sort(descending=True).values, expected.values)
    assert all(len(row.unique()) == k for row in found)
    assert torch.equal(sparse_codes.reference_largest(x, k).sort().values, expected.indices.sort().values)


def test_equals_and_nan() -> None:
    zeros = torch.zeros(2, 10)
    assert largest_of_rows(zeros, 3).sort().values.tolist() == [[0, 1, 2]] * 2  # the first ones
    broken = torch.tensor([[torch.nan, 1.0, 2.0]])
    indices, _, weight, _ = given(1, 1, 3, 3)
    assert bool(chosen_products(broken.double(), weight, indices).isnan().all())


def test_registration() -> None:
    indices, values, weight, x = given(dtype=torch.float32)
    torch.library.opcheck(OPERATORS.chosen_sum.default, (indices, values, weight))
    torch.library.opcheck(OPERATORS.chosen_products.default, (x, weight, indices))
    torch.library.opcheck(OPERATORS.chosen_outer.default, (indices, values, x, 20))
    torch.library.opcheck(OPERATORS.largest_of_rows.default, (x.detach(), 4))


def test_equal_bits_with_any_number_of_threads() -> None:
    indices, values, weight, x = (each.detach() for each in given(600, 16, 500, 256, torch.float32))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(
                [
                    OPERATORS.chosen_sum(indices, values, weight),
                    OPERATORS.chosen_products(x, weight, indices),
                    OPERATORS.chosen_outer(indices, values, x, 500),
                    largest_of_rows(x, 9),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_bad_input() -> None:
    indices, values, weight, x = given()
    with pytest.raises(ValueError, match="indices: 0 to 20"):
        OPERATORS.chosen_sum(indices.clamp(max=0).index_fill(0, torch.tensor([1]), 20), values, weight)
    with pytest.raises(ValueError, match="give int64"):
        chosen_sum(indices.int(), values, weight)
    with pytest.raises(ValueError, match="one float dtype"):
        chosen_sum(indices, values.float(), weight)
    with pytest.raises(ValueError, match="it has 4 channels"):
        chosen_products(x[:, :4], weight, indices)
    with pytest.raises(ValueError, match="1 to n"):
        largest_of_rows(x, 12)
