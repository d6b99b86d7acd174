"""A weight that is kept as two factors, W = left right, and multiplied twice; the product is never formed.

    y = left (right x),   left [out, rank],   right [rank, in]
    y_h = left_h (right_h x)   head by head: left_h [out / heads, rank],   right_h [rank, in]

Each factor is stored like a weight of its own, so that a quantizer rounds both. Layers are read as if they had the
product (`dequantize`), which costs a product of matrices each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actkit.core.grids.grid import Grid
from actkit.core.ground import registry
from actkit.core.layers.weights import DenseWeight, WeightStorage, rounded


class LowRankWeight(WeightStorage):
    """A weight as two factors.

    Args:
        left: [out, rank]; a tensor, or stored in another way.
        right: [heads * rank, in]; the same.
        heads: parts of the outputs that have factors of their own.

    Raises:
        ValueError: the factors do not fit each other.
    """

    kind = "low_rank"

    def __init__(self, left: Tensor | WeightStorage, right: Tensor | WeightStorage, heads: int = 1) -> None:
        super().__init__()
        if heads < 1 or left.shape[0] % heads or right.shape[0] != heads * left.shape[1]:
            raise ValueError(
                f"factors: left {tuple(left.shape)} and right {tuple(right.shape)} do not fit {heads} heads; give "
                f"[heads * size, rank] and [heads * rank, in]."
            )
        self.left, self.right = (DenseWeight(each) if isinstance(each, Tensor) else each for each in (left, right))
        self.heads = heads

    @property
    def rank(self) -> int:
        """Of one head's factors."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors."""
        return self.left.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    @property
    def in_training(self) -> bool:  # type: ignore[override]
        """Whether a factor is a stand-in that is trained."""
        return self.left.in_training or self.right.in_training

    def bytes_read(self, density: float) -> float:
        return self.left.nbytes + self.right.bytes_read(density)

    def _values(self) -> Tensor:
        left, right = self.left.dequantize(), self.right.dequantize()
        return (left.unflatten(0, (self.heads, -1)) @ right.unflatten(0, (self.heads, -1))).flatten(0, 1)

    def narrow(self, x: Tensor) -> Tensor:
        """Return what both products meet in.

        Args:
            x: [..., in].

        Returns:
            [..., heads * rank].
        """
        return self.right.linear(x, None)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        inner = self.narrow(x)
        if self.heads == 1:
            return self.left.linear(inner, bias)
        left = self.left.dequantize().unflatten(0, (self.heads, -1))  # [heads, size, rank]
        rows = inner.reshape(-1, self.heads, self.rank).transpose(0, 1)  # [heads, rows, rank]
        y = torch.bmm(rows, left.mT).transpose(0, 1).reshape(*x.shape[:-1], self.shape[0])
        return y if bias is None else y.add_(bias)

    def factors(self, outputs: range | None = None) -> tuple[Tensor, Tensor]:
        """Return two matrices whose product is the weight, or some of its rows; those of several heads hold zeros.

        Args:
            outputs: whole heads, if there are several; None for all.

        Returns:
            [outputs, n] and [n, in], n being the rank times the heads that the outputs belong to.

        Raises:
            ValueError: the outputs cut a head.
        """
        outputs = outputs or range(self.shape[0])
        size = self.shape[0] // self.heads
        if self.heads > 1 and (outputs.start % size or outputs.stop % size):
            raise ValueError(f"outputs: {outputs} cut a head of {size}; give whole heads.")
        left, right = self.left.dequantize()[outputs.start : outputs.stop], self.right.dequantize()
        if self.heads == 1:
            return left, right
        own = range(outputs.start // size * self.rank, outputs.stop // size * self.rank)
        return torch.block_diag(*left.split(size)), right[own.start : own.stop]

    def misfit(self, grid: Grid) -> str | None:
        """Say why the groups of a grid do not fit the factors, or None.

        Args:
            grid: to round to.
        """
        for name, factor in (("left", self.left), ("right", self.right)):
            reason = grid.fits(*factor.shape)
            if reason is not None:
                return f"its {name} factor {tuple(factor.shape)}: {reason}"
        return None

    def rounded(self, grid: Grid) -> LowRankWeight:
        """Return the weight with both factors rounded.

        Args:
            grid: to round to.
        """
        left, right = (rounded(factor.dequantize().detach(), grid) for factor in (self.left, self.right))
        return LowRankWeight(left, right, self.heads)

    def frozen(self) -> LowRankWeight:
        return LowRankWeight(self.left.frozen(), self.right.frozen(), self.heads) if self.in_training else self

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        factors = [self.left.spec(), self.right.spec()]
        return {"kind": self.kind, "rank": self.rank, "heads": self.heads, "factors": factors}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> LowRankWeight:
        heads, rank = spec["heads"], spec["rank"]
        shapes = (shape[0], rank), (heads * rank, shape[1])
        left, right = (
            registry.weight_class(stored["kind"]).from_spec(stored, each, dtype)
            for stored, each in zip(spec["factors"], shapes, strict=True)
        )
        return cls(left, right, heads)

    def describe(self) -> str:
        of = "" if self.heads == 1 else f" for each of {self.heads} heads"
        kinds = dict.fromkeys(each.describe() for each in (self.left, self.right))
        return f"factors of rank {self.rank}{of} ({' and '.join(kinds)})"
