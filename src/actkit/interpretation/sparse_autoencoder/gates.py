"""Sparse autoencoders with gates: thresholds of their own, or a head that opens them; formulas in `autoencoder.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder


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
        self._count(latents)
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
        products = self._input(x) @ self.encoder.T
        return self._latents(products, products + self.encoder_bias)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """See `SparseAutoencoder.losses`."""
        products = self._input(x) @ self.encoder.T
        pre = products + self.encoder_bias
        latents, gate = self._latents(products, pre), pre.relu()
        self._count(latents)
        by_gate = gate @ self.decoder.detach() + self.decoder_bias.detach()
        return {
            "error": self._error(x, latents),
            "sparsity": self.sparsity * self.ramp * gate.sum(1).mean(),
            "auxiliary": (x - by_gate).square().sum(1).mean(),
        }

    def _latents(self, products: Tensor, pre: Tensor) -> Tensor:
        return (pre > 0) * (self.log_scale.exp() * products + self.magnitude_bias).relu()

    def _scaled(self) -> list[Tensor]:
        return [*super()._scaled(), self.magnitude_bias]


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
