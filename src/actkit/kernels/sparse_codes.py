"""The operators of sparse codes, with gradients: few rows of a weight for each row of an input, and never a dense code.

    chosen_sum(indices, values, W)       y_i = sum_j values_ij W[indices_ij]            what a code decodes to
    chosen_products(x, W, indices)       p_ij = <x_i, W[indices_ij]>                    what few latents read
    chosen_outer(indices, values, y, n)  G[l] = sum over i, j with indices_ij = l of values_ij y_i
    largest_of_rows(x, k)                the places of the k largest of each row

The first three are each other's derivatives, so that gradients of any order are made of them: the gradient of a code
has k numbers per row, and that of the weight takes k products per row where a dense one takes n. On the CPU they run in
Numba, in float32 (float64 of float64). Sums over rows are taken in the order of the rows, by one thread for each row of
the weight: the same bits for any number of threads. Elsewhere, and without Numba, the same formulas run in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actkit.kernels.operators import has_numba, plain, register


def chosen_sum(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Sum chosen rows of a weight, times values.

    Args:
        indices: int64 [rows, k], of rows of the weight; one may be named twice.
        values: [rows, k].
        weight: [n, channels], of the dtype of the values.

    Returns:
        [rows, channels].

    Raises:
        ValueError: an argument is outside of this.
    """
    _check(indices, values, weight)
    if torch.compiler.is_exporting():
        return reference_sum(indices, values, weight)
    y: Tensor = torch.ops.actkit.chosen_sum.default(indices, values, weight)
    return y


