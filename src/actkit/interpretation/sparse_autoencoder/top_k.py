"""Sparse autoencoders that count: the k largest latents of a row, or of a batch; formulas in `autoencoder.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder
from actkit.interpretation.sparse_autoencoder.gates import JumpReLUAutoencoder
from actkit.kernels import chosen_products, chosen_sum, largest_of_rows


class TopKAutoencoder(SparseAutoencoder):
    """The k largest latents of each row, with gradients that are as sparse.

    Args:
        channels: of what is encoded.
        latents: how many there are.
        k: that are not 0 in a row, at most.
        centred: take the decoder's bias off before encoding.
        auxiliary: weight of the auxiliary loss in training; 0 for none.
        dead_after: rows without firing after which a latent counts as dead.
    """

    kind = "topk"

    def __init__(
        self,
        channels: int,
        latents: int,
        k: int = 32,
        *,
        centred: bool = True,
        auxiliary: float = 1 / 32,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(channels, latents, centred=centred, sparsity=0.0)
        if not 1 <= k <= latents:
            raise ValueError(f"k: {k} was given; give 1 to {latents}, the number of latents.")
        self.k, self.auxiliary, self.dead_after = k, auxiliary, dead_after

    def code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode rows without a dense code.

        Args:
            x: [rows, channels].

        Returns:
            Which latents, int64 [rows, k], and their values [rows, k], of which some may be 0.
        """
        return self._code(x)[:2]

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents [..., latents] of x; their gradients are dense, those of `forward` are not.

        Args:
            x: [..., channels].
        """
        indices, values = self.code(x.flatten(0, -2) if x.dim() > 1 else x[None])
        dense = values.new_zeros(len(values), self.latents).scatter(1, indices, values)
        return dense.view(*x.shape[:-1], self.latents)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x, in its dtype.

        Args:
            x: [..., channels].
        """
        indices, values = self.code(x.flatten(0, -2) if x.dim() > 1 else x[None])
        return (chosen_sum(indices, values, self.decoder) + self.decoder_bias).view(x.shape).to(x.dtype)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """See `SparseAutoencoder.losses`; shares of the variance of the rows."""
        indices, values, pre = self._code(x)
        if self.training:
            with torch.no_grad():
                self.silent += len(x)
                self.silent[indices[values > 0]] = 0
        residual = x - chosen_sum(indices, values, self.decoder) - self.decoder_bias
        variance = (x - x.mean(0)).square().sum()
        found = {"error": residual.square().sum() / variance}
        if self.auxiliary:
            auxiliary = self._auxiliary(x, residual, pre, self.dead_after, positive=True)
            found["auxiliary"] = self.auxiliary * auxiliary / variance
        return found

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = self._input(x)
        with torch.no_grad():
            pre = torch.addmm(self.encoder_bias, given, self.encoder.T)
            indices = largest_of_rows(pre, self.k)
        values = chosen_products(given, self.encoder, indices) + self.encoder_bias[indices]
        return indices, values.relu(), pre


