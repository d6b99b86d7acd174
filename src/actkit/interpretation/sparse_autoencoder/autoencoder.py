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

from typing import Any, ClassVar

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
        return self._input(x) @ self.encoder.T + self.encoder_bias

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
        return latents @ self.decoder + self.decoder_bias

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
        self._count(latents > 0)
        penalty = (latents * self.decoder.norm(dim=1)).sum(1).mean()
        return {"error": self._error(x, latents), "sparsity": self.sparsity * self.ramp * penalty}

    def constrain_gradients(self) -> None:
        """Take from the decoder's gradients what would only change the norm of its rows."""
        if self.decoder.grad is not None:
            self.decoder.grad -= (self.decoder.grad * self.decoder).sum(1, keepdim=True) * self.decoder

    @torch.no_grad()
    def constrain(self) -> None:
        """Give the decoder's rows the norm 1 again, after a step."""
        self.decoder /= self.decoder.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.decoder.dtype).eps)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Make of an autoencoder of factor * x one of x; rows of the decoder keep their norm.

        Args:
            factor: above 0.
        """
        for each in self._scaled():
            each /= factor

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
    def _count(self, fired: Tensor) -> None:
        """fired: bool [rows, latents]."""
        if self.training:
            self.silent += len(fired)
            self.silent[fired.any(0)] = 0

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


class JumpReLUAutoencoder(SparseAutoencoder):
    """What exceeds a threshold of its own.

    Args:
        channels: of what is encoded.
        latents: how many there are.
        centred: take the decoder's bias off before encoding.
        sparsity: weight of the penalty in training.
        target: number of latents that the penalty pulls to; None: as few as possible.
        threshold: all thresholds at the start.
        bandwidth: around a threshold, in which it is given a gradient.
    """

    kind = "jumprelu"

    def __init__(
        self,
        channels: int,
        latents: int,
        *,
        centred: bool = False,
        sparsity: float = 1.0,
        target: float | None = None,
        threshold: float = 0.01,
        bandwidth: float = 0.05,
    ) -> None:
        super().__init__(channels, latents, centred=centred, sparsity=sparsity)
        if threshold < 0 or bandwidth <= 0 or (target is not None and target <= 0):
            raise ValueError(
                f"threshold, bandwidth, target: {threshold}, {bandwidth} and {target} were given; give 0 or more, and "
                f"above 0."
            )
        self.target, self.bandwidth = target, bandwidth
        self.threshold = nn.Parameter(torch.full((latents,), float(threshold)))

    def encode(self, x: Tensor) -> Tensor:
        """See `SparseAutoencoder.encode`."""
        return _Jump.apply(self.preactivations(x), self.threshold, self.bandwidth)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """See `SparseAutoencoder.losses`."""
        pre = self.preactivations(x)
        latents = _Jump.apply(pre, self.threshold, self.bandwidth)
        self._count(latents > 0)
        count = _Step.apply(pre, self.threshold, self.bandwidth).sum(1).mean()
        penalty = count if self.target is None else (count / self.target - 1).square()
        return {"error": self._error(x, latents), "sparsity": self.sparsity * self.ramp * penalty}

    @torch.no_grad()
    def constrain(self) -> None:
        """See `SparseAutoencoder.constrain`; thresholds stay at 0 or above."""
        super().constrain()
        self.threshold.clamp_(min=0)

    def _scaled(self) -> list[Tensor]:
        return [*super()._scaled(), self.threshold]


class GatedAutoencoder(SparseAutoencoder):
    """Which latents are on, and how much, by two heads of one encoder.

    Args:
        channels: of what is encoded.
        latents: how many there are.
        centred: take the decoder's bias off before encoding.
        sparsity: weight of the penalty in training.
    """

    kind = "gated"

    def __init__(self, channels: int, latents: int, *, centred: bool = True, sparsity: float = 5.0) -> None:
        super().__init__(channels, latents, centred=centred, sparsity=sparsity)
        self.log_scale = nn.Parameter(torch.zeros(latents))  # of the magnitudes
        self.magnitude_bias = nn.Parameter(torch.zeros(latents))

    def encode(self, x: Tensor) -> Tensor:
        """See `SparseAutoencoder.encode`."""
        return self._latents(self._input(x) @ self.encoder.T)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """See `SparseAutoencoder.losses`."""
        products = self._input(x) @ self.encoder.T
        latents = self._latents(products)
        self._count(latents > 0)
        gate = (products + self.encoder_bias).relu()
        by_gate = gate @ self.decoder.detach() + self.decoder_bias.detach()
        return {
            "error": self._error(x, latents),
            "sparsity": self.sparsity * self.ramp * gate.sum(1).mean(),
            "auxiliary": (x - by_gate).square().sum(1).mean(),
        }

    def _latents(self, products: Tensor) -> Tensor:
        open_ = products + self.encoder_bias > 0
        return open_ * (self.log_scale.exp() * products + self.magnitude_bias).relu()

    def _scaled(self) -> list[Tensor]:
        return [*super()._scaled(), self.magnitude_bias]


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
        latents = self._largest(pre)
        self._count(latents > 0)
        if self.training:
            with torch.no_grad():
                least = latents[latents > 0].min() if bool((latents > 0).any()) else None
                if least is not None:
                    self.threshold += self.rate * (least.double() - self.threshold)
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
        if not self.training:
            return pre * (pre > self.threshold)
        values = pre.relu().flatten()
        count = int(self.k * pre.shape[:-1].numel())
        kept = values.topk(count, sorted=False)
        return torch.zeros_like(values).scatter(0, kept.indices, kept.values).view(pre.shape)

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
        decoded, before = self.decoder_bias, 0
        for width in dict.fromkeys((*self.widths, self.latents)):
            decoded = decoded + latents[:, before:width] @ self.decoder[before:width]
            before = width
            name = "error" if width == self.latents else f"error of {width}"
            found[name] = (x - decoded).square().sum(1).mean()
        return found, x - decoded


class _Jump(torch.autograd.Function):
    """p [p > theta], with a straight-through gradient for theta."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        near = _near(pre, threshold, ctx.bandwidth)
        of_threshold = -(threshold / ctx.bandwidth * near * grad).view(-1, len(threshold)).sum(0)
        return (pre > threshold) * grad, of_threshold, None


class _Step(torch.autograd.Function):
    """[p > theta], with a straight-through gradient for theta alone."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        near = _near(pre, threshold, ctx.bandwidth)
        return None, -(near * grad / ctx.bandwidth).view(-1, len(threshold)).sum(0), None


def _near(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


KINDS: dict[str, type[SparseAutoencoder]] = {
    cls.kind: cls
    for cls in (
        SparseAutoencoder,
        TopKAutoencoder,
        JumpReLUAutoencoder,
        GatedAutoencoder,
        BatchTopKAutoencoder,
        MatryoshkaAutoencoder,
    )
}
