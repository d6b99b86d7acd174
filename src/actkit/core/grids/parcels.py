"""A large tensor some rows at a time."""

from __future__ import annotations

from torch import Tensor


def parcels(tensor: Tensor, values: int = 1 << 20) -> tuple[Tensor, ...]:
    """Split a tensor into views of consecutive rows with about so many values each.

    What is computed from one stays in the caches, and copies in float32 stay small beside the tensor.

    Args:
        tensor: [rows, ...].
        values: how many a view holds, about; one row at least.
    """
    return tensor.split(max(1, values * len(tensor) // max(1, tensor.numel())))
