"""What becomes of each row between two sites, such as the input and the output of a block.

    >>> seen = record(model, {Joined(Site("block.input", 0), Site("block.output", 0)): Difference()}, batches)

The statistic reads rows of both, [n, channels of the first, channels of the second].
"""

from __future__ import annotations

from collections import deque
from math import pi
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.core.watch.streaming import Rows, Statistic


class Difference(Statistic):
    """Means over rows of how far they move from one site to another of equally many channels.

    A row of zeros counts as turned by a right angle.
    """

    _sums: Tensor

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        return {"sums": torch.zeros(4, dtype=torch.float64, device=device)}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        if x.shape[1] % 2:
            raise ValueError(f"x: {x.shape[1]} channels were given; join two sites that have equally many.")
        first, second = x.double().chunk(2, 1)
        # both are of length 1, so that rounding alone puts a cosine beyond 1, whose angle would be NaN
        cosine = (F.normalize(first, dim=1) * F.normalize(second, dim=1)).sum(1).clamp(-1, 1)
        gap = second - first
        parts = (cosine.arccos() / pi, 1 - cosine, gap.square().mean(1), gap.abs().mean(1))
        self._sums += torch.stack([part.sum() for part in parts])

    def _merge(self, other: Self) -> None:
        self._sums += other._sums.to(self._device)

    @property
    def angle(self) -> float:
        """Mean angle between the two rows, in half turns: 0 to 1."""
        return self._mean(0)

    @property
    def cosine(self) -> float:
        """Mean of 1 less the cosine of that angle: 0 to 2."""
        return self._mean(1)

    @property
    def square(self) -> float:
        """Mean square of the difference."""
        return self._mean(2)

    @property
    def absolute(self) -> float:
        """Mean size of the difference."""
        return self._mean(3)

    def _mean(self, which: int) -> float:
        self._needs_rows()
        return float(self._sums[which]) / self.count


class End:
    """One of the two sites of a joined statistic: its rows wait for those of the other.

    Args:
        statistic: reads both.
        mine: rows that wait for the other's.
        others: rows of the other that wait for these.
        second: whether these rows stand behind the other's.
    """

    kernel_name = None

    def __init__(self, statistic: Statistic, mine: deque[Tensor], others: deque[Tensor], second: bool) -> None:
        self.statistic, self.mine, self.others, self.second = statistic, mine, others, second

    @classmethod
    def both(cls, statistic: Statistic) -> tuple[End, End]:
        """Make the two ends of a statistic."""
        first: deque[Tensor] = deque()
        second: deque[Tensor] = deque()
        return cls(statistic, first, second, False), cls(statistic, second, first, True)

    def matches(self, other: Any) -> bool:
        """No other statistic is the same."""
        return False

    def memory(self, channels: int) -> int:
        """Half of what the statistic holds, in bytes."""
        return self.statistic.memory(2 * channels) // 2

    def update(self, x: Tensor, rows: Rows | None = None) -> None:
        """Read rows of this site; those of both sites come in the same order in each pass."""
        if not self.others:
            self.mine.append(x.detach().clone())  # the model may change it in place before the other comes
            return
        other = self.others.popleft()
        self.statistic.update(torch.cat((other, x) if self.second else (x, other), 1), rows)
