"""Which dimension of a tensor holds the channels, followed through one forward pass.

Linear and embedding layers put the channels last, convolutions and whatever works on images into dimension 1. What
keeps the shape keeps the dimension, transposing moves it, and reshaping keeps it if the dimensions before or behind
stay as they are. Of any other tensor the dimension is not known, and nothing is guessed from its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from actkit.core.layers.conv import ActConv
from actkit.core.layers.conv1d import is_conv1d
from actkit.core.layers.linear import ActLinear

LAST, FIRST = -1, 1  # of functions and layers whose channels are known
_LAST = frozenset(["linear", "embedding", "embedding_bag", "layer_norm", "rms_norm"])
_FIRST = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("batch_norm", "instance_norm", "group_norm"),
)
_LOST = frozenset(["matmul", "bmm", "mm", "einsum", "tensordot", "baddbmm", "scaled_dot_product_attention", "__get"])
_SLICES = frozenset(["chunk", "split", "tensor_split", "narrow", "cat", "concat", "pad", "interpolate", "index_select"])
_CLASSES_FIRST = (
    *(
        ActConv,
        nn.modules.conv._ConvNd,
        nn.modules.batchnorm._BatchNorm,
        nn.modules.instancenorm._InstanceNorm,
        nn.GroupNorm,
    ),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd),
    *(nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.dropout.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Upsample),
)
_CLASSES_LAST = (nn.Linear, nn.Embedding, ActLinear)


def axis_of_class(module: nn.Module) -> int | None:
    """Return 1 or -1 if every instance of the class has its channels there, at input and output; else None."""
    if isinstance(module, _CLASSES_FIRST):
        return FIRST
    one = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
    last = isinstance(module, _CLASSES_LAST) or is_conv1d(module)
    return LAST if one or last or "RMSNorm" in type(module).__name__ else None


class ChannelAxes:
    """The channel dimension of each tensor that is known, from 0. Functions are named without trailing underscores."""

    def __init__(self) -> None:
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, x: Tensor) -> int | None:
        """Return the dimension, or None if it is not known."""
        return self._of.get(x)

    def give(self, x: Tensor, axis: int | None) -> None:
        """Say which dimension it is; a negative one counts from the end."""
        if axis is not None and -x.dim() <= axis < x.dim():
            self._of[x] = axis % x.dim()

    def follow(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Find the channels of what a torch function gave.

        Args:
            name: of the function, without trailing underscores.
            args: positional, as it was called.
            kwargs: by keyword.
            result: what it returned.
        """
        tensors = [x for x in _flat(args) if isinstance(x, Tensor)]
        for found in _flat((result,)):
            if not isinstance(found, Tensor) or found in self._of or not found.is_floating_point():
                continue
            if name in _LAST:
                self.give(found, LAST)
            elif name.removeprefix("torch_") in _FIRST:
                self.give(found, FIRST)
            else:
                axes = {self._moved(name, args, kwargs, x, found) for x in tensors if x in self._of and x is not found}
                if len(axes) == 1:
                    self.give(found, axes.pop())

    def _moved(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, y: Tensor) -> int | None:
        """Where the channels of x are in y, which came from it; None if that is not known."""
        axis = self._of[x]
        if name in _LOST:
            return None
        if name in ("transpose", "swapaxes", "swapdims", "permute"):
            return _permuted(name, args, kwargs, axis, x.dim())
        if name in ("view", "reshape", "flatten", "unflatten", "contiguous", "unsqueeze", "squeeze"):
            if x.shape[axis + 1 :] == y.shape[y.dim() - x.dim() + axis + 1 :] and axis == x.dim() - 1:
                return LAST if x.shape[-1] == y.shape[-1] else None
            return axis if x.shape[: axis + 1] == y.shape[: axis + 1] else None
        if x.dim() != y.dim():
            return None
        if name == "__getitem":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return axis if all(isinstance(each, slice) or each is Ellipsis for each in index) else None
        same = all(a in (b, 1) for a, b in zip(x.shape, y.shape))  # also one that was broadcast
        return axis if same or name in _SLICES or "pool" in name else None


def _permuted(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], axis: int, dimensions: int) -> int | None:
    given = [*args[1:], *kwargs.values()]
    if name == "permute":
        order = given[0] if len(given) == 1 and isinstance(given[0], Sequence) else given
    else:
        order = list(range(dimensions))
        one, other = (each % dimensions for each in given)
        order[one], order[other] = other, one
    return next((new for new, old in enumerate(order) if old % dimensions == axis), None)


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _flat(value) if isinstance(value, tuple | list) else [value]
    return found