def chosen_products(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """Multiply each row of an input with chosen rows of a weight.

    Args:
        x: [rows, channels].
        weight: [n, channels], of the dtype of x.
        indices: int64 [rows, k], of rows of the weight.

    Returns:
        [rows, k].

    Raises:
        ValueError: an argument is outside of this.
    """
    _check(indices, x, weight)
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x: it has {x.shape[-1]} channels, and the weight {weight.shape[-1]}.")
    if torch.compiler.is_exporting():
        return reference_products(x, weight, indices)
    y: Tensor = torch.ops.actkit.chosen_products.default(x, weight, indices)
    return y


def largest_of_rows(x: Tensor, k: int) -> Tensor:
    """Find the k largest values of each row, in no particular order; there is no gradient.

    Args:
        x: [rows, n].
        k: 1 to n.

    Returns:
        Their places, int64 [rows, k].

    Raises:
        ValueError: an argument is outside of this.
    """
    if x.dim() != 2 or not x.is_floating_point() or not 1 <= k <= x.shape[1]:
        raise ValueError(f"x, k: {x.dtype} {list(x.shape)} and {k} were given; give floats [rows, n] and 1 to n.")
    found: Tensor = torch.ops.actkit.largest_of_rows.default(x.detach(), k)
    return found


def _check(indices: Tensor, rows: Tensor, weight: Tensor) -> None:
    if indices.dim() != 2 or indices.dtype != torch.int64 or len(indices) != len(rows):
        raise ValueError(
            f"indices: {indices.dtype} {list(indices.shape)} were given for {len(rows)} rows; give int64 [rows, k]."
        )
    if rows.dim() != 2 or weight.dim() != 2 or rows.dtype != weight.dtype or not weight.is_floating_point():
        raise ValueError(
            f"values, x, weight: {rows.dtype} {list(rows.shape)} and {weight.dtype} {list(weight.shape)} were given; "
            f"give two matrices of one float dtype."
        )


# -- in plain torch: the reference, and what runs beside the CPU -------------------------------------------------------


def reference_sum(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """The same in plain torch."""
    return torch.einsum("ij,ijc->ic", values, weight[indices])


def reference_products(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """The same in plain torch."""
    return torch.einsum("ic,ijc->ij", x, weight[indices])


def reference_outer(indices: Tensor, values: Tensor, y: Tensor, n: int) -> Tensor:
    """The same in plain torch."""
    parts = values[:, :, None] * y[:, None]
    return y.new_zeros(n, y.shape[1]).index_add(0, indices.flatten(), parts.flatten(0, 1))


def reference_largest(x: Tensor, k: int) -> Tensor:
    """The same in plain torch."""
    return x.topk(k, sorted=False).indices


# -- on the CPU --------------------------------------------------------------------------------------------------------


def _ready(indices: Tensor, n: int, *tensors: Tensor) -> tuple[Tensor, ...] | None:
    """What the kernels read; None if they cannot run. The kernels check no bounds."""
    if not has_numba():
        return None
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < n):
        raise ValueError(f"indices: {int(indices.min())} to {int(indices.max())} were given, the weight has {n} rows.")
    wide = [each if each.dtype == torch.float64 else each.float() for each in tensors]
    return plain(indices), *map(plain, wide)


def _sum(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    given = _ready(indices, len(weight), values, weight)
    if given is None:
        return reference_sum(indices, values, weight)
    from actkit.kernels import numba_sparse_codes

    return numba_sparse_codes.chosen_sum(*given).to(weight.dtype)


def _products(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    given = _ready(indices, len(weight), x, weight)
    if given is None:
        return reference_products(x, weight, indices)
    from actkit.kernels import numba_sparse_codes

    return numba_sparse_codes.chosen_products(*given).to(x.dtype)


def _outer(indices: Tensor, values: Tensor, y: Tensor, n: int) -> Tensor:
    given = _ready(indices, n, values, y)
    if given is None:
        return reference_outer(indices, values, y, n)
    from actkit.kernels import numba_sparse_codes

    return numba_sparse_codes.chosen_outer(given[0], given[1], given[2], n).to(y.dtype)


def _largest(x: Tensor, k: int) -> Tensor:
    if not has_numba():
        return reference_largest(x, k)
    from actkit.kernels import numba_sparse_codes

    return numba_sparse_codes.largest_of_rows(plain(x if x.dtype == torch.float64 else x.float()), k)


# -- registration ------------------------------------------------------------------------------------------------------


def _fake_sum(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(len(indices), weight.shape[1])


def _fake_products(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(indices.shape)


def _fake_outer(indices: Tensor, values: Tensor, y: Tensor, n: int) -> Tensor:
    return y.new_empty(n, y.shape[1])


def _fake_largest(x: Tensor, k: int) -> Tensor:
    return x.new_empty((len(x), k), dtype=torch.int64)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _sum_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, values, weight = ctx.saved_tensors
    operators = torch.ops.actkit
    of_values = operators.chosen_products.default(grad, weight, indices) if ctx.needs_input_grad[1] else None
    of_weight = operators.chosen_outer.default(indices, values, grad, len(weight)) if ctx.needs_input_grad[2] else None
    return None, of_values, of_weight


def _products_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, indices = ctx.saved_tensors
    operators = torch.ops.actkit
    of_x = operators.chosen_sum.default(indices, grad, weight) if ctx.needs_input_grad[0] else None
    of_weight = operators.chosen_outer.default(indices, grad, x, len(weight)) if ctx.needs_input_grad[1] else None
    return of_x, of_weight, None


def _outer_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, values, y = ctx.saved_tensors
    operators = torch.ops.actkit
    of_values = operators.chosen_products.default(y, grad, indices) if ctx.needs_input_grad[1] else None
    of_y = operators.chosen_sum.default(indices, values, grad) if ctx.needs_input_grad[2] else None
    return None, of_values, of_y, None


register("chosen_sum(Tensor indices, Tensor values, Tensor weight) -> Tensor", _sum, _fake_sum, reference_sum)
register(
    "chosen_products(Tensor x, Tensor weight, Tensor indices) -> Tensor", _products, _fake_products, reference_products
)
register(
    "chosen_outer(Tensor indices, Tensor values, Tensor y, SymInt n) -> Tensor", _outer, _fake_outer, reference_outer
)
register("largest_of_rows(Tensor x, SymInt k) -> Tensor", _largest, _fake_largest, reference_largest)
torch.library.register_autograd("actkit::chosen_sum", _sum_gradients, setup_context=_keep)
torch.library.register_autograd("actkit::chosen_products", _products_gradients, setup_context=_keep)
torch.library.register_autograd("actkit::chosen_outer", _outer_gradients, setup_context=_keep)
