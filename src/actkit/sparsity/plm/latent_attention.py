"""Multi-head latent attention: what is cached of a token is a narrow vector that all heads share (DeepSeek-V2, 2024).

    c, k = split(kv_a_proj x);  c = norm(c)                            what is cached: c [rank], and k [rope] turned
    key_h = [K_h c ; turned k],  value_h = V_h c                       K_h, V_h: the rows of head h in kv_b_proj
    out = o_proj concat_h(sum_t p_t value_h),  p = softmax(query_h . key_h / sqrt(nope + rope))

Expanded, as above, it is attention with keys of nope + rope features and values of value_dim. Absorbed it is the same
function, with the projections moved to the other side of the sums over tokens:

    query_h . key_h = (K_h^T query_h[:nope]) . c + query_h[nope:] . k,     sum_t p_t value_h = V_h (sum_t p_t c_t)

so that a cached token is read as it lies: rank + rope numbers for all heads together.

When to use it: in `plm`, or in a model of your own whose key-value cache is to be small.
Cost: absorbed, a head multiplies rank + rope and rank numbers per cached token, not nope + rope and value_dim: more
arithmetic, and a fraction of the memory. A pass of many tokens is cheaper expanded; `absorbs` says which it is.
Settled here: the cache holds c behind its norm, and k turned, so that nothing of the past is computed again.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

Rotary = tuple[Tensor, Tensor]
CacheForm = Literal["latent", "expanded"]
OWN = ("sdpa", "eager")  # attention functions that the absorbed form stands for


class LatentAttention(nn.Module):
    """Causal attention whose keys and values are made of one narrow vector per token.

    Its parameters have the names that public checkpoints use.

    Args:
        hidden_size: width of the hidden states.
        num_heads: how many.
        kv_lora_rank: width of what is cached for keys and values.
        qk_nope_head_dim: features of a query that are not turned.
        qk_rope_head_dim: features of a query that are, and of the key that all heads share.
        v_head_dim: features of a value.
        q_lora_rank: width that queries go through; None if they are projected at once.
        interleaved: whether neighbouring features turn together, or halves.
        cache: what a cache is given, 'latent' or 'expanded' keys and values; the outputs are the same.
        bias: of the layers that read or write hidden states, except the queries of full rank.
        epsilon: of the norms.
        layer_index: which layer of a transformers cache is this one's.
        config: of a transformers model, which names the attention function; None for torch's.

    Raises:
        ValueError: a size is not positive, or a width that turns is odd.
    """

    decodes_as: ClassVar[str] = "latent_attention"
    linear_inputs: ClassVar[Any] = (
        ("attention.input", ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")),
        (None, ("q_b_proj",)),
        (None, ("kv_b_proj",)),
        ("attention.mixed", ("o_proj",)),
    )
    num_key_value_groups, is_causal = 1, True  # as transformers' attention functions ask

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        *,
        q_lora_rank: int | None = None,
        interleaved: bool = True,
        cache: CacheForm = "latent",
        bias: bool = False,
        epsilon: float = 1e-6,
        layer_index: int = 0,
        config: Any = None,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, q_lora_rank)
        if cache not in get_args(CacheForm):
            raise ValueError(f"cache: {cache!r} was given, allowed are {', '.join(get_args(CacheForm))}.")
        self.config, self.layer_idx, self.cache, self.interleaved = config, layer_index, cache, interleaved
        self.hidden_size, self.num_heads, self.q_lora_rank, self.kv_lora_rank = (
            hidden_size,
            num_heads,
            q_lora_rank,
            kv_lora_rank,
        )
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.scaling = self.qk_head_dim**-0.5
        queries = num_heads * self.qk_head_dim
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=bias)
            self.q_a_layernorm = LlamaRMSNorm(q_lora_rank, epsilon)
            self.q_b_proj = nn.Linear(q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = LlamaRMSNorm(kv_lora_rank, epsilon)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: [batch, length, hidden].
            position_embeddings: (cos, sin) [batch, length, rope].
            attention_mask: bool (True: visible) or additive [batch, 1, length, keys]; None for causality alone.
            past_key_values: a transformers cache.
            kwargs: what transformers passes besides.

        Returns:
            The new hidden states, of the same shape, and the attention weights, if the attention function gives them.
        """
        batch, length = hidden_states.shape[:2]
        if self.q_lora_rank is None:
            projected = self.q_proj(hidden_states)
        else:
            projected = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = projected.view(batch, length, self.num_heads, self.qk_head_dim).transpose(1, 2)
        plain, turned = query.split((self.qk_nope_head_dim, self.qk_rope_head_dim), -1)
        turned = _turn(turned, position_embeddings, self.interleaved)
        latent, key = self.kv_a_proj_with_mqa(hidden_states).split((self.kv_lora_rank, self.qk_rope_head_dim), -1)
        latent = self.kv_a_layernorm(latent)[:, None]  # [batch, 1, length, rank]
        key = _turn(key[:, None], position_embeddings, self.interleaved)  # [batch, 1, length, rope]
        if past_key_values is not None and self.cache == "latent":
            latent, key = past_key_values.update(latent, key, self.layer_idx)
            if self.absorbs(length, latent.shape[2]):
                absorbed, chances = self._absorbed(plain, turned, latent, key, attention_mask)
                return self.o_proj(absorbed), chances
        keys, values = self.expand(latent, key)
        if past_key_values is not None and self.cache == "expanded":
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        mixed, weights = self._attend(torch.cat((plain, turned), -1), keys, values, attention_mask, **kwargs)
        return self.o_proj(mixed.reshape(batch, length, -1)), weights

    def expand(self, latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of all heads from what is cached.

        Args:
            latent: [batch, 1, keys, rank].
            key: turned, [batch, 1, keys, rope].

        Returns:
            Keys [batch, heads, keys, nope + rope], and values [batch, heads, keys, value_dim].
        """
        both = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        plain, values = both.split((self.qk_nope_head_dim, self.v_head_dim), -1)
        return torch.cat((plain, key.expand(-1, self.num_heads, -1, -1)), -1), values

    def absorb(self) -> tuple[Tensor, Tensor]:
        """Return the two halves of kv_b_proj head by head, as the absorbed form multiplies them: views, not copies.

        Returns:
            K [heads, nope, rank], by which a query's plain features become rank features, and V [heads, value_dim,
            rank].
        """
        both = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        plain, values = both.split((self.qk_nope_head_dim, self.v_head_dim), 1)
        return plain, values

    def absorbs(self, length: int, keys: int) -> bool:
        """Whether new tokens are computed in absorbed form: it multiplies less, and means what the layers mean.

        Args:
            length: new tokens.
            keys: tokens in the cache, these among them.
        """
        if type(self.kv_b_proj) is not nn.Linear or self.training or self._function() not in OWN:
            return False
        widths = self.qk_nope_head_dim + self.v_head_dim
        absorbed = length * (widths * self.kv_lora_rank + keys * (2 * self.kv_lora_rank + self.qk_rope_head_dim))
        return absorbed < keys * widths * self.kv_lora_rank + length * keys * (widths + self.qk_rope_head_dim)

    def _function(self) -> str:
        return getattr(self.config, "_attn_implementation", None) or "sdpa"

    def _absorbed(
        self, plain: Tensor, turned: Tensor, latent: Tensor, key: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attend to what is cached, as it is: [batch, length, heads * value_dim], and the weights."""
        keys_of, values_of = self.absorb()
        query = torch.einsum("bhqn,hnr->bhqr", plain, keys_of)
        scores = (query @ latent.transpose(2, 3) + turned @ key.transpose(2, 3)) * self.scaling
        length, keys = scores.shape[2:]
        if mask is None:
            mask = torch.ones(length, keys, dtype=torch.bool, device=scores.device).tril(keys - length)
        mask = mask[..., :keys]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        mixed = torch.einsum("bhqr,hvr->bqhv", weights @ latent, values_of)
        return mixed.flatten(2), weights

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by the attention function of the config: [batch, length, heads, value_dim], and the weights."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self._function(), eager_attention_forward)
        return function(self, query, keys, values, mask, dropout=0.0, scaling=self.scaling, **kwargs)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, rank={self.kv_lora_rank}, cache={self.cache!r}"


def check_sizes(
    hidden_size: int, heads: int, rank: int, nope: int, rope: int, value: int, query_rank: int | None
) -> None:
    """Raise ValueError for sizes of which no latent attention can be made."""
    sizes = {
        "hidden_size": hidden_size,
        "num_heads": heads,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "q_lora_rank": 1 if query_rank is None else query_rank,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {size} was given; give 1 or more.")
    if rope % 2:
        raise ValueError(f"qk_rope_head_dim: {rope} was given; features turn in pairs, give an even number.")


def _turn(x: Tensor, rotary: Rotary, interleaved: bool) -> Tensor:
    """Turn x [batch, heads, length, rope]; each half of the tables [batch, length, rope] holds the angle of a pair."""
    cos, sin = (table[:, None, :, : x.shape[-1] // 2] for table in rotary)
    if not interleaved:
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
