"""Spark attention: a slice of each head chooses the keys, the rest weighs them (2025, arXiv:2506.06644).

The attention of the Spark Transformer:

    a = softmax(Top_k^(-inf)(K1 q1 / sqrt(r))),   y = V^T (a * softplus(K2 q2 / sqrt(head_dim - r)))

per head and query, with q1, K1 the first r features and q2, K2 the others. Top_k^(-inf) is statistical top-k over the
visible keys: if at most k are visible, all are attended, and the one with the largest score always is. The weights
do not sum to 1. Parameters, cache and cost of a dense pass are those of ordinary attention; decoding can read K1 of all
keys, and K2 and V of about k.

Our own reading: the two scales, which the sources that we could read do not state. Each part has a rotary embedding of
its own, as a head of its width would: exact for r = head_dim / 2, as in the paper; for another r each plane takes the
nearest faster or equal frequency of the model's table. The scale of the output changes with softplus; the paper has a
norm behind it, a Llama block has none.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.sparsity.spark.statistical_top_k import statistical_topk

Rotary = tuple[Tensor, Tensor]


class Split(NamedTuple):
    """The two parts of queries or keys, views of one tensor.

    Attributes:
        chooses: [..., r], decides which keys are attended.
        weighs: [..., head_dim - r], weighs them.
    """

    chooses: Tensor
    weighs: Tensor


class SparkAttention(nn.Module):
    """Causal attention of about k keys per query; takes the place of transformers' LlamaAttention.

    Args:
        d_model: width of the hidden states.
        heads: how many.
        head_dim: features of a head.
        r: how many of them, the first, choose the keys.
        k: keys to attend to.
        key_value_heads: shared by groups of queries; by default one per head.
        bias: of the query, key and value layers.
        layer_index: which layer of a transformers cache is this one's.

    Raises:
        ValueError: sizes do not fit.
    """

    decodes_as: ClassVar[str] = "spark_attention"
    linear_inputs: ClassVar[Any] = (
        ("attention.input", ("q_proj", "k_proj", "v_proj")),
        ("attention.mixed", ("o_proj",)),
    )

    def __init__(
        self,
        d_model: int,
        heads: int,
        head_dim: int,
        r: int,
        k: int,
        *,
        key_value_heads: int | None = None,
        bias: bool = False,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        key_value_heads = heads if key_value_heads is None else key_value_heads
        if not 0 < r < head_dim or r % 2 or head_dim % 2:
            raise ValueError(
                f"r: {r} was given with head_dim {head_dim}; both must be even, and r within (0, head_dim)."
            )
        if k < 1:
            raise ValueError(f"k: {k} was given; it is a number of keys, give 1 or more.")
        if key_value_heads < 1 or heads % key_value_heads:
            raise ValueError(f"key_value_heads: {key_value_heads} was given; it must divide the {heads} heads.")
        self.d_model, self.heads, self.key_value_heads, self.head_dim = d_model, heads, key_value_heads, head_dim
        self.r, self.k, self.layer_idx = r, k, layer_index
        self.q_proj = nn.Linear(d_model, heads * head_dim, bias)
        self.k_proj = nn.Linear(d_model, key_value_heads * head_dim, bias)
        self.v_proj = nn.Linear(d_model, key_value_heads * head_dim, bias)
        self.o_proj = nn.Linear(heads * head_dim, d_model, False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            hidden_states: [batch, length, d_model].
            position_embeddings: (cos, sin) [batch, length, head_dim]; None for no rotary embedding.
            attention_mask: bool (True: visible) or additive [batch, 1, length, keys], or [batch, keys] with 0 for
                padding beside causality; None for causality alone.
            past_key_values: a transformers cache, in which K1 and K2 lie side by side as the key.
            kwargs: what transformers passes besides, not read.

        Returns:
            The new hidden states, of the same shape, and the weights [batch, heads, length, keys].
        """
        batch, length = hidden_states.shape[:2]

        def by_head(projected: Tensor) -> Tensor:
            return projected.view(batch, length, -1, self.head_dim).transpose(1, 2)

        query, key = by_head(self.q_proj(hidden_states)), by_head(self.k_proj(hidden_states))
        value = by_head(self.v_proj(hidden_states))
        if position_embeddings is not None:
            query, key = self._rotated(query, position_embeddings), self._rotated(key, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        visible = _visible(attention_mask, length, key.shape[2], key.device)
        weights = self.weights(query, key, visible)
        mixed = (weights @ self._per_head(value)).transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(mixed), weights

    def split(self, x: Tensor) -> Split:
        """Split queries or keys [..., head_dim], such as those in a cache."""
        return Split(x[..., : self.r], x[..., self.r :])

    def weights(self, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
        """Compute what each value is multiplied by, exactly 0 for keys that are not attended.

        Args:
            query: [batch, heads, length, head_dim].
            key: [batch, key_value_heads, keys, head_dim].
            visible: bool, broadcastable to the result.

        Returns:
            [batch, heads, length, keys]. A query that sees no key (padding) has the mean over all.
        """
        queries, keys = self.split(query), self.split(self._per_head(key))
        scores = queries.chooses @ keys.chooses.transpose(2, 3) * self.r**-0.5
        scores = scores.masked_fill(~visible, 0)  # padding may not be finite
        if self.k < scores.shape[-1]:
            chosen = statistical_topk(scores, self.k, mode="neg_inf", valid_mask=visible.expand_as(scores))
        else:
            chosen = scores.masked_fill(~visible, float("-inf"))
        wide = torch.promote_types(chosen.dtype, torch.float32)
        lowest = torch.finfo(chosen.dtype).min  # finite, so that a row without keys is not NaN
        attention = chosen.clamp(min=lowest).softmax(-1, dtype=wide)
        gains = F.softplus((queries.weighs @ keys.weighs.transpose(2, 3)).to(wide) * (self.head_dim - self.r) ** -0.5)
        return (attention * gains).to(query.dtype)

    def _per_head(self, x: Tensor) -> Tensor:
        """[batch, key_value_heads, ...] -> [batch, heads, ...]."""
        return x.repeat_interleave(self.heads // self.key_value_heads, dim=1)

    def _rotated(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Turn each part of x [batch, heads, length, head_dim] as a head of its own width."""
        return torch.cat(
            [_rotate(part, *(_narrowed(each, part.shape[-1]) for each in rotary)) for part in self.split(x)], -1
        )

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {
            "d_model": self.d_model,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "r": self.r,
            "k": self.k,
            "key_value_heads": self.key_value_heads,
            "bias": self.q_proj.bias is not None,
            "layer_index": self.layer_idx,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> SparkAttention:
        """Make it in the dtype of what stands in its place; the values come from the weights file."""
        return cls(**spec).to(next(original.parameters()).dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, r={self.r}, k={self.k}"


def _visible(mask: Tensor | None, length: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each query may attend to: bool, broadcastable to [batch, heads, length, keys]."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask: a {type(mask).__name__} was given; use attn_implementation 'sdpa' or 'eager'."
        )
    if mask is not None and mask.dim() == 4:
        mask = mask[..., :keys]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    causal = torch.ones(length, keys, dtype=torch.bool, device=device).tril(keys - length)
    return causal[None, None] if mask is None else causal & mask[:, None, None, :].bool()


def _narrowed(table: Tensor, width: int) -> Tensor:
    """Take the columns of a rotary table [batch, length, head_dim] for a head of `width`: [batch, length, width]."""
    planes = torch.arange(width // 2, device=table.device) * table.shape[-1] // width
    return table[..., planes].repeat(1, 1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [batch, heads, length, width] in the planes (i, i + width / 2)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)
