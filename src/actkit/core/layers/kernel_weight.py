"""An integer weight that is stored as the kernels read it, and in no other way.

`IntegerWeight` keeps codes and packs a second copy for the kernels. If memory is short, or a weight is used as soon as
it is read from a file, the packed one is enough: it is multiplied as it lies, and widened for many rows at once. No
checkpoint keeps it, as it is made for the kernels of this machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.core.grids.grid import Grid
from actkit.core.layers.weights import WIDENED, WeightStorage
from actkit.kernels.quantized import QuantizedWeight


class KernelWeight(WeightStorage):
    """A packed integer weight; the values are those of the codes that it was packed from.

    Args:
        weight: as `pack_quantized` made it.
        grid: that its codes are of.
        dtype: what `dequantize` returns.
    """

    kind = "kernel"

    def __init__(self, weight: QuantizedWeight, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self._weight, self.grid, self.dtype = weight, grid, dtype
        self.shape = weight.out_features, weight.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers, padding included."""
        return self._weight.nbytes

    def _values(self) -> Tensor:
        return self._weight.dense().to(self.dtype).contiguous()  # products round by how a weight lies

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.dequantize()
        step = max(1, WIDENED // self.shape[1])  # the same products as those of codes, which are widened so
        parts = [
            F.linear(x, weight[start : start + step], None if bias is None else bias[start : start + step])
            for start in range(0, self.shape[0], step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def describe(self) -> str:
        """What it is rounded to."""
        return self.grid.describe()

    def packed(self, selects: bool) -> QuantizedWeight | None:
        return None if self.dtype == torch.float64 else self._weight

    def product(self, x: Tensor, packed: Any, bias: Tensor | None, **chosen: Any) -> Tensor:
        from actkit import kernels

        return kernels.quantized_linear(x, packed, bias=bias, **chosen)
