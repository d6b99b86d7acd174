"""The signed distribution of activations, in bounded memory: what fits, ranges and entropies read."""

from __future__ import annotations

import math
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from actkit.core.watch.streaming import Rows, Statistic


class Histogram(Statistic):
    """Counts of values by size and sign, over all rows and channels.

    A bin holds the float32 values of one sign, one exponent and the same first 9 bits of the mantissa, so that it is
    1/512 of its inner edge wide; zero has a bin of its own. 2 MB for any site.
    """

    HALF: ClassVar[int] = 1 << 17  # bins of one sign
    _SHIFT: ClassVar[int] = 14  # mantissa bits dropped

    _bins: Tensor

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        if device.type == "cpu":  # numpy's pages take memory only once something is counted in them
            return {"bins": torch.from_numpy(np.zeros(2 * self.HALF + 1, np.int64))}
        return {"bins": torch.zeros(2 * self.HALF + 1, dtype=torch.int64, device=device)}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        values = x.float() + 0.0  # no -0
        # an int32 with the bits of a float32 grows with its size, above 0 from 0 on and below it from the least on
        index = (values.view(torch.int32) >> self._SHIFT) + self.HALF
        counts = torch.bincount(index.flatten(), minlength=2 * self.HALF)
        zeros = values.numel() - values.count_nonzero()
        counts[self.HALF] -= zeros
        self._bins[: self.HALF] += counts[: self.HALF].flip(0)
        self._bins[self.HALF] += zeros
        self._bins[self.HALF + 1 :] += counts[self.HALF :]

    def _merge(self, other: Self) -> None:
        self._bins += other._bins.to(self._device)

    @property
    def total(self) -> int:
        """How many values were counted."""
        self._needs_rows()
        return int(self._bins.sum())

    @property
    def zeros(self) -> float:
        """The share of the values that are exactly 0."""
        return int(self._bins[self.HALF]) / self.total

    def cells(self, *, bits: int = 9) -> tuple[Tensor, Tensor, Tensor]:
        """Return the bins that hold something, in order: their lower edges, upper edges and counts.

        Args:
            bits: of the mantissa that tell bins apart, 0 to 9; fewer give wider bins.

        Returns:
            Three float64 tensors [bins] on the CPU; the edges of the bin of zero are both 0.
        """
        self._needs_rows()
        bins, dropped = self._bins.cpu(), 9 - bits
        index = bins.nonzero().flatten()
        sign, size = (index - self.HALF).sign(), (index - self.HALF).abs()
        size = torch.where(sign == 0, 0, ((size - 1) >> dropped) + 1)
        key, group = (sign * size).unique_consecutive(return_inverse=True)
        counts = torch.zeros(len(key), dtype=torch.float64).index_add_(0, group, bins[index].double())
        patterns = torch.stack([(key.abs() - 1).clamp(min=0), key.abs()]).to(torch.int32) << (self._SHIFT + dropped)
        inner, outer = patterns.view(torch.float32).clamp(max=torch.finfo(torch.float32).max).double()
        return torch.where(key < 0, -outer, inner), torch.where(key < 0, -inner, outer), counts

    def quantile(self, p: float) -> float:
        """Return the value that a share of the values does not exceed, linear inside its bin.

        Args:
            p: the share, 0 to 1.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"p: {p} was given; it is a share, give 0 to 1.")
        lower, upper, counts = self.cells()
        cumulative = counts.cumsum(0)
        target = p * float(cumulative[-1])
        index = min(int(torch.searchsorted(cumulative, target)), len(counts) - 1)
        before = float(cumulative[index] - counts[index])
        share = (target - before) / float(counts[index])
        return float(lower[index] + (upper[index] - lower[index]) * share)

    def cdf(self, x: float) -> float:
        """Return the share of the values that are at most `x`, linear inside its bin.

        Args:
            x: any value.
        """
        lower, upper, counts = self.cells()
        width = (upper - lower).clamp(min=torch.finfo(torch.float64).tiny)
        inside = torch.where(upper <= x, 1.0, ((x - lower) / width).clamp(0, 1))
        return float((counts * inside).sum() / counts.sum())

    def entropy(self) -> float:
        """Return the differential entropy, in nats, of the values that are not exactly 0.

        The plug-in estimate, with Miller and Madow's term for the bins that chance left empty, over bins of 6 bits:
        bfloat16 has 7, and leaves finer ones empty.

        Returns:
            The entropy; -inf if all values are 0, or one other value.
        """
        lower, upper, counts = self.cells(bits=6)
        kept = upper > lower
        counts, width = counts[kept], (upper - lower)[kept]
        if len(counts) < 2:
            return -math.inf
        total = counts.sum()
        shares = counts / total
        return float(-(shares * (shares / width).log()).sum() + (len(counts) - 1) / (2 * total))