class BatchTopKAutoencoder(SparseAutoencoder):
    """The k largest latents per row of a whole batch, in training; afterwards those above one threshold.

    Args:
        channels: of what is encoded.
        latents: how many there are.
        k: that are not 0 in a row, on average.
        centred: take the decoder's bias off before encoding.
        auxiliary: weight of the auxiliary loss in training; 0 for none.
        dead_after: rows without firing after which a latent counts as dead.
        rate: at which the threshold follows the least latent of a batch.
    """

    kind = "batchtopk"

    def __init__(
        self,
        channels: int,
        latents: int,
        k: float = 32,
        *,
        centred: bool = True,
        auxiliary: float = 1.0,
        dead_after: int = 1_000_000,
        rate: float = 0.01,
    ) -> None:
        super().__init__(channels, latents, centred=centred, sparsity=0.0)
        if not 0 < k <= latents:
            raise ValueError(f"k: {k} was given; give a number above 0, and at most {latents}, the number of latents.")
        self.k, self.auxiliary, self.dead_after, self.rate = k, auxiliary, dead_after, rate
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))

    def encode(self, x: Tensor) -> Tensor:
        """See `SparseAutoencoder.encode`: by batches in training mode, by the threshold in evaluation mode."""
        return self._largest(self.preactivations(x))

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """See `SparseAutoencoder.losses`."""
        pre = self.preactivations(x)
        if self.training:
            kept, places = self._kept(pre)
            latents = self._placed(pre, kept, places)
            self._follow(len(x), kept.detach(), places)
        else:
            latents = self._largest(pre)
        found, residual = self._errors(x, latents)
        if self.auxiliary:
            auxiliary = self._auxiliary(x, residual, pre, self.dead_after, positive=False)
            found["auxiliary"] = self.auxiliary * auxiliary / len(x)
        return found

    def finished(self) -> JumpReLUAutoencoder:
        """Return the same as a JumpReLU autoencoder, which is what others read."""
        made = JumpReLUAutoencoder(self.channels, self.latents, centred=self.centred)
        made = made.to(self.decoder.device, self.decoder.dtype)
        own = self.state_dict()
        own["threshold"] = own["threshold"].to(self.decoder.dtype).expand(self.latents)
        made.load_state_dict(own)
        made.site, made.model = self.site, self.model
        return made.train(self.training)

    def _errors(self, x: Tensor, latents: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        residual = x - self.decode(latents)
        return {"error": residual.square().sum(1).mean()}, residual

    def _largest(self, pre: Tensor) -> Tensor:
        return self._placed(pre, *self._kept(pre)) if self.training else pre * (pre > self.threshold)

    def _kept(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """The largest values of a batch, not below 0, and their places."""
        kept = pre.relu().flatten().topk(int(self.k * pre.shape[:-1].numel()), sorted=False)
        return kept.values, kept.indices

    def _placed(self, pre: Tensor, kept: Tensor, places: Tensor) -> Tensor:
        return pre.new_zeros(pre.numel()).scatter(0, places, kept).view(pre.shape)

    @torch.no_grad()
    def _follow(self, rows: int, kept: Tensor, places: Tensor) -> None:
        """What fired, and the threshold behind the least of it."""
        above = kept > 0
        self.silent += rows
        self.silent[places[above] % self.latents] = 0
        if bool(above.any()):
            self.threshold += self.rate * (kept[above].min().double() - self.threshold)

    def _scaled(self) -> list[Tensor]:
        return [*super()._scaled(), self.threshold]


class MatryoshkaAutoencoder(BatchTopKAutoencoder):
    """A `BatchTopKAutoencoder` whose first latents are also an autoencoder by themselves.

    Args:
        channels: of what is encoded.
        latents: how many there are.
        k: as in `BatchTopKAutoencoder`.
        widths: the numbers of first latents; None: an eighth, a quarter and a half of all.
        settings: as in `BatchTopKAutoencoder`.
    """

    kind = "matryoshka"

    def __init__(
        self, channels: int, latents: int, k: float = 32, *, widths: tuple[int, ...] | None = None, **settings: Any
    ) -> None:
        super().__init__(channels, latents, k, **settings)
        found = tuple(max(1, latents // part) for part in (8, 4, 2)) if widths is None else tuple(widths)
        if list(found) != sorted(set(found)) or not found or not 1 <= found[0] <= found[-1] <= latents:
            raise ValueError(f"widths: {widths} was given; give rising numbers of latents, 1 to {latents}.")
        self.widths = found

    def _errors(self, x: Tensor, latents: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        found: dict[str, Tensor] = {}
        decoded: Tensor = self.decoder_bias
        before = 0
        for width in dict.fromkeys((*self.widths, self.latents)):
            decoded = decoded + latents[:, before:width] @ self.decoder[before:width]
            before = width
            name = "error" if width == self.latents else f"error of {width}"
            found[name] = (x - decoded).square().sum(1).mean()
        return found, x - decoded
