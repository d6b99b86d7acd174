"""A random sample of rows that is the same in whatever order, batches or shards the rows come."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from actkit.core.watch.streaming import Rows, Statistic, in_order

HALF = (torch.bfloat16, torch.float16)


class Sample(Statistic):
    """A random sample of rows that no order changes: those with the smallest hash of (document, position, seed).

    Rows that share document and position (a long document fills many sequences) go by their values. Which row of the
    data
    each is, (sequence, position) says.

    Args:
        size: how many rows.
        seed: of the hash.
    """

    _settings = ("size", "seed")
    _in_chunks = False

    _rows: Tensor
    _documents: Tensor
    _positions: Tensor
    _sequences: Tensor
    _hashes: Tensor | None = None  # of the kept rows, if known

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size: {size} was given; give at least 1 row.")
        self.size, self.seed = size, seed

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        names = ("documents", "positions", "sequences")
        keys = {name: torch.zeros(0, dtype=torch.int64, device=device) for name in names}
        return {"rows": torch.zeros(0, channels, device=device), **keys}

    def memory(self, channels: int) -> int:
        return self.size * (4 * channels + 24)

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        if rows is None:
            raise ValueError("rows: Sample chooses by document and position; pass Rows(documents, positions).")
        self._keep(x, rows)

    def _merge(self, other: Self) -> None:
        keys = (other._documents, other._positions, other._sequences)
        rows = Rows(*(key.to(self._device) for key in keys))
        self._keep(other._rows.to(self._device), rows)

    def _keep(self, x: Tensor, rows: Rows) -> None:
        """The state stays sorted by hash."""
        new, hashes = (each.to(self._device) for each in self._smallest(rows))
        keys = [key.to(self._device) for key in (rows.documents, rows.positions, rows.sequences)]
        known = self._known_hashes()
        if len(known) == self.size:  # most rows fail here, before anything is copied
            passed = hashes <= torch.cat([known, hashes]).kthvalue(self.size).values
            new, hashes = new[passed], hashes[passed]
            if not len(new):
                return
        chosen = x.index_select(0, new)
        values = chosen if chosen.dtype in HALF else chosen.float()  # as they came: half the memory
        kept: tuple[Tensor, ...] = (values, *(key[new] for key in keys))
        if len(known):
            before = (self._rows, self._documents, self._positions, self._sequences)
            kept = tuple(torch.cat(pair) for pair in zip(before, kept, strict=True))
            hashes = torch.cat([known, hashes])
        order = None if not len(known) else hashes.argsort(stable=True)  # new ones alone are in order
        ordered = hashes if order is None else hashes[order]
        same = ordered.diff() == 0
        if bool(same.any()):  # rows that share a key go by their content, then by their sequence, so no order counts
            tied = torch.nn.functional.pad(same, (1, 0)) | torch.nn.functional.pad(same, (0, 1))
            at = torch.arange(len(hashes), device=hashes.device) if order is None else order
            digests = torch.zeros_like(hashes)
            digests[at[tied]] = _digest(kept[0][at[tied]].float())
            order = kept[3].argsort(stable=True)
            order = order[digests[order].argsort(stable=True)]
            order = order[hashes[order].argsort(stable=True)]
        if order is not None:  # else they are sorted, and not too many
            order = order[: self.size]
            hashes, kept = hashes[order], tuple(each[order] for each in kept)
        self._hashes = hashes
        self._rows, self._documents, self._positions, self._sequences = kept

    def _known_hashes(self) -> Tensor:
        if self._hashes is None:
            kept = self._documents
            self._hashes = self._hash(Rows(kept, self._positions)) if len(kept) else kept
        return self._hashes

    def _smallest(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Indices and hashes of the rows that may stay, by hash: `size`, and those that share the last one's hash."""
        key = (self.seed, self.size)
        if key not in rows.memo:
            hashes, order = self._hash(rows).sort(stable=True)
            share = hashes <= hashes[: self.size][-1:]  # of no rows, none
            rows.memo[key] = order[share], hashes[share]
        return rows.memo[key]

    def _hash(self, rows: Rows) -> Tensor:
        seed = torch.tensor(self.seed, device=rows.documents.device)
        return mix(mix(mix(seed) ^ rows.documents) ^ rows.positions)

    def load_state(self, state: dict[str, Tensor]) -> Self:
        self._hashes = None
        return super().load_state(state)

    @property
    def rows(self) -> Tensor:
        """float32 [size, channels] (fewer if fewer were seen), sorted by document, then position."""
        self._needs_rows()
        return self._rows[self._order()].float()

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

    @property
    def sequences(self) -> Tensor:
        """int64 [size]: the running number, among all rows of the data, of the sequence that each row is from.

        No two rows have the same sequence and position.
        """
        self._needs_rows()
        return self._sequences[self._order()]

    def _order(self) -> Tensor:
        return in_order(self._documents, self._positions)


def paired(first: Sample, second: Sample) -> tuple[Tensor, Tensor]:
    """Return the rows of two samples of equal settings, token by token, in the data's order.

    Args:
        first: of one site.
        second: of another site and the same tokens, but for the last of those that share document and position: such
            tokens, which only one sample kept, are left out.

    Returns:
        float32 [tokens, channels] each.
    """
    each = (first, second)
    keys, place = torch.cat([torch.stack([one.sequences, one.positions], 1) for one in each]).unique(
        dim=0, return_inverse=True
    )
    found = torch.full((2, len(keys)), -1, device=place.device)
    for row, at in zip(found, place.split([len(one.positions) for one in each]), strict=True):
        row[at] = torch.arange(len(at), device=place.device)
    both = (found >= 0).all(0)
    return first.rows[found[0, both]], second.rows[found[1, both]]


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
