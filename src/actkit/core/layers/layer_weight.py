"""What `layer.weight` answers if a layer is more than a stored matrix.

Much code reads the `weight` of a linear layer from outside: its dtype or device before the call, or the values, to
multiply by them itself (torch's fused encoder layer and multi-head attention do). The first must cost nothing, the
second must get the values that the layer multiplies by, and must not pass by what else the layer computes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from actkit.core.ground.errors import UnsupportedModelError

if TYPE_CHECKING:
    from actkit.core.layers.linear import ActLinear

GIVE_VALUES = frozenset(["T", "mT", "H", "mH", "data", "real", "imag"])  # attributes; the others describe the tensor
# fmt: off
DESCRIBE = frozenset([
    "__hash__", "__len__", "data_ptr", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "is_signed", "ndimension", "nelement", "numel", "size", "stride", "type",
])
# fmt: on


class LayerWeight(Tensor):
    """The weight [out, in] of an ActLinear, dequantized when it is computed with.

    Raises:
        UnsupportedModelError: it is computed with, and the layer also selects, rotates or rounds its inputs or adds a
            correction, which the result would leave out.
    """

    layer: ActLinear

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LayerWeight({tuple(self.shape)}, {self.dtype}, of {self.layer!r})"

    @staticmethod
    def of(layer: ActLinear) -> LayerWeight:
        """The weight of `layer`; holds one value until it is computed with."""
        stored = layer.storage
        device = next(tensor.device for tensor in (*stored.parameters(), *stored.buffers()))
        tracing = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
        with _disable_current_modes() if tracing else nullcontext():  # a traced tensor has a class of its own
            one = torch.empty((), dtype=stored.dtype, device=device)
            weight = one.expand(stored.shape).as_subclass(LayerWeight)
        weight.layer = layer
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else None
        with torch._C.DisableTorchFunctionSubclass():
            if name in DESCRIBE or (name == "__get__" and attribute not in GIVE_VALUES):
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map_only(
                LayerWeight, lambda weight: weight.values_for(attribute or name), (args, kwargs)
            )
            return func(*args, **(kwargs or {}))

    def values_for(self, reader: str) -> Tensor:
        """The values [out, in], for the function or attribute `reader`."""
        layer = self.layer
        if layer.other_slots:
            more = " and ".join(layer.other_slots.values())
            raise UnsupportedModelError(
                f"weight: {reader} was called with the weight of a layer [{layer.out_features}, {layer.in_features}] "
                f"that also {more}, which the result would leave out. Call the layer itself; for the values alone "
                f"read layer.dequantized(). If a model's own code does this, leave the layer out of the recipe."
            )
        return layer.dequantized()
