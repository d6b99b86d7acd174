"""What an attention multiplies, rounded: queries, keys and values by static scales, the attention weights by a grid.

A child module `CHILD` of an attention says how; the attention function of `cache_rounding.py` asks it. Rounding the
attention weights needs them explicit, [batch, heads, queries, keys] in float32, as the eager attention of transformers
has them; without that transformers' scaled dot-product attention goes on.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.attention_function import refuse_unknown
from actkit.core.layers.keeps_dtype import KeepsDtype

CHILD = "attention_rounding"  # the name of the child module


class AttentionRounding(KeepsDtype):
    """How one attention rounds its operands.

    Args:
        bits: of queries, keys and values, symmetric, half a step more than the largest code at the top; None leaves
            them.
        query: float32 [heads], the scale of each head; None without `bits`.
        key: float32 [key-value heads].
        value: float32 [key-value heads].
        weights: what the attention weights are rounded to, as values from 0 to 1; None leaves them.

    Raises:
        ValueError: there are bits and no scales, or scales and no bits.
    """

    decodes_as: ClassVar[str] = "attention_rounding"
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None

    def __init__(
        self,
        bits: int | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        weights: Grid | None = None,
    ) -> None:
        super().__init__()
        scales = {"query": query, "key": key, "value": value}
        if any((each is None) != (bits is None) for each in scales.values()):
            raise ValueError("bits: give them with the scales of query, key and value, or none of the four.")
        self.bits, self.weights = bits, weights
        self.grid = None if bits is None else static_grid(bits)
        for name, scale in scales.items():
            self.register_buffer(name, None if scale is None else scale.detach().clone().float())

    def forward(self, x: Tensor) -> Tensor:
        """Round attention weights [..., keys], each from 0 to 1."""
        if self.weights is None:
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        scale, zero = self.weights.from_range(wide.new_zeros(1), wide.new_ones(1))
        return self.weights.fake(wide, scale, zero).to(x.dtype)

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round queries, keys and values, [batch, heads, tokens, head size] each."""
        if self.grid is None:
            return query, key, value
        given = (query, self.query), (key, self.key), (value, self.value)
        query, key, value = (self.grid.fake(x, scale[:, None, None]) for x, scale in given)  # type: ignore[index]
        return query, key, value

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Attend with rounded attention weights, in the form of transformers' attention functions.

        Args:
            module: the attention.
            query: [batch, heads, tokens, head size].
            key: [batch, key-value heads, all tokens, head size].
            value: of the shape of `key`.
            mask: as scaled dot-product attention takes it: True where a query reads a key, or added to the scores.
            settings: of transformers.

        Returns:
            What is mixed, [batch, tokens, heads, head size], and rounded weights [batch, heads, tokens, all tokens].

        Raises:
            UnsupportedModelError: scores are capped, biased by position, or join sinks.
        """
        refuse_unknown(settings, "beside rounded attention weights")
        readers = query.shape[1] // key.shape[1]
        if readers > 1:  # heads that share keys stand side by side
            key, value = key.repeat_interleave(readers, 1), value.repeat_interleave(readers, 1)
        scaling = settings.get("scaling")
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        causal = settings.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if mask is None and causal and query.shape[2] > 1:  # aligned to the first key, as scaled_dot_product_attention
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            lowest = torch.finfo(scores.dtype).min  # not -inf: a row that reads nothing (padding) would be NaN
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        weights = self(torch.softmax(scores, -1, dtype=wide)).to(query.dtype)
        weights = F.dropout(weights, settings.get("dropout", 0.0), self.training)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        scales = (self.query, self.key)
        return {
            "bits": self.bits,
            "heads": [0 if scale is None else len(scale) for scale in scales],
            "weights": None if self.weights is None else self.weights.spec(),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> AttentionRounding:
        """One of the right structure whose values come from a file."""
        heads, shared = spec["heads"]
        weights = None if spec["weights"] is None else Grid.from_spec(spec["weights"])
        if spec["bits"] is None:
            return cls(weights=weights)
        return cls(spec["bits"], torch.ones(heads), torch.ones(shared), torch.ones(shared), weights)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, weights={None if self.weights is None else self.weights.describe()}"


def static_grid(bits: int) -> IntegerGrid:
    """Integers of a static symmetric range: -2^(bits-1) to 2^(bits-1) - 1, steps of the largest / (2^(bits-1) - 0.5).

    Args:
        bits: of a code.
    """
    return IntegerGrid(bits, symmetric=True, scope="tensor", half_step=True)
