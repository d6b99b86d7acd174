"""Sparse autoencoders: an activation as a sum of few directions out of many.

    x ~ decode(a) = a D + b,    a = encode(x),    p = (x - b) E^T + c      (b is not taken off if `centred` is False)
    standard   a = relu(p)                       loss |x - decode(a)|^2 + l sum |a|
    topk       a = the k largest of relu(p)      loss FVU + auxiliary
    batchtopk  the k rows largest of a batch     loss |x - decode(a)|^2 + auxiliary       afterwards a = p [p > theta]
    matryoshka the same                          the same for each of some widths, of the first latents alone
    jumprelu   a = p [p > theta]                 loss |x - decode(a)|^2 + l L0, or l (L0 / target - 1)^2
    gated      a = [p > 0] relu(exp(r) (p - c) + m)
                                                 loss |x - decode(a)|^2 + l |relu(p)| + |x - stopped decode(relu(p))|^2
    auxiliary = share |x - decode(a) - a_dead D|^2, of the channels / 2 largest latents that have not fired for long

Papers: Gao et al. 2024 (arXiv:2406.04093, topk), Rajamanoharan et al. 2024 (arXiv:2407.14435, jumprelu;
arXiv:2404.16014, gated), Bussmann et al. (arXiv:2412.06410, batchtopk; arXiv:2503.17547, matryoshka); the losses as in
dictionary_learning and sparsify, those of batchtopk and matryoshka as in SAELens 6.

When to use it: to read an activation as features (`train_autoencoder` trains one, `read_autoencoder` opens one of
others); topk first, as its number of latents needs no search.
Cost: the encoder's product forward; for topk nothing else is dense (`kernels/sparse_codes.py`).
Settled here: rows of D have norm 1 in training. The auxiliary loss predicts x - decode(a), without the bias (the sign
is the other one in older code). What fired is counted by values above 0. The straight-through gradient of theta is
taken at p, not behind the jump, where half of its window is lost; theta is trained as it is, not its logarithm, as in
SAELens 6.54.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.kernels import chosen_products, chosen_sum, largest_of_rows


class SparseAutoencoder(nn.Module):
    """What all kinds share, and the kind 'standard'.

    Args:
        channels: of what is encoded.
        latents: how many there are.
        centred: take the decoder's bias off before encoding.
        sparsity: weight of the penalty in training.
    """

    kind: ClassVar[str] = "standard"

    def __init__(self, channels: int, latents: int, *, centred: bool = True, sparsity: float = 5.0) -> None:
        super().__init__()
        if min(channels, latents) < 1:
            raise ValueError(f"channels, latents: {channels} and {latents} were given; give 1 or more of each.")
        self.channels, self.latents, self.centred, self.sparsity = channels, latents, centred, sparsity
        self.ramp = 1.0  # of the penalty, which a training lets grow from 0
        self.site: str | None = None  # that it was trained on
        self.model: str | None = None  # the fingerprint of the model
        directions = F.normalize(torch.randn(latents, channels), dim=1)
        self.encoder = nn.Parameter(directions.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(latents))
        self.decoder = nn.Parameter(directions)
        self.decoder_bias = nn.Parameter(torch.zeros(channels))
        self.silent: Tensor  # rows since each latent fired
        self.register_buffer("silent", torch.zeros(latents, dtype=torch.int64))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.channels}, {self.latents}, kind={self.kind!r}"

    def preactivations(self, x: Tensor) -> Tensor:
        """Multiply with the encoder.

        Args:
            x: [..., channels].

        Returns:
            p [..., latents].

        Raises:
            ValueError: x has another width.
        """
        return F.linear(self._input(x), self.encoder, self.encoder_bias)

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents [..., latents] of x, most of which are 0.

        Args:
            x: [..., channels].
        """
        return self.preactivations(x).relu()

    def decode(self, latents: Tensor) -> Tensor:
        """Return the sum of directions [..., channels].

        Args:
            latents: [..., latents].
        """
        return F.linear(latents, self.decoder.T, self.decoder_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x, in its dtype.

        Args:
            x: [..., channels].
        """
        return self.decode(self.encode(x)).to(x.dtype)

    # -- training

    def loss(self, x: Tensor) -> Tensor:
        """Return the sum of `losses`.

        Args:
            x: [rows, channels].
        """
        return torch.stack(list(self.losses(x).values())).sum()

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the parts of the training loss; in training mode, what fired is counted.

        Args:
            x: [rows, channels].

        Returns:
            Numbers by name.
        """
        latents = self.encode(x)
        self._count(latents)
        penalty = latents.mean(0) @ self.decoder.norm(dim=1)  # latents are not below 0
        return {"error": self._error(x, latents), "sparsity": self.sparsity * self.ramp * penalty}

    @torch.no_grad()  # else a gradient would hold its own graph, and no step's memory would be freed
    def constrain_gradients(self) -> None:
        """Take from the decoder's gradients what would only change the norm of its rows."""
        if self.decoder.grad is not None:
            self.decoder.grad -= (self.decoder.grad * self.decoder).sum(1, keepdim=True) * self.decoder

    @torch.no_grad()
    def constrain(self) -> None:
        """Give the decoder's rows the norm 1 again, after a step."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.decoder.dtype).eps))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Make of an autoencoder of factor * x one of x; rows of the decoder keep their norm.

        Args:
            factor: above 0.
        """
        for each in self._scaled():
            each.div_(factor)

    def finished(self) -> SparseAutoencoder:
        """Return what is kept after training: itself, if it encodes as it was trained."""
        return self

    def _scaled(self) -> list[Tensor]:
        return [self.encoder_bias, self.decoder_bias]

    def _input(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.channels:
            raise ValueError(
                f"x: it has {x.shape[-1]} channels, and the autoencoder is of {self.channels}; give activations of "
                f"{self.site or 'the site that it was trained on'}."
            )
        x = x.to(self.decoder.dtype)
        return x - self.decoder_bias if self.centred else x

    def _error(self, x: Tensor, latents: Tensor) -> Tensor:
        return (x - self.decode(latents)).square().sum(1).mean()

    @torch.no_grad()
    def _count(self, latents: Tensor) -> None:
        """latents: [rows, latents], which have fired above 0."""
        if self.training:
            self.silent += len(latents)
            self.silent[latents.amax(0) > 0] = 0

    def _auxiliary(self, x: Tensor, residual: Tensor, pre: Tensor, dead_after: int, positive: bool) -> Tensor:
        """The squared error of predicting the residual from dead latents, a sum; 0 if none is dead."""
        dead = (self.silent > dead_after).nonzero()[:, 0]
        if not self.training or not len(dead):
            return residual.new_zeros(())
        most = max(1, self.channels // 2)
        with torch.no_grad():
            indices = dead[largest_of_rows(pre.detach()[:, dead], min(most, len(dead)))]
        values = chosen_products(self._input(x), self.encoder, indices) + self.encoder_bias[indices]
        values = values.relu() if positive else values
        predicted = chosen_sum(indices, values, self.decoder)
        return min(len(dead) / most, 1.0) * (predicted - residual.detach()).square().sum()
