"""Softplus attention as a layer of one's own models: projections, rotary positions, LSSA or LSSAR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actkit.functions.softplus_attention.weights import attend, check_power


class SoftplusAttention(nn.Module):
    """Causal self-attention without softmax.

    Args:
        dim: of the hidden states.
        heads: that read.
        kv_heads: that are read; None for as many. Heads that share keys stand side by side.
        power: of the re-weighting; None for LSSA.
        rope: turn queries and keys by their positions (base 10,000).

    Raises:
        ValueError: the sizes do not divide, the head size is 1 or odd, or the power is below 1.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, power: float | None = 15, rope: bool = True
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if min(dim, heads, kv_heads) < 1 or dim % heads or heads % kv_heads:
            raise ValueError(
                f"dim, heads, kv_heads: {dim}, {heads} and {kv_heads} were given; heads must divide dim, and kv_heads "
                f"must divide heads."
            )
        size = dim // heads
        if size < 2 or (rope and size % 2):
            raise ValueError(f"heads: {heads} leave a head size of {size}; it must be 2 or more, and even with rope.")
        check_power(power)
        self.dim, self.heads, self.kv_heads, self.power, self.rope = dim, heads, kv_heads, power, rope
        self.query, self.output = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.key, self.value = (nn.Linear(dim, kv_heads * size, bias=False) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: [batch, length, dim].
            mask: bool [batch, length], True for real tokens; None if all are.
        """
        batch, length = x.shape[:2]
        query, key, value = (
            layer(x).view(batch, length, heads, -1).transpose(1, 2)
            for layer, heads in ((self.query, self.heads), (self.key, self.kv_heads), (self.value, self.kv_heads))
        )
        if self.rope:
            query, key = _turned(query), _turned(key)
        visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if mask is not None:
            visible = visible & mask.bool()[:, None, None, :]
        kind = "lssa" if self.power is None else "lssar"
        mixed, _ = attend(query, key, value, visible, kind, power=self.power)  # type: ignore[arg-type]
        return self.output(mixed.transpose(1, 2).flatten(2))

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        names = ("dim", "heads", "kv_heads", "power", "rope")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> SoftplusAttention:
        """One in the dtype of what stands in its place; the values come from the weights file."""
        return cls(**spec) if original is None else cls(**spec).to(next(original.parameters()).dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.spec().items())


def _turned(x: Tensor) -> Tensor:
    """Rotate [batch, heads, length, size] by positions, feature i with feature i + size / 2."""
    length, size = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    rates = 10_000 ** (-torch.arange(0, size, 2, device=x.device, dtype=wide) / size)
    angles = torch.arange(length, device=x.device, dtype=wide)[:, None] * rates
    low, high = x.to(wide).chunk(2, -1)
    turned = torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), -1)
    return turned.to(x.dtype)
