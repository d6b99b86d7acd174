"""Where the largest activations are, how large they are beside the others, and what makes them massive.

    massive  = |x| > 100 and |x| > 1000 x median |x|            (Sun et al. 2024, arXiv:2402.17762)

`Extremes` says which tokens and channels hold the largest values, `SequencePeaks` the largest and the median of each
sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from actkit.core.watch.streaming import Rows, Statistic

MASSIVE, MASSIVE_RATIO = 100.0, 1000.0


def is_massive(magnitude: float, median: float) -> bool:
    """Say whether a magnitude is massive beside the median one.

    Args:
        magnitude: |x|.
        median: of the |x| it is compared with; beside 0 nothing is.
    """
    return magnitude > MASSIVE and median > 0 and magnitude > MASSIVE_RATIO * median


@dataclass(frozen=True)
class Extreme:
    """One value and where it stands.

    Attributes:
        value: with its sign.
        channel: its place in the row; heads lie side by side.
        document: of the token.
        sequence: the running number of the sequence among all of the data.
        position: the column in that sequence, padding counted.
        place: how many real tokens stand before it there.
        token_id: which token it is; -1 if the row is none.
    """

    value: float
    channel: int
    document: int
    sequence: int
    position: int
    place: int
    token_id: int


class Extremes(Statistic):
    """The k values of largest magnitude, and where each stands.

    Of equal ones the first sequence, position and channel counts, so that no order of the rows changes what is kept.

    Args:
        k: how many.
    """

    _settings = ("k",)

    _value: Tensor
    _channel: Tensor
    _document: Tensor
    _sequence: Tensor
    _position: Tensor
    _place: Tensor
    _token_id: Tensor

    def __init__(self, k: int = 10) -> None:
        if k < 1:
            raise ValueError(f"k: {k} was given; give at least 1 value to keep.")
        self.k = k

    def memory(self, channels: int) -> int:
        return self.k * 8 * len(self._fields)

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        keys = ("channel", "document", "sequence", "position", "place", "token_id")
        empty = {name: torch.zeros(0, dtype=torch.int64, device=device) for name in keys}
        return {"value": torch.zeros(0, dtype=torch.float64, device=device), **empty}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        if rows is None:
            raise ValueError("rows: Extremes says where values stand; pass Rows(documents, positions).")
        sizes = x.abs().flatten()
        least = sizes.topk(min(self.k, len(sizes))).values[-1].double()
        if len(self._value) == self.k:
            least = torch.maximum(least, self._value[-1].abs())
        found = (sizes >= least).nonzero().flatten()
        if not len(found):
            return
        row, channel = found // x.shape[1], found % x.shape[1]
        keys = (rows.documents, rows.sequences, rows.positions, rows.places, rows.token_ids)
        at = [key.to(self._device)[row] for key in keys]
        self._keep(x.flatten()[found].double(), channel, *at)

    def _merge(self, other: Self) -> None:
        self._keep(*(getattr(other, f"_{name}").to(self._device) for name in self._fields))

    def _keep(self, *new: Tensor) -> None:
        """Put values with their keys among the known ones; the state stays sorted, the largest first."""
        both = [torch.cat((getattr(self, f"_{name}"), each)) for name, each in zip(self._fields, new, strict=True)]
        value, channel, document, sequence, position, *_ = both
        order = torch.arange(len(value), device=self._device)
        for key in (value, document, channel, position, sequence, -value.abs()):  # the last sorts first
            order = order[key[order].argsort(stable=True)]
        for name, each in zip(self._fields, both, strict=True):
            setattr(self, f"_{name}", each[order[: self.k]])

    @property
    def entries(self) -> tuple[Extreme, ...]:
        """The values with their places, the largest magnitude first."""
        self._needs_rows()
        columns = (getattr(self, f"_{name}").tolist() for name in self._fields)
        return tuple(Extreme(**dict(zip(self._fields, entry, strict=True))) for entry in zip(*columns, strict=True))


class SequencePeaks(Statistic):
    """The largest and the median |x| of each sequence, over its tokens and channels.

    The median is torch's: of an even number of values the lower of the two in the middle.
    """

    _in_chunks = False  # a sequence is read whole

    _sequence: Tensor
    _largest: Tensor
    _median: Tensor

    def memory(self, channels: int) -> int:
        return 0  # 24 bytes for each sequence, and nobody knows here how many there are

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return {"sequence": torch.zeros(0, dtype=torch.int64, device=device), "largest": empty, "median": empty}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        if rows is None:
            raise ValueError("rows: SequencePeaks tells sequences apart; pass Rows(documents, positions).")
        sequences = rows.sequences.to(self._device)
        numbers = sequences.unique()
        largest, median = [], []
        for number in numbers:
            sizes = x[sequences == number].abs().flatten()
            largest.append(sizes.amax().double())
            median.append(sizes.float().median().double())
        self._add(numbers, torch.stack(largest), torch.stack(median))

    def _merge(self, other: Self) -> None:
        self._add(*(getattr(other, f"_{name}").to(self._device) for name in self._fields))

    def _add(self, *new: Tensor) -> None:
        both = [torch.cat((getattr(self, f"_{name}"), each)) for name, each in zip(self._fields, new, strict=True)]
        order = both[0].argsort()
        self._sequence, self._largest, self._median = (each[order] for each in both)
        twice = self._sequence[1:][self._sequence.diff() == 0]
        if len(twice):
            raise ValueError(
                f"rows: sequence {int(twice[0])} came in two parts, and its median needs it whole; give all rows of a "
                f"sequence at once, and each sequence once."
            )

    @property
    def largest(self) -> Tensor:
        """The largest |x| of each sequence: [sequences]."""
        self._needs_rows()
        return self._largest

    @property
    def median(self) -> Tensor:
        """The median |x| of each sequence: [sequences]."""
        self._needs_rows()
        return self._median
