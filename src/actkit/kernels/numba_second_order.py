"""`second_order.round_columns` in Numba. Rows are dealt out to the threads; results do not depend on their number."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.process import LOCK, compiled, follow_torch_threads


@compiled(parallel=True)
def _round_columns(block, upper, scale, zero, groups, levels, codes, errors):  # type: ignore[no-untyped-def]
    rows, columns = block.shape
    for r in prange(rows):
        row = block[r]
        for i in range(columns):
            unit, shift = scale[r, groups[i]], zero[r, groups[i]]
            code = min(max(np.rint(row[i] / unit) + shift, np.float32(0)), levels)
            error = (row[i] - (code - shift) * unit) / upper[i, i]
            codes[r, i], errors[r, i] = np.uint8(code), error
            later, weights = row[i + 1 :], upper[i, i + 1 :]
            for j in range(later.size):
                later[j] -= error * weights[j]


def round_columns(
    block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, groups: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Compute it; arguments and results are those of `second_order.round_columns`."""
    own = block.contiguous()
    codes, errors = torch.empty(own.shape, dtype=torch.uint8), torch.empty_like(own)
    given = (tensor.contiguous().numpy() for tensor in (own, upper, scale, zero, groups))
    with LOCK:
        follow_torch_threads(own.nbytes)
        _round_columns(*given, np.float32(levels), codes.numpy(), errors.numpy())
    if own is not block:
        block.copy_(own)
    return codes, errors
