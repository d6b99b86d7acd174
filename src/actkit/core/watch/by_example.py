"""One vector for each example: the mean of its rows, the first, the last, or all of them side by side."""

from __future__ import annotations

from typing import Literal, Self, get_args

import torch
from torch import Tensor

from actkit.core.ground.errors import DataError
from actkit.core.watch.streaming import Rows, Statistic, in_order

Position = Literal["mean", "first", "last", "flat"]


class ByExample(Statistic):
    """The rows of each example as one float32 vector.

    Args:
        position: 'mean' over the rows, the 'first' or the 'last' real one, or all of them ('flat'), for which examples
            need equally many.
    """

    _settings = ("position",)
    _in_chunks = False  # an example's rows come together

    _values: Tensor
    _sequence: Tensor
    _counts: Tensor

    def __init__(self, position: Position = "mean") -> None:
        if position not in get_args(Position):
            raise ValueError(f"position: {position!r} was given; give {', '.join(map(repr, get_args(Position)))}.")
        self.position = position

    def memory(self, channels: int) -> int:
        return 0  # a vector for each example, and nobody knows here how many there are

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return {"values": torch.zeros(0, channels, device=device), "sequence": empty, "counts": empty.clone()}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        if rows is None:
            raise ValueError("rows: ByExample tells examples apart; pass Rows(documents, positions).")
        sequence, position = rows.sequences.to(self._device), rows.positions.to(self._device)
        order = in_order(sequence, position)
        x, sequence = x[order].float(), sequence[order]
        examples, counts = sequence.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        if self.position == "flat":
            self._add(x, examples, counts)
        elif self.position == "mean":
            sums = torch.zeros(len(examples), x.shape[1], dtype=torch.float64, device=self._device)
            sums.index_add_(0, torch.repeat_interleave(counts), x.double())
            self._add((sums / counts[:, None]).float(), examples, torch.ones_like(counts))
        else:
            chosen = ends - 1 if self.position == "last" else ends - counts
            self._add(x[chosen], examples, torch.ones_like(counts))

    def _merge(self, other: Self) -> None:
        self._add(*(getattr(other, f"_{name}").to(self._device) for name in self._fields))

    def _add(self, values: Tensor, sequence: Tensor, counts: Tensor) -> None:
        self._values = torch.cat((self._values, values))
        self._sequence = torch.cat((self._sequence, sequence))
        self._counts = torch.cat((self._counts, counts))

    @property
    def vectors(self) -> Tensor:
        """Float32 [examples, values], in the order of the examples.

        Raises:
            DataError: examples have unequal numbers of rows, and all are wanted side by side.
        """
        self._needs_rows()
        least, most = int(self._counts.min()), int(self._counts.max())
        if least != most:
            raise DataError(
                f"position: 'flat' was given, and examples have {least} to {most} rows; give examples of one length, "
                f"or 'mean', 'first' or 'last'."
            )
        order = torch.argsort(self._sequence, stable=True)
        return self._values.view(len(order), -1)[order].cpu()
