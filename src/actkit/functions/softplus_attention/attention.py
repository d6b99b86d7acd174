"""The attention functions that a model is told of: `lssa`, `lssar`, and `mapped_attention` for the table of ablations.

`weights.py` has the formulas. They are registered under `actkit.attentions`, so that an edit, and a checkpoint, name
them with their settings: {"name": "lssar", "power": 15}.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn

from actkit.core.layers.attention_function import AttentionFunction
from actkit.functions.softplus_attention.weights import Kind, attend, check_power


@dataclass(frozen=True)
class WeightedAttention(AttentionFunction):
    """What the three share.

    Attributes:
        weights: form the weights whole, so that `attention.weights` can be read.
    """

    weights: bool = False

    def kind_and_power(self) -> tuple[Kind, float | None, int]:
        """Return the kind of the weights, the power of the re-weighting, and the rows that are not shifted."""
        raise NotImplementedError

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        kind, power, rows = self.kind_and_power()
        return attend(query, key, value, visible, kind, dropout, self.weights, power=power, offset_rows=rows)

    def forms_weights(self, model: nn.Module) -> bool:
        return self.weights

    def may_replace(self, other: AttentionFunction) -> bool:
        return isinstance(other, WeightedAttention)


@dataclass(frozen=True)
class LssaAttention(WeightedAttention):
    """Attention by softplus and the length, without re-weighting."""

    def kind_and_power(self) -> tuple[Kind, float | None, int]:
        return "lssa", None, 0


@dataclass(frozen=True)
class LssarAttention(WeightedAttention):
    """Attention by softplus and the length, re-weighted.

    Attributes:
        power: of the re-weighting, 1 or more.
        offset_rows: rows that read at most so many keys are not shifted.

    Raises:
        ValueError: a setting is out of bounds.
    """

    power: float = 15
    offset_rows: int = 3

    def __post_init__(self) -> None:
        check_power(self.power)
        _check_rows(self.offset_rows)

    def kind_and_power(self) -> tuple[Kind, float | None, int]:
        return "lssar", self.power, self.offset_rows


@dataclass(frozen=True)
class MappedAttention(WeightedAttention):
    """Attention by weights of any kind, with or without re-weighting.

    Attributes:
        kind: 'softmax', 'sigmoid', 'relu', 'lssa' or 'lssar'.
        power: of the re-weighting; None for none (of 'lssar': 15).
        offset_rows: rows that read at most so many keys are not shifted.

    Raises:
        ValueError: a setting is out of bounds.
    """

    kind: Kind = "softmax"
    power: float | None = None
    offset_rows: int = 3

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: {self.kind!r} was given, allowed are {', '.join(get_args(Kind))}.")
        check_power(self.power)
        _check_rows(self.offset_rows)

    def kind_and_power(self) -> tuple[Kind, float | None, int]:
        return self.kind, self.power, self.offset_rows


def _check_rows(rows: int) -> None:
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
        raise ValueError(f"offset_rows: {rows!r} was given; give a whole number from 0 on (the paper: 3).")
