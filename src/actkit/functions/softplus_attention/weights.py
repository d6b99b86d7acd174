"""Attention weights without softmax: a positive map of the scores, a normalisation, and a re-weighting (LSSA, LSSAR).

    s_ij = log(d) log(N_i) q_i k_j / (|q_i| |k_j|)            N_i: how many keys row i reads, d: the head size
    A_ij = softplus(s_ij) / (sum_j softplus(s_ij) + 1e-8)     over the keys that it reads (LSSA)
    b_ij = relu(N_i A_ij - O_i)^p,   A'_ij = b_ij / sum_j b_ij                            (LSSAR)

O_i is 1, and 0 for rows that read at most three keys. N A has mean 1, so that the shift removes what is below average;
p sharpens the rest. Other maps (exp, sigmoid, ReLU) and re-weighting any of them make the paper's table of ablations.
Cost: a second pass over the weights of a row. Everything is computed in float32 (float64 if the inputs are), whatever
autocast says. Queries are taken in chunks, so that what is held at once does not grow with the square of the length;
not while gradients are kept, and not in a compiled model.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.core.layers.attention_function import read_mask
from actkit.core.layers.keeps_dtype import check_floats

Kind = Literal["softmax", "sigmoid", "relu", "lssa", "lssar"]
EPSILON = 1e-8  # of the paper's first normalisation
LEAST = 1e-6  # rows that no weight leads by more are not sharpened: they would be divided by nothing
CHUNK = 1 << 20  # scores that are held at a time without gradients: 4 MiB in float32, which stay in the cache


def softplus_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    power: float | None = None,
    offset_rows: int = 3,
    counts: Tensor | None = None,
    scale: Literal["log"] | float = "log",
    dropout: float = 0.0,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend by LSSA, or by LSSAR if there is a power.

    Args:
        query: [batch, heads, queries, head size], behind the rotary embedding.
        key: [batch, key-value heads, keys, head size]; heads that share keys stand side by side.
        value: [batch, key-value heads, keys, value size].
        mask: bool, what expands to [batch, heads, queries, keys], True where a query reads a key; or a float mask of 0
            and minus infinity.
        is_causal: a query does not read what is behind it; the last query stands beside the last key.
        power: of the re-weighting, 1 or more; None for LSSA.
        offset_rows: rows that read at most so many keys are not shifted.
        counts: how many keys a row reads, [batch, heads, queries, 1] or what expands to it; None counts the mask.
        scale: of the cosines, 'log' for log(d) log(N), or a number.
        dropout: of the weights.
        return_weights: give the weights too.

    Returns:
        [batch, heads, queries, value size], and the weights if they were asked for. A row that reads no key is zero.

    Raises:
        ValueError: a setting is out of bounds, or the head size is 1, of which the logarithm is 0.
        UnsupportedModelError: the mask adds other numbers than 0 and minus infinity.
    """
    check_floats(query, "query")
    check_power(power)
    visible = read_mask(mask, query, key, causal=False)
    if is_causal:
        queries, keys = query.shape[2], key.shape[2]
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        visible = visible & ahead
    if mask is not None and not torch.compiler.is_compiling() and not bool(visible.any(-1).all()):
        warnings.warn("softplus_attention: some rows read no key, and are zero.", stacklevel=2)
    kind: Kind = "lssa" if power is None else "lssar"
    settings = {"power": power, "offset_rows": offset_rows, "counts": counts, "scale": scale}
    mixed, weights = attend(query, key, value, visible, kind, dropout, return_weights, **settings)  # type: ignore[arg-type]
    return mixed if weights is None else (mixed, weights)


