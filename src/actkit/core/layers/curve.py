"""Learned activation functions as the CPU decoder reads them: coefficients for each group of channels.

A module that has a method `curve()` says by it what it computes now, or None if that is no curve. All but the last are
element by element:

    rational_a, rational_b    (a_0 + ... + a_5 x^5) / Q(x), as `kernels.rational` has Q; a_0 to a_5, then b_1 to b_4
    crrelu                    max(x, 0) + e x exp(-x^2 / 2); e
    poly_relu                 c_0 + c_1 r + ... + c_9 r^9, r = max(x, 0); c_0 to c_9
    series_silu, ...          c (f(a_1 x + b_1) + ... + f(a_n x + b_n)), n up to 4; a_1, b_1 to a_4, b_4, then c and n
    poly_norm                 c_0 + sum of c_i x^i / sqrt(mean(x^2i) + e), means over all channels; c_0 to c_8, then e
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

CurveKind = Literal[
    "rational_a",
    "rational_b",
    "crrelu",
    "poly_relu",
    "series_silu",
    "series_relu",
    "series_gelu",
    "series_gelu_tanh",
    "series_relu2",
    "poly_norm",
]
KINDS: tuple[CurveKind, ...] = get_args(CurveKind)
COEFFICIENTS = 10  # of a group; zeros stand in for missing ones
NUMERATOR = 6  # of them the numerator's


@dataclass(frozen=True, eq=False)
class Curve:
    """A function of one variable for each group of channels.

    Attributes:
        kind: of `KINDS`.
        rows: float32 [groups, COEFFICIENTS]; channels are split into contiguous groups of equal size.
    """

    kind: CurveKind
    rows: Tensor

    @classmethod
    def of(cls, kind: CurveKind, *parts: Tensor) -> Curve | None:
        """Make it from coefficients.

        Args:
            kind: of `KINDS`.
            parts: float [groups or 1, n] each: numerator and denominator of a rational, else one.

        Returns:
            The curve, or None if there are more coefficients than it has places.
        """
        places: Sequence[int] = (NUMERATOR, COEFFICIENTS - NUMERATOR) if len(parts) == 2 else (COEFFICIENTS,)
        if any(part.shape[1] > place for part, place in zip(parts, places, strict=True)):
            return None
        groups = max(len(part) for part in parts)
        rows = torch.zeros(groups, COEFFICIENTS)
        at = 0
        for part, place in zip(parts, places, strict=True):
            rows[:, at : at + part.shape[1]] = part.detach().float()
            at += place
        return cls(kind, rows)


def curve_of(module: nn.Module) -> Curve | None:
    """Return what an activation function computes as a curve, or None.

    Args:
        module: an activation function.
    """
    found: Any = getattr(module, "curve", None)
    return found() if callable(found) else None
