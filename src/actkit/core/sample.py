"""A random sample of rows that is the same in whatever order, batches or shards the rows come."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from actkit.core.streaming import Rows, Statistic


class Sample(Statistic):
    """The `size` rows with the smallest hash of (document, position, seed): a random sample that no order changes."""

    _settings = ("size", "seed")

    _rows: Tensor
    _documents: Tensor
    _positions: Tensor

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size: {size} was given; give at least 1 row.")
        self.size, self.seed = size, seed

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        keys = {name: torch.zeros(0, dtype=torch.int64, device=device) for name in ("documents", "positions")}
        return {"rows": torch.zeros(0, channels, device=device), **keys}

    def memory(self, channels: int) -> int:
        return self.size * (4 * channels + 16)

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        if rows is None:
            raise ValueError("rows: Sample chooses by document and position; pass Rows(documents, positions).")
        self._keep(x, rows.documents.to(x.device), rows.positions.to(x.device))

    def _merge(self, other: Self) -> None:
        self._keep(*(getattr(other, f"_{name}").to(self._device) for name in self._fields))

    def _keep(self, x: Tensor, documents: Tensor, positions: Tensor) -> None:
        hashes = self._hash(documents, positions)
        if len(self._rows) == self.size:  # most rows fail here, before anything is copied
            chosen = hashes <= self._hash(self._documents, self._positions).max()
            x, documents, positions = x[chosen], documents[chosen], positions[chosen]
        self._rows = torch.cat([self._rows, x.float()])
        self._documents = torch.cat([self._documents, documents])
        self._positions = torch.cat([self._positions, positions])
        hashes = self._hash(self._documents, self._positions)
        order = hashes.argsort(stable=True)
        if bool((hashes[order].diff() == 0).any()):  # rows that share a key go by their content, so no order counts
            order = _digest(self._rows).argsort(stable=True)
            order = order[hashes[order].argsort(stable=True)]
        order = order[: self.size]
        self._rows, self._documents, self._positions = self._rows[order], self._documents[order], self._positions[order]

    def _hash(self, documents: Tensor, positions: Tensor) -> Tensor:
        return mix(mix(mix(torch.tensor(self.seed, device=documents.device)) ^ documents) ^ positions)

    @property
    def rows(self) -> Tensor:
        """float32 [size, channels] (fewer where fewer were seen), sorted by document, then position."""
        self._needs_rows()
        return self._rows[self._order()]

    @property
    def documents(self) -> Tensor:
        """int64 [size]: the document of each row."""
        self._needs_rows()
        return self._documents[self._order()]

    @property
    def positions(self) -> Tensor:
        """int64 [size]: the position of each row."""
        self._needs_rows()
        return self._positions[self._order()]

    def _order(self) -> Tensor:
        order = self._positions.argsort(stable=True)
        return order[self._documents[order].argsort(stable=True)]


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014) of int64 values; products wrap around as they do in C."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts the sign in; this takes it out again


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _digest(rows: Tensor) -> Tensor:
    """int64 [n] that depends on every bit of rows [n, channels] float32."""
    columns = mix(torch.arange(rows.shape[1], device=rows.device))
    return mix(rows.contiguous().view(torch.int32).long() ^ columns).sum(1)
