"""Which share of a prompt's tokens goes behind which block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PruneSchedule:
    """Which share of the tokens goes behind which block.

    Attributes:
        shares: block -> share of the tokens that it read, from 0 to below 1.

    Raises:
        ValueError: a share is out of bounds, or a block below 0.
    """

    shares: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for block, share in self.shares.items():
            if block < 0 or not 0 <= share < 1:
                raise ValueError(
                    f"shares: {share} behind block {block} was given; give blocks from 0 on, and 0 to below 1."
                )

    @classmethod
    def geometric(cls, blocks: Sequence[int], beta: float) -> PruneSchedule:
        """The same share behind each of some blocks, so that `beta` of the tokens is gone behind the last.

        Args:
            blocks: that prune.
            beta: share of the tokens, from 0 to below 1.

        Raises:
            ValueError: beta is out of bounds.
        """
        if not blocks or not 0 <= beta < 1:
            raise ValueError(f"beta: {beta} behind {len(blocks)} blocks was given; give one or more, and 0 to below 1.")
        return cls(dict.fromkeys(blocks, 1 - (1 - beta) ** (1 / len(blocks))))

    @classmethod
    def of_sparsity(cls, blocks: Sequence[int], of: int, sparsity: float) -> PruneSchedule:
        """The geometric schedule with a given token sparsity, but for the rounding of numbers.

        Args:
            blocks: that prune.
            of: blocks of the model.
            sparsity: token-layers that are removed over all token-layers.

        Raises:
            ValueError: these blocks cannot remove so much.
        """
        most = cls.geometric(blocks, 1 - 1e-9).sparsity(of)
        if not 0 <= sparsity < most:
            raise ValueError(f"sparsity: {sparsity} was given; behind these blocks at most {most:.2f} can be removed.")
        low, high = 0.0, 1 - 1e-9
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if cls.geometric(blocks, middle).sparsity(of) < sparsity else (low, middle)
        return cls.geometric(blocks, low)

    def sparsity(self, of: int) -> float:
        """Return the share of token-layers that it removes: a block that prunes has read its tokens.

        Args:
            of: blocks of the model.
        """
        left, removed = 1.0, 0.0
        for block in range(of):
            removed += 1 - left
            left *= 1 - self.shares.get(block, 0.0)
        return removed / of
