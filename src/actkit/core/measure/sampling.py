"""How the next token is chosen from its logits: the likeliest, or drawn from the likeliest ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The default takes the likeliest token each time.

    Attributes:
        temperature: 0 takes the likeliest token; above 0 tokens are drawn from softmax(logits / temperature).
        top_k: draw from that many of the likeliest tokens; None for all.
        top_p: of these draw from the smallest set that holds this share (Holtzman et al. 2020, arXiv:1904.09751); None
            for all.
        seed: of the drawing; equal seeds draw equal tokens.

    Raises:
        ValueError: a setting is out of bounds, or top_k or top_p stands beside temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature} was given; give 0 (the likeliest token) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: {self.top_k} was given; give at least 1, or None for all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} was given; give a share above 0 and up to 1.")
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None and self.temperature == 0:
                raise ValueError(
                    f"{name}: {value} was given with temperature 0, which draws nothing; give temperature > 0."
                )

    def generator(self) -> torch.Generator:
        """Make a fresh source of random numbers for one text."""
        return torch.Generator().manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose the next token.

        Args:
            logits: [vocabulary].
            generator: what `generator()` gave for this text.

        Returns:
            The token's id.
        """
        if self.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(self.distribution(logits), 1, generator=generator))

    def distribution(self, logits: Tensor) -> Tensor:
        """Return what tokens are drawn from, for a temperature above 0.

        Args:
            logits: [vocabulary].

        Returns:
            Probabilities, float64 [vocabulary] on the CPU, 0 outside the set; of equally likely tokens the first stay.
        """
        scaled = logits.detach().cpu().double() / self.temperature
        values, order = scaled.sort(descending=True, stable=True)
        values, order = values[: self.top_k], order[: self.top_k]
        chances = values.softmax(0)
        if self.top_p is not None:
            kept = chances.cumsum(0) - chances < self.top_p
            kept[0] = True
            chances, order = chances[kept] / chances[kept].sum(), order[kept]
        return torch.zeros_like(scaled).scatter_(0, order, chances)


LIKELIEST = Sampling()
