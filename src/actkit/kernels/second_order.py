"""Round the columns of a weight one after the other, each error moved onto the columns that are still to come.

    code = clamp(round(w_i / scale) + zero, 0, levels),  e = (w_i - (code - zero) scale) / U_ii,  w_j -= e U_ij  (j > i)

The inner loop of second-order rounding (GPTQ), whose rows do not depend on each other. In Numba a row of a block of
columns stays in the first cache; without Numba, and on other devices, plain torch goes through the columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actkit.kernels.operators import has_numba


def round_columns(
    block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, groups: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Round some columns of a weight.

    Args:
        block: the columns, float32 [rows, columns]; changed in place to what they were when their turn came.
        upper: float32 [columns, columns], the upper triangle U.
        scale: float32 [rows, groups].
        zero: float32 [rows, groups].
        groups: int64 [columns], which scale is whose.
        levels: the largest code.

    Returns:
        Codes, uint8 [rows, columns], and the errors e, float32 [rows, columns].
    """
    if block.device.type == "cpu" and has_numba():
        from actkit.kernels.numba_second_order import round_columns as compiled

        return compiled(block, upper, scale, zero, groups, levels)
    return reference(block, upper, scale, zero, groups, levels)


def reference(
    block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, groups: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Compute the same in plain torch."""
    columns = block.t().contiguous()
    scale, zero = scale.t()[groups], zero.t()[groups]
    codes, errors = torch.empty(columns.shape, dtype=torch.uint8, device=block.device), torch.empty_like(columns)
    for i, column in enumerate(columns):
        code = (torch.round(column / scale[i]) + zero[i]).clamp(0, levels)
        codes[i], errors[i] = code, (column - (code - zero[i]) * scale[i]) / upper[i, i]
        columns[i + 1 :].sub_(torch.outer(upper[i, i + 1 :], errors[i]))
    block.copy_(columns.t())
    return codes.t().contiguous(), errors.t().contiguous()
