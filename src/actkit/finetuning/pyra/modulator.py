"""Tokens are scaled before they are merged, by two learned vectors: PYRA (2024, ECCV, arXiv:2403.09192).

    I = norm(M_s + M_t)                     M_s, M_t [r, d]: sources and their targets, times their sizes
    by channel  2 sigmoid(w_r^T I)  [d]     by token  2 sigmoid(I w_d^T) - 1  [r]
    M_s <- M_s + (M_s * by channel) * by token

w_d begins at 0, so that training begins at plain merging.

When to use it: through `merge_tokens(pyra=True)`, trained with low-rank changes of the frozen model.
Cost: r + 3 d numbers a block with the norm's, and about 4 r d products an image.
Settled here: a sequence too short for r pairs uses the first of w_r (the release ends with an error there): the k-th
number belongs to the k-th most similar pair.
Our own reading: without `token` the source is multiplied by the factor of its channels alone, from w_r = 0, so that
this too begins at plain merging.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PyraModulator(nn.Module):
    """(sources, targets), both [batch, r, features] -> the sources as they are added: the same shape.

    Args:
        features: d.
        r: pairs.
        norm: whether the sum goes through a layer norm.
        channel: whether there is a factor for each channel.
        token: whether there is one for each source.
        bounded: sigmoids; without them the factors are the products themselves.

    Raises:
        ValueError: neither factor, or no pair.
    """

    def __init__(
        self, features: int, r: int, norm: bool = True, channel: bool = True, token: bool = True, bounded: bool = True
    ) -> None:
        super().__init__()
        if r < 1 or not (channel or token):
            raise ValueError(f"r, channel, token: {r}, {channel} and {token} were given; give a pair and a factor.")
        self.settings: dict[str, Any] = {
            "features": features,
            "r": r,
            "norm": norm,
            "channel": channel,
            "token": token,
            "bounded": bounded,
        }
        self.bounded = bounded
        self.norm = nn.LayerNorm(features) if norm else nn.Identity()
        self.by_channel = nn.Parameter(torch.zeros(r)) if channel else None
        self.by_token = nn.Parameter(torch.zeros(features)) if token else None
        if self.by_channel is not None and token:
            nn.init.uniform_(self.by_channel, -1.0, 1.0)  # Kaiming's rule for one input

    def forward(self, sources: Tensor, targets: Tensor) -> Tensor:
        """Scale the sources."""
        seen = self.norm(sources + targets)
        scaled = sources
        if self.by_channel is not None:
            factor = torch.einsum("brd,r->bd", seen, self.by_channel[: seen.shape[1]])[:, None]
            scaled = scaled * (2 * factor.sigmoid() if self.bounded else factor)
        if self.by_token is None:
            return scaled if self.bounded else sources + scaled
        token = (seen @ self.by_token)[..., None]
        return sources + scaled * (2 * token.sigmoid() - 1 if self.bounded else token)

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return dict(self.settings)
