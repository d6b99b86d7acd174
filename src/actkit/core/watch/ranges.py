"""Signed extremes of activations: over all tokens, or sequence by sequence."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from actkit.core.watch.streaming import Rows, Statistic


class Range(Statistic):
    """The smallest and the largest value of each channel, exact."""

    _low: Tensor
    _high: Tensor

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        low = torch.full((channels,), torch.inf, dtype=torch.float64, device=device)
        return {"low": low, "high": -low}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        low, high = torch.aminmax(x, dim=0)
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)

    def _merge(self, other: Self) -> None:
        self._low = torch.minimum(self._low, other._low.to(self._device))
        self._high = torch.maximum(self._high, other._high.to(self._device))

    @property
    def low(self) -> Tensor:
        """The smallest value of each channel: [channels]."""
        self._needs_rows()
        return self._low

    @property
    def high(self) -> Tensor:
        """The largest value of each channel: [channels]."""
        self._needs_rows()
        return self._high


class Midpoints(Statistic):
    """The mean over sequences of (smallest + largest) / 2 of each channel.

    Sequences are told apart by their running numbers; of more than `size` the first ones count.

    Args:
        size: how many sequences.
    """

    _settings = ("size",)
    _in_chunks = False

    _sequences: Tensor
    _low: Tensor
    _high: Tensor

    def __init__(self, size: int = 512) -> None:
        if size < 1:
            raise ValueError(f"size: {size} was given; give at least 1 sequence.")
        self.size = size

    def memory(self, channels: int) -> int:
        return self.size * (16 * channels + 8)

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        empty = torch.zeros(0, channels, dtype=torch.float64, device=device)
        return {"sequences": torch.zeros(0, dtype=torch.int64, device=device), "low": empty, "high": empty}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        if rows is None:
            raise ValueError("rows: Midpoints tells sequences apart by their keys; pass Rows(documents, positions).")
        self._keep(rows.sequences.to(self._device), x.double(), x.double())

    def _merge(self, other: Self) -> None:
        self._keep(*(each.to(self._device) for each in (other._sequences, other._low, other._high)))

    def _keep(self, sequences: Tensor, low: Tensor, high: Tensor) -> None:
        """Extend the extremes of sequences [n], n of them or more, by values [n, channels]."""
        numbers, index = torch.cat([self._sequences, sequences]).unique(return_inverse=True)
        shape = (len(numbers), low.shape[1])
        index = index[:, None].expand(-1, low.shape[1])
        found = (
            low.new_zeros(shape).scatter_reduce(0, index, torch.cat(pair), how, include_self=False)
            for pair, how in (((self._low, low), "amin"), ((self._high, high), "amax"))
        )
        self._sequences, (self._low, self._high) = numbers[: self.size], (each[: self.size] for each in found)

    @property
    def value(self) -> Tensor:
        """The mean midpoint of each channel: [channels]."""
        self._needs_rows()
        return ((self._low + self._high) / 2).mean(0)
