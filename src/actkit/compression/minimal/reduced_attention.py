"""Attention with fewer matrices, from "Reducing the Transformer Architecture to a Minimum" (2024, arXiv:2410.13732).

    scores = q k^T / sqrt(width of a head),   out = softmax(scores) v W_o

    qk = full        q = x W_q, k = x W_k              vo = full        v = x W_v, and W_o
    qk = shared      q = k = x W_q                     vo = collapsed   v = x, and W_o
    qk = collapsed   q = x W, k = x                    vo = none        v = x, and no W_o
    qk = symmetric   the same, W = W^T
    qk = cholesky    q = k = x T, T lower triangular, so W = T T^T

Of n channels, `full` and `full` have 4 n^2 numbers, `collapsed` and `none` n^2, `cholesky` n (n + 1) / 2 for query and
key. A score is quadratic in the tokens whatever the form, so that a layer stays nonlinear without an MLP.

When to use it: for small models whose budget matters, trained from scratch, in `MinimalViT` or in a model of your own;
`collapse_attention` brings a trained single-head attention into the collapsed form exactly.
Cost: less than ordinary attention. With one head as wide as the model its scores cost n per pair of tokens, as much as
all heads together elsewhere.
Settled here: the temperature of a collapsed form is sqrt(n), which is that of one head. `collapsed` and `none` mix
unprojected tokens, `symmetric` and `cholesky` have no biases, and all of these have one head; `shared` is the symmetric
form of several. T begins as the identity / n^(1/4), so that scores begin at the size of one. A mask says which keys are
real; attention behind it is computed by torch's `scaled_dot_product_attention`.
Our own reading: `symmetric` in the paper is one of `shared`, `symmetric` and `cholesky`; all three are here. With a
causal mask a symmetric form still moves information in one direction alone.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QueryKey = Literal["full", "shared", "collapsed", "symmetric", "cholesky"]
ValueOutput = Literal["full", "collapsed", "none"]
ONE_HEAD = ("collapsed", "symmetric", "cholesky")


class ReducedAttention(nn.Module):
    """Self-attention [batch, tokens, features] -> the same shape.

    Args:
        features: n.
        heads: that share the features out.
        qk: how query and key are made.
        vo: how value and output are.
        bias: whether linear layers have one.
        dropout: of attention weights, in training.

    Raises:
        ValueError: an unknown form, heads that do not divide the features, or several where the form has one.
    """

    def __init__(
        self,
        features: int,
        heads: int = 1,
        qk: QueryKey = "full",
        vo: ValueOutput = "full",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, given, allowed in (("qk", qk, get_args(QueryKey)), ("vo", vo, get_args(ValueOutput))):
            if given not in allowed:
                raise ValueError(f"{name}: {given!r} was given, allowed are {', '.join(allowed)}.")
        if heads < 1 or features % heads:
            raise ValueError(f"heads: {heads} was given for {features} features; give a divisor of them.")
        if heads > 1 and qk in ONE_HEAD:
            raise ValueError(
                f"qk: {qk!r} was given with {heads} heads, and has one, as its matrix is as wide as the model; give "
                f"heads=1, or qk='shared', the symmetric form of several heads."
            )
        if heads > 1 and vo != "full":
            raise ValueError(
                f"vo: {vo!r} was given with {heads} heads, and mixes whole tokens, so that it has one; give heads=1, "
                f"or vo='full'."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} was given; give a share of at least 0 and below 1.")
        self.settings: dict[str, Any] = {
            "features": features,
            "heads": heads,
            "qk": qk,
            "vo": vo,
            "bias": bias,
            "dropout": dropout,
        }
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(features, features, bias) if qk in ("full", "shared", "collapsed") else None
        self.key = nn.Linear(features, features, bias) if qk == "full" else None
        self.form = None  # the free entries of a symmetric or triangular matrix, row by row up to the diagonal
        if qk in ("symmetric", "cholesky"):
            rows, columns = torch.tril_indices(features, features)
            start = torch.eye(features) / features**0.25
            if qk == "symmetric":
                start = torch.randn(features, features) / (3 * features) ** 0.5
            self.form = nn.Parameter(start[rows, columns])
        self.value = nn.Linear(features, features, bias) if vo == "full" else None
        self.output = nn.Linear(features, features, bias) if vo != "none" else None

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> ReducedAttention:
        """Return the full form with the weights of torch's attention.

        Args:
            attention: of keys and values as wide as the queries, without extra keys; with batches first or not.

        Raises:
            ValueError: keys or values have another width, or extra ones are added.
        """
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "attention: keys or values of another width than the queries, or added to the tokens, were given; give "
                "self-attention over tokens of one width."
            )
        bias = attention.in_proj_bias is not None
        made = cls(attention.embed_dim, attention.num_heads, bias=bias, dropout=attention.dropout)
        layers = (made.query, made.key, made.value)
        with torch.no_grad():
            for index, (layer, weight) in enumerate(zip(layers, attention.in_proj_weight.chunk(3), strict=True)):
                assert layer is not None
                layer.weight.copy_(weight)
                if layer.bias is not None and attention.in_proj_bias is not None:
                    layer.bias.copy_(attention.in_proj_bias.chunk(3)[index])
            assert made.output is not None
            made.output.weight.copy_(attention.out_proj.weight)
            if made.output.bias is not None and attention.out_proj.bias is not None:
                made.output.bias.copy_(attention.out_proj.bias)
        weight = attention.in_proj_weight
        return made.to(weight.device, weight.dtype).train(attention.training)

    def matrix(self) -> Tensor | None:
        """Return the symmetric matrix, or T, of the forms that keep free entries alone: [features, features]."""
        if self.form is None:
            return None
        features = self.settings["features"]
        rows, columns = torch.tril_indices(features, features, device=self.form.device)
        lower = self.form.new_zeros(features, features).index_put((rows, columns), self.form)
        return lower if self.settings["qk"] == "cholesky" else lower + lower.tril(-1).mT

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Mix the tokens of x.

        Args:
            x: [batch, tokens, features].
            mask: bool [batch, tokens], which keys are real; every row has one. None for all.
            causal: a token sees itself and those before it.
        """
        q, k = self._query_key(x)
        v = x if self.value is None else self.value(x)
        allowed = None if mask is None else mask[:, None, None, :].bool()
        if allowed is not None and causal:
            allowed = allowed & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        mixed = F.scaled_dot_product_attention(
            self._by_head(q),
            self._by_head(k),
            self._by_head(v),
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal and allowed is None,
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        return mixed if self.output is None else self.output(mixed)

    def _query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.matrix()
        if matrix is not None:
            q = x @ matrix
            return q, q if self.settings["qk"] == "cholesky" else x
        assert self.query is not None
        q = self.query(x)
        return q, x if self.settings["qk"] == "collapsed" else q if self.key is None else self.key(x)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return dict(self.settings)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> ReducedAttention:
        """Make it in the dtype of what stands in its place; the values come from the weights file."""
        made = cls(**spec)
        standing = None if original is None else next(original.parameters(), None)
        return made if standing is None else made.to(standing.dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())
