"""ActConv: a convolution whose weight is stored as that of a changed linear layer is, y = conv(x, W) + bias.

The weight slot is the same `WeightStorage` as of `ActLinear`, of the kernel laid out flat: [out, in / groups x kernel].
It computes in plain torch with what `dequantize` gives.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground import registry
from actkit.core.ground.errors import CoverageError
from actkit.core.layers.known_layers import hooks_of
from actkit.core.layers.weights import DenseWeight, WeightStorage

PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


class ActConv(nn.Module):
    """A convolution over one or two dimensions with a stored weight.

    Args:
        weight: [out_channels, in_channels / groups * kernel].
        bias: [out_channels], or None.
        settings: as those of torch's convolutions: in_channels, out_channels, kernel_size, stride, padding, dilation,
            groups. Sizes are tuples with one number per dimension; padding may be 'same' or 'valid'.

    Shapes: [batch, in_channels, ...] -> [batch, out_channels, ...], as torch.nn.Conv1d and Conv2d.

    Raises:
        ValueError: the weight or the bias does not fit the settings.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    def __init__(self, weight: WeightStorage, bias: Tensor | None, **settings: Any) -> None:
        super().__init__()
        for name in SETTINGS:
            value = settings[name]
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        flat = (self.out_channels, self.in_channels // self.groups * prod(self.kernel_size))
        if tuple(weight.shape) != flat:
            raise ValueError(f"weight: {tuple(weight.shape)} was given, the layer has {flat}.")
        if bias is not None and bias.shape != (self.out_channels,):
            raise ValueError(f"bias: it has shape {tuple(bias.shape)}, the layer {self.out_channels} outputs.")
        self.storage = weight
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, convolution: nn.Module, *, weight: WeightStorage | None = None) -> ActConv:
        """A changed copy of a convolution; a dense weight and the bias are shared with the source, not copied.

        Args:
            convolution: nn.Conv1d, nn.Conv2d or ActConv.
            weight: None keeps the one that is there.

        Raises:
            CoverageError: it may compute something else than its weight says.
            ValueError: the weight does not fit it.
        """
        reason = why_no_plain_convolution(convolution)
        if reason is not None:
            raise CoverageError(f"convolution: it is not changed, as {reason}. Leave it out.")
        module: Any = convolution
        if weight is None:
            weight = module.storage if isinstance(module, ActConv) else DenseWeight(module.weight.flatten(1))
        settings = {name: getattr(module, name) for name in SETTINGS}
        return cls(weight, module.bias, **settings).train(module.training)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in / groups, *kernel], in the layer's dtype."""
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return self.storage.dequantize().reshape(shape)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weight takes in storage."""
        return self.storage.nbytes

    def forward(self, x: Tensor) -> Tensor:
        convolve: Any = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        return convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def spec(self) -> dict[str, Any]:
        """The JSON arguments from which `from_spec` rebuilds the layer's structure."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
            "dtype": str(self.storage.dtype).removeprefix("torch."),
            "bias": None if self.bias is None else str(self.bias.dtype).removeprefix("torch."),
            "weight": self.storage.spec(),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> ActConv:
        """A layer of the right structure whose values come from a weights file."""
        dtype, stored = getattr(torch, spec["dtype"]), spec["weight"]
        shape = (spec["out_channels"], spec["in_channels"] // spec["groups"] * prod(spec["kernel_size"]))
        weight = registry.weight_class(stored["kind"]).from_spec(stored, shape, dtype)
        bias = None
        if spec["bias"] is not None:
            bias = nn.Parameter(torch.empty(shape[0], dtype=getattr(torch, spec["bias"])))
        return cls(weight, bias, **{name: spec[name] for name in SETTINGS})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in SETTINGS) + f", bias={self.bias is not None}"


def why_no_plain_convolution(module: nn.Module) -> str | None:
    """Why a module may compute something else than a convolution with its weight, or None."""
    if isinstance(module, ActConv):
        return None if type(module).forward is ActConv.forward else "it has a forward pass of its own"
    if type(module) not in PLAIN_CONVOLUTIONS:
        return f"a {type(module).__name__} is no plain Conv1d or Conv2d"
    if module.padding_mode != "zeros":
        return f"it pads by {module.padding_mode!r}, and only padding with zeros is known here"
    if "forward" in vars(module):
        return "its forward pass was replaced on the object"
    if type(module._parameters.get("weight")) is not nn.Parameter:
        return "its weight is no parameter of its own: it is computed (a parametrization, a hook), or kept elsewhere"
    if hooks_of(module):
        return f"it has a hook ({', '.join(hooks_of(module))})"
    return None
