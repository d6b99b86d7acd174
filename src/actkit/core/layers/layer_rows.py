"""The inputs of a linear layer or convolution as rows, which its weight is multiplied with as a matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what the weight of a layer is multiplied with.

    Args:
        layer: a Linear, transformers' Conv1D, a Conv1d or a Conv2d.
        x: that it was called on.

    Returns:
        [groups, rows, inputs]; one group but for convolutions with more, rows are positions there.
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    flat = isinstance(layer, nn.Conv1d)
    size, stride, dilation = (_pair(each, flat) for each in (layer.kernel_size, layer.stride, layer.dilation))
    x = x if x.dim() == (3 if flat else 4) else x[None]  # without a batch dimension
    x = x.unsqueeze(-2) if flat else x
    padding: list[int] = []
    for place in (1, 0):  # F.pad begins with the last dimension
        total = dilation[place] * (size[place] - 1)
        if layer.padding == "same":
            padding += [total // 2, total - total // 2]
        elif layer.padding != "valid":
            padding += [_pair(layer.padding, flat, 0)[place]] * 2
    if any(padding):
        x = F.pad(x, padding, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for place in (0, 1):  # windows as views: [batch, channels, height, width, size, size]
        span = dilation[place] * (size[place] - 1) + 1
        x = x.unfold(2 + place, span, stride[place])[..., :: dilation[place]]
    windows, inputs = x.unflatten(1, (layer.groups, -1)), layer.in_channels // layer.groups * size[0] * size[1]
    if stride[1] < size[1]:  # neighbours overlap: each entry of the kernel is copied along the positions, not by itself
        return windows.permute(1, 2, 5, 6, 0, 3, 4).reshape(layer.groups, inputs, -1).mT
    return windows.permute(1, 0, 3, 4, 2, 5, 6).reshape(layer.groups, -1, inputs)


def _pair(value: Any, flat: bool, filling: int = 1) -> tuple[int, int]:
    """Both dimensions of a setting; those of a Conv1d have one."""
    return (filling, int(value[0])) if flat else (int(value[0]), int(value[1]))
