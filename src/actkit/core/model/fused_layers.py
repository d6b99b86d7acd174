"""Fused linear layers: which output rows belong to query, key and value, or to gate and up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FusedLayout = Literal["parts", "by_head"]


@dataclass(frozen=True)
class PartRows:
    """The output rows of one part of a fused layer: runs of rows at equal distances.

    Attributes:
        start: the first row.
        size: rows of a run.
        count: how many runs.
        step: from the start of one run to the next.
    """

    start: int
    size: int
    count: int = 1
    step: int = 0

    def __len__(self) -> int:
        return self.size * self.count

    def indices(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the rows in the order of the part's channels: int64 [count * size]."""
        runs = torch.arange(self.count, device=device)[:, None] * self.step
        return (self.start + runs + torch.arange(self.size, device=device)).flatten()

    def of(self, output: Tensor) -> Tensor:
        """Return the part of the layer's output [..., rows]: [..., count * size]."""
        if self.count == 1:
            return output[..., self.start : self.start + self.size]
        return output[..., self.indices(output.device)]

    def replaced(self, output: Tensor, part: Tensor) -> Tensor:
        """Return the layer's output [..., rows] with another part [..., count * size] in its place."""
        return output.index_copy(-1, self.indices(output.device), part)


def query_key_value_rows(
    layout: FusedLayout, heads: int, key_value_heads: int, head_dim: int
) -> tuple[PartRows, PartRows, PartRows]:
    """Return the rows of query, key and value.

    Args:
        layout: 'parts' is all queries, then all keys, then all values; 'by_head' is for each key-value head its
            queries,
            its key and its value.
        heads: of the queries.
        key_value_heads: of key and value.
        head_dim: rows of a head.
    """
    readers = heads // key_value_heads  # queries per key-value head
    if layout == "parts":
        query, other = heads * head_dim, key_value_heads * head_dim
        return PartRows(0, query), PartRows(query, other), PartRows(query + other, other)
    query, step = readers * head_dim, (readers + 2) * head_dim
    return (
        PartRows(0, query, key_value_heads, step),
        PartRows(query, head_dim, key_value_heads, step),
        PartRows(query + head_dim, head_dim, key_value_heads, step),
    )
