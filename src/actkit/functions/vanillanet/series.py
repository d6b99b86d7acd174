"""A series of shifted activations on images, from VanillaNet (2023, arXiv:2305.12972).

    series(x)[h, w, c] = sum_{i,j=-n..n} a[i, j, c] f(x[h+i, w+j, c])

A depthwise convolution of (2n+1) x (2n+1) behind the activation, then a batch norm: the activation of a place also sees
its neighbours. What comes before it (another batch norm) shifts the functions against each other.

When to use it: in shallow convolutional nets, which lack nonlinearity. It is not element-wise: whoever counts zeros or
reads single units has to look at f's outputs. For rows of features there is PanGu-pi's series.
Cost: (2n+1)^2 multiplications per value, 49 at n = 3; the batch norm is folded into the kernel by `fuse()`.
Settled here: as in the release, f is ReLU and the kernels are drawn with a deviation of 0.02, the batch norm's eps is
1e-6, and borders are padded with 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.layers.activation_function import Axis
from actkit.core.layers.activations import Activation
from actkit.core.layers.batch_norm import batch_norm_factors
from actkit.functions.vanillanet.folding import EPS


class SeriesActivation2d(nn.Module):
    """f, a depthwise convolution, a batch norm: [batch, channels, height, width] -> the same shape.

    Args:
        channels: of the images.
        order: n; the kernel is 2n + 1 wide.
        act: f, the name of an element-wise function.
        fused: without a batch norm, but with a bias: what `fuse()` makes.

    Raises:
        ValueError: channels below 1, or an order below 0.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ("positions",)
    weight_decay: ClassVar[bool] = False

    def __init__(self, channels: int, order: int = 3, act: str = "relu", fused: bool = False) -> None:
        super().__init__()
        if channels < 1 or order < 0:
            raise ValueError(f"channels, order: {channels} and {order} were given; give 1 or more, and 0 or more.")
        self.channels, self.order, self.fused = channels, order, fused
        self.act = Activation(act)
        width = 2 * order + 1
        self.weight = nn.Parameter(torch.empty(channels, 1, width, width))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(channels)) if fused else None
        self.norm = nn.Identity() if fused else nn.BatchNorm2d(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x [batch, channels, height, width]."""
        y = F.conv2d(self.act(x), self.weight, self.bias, padding=self.order, groups=self.channels)
        normalised: Tensor = self.norm(y)
        return normalised

    def fuse(self) -> SeriesActivation2d:
        """Return one that computes the same, its batch norm in the kernel.

        Raises:
            ValueError: it is in training mode, in which a batch norm reads the batch.
        """
        fused = SeriesActivation2d(self.channels, self.order, self.act.name, fused=True).to(self.weight)
        fused.train(self.training)
        with torch.no_grad():
            if isinstance(self.norm, nn.BatchNorm2d):
                factor, shift = batch_norm_factors(self.norm)
                fused.weight.copy_(self.weight.double() * factor[:, None, None, None])
                assert fused.bias is not None
                fused.bias.copy_(shift)
            else:
                fused.load_state_dict(self.state_dict())
        return fused

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {"channels": self.channels, "order": self.order, "act": self.act.name, "fused": self.fused}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> SeriesActivation2d:
        """Make it from what `spec()` gave, in the dtype of what stands in its place if that has one."""
        first = None if original is None else next(original.parameters(), None)
        return cls(**spec) if first is None else cls(**spec).to(first.dtype)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, order={self.order}"
