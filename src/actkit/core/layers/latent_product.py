"""The product of two matrices in training, rounded as one: q(Wq_h^T Wk_h) for each head h (`query_key`).

Two weights that are rounded each for itself and multiplied then push one another across thresholds; their product is
one weight [heads * in, in], and is stored as such (2023, arXiv:2302.02210).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.grids.grid import Grid
from actkit.core.layers.latent_weight import LatentWeight


class LatentProduct(LatentWeight):
    """The products of two factors, head by head, seen through a grid.

    Args:
        query: [heads * head size, in]; becomes a Parameter.
        key: of the same shape; becomes a Parameter.
        heads: how many.
        grid: that the products are seen through; their scales are found anew in each step.

    Attributes:
        boundary: if set, products that are further than so many steps from a threshold give no gradient.

    Raises:
        ValueError: the groups do not fit.
    """

    kind = "latent_product"
    boundary: float | None = None

    def __init__(self, query: Tensor, key: Tensor, heads: int, grid: Any) -> None:
        nn.Module.__init__(self)
        self.query, self.key, self.heads = nn.Parameter(query), nn.Parameter(key), heads
        self.grid, self.clip, self.step = grid.of(*self.shape), 1.0, None
        self._scales = self.grid.parameter_shape(*self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(heads * in, in)."""
        return self.heads * self.query.shape[1], self.query.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors."""
        return self.query.dtype

    def latent(self) -> Tensor:
        """The products [heads * in, in] that are rounded."""
        query, key = (each.unflatten(0, (self.heads, -1)) for each in (self.query, self.key))
        return (query.mT @ key).flatten(0, 1)

    def _values(self) -> Tensor:
        latent = self.latent()
        if self.boundary is not None and latent.requires_grad:
            latent = torch.where(self.from_thresholds() <= self.boundary, latent, latent.detach())
        return self.grid.fake_straight(latent, *self.grid.parameters(latent))

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "grid": self.grid.spec(), "heads": self.heads, "rows": self.query.shape[0]}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> LatentProduct:
        query, key = (torch.empty(spec["rows"], shape[1], dtype=dtype) for _ in range(2))
        return cls(query, key, spec["heads"], Grid.from_spec(spec["grid"]))
