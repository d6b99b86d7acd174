"""What reading pruned texts gave, and what that costs: losses of all positions, and of the kept ones alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pruned:
    """What reading some texts gave.

    Attributes:
        logits: [batch, tokens, vocabulary], of dropped tokens too.
        kept: of each block the positions that it read, int64 [batch, so many], in order.
        left: those that came out of the last block.
        low: of each block, bool [batch, tokens]: of which positions it read fewer bits.
    """

    logits: Tensor
    kept: tuple[Tensor, ...]
    left: Tensor
    low: tuple[Tensor, ...] = ()

    @property
    def kept_mask(self) -> Tensor:
        """Bool [batch, tokens]: whether a token came through."""
        mask = torch.zeros(self.logits.shape[:2], dtype=torch.bool, device=self.left.device)
        return mask.scatter(1, self.left, True)


@dataclass(frozen=True)
class PositionLosses:
    """The losses at all positions that have a next token, in order.

    Attributes:
        nats: float64 [positions].
        kept: bool [positions], whether the token there came through all blocks.
        sparsity: token-layers that were removed over all.
    """

    nats: Tensor
    kept: Tensor
    sparsity: float


@dataclass(frozen=True)
class PrunedQuality:
    """Losses under pruning, in nats: of all positions with a next token, and of those whose token was kept.

    Attributes:
        all: over all of them; a dropped token's prediction comes from its last hidden state.
        kept: over the kept ones, the paper's figure. It is no measure of the model: the positions are chosen.
        kept_before: of the same positions without pruning.
        before: over all of them without pruning.
        tokens: how many positions.
        kept_tokens: how many of them were kept.
        sparsity: token-layers that were removed over all.
    """

    all: float
    kept: float
    kept_before: float
    before: float
    tokens: int
    kept_tokens: int
    sparsity: float

    @classmethod
    def of(cls, before: PositionLosses, after: PositionLosses) -> PrunedQuality:
        """Compare the losses on the same positions, without and with pruning."""
        kept = after.kept
        parts = after.nats, after.nats[kept], before.nats[kept], before.nats
        means: list[float] = [float(part.mean()) for part in parts]
        return cls(means[0], means[1], means[2], means[3], len(kept), int(kept.sum()), after.sparsity)

    def describe(self) -> str:
        """All as perplexities, in a line."""
        return (
            f"perplexity {math.exp(self.before):.2f} -> {math.exp(self.all):.2f} on all {self.tokens} tokens; on the "
            f"{self.kept_tokens} kept ones alone {math.exp(self.kept_before):.2f} -> {math.exp(self.kept):.2f}"
        )
