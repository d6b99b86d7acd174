"""Which tokens of an image are alike, and their mean in place of two: ToMe (2022, arXiv:2210.09461).

    a: tokens at even places, b: those at odd ones;  each a's best partner in b by cosine;  the r best pairs are merged
    x_b <- sum of s x over what is merged / sum of s,    s: how many patches a token stands for, 1 at first

When to use it: through `merge_tokens`, or by hand in a model of your own between attention and MLP.
Cost: T^2 / 4 products of the width of a head for T tokens.
Settled here: the order of pairs is stable, so that equal scores give the same pairs in any precision; the class token
is never merged and stays first. Nothing of the choice has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Matching:
    """Who is merged into whom.

    Attributes:
        kept: [batch, left] which tokens stay, in their new order: the even ones, the class token first, then the odd
            ones; with two protected tokens these come first.
        source: [batch, r] which tokens go, the most alike first.
        target: [batch, r] places among the tokens that stay of those that they go into; several may share one.
    """

    kept: Tensor
    source: Tensor
    target: Tensor


@torch.no_grad()
def bipartite_match(metric: Tensor, r: int, *, protected: int = 1) -> Matching:
    """Pair tokens that are alike.

    Args:
        metric: [batch, tokens, channels], what likeness is measured on.
        r: how many tokens go; at most half of those that are not protected do.
        protected: the first tokens, 0, 1 (class) or 2 (class and distillation), which are never merged.

    Raises:
        ValueError: r is negative, or another number of protected tokens was given.
    """
    if r < 0 or protected not in (0, 1, 2):
        raise ValueError(f"r, protected: {r} and {protected} were given; give r of at least 0, and 0, 1 or 2.")
    batch, tokens, _ = metric.shape
    r = min(r, max((tokens - protected) // 2, 0))
    unit = F.normalize(metric, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].mT
    if protected > 0:
        scores[:, 0] = -torch.inf
    if protected > 1:
        scores[:, :, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    stay, source = order[:, r:], order[:, :r]
    if protected:
        stay = stay.sort(-1).values  # the class token is the first again
    target = partner.gather(-1, source)
    odd = torch.arange(1, tokens, 2, device=metric.device).expand(batch, -1)
    even, before = 2 * stay, stay.shape[1]
    if protected == 2:
        kept = torch.cat([even[:, :1], odd[:, :1], even[:, 1:], odd[:, 1:]], 1)
    else:
        kept = torch.cat([even, odd], 1)
    return Matching(kept, 2 * source, before + target)


def merge(x: Tensor, matching: Matching, *, modulate: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Add the sources to their targets.

    Args:
        x: [batch, tokens, channels].
        matching: of these tokens.
        modulate: (sources, targets), both [batch, r, channels] -> what is added in place of the sources.

    Returns:
        [batch, tokens - r, channels], the tokens that stay in their new order.
    """
    batch, tokens, channels = x.shape
    first = torch.arange(batch, device=x.device)[:, None]
    rows = x.reshape(-1, channels)  # whole rows are copied faster than by gather

    def at(places: Tensor) -> Tensor:
        return rows.index_select(0, (places + tokens * first).flatten()).view(batch, -1, channels)

    left, source = at(matching.kept), at(matching.source)
    if modulate is not None:
        source = modulate(source, at(matching.kept.gather(1, matching.target)))
    targets = (matching.target + left.shape[1] * first).flatten()
    return left.reshape(-1, channels).index_add(0, targets, source.reshape(-1, channels)).view_as(left)


def merge_tokens(
    x: Tensor, size: Tensor, matching: Matching, *, modulate: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Average tokens with their targets, each by how many patches it stands for.

    Args:
        x: [batch, tokens, channels].
        size: [batch, tokens, 1].
        matching: of these tokens.
        modulate: as in `merge`; it sees x times size.

    Returns:
        Tokens and sizes after.
    """
    merged = merge(size, matching)
    return merge(x * size, matching, modulate=modulate) / merged, merged


def unmerge(x: Tensor, sources: Tensor) -> Tensor:
    """Give every token of the input what the token holds that it went into.

    Args:
        x: [batch, tokens left, channels].
        sources: [batch, tokens left, tokens], 1 where a token went into one that is left (`source_map`).

    Returns:
        [batch, tokens, channels].
    """
    return sources.mT.to(x.dtype) @ x
