"""Exact rewrites around a linear layer: a scale moved from its inputs into whatever produces them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.layers.keeps_dtype import KeepsDtype


class ScaledActivation(KeepsDtype):
    """act(x) / scale: lets a scale pass a nonlinearity that does not commute with it.

    Args:
        activation: act.
        scale: [channels]; kept in float32.
    """

    scale: Tensor

    def __init__(self, activation: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("scale", scale.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels] -> the same shape."""
        return (self.activation(x) / self.scale).to(x.dtype)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"channels": self.scale.numel()}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> ScaledActivation:
        """The module that `spec` described; its values come from the checkpoint."""
        return cls(original, torch.ones(spec["channels"]))
