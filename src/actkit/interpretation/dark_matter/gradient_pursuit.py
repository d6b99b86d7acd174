"""Gradient pursuit: how well a decoder could do with as few latents, if they were chosen at inference.

    r = x - b - w D,   g = r D^T,   the largest of g joins the support,   G = g on the support
    w <- relu(w + <c, r> / <c, c> G),   c = G D                     as often as the encoder has latents above 0

From arXiv:2410.14670; as in its code and dictionary_learning's, the largest signed value joins.
When to use it: to tell a bad encoder from a bad dictionary.
Cost: two products with the whole decoder for each latent of a row, 2 L0 times what the encoder costs.
Settled here: a weight that was clipped to 0 leaves the support (as in the authors' code; dictionary_learning keeps it).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def gradient_pursuit(x: Tensor, decoder: Tensor, bias: Tensor, counts: Tensor | int) -> Tensor:
    """Choose latents of each row greedily.

    Args:
        x: [rows, channels].
        decoder: [latents, channels].
        bias: [channels].
        counts: how many latents each row may have, int64 [rows] or one number.

    Returns:
        Weights [rows, latents], none below 0; x is about weights @ decoder + bias.

    Raises:
        ValueError: shapes do not go together, or a count is below 0.
    """
    if x.dim() != 2 or decoder.dim() != 2 or x.shape[1] != decoder.shape[1] or bias.shape != (x.shape[1],):
        raise ValueError(
            f"x, decoder, bias: {list(x.shape)}, {list(decoder.shape)} and {list(bias.shape)} were given; give "
            f"[rows, channels], [latents, channels] and [channels]."
        )
    wanted = torch.as_tensor(counts, device=x.device).expand(len(x))
    if len(x) and int(wanted.min()) < 0:
        raise ValueError(f"counts: {int(wanted.min())} was given; give 0 or more.")
    signal = x.to(decoder.dtype) - bias
    weights = signal.new_zeros(len(x), len(decoder))
    for turn in range(int(wanted.max()) if len(x) else 0):
        at = (wanted > turn).nonzero()[:, 0]
        held = weights[at]
        residual = signal[at] - held @ decoder
        gradient = residual @ decoder.T
        support = held != 0
        support.scatter_(1, gradient.argmax(1, keepdim=True), True)
        gradient = torch.where(support, gradient, gradient.new_zeros(()))
        change = gradient @ decoder
        step = (change * residual).sum(1) / change.square().sum(1).clamp_min(torch.finfo(change.dtype).tiny)
        weights[at] = (held + step[:, None] * gradient).relu()
    return weights
