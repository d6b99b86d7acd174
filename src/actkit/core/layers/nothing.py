"""Modules that stand where something was taken out: one that gives what it gets, and one that gives zeros.

PassThrough(x) = x        where a norm stood that was folded into what reads it
Nothing(x)     = 0        where an MLP stood whose output is added to the residual stream
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class PassThrough(nn.Module):
    """x: any shape -> the same tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them: none."""
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> PassThrough:
        """Make one."""
        return cls()


class Nothing(nn.Module):
    """Zeros: any shape -> the same shape. An MLP of this class has no layers to read."""

    linear_inputs: ClassVar[tuple[tuple[str | None, tuple[str, ...]], ...]] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros like x."""
        return torch.zeros_like(x)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them: none."""
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Nothing:
        """Make one."""
        return cls()