def check_power(power: float | None) -> None:
    """Refuse a power that does not sharpen.

    Args:
        power: of the re-weighting; None for none.

    Raises:
        ValueError: it is no number from 1 on.
    """
    number = isinstance(power, int | float) and not isinstance(power, bool) and math.isfinite(power)
    if power is not None and not (number and power >= 1):
        raise ValueError(f"power: {power!r} was given; give a number from 1 on (the paper: 15), or None for LSSA.")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    kind: Kind = "lssar",
    dropout: float = 0.0,
    return_weights: bool = False,
    *,
    power: float | None = None,
    offset_rows: int = 3,
    counts: Tensor | None = None,
    scale: Literal["log"] | float = "log",
) -> tuple[Tensor, Tensor | None]:
    """Mix values by weights of some kind; queries are taken in chunks unless weights or gradients are wanted.

    Args:
        query: as in `softplus_attention`, and so are the others.
        key: see query.
        value: see query.
        visible: bool, what expands to [batch, heads, queries, keys].
        kind: of the weights.
        dropout: see query.
        return_weights: see query.
        power: see query.
        offset_rows: see query.
        counts: see query.
        scale: see query.
    """
    batch, heads, queries, _ = query.shape
    readers, keys = heads // key.shape[1], key.shape[2]
    if readers > 1:
        key, value = key.repeat_interleave(readers, 1), value.repeat_interleave(readers, 1)
    visible = visible[(None,) * (4 - visible.dim())].expand(batch, -1, queries, keys)
    counts = None if counts is None else counts.expand(batch, -1, queries, 1)
    settings: dict[str, Any] = {"power": power, "offset_rows": offset_rows, "scale": scale}
    check_weights(kind, power, scale, query.shape[-1])
    prepared = _prepared(key, kind)  # once for all chunks

    def mix(rows: slice) -> tuple[Tensor, Tensor]:
        here = None if counts is None else counts[:, :, rows]
        found = _weights(query[:, :, rows], prepared, visible[:, :, rows], kind, counts=here, **settings)
        found = F.dropout(found, dropout) if dropout else found
        return found.to(value.dtype) @ value, found

    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if return_weights or learns or torch.compiler.is_compiling():  # what is compiled takes any length
        mixed, weights = mix(slice(None))
        return mixed, weights if return_weights else None
    step = max(1, CHUNK // max(1, batch * heads * keys))
    mixed = value.new_empty(batch, heads, queries, value.shape[-1])
    for start in range(0, queries, step):  # small pieces kept apart would leave holes in memory
        mixed[:, :, start : start + step] = mix(slice(start, start + step))[0]
    return mixed, None


def attention_weights(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    kind: Kind = "lssar",
    power: float | None = None,
    *,
    offset_rows: int = 3,
    counts: Tensor | None = None,
    scale: Literal["log"] | float = "log",
) -> Tensor:
    """Form attention weights: a positive map of the scores, a normalisation, and with a power the re-weighting.

    | kind | scores | map | normalised |
    |---|---|---|---|
    | softmax | q k / sqrt(d) | exp | by the sum |
    | sigmoid | q k / sqrt(d) - log N | sigmoid | no |
    | relu | q k / sqrt(d) | ReLU | by N |
    | lssa, lssar | log(d) log(N) cos(q, k) | softplus | by the sum |

    Args:
        query: [batch, heads, queries, head size].
        key: [batch, heads, keys, head size].
        visible: bool, what expands to [batch, heads, queries, keys].
        kind: see the table; 'lssar' has a power of 15 by itself.
        power: of the re-weighting of any kind; what is not normalised is, for it.
        offset_rows: as in `softplus_attention`.
        counts: as in `softplus_attention`.
        scale: of the cosines, 'log' or a number.

    Returns:
        float32 (float64 if the inputs are) [batch, heads, queries, keys], 0 where a query does not read a key.

    Raises:
        ValueError: the kind is unknown, the power out of bounds, or the head size 1.
    """
    check_weights(kind, power, scale, query.shape[-1])
    settings: dict[str, Any] = {"power": power, "offset_rows": offset_rows, "scale": scale}
    return _weights(query, _prepared(key, kind), visible, kind, counts=counts, **settings)


def check_weights(kind: Kind, power: float | None, scale: Literal["log"] | float, head_size: int) -> None:
    """Refuse settings of `attention_weights` that give no weights.

    Args:
        kind: of the weights.
        power: of the re-weighting.
        scale: of the cosines.
        head_size: channels of a query.

    Raises:
        ValueError: as there.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: {kind!r} was given, allowed are {', '.join(get_args(Kind))}.")
    check_power(power)
    if kind in ("lssa", "lssar") and scale == "log" and head_size == 1:
        raise ValueError("query: the head size is 1, and log(1) = 0 makes all scores 0; use a larger one, or a scale.")


def _prepared(key: Tensor, kind: Kind) -> Tensor:
    """Keys in float32 or wider, of length 1 if cosines are taken."""
    with torch.autocast(key.device.type, enabled=False):
        key = key.to(torch.promote_types(key.dtype, torch.float32))
        return F.normalize(key, dim=-1) if kind in ("lssa", "lssar") else key


def _weights(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    kind: Kind,
    power: float | None,
    offset_rows: int,
    counts: Tensor | None,
    scale: Literal["log"] | float,
) -> Tensor:
    """What `attention_weights` forms, of keys that are prepared."""
    power = 15 if power is None and kind == "lssar" else power
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = query.to(wide), key.to(wide)
        counts = (visible.sum(-1, keepdim=True) if counts is None else counts).to(wide)
        if kind in ("lssa", "lssar"):
            cosines = F.normalize(query, dim=-1) @ key.mT
            factor = math.log(query.shape[-1]) * counts.clamp_min(1).log() if scale == "log" else scale
            if _learns(cosines):
                weights = _shared(F.softplus(factor * cosines) * visible)
            else:
                weights = F.softplus(cosines.mul_(factor)).mul_(visible)
                weights.div_(weights.sum(-1, keepdim=True) + EPSILON)
        else:
            scores = query @ key.mT * query.shape[-1] ** -0.5
            if kind == "softmax":  # a row that reads nothing has weights of 0, not NaN
                weights = torch.softmax(scores.masked_fill(~visible, torch.finfo(wide).min), -1) * visible
            elif kind == "sigmoid":
                weights = torch.sigmoid(scores - counts.clamp_min(1).log()) * visible
            else:
                weights = F.relu(scores) * visible / counts.clamp_min(1)
            weights = weights if power is None or kind == "softmax" else _shared(weights)
        return weights if power is None else reweighted(weights, counts, power, offset_rows)


def reweighted(weights: Tensor, counts: Tensor, power: float, offset_rows: int = 3) -> Tensor:
    """Sharpen weights: what is below the average of a row goes, the rest is raised to a power.

    The largest of a row is divided out first, which changes nothing and keeps the power within the numbers there are. A
    row of equal weights, of which nothing would be left, stays as it is.

    Args:
        weights: [..., queries, keys], of sum 1.
        counts: of the keys that a row reads, [..., queries, 1].
        power: 1 or more.
        offset_rows: rows that read at most so many keys are not shifted.
    """
    least = (counts > offset_rows).to(weights.dtype)
    if _learns(weights):
        above = F.relu(weights * counts - least)
        largest = above.detach().amax(-1, keepdim=True)
        sharp = (above / largest.clamp_min(LEAST)) ** power
        shared = sharp / sharp.sum(-1, keepdim=True).clamp_min(LEAST)
    else:  # in place: what is new for each step costs more than the arithmetic
        above = (weights * counts).sub_(least).relu_()
        largest = above.amax(-1, keepdim=True)
        shared = _raised(above.div_(largest.clamp_min(LEAST)), power)
        shared.div_(shared.sum(-1, keepdim=True).clamp_min(LEAST))
    return torch.where(largest > LEAST, shared, weights)


def _learns(x: Tensor) -> bool:
    """Whether gradients are wanted, or the code is compiled, which may both keep what is computed between."""
    return (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling()


def _raised(x: Tensor, power: float) -> Tensor:
    """x ** power, whose memory may be used; whole powers by squaring: five times as fast."""
    if power != int(power):
        return x.pow_(power)
    left, result = int(power), None
    while left:
        if left % 2:
            result = x.clone() if result is None else result.mul_(x)
        left //= 2
        if left:
            x.mul_(x)
    assert result is not None  # the power is 1 or more
    return result


def _shared(mapped: Tensor) -> Tensor:
    return mapped / (mapped.sum(-1, keepdim=True) + EPSILON)
