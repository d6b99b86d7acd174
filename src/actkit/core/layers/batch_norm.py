"""A batch norm in evaluation mode is a factor and a shift for each channel, and goes into the layer beside it.

    norm(x)            = s x + t,                       s = gamma / sqrt(var + eps),   t = beta - mean s
    norm(W x + b)      = (s W) x + (s b + t)            behind a layer
    W norm(x) + b      = (W diag(s)) x + (W t + b)      in front of one

In float64; the caller rounds once. W is [out, in] or a kernel [out, in, ...].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def batch_norm_factors(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the factor s and the shift t that a batch norm is in evaluation mode, float64 [channels].

    Args:
        norm: a batch norm with running statistics.

    Raises:
        ValueError: it is in training mode, or keeps no statistics.
    """
    found: Any = norm
    if norm.training or found.running_mean is None:
        raise ValueError(
            "norm: a batch norm in training mode, or without running statistics, reads the batch and cannot be folded; "
            "call model.eval() first."
        )
    gamma = torch.ones_like(found.running_var) if found.weight is None else found.weight.detach()
    beta = torch.zeros_like(found.running_mean) if found.bias is None else found.bias.detach()
    factor = gamma.double() / (found.running_var.double() + found.eps).sqrt()
    return factor, beta.double() - found.running_mean.double() * factor


def norm_behind(norm: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the layer in front of it.

    Args:
        norm: reads what the layer gives.
        weight: of the layer, [out, in, ...].
        bias: [out], or None.

    Returns:
        Weight and bias of the one layer, float64.

    Raises:
        ValueError: as `batch_norm_factors`.
    """
    factor, shift = batch_norm_factors(norm)
    folded = weight.detach().double() * factor.view(-1, *[1] * (weight.dim() - 1))
    return folded, shift if bias is None else bias.detach().double() * factor + shift


def norm_in_front(norm: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the linear layer that reads what it gives.

    Args:
        norm: in front of the layer.
        weight: of the layer, [out, in].
        bias: [out], or None.

    Returns:
        Weight and bias of the one layer, float64.

    Raises:
        ValueError: as `batch_norm_factors`.
    """
    factor, shift = batch_norm_factors(norm)
    added = weight.detach().double() @ shift
    return weight.detach().double() * factor, added if bias is None else bias.detach().double() + added
