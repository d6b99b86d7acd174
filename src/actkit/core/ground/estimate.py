"""A measured number with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A measured number and its 95 % interval.

    Attributes:
        value: the number.
        low: the lower end; -inf if one document says nothing about others.
        high: the upper end; inf then.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """value, low and high; None for what is not finite, which JSON does not know."""
        named = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in named.items()}

    def text(self, form: str = ".4g") -> str:
        """'31.2 [30.1, 32.4]'; form: a format of one number."""
        if math.isinf(self.low) and math.isinf(self.high):
            return f"{self.value:{form}} [unknown]"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"
