"""Narrower copies of layers: some of their outputs and inputs, the same class.

A size alone, as a checkpoint keeps it, gives a layer of that size without values, which come from the weights file.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from actkit.core.ground.errors import EditError
from actkit.core.layers.conv1d import is_conv1d
from actkit.core.layers.known_layers import why_unread
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import DenseWeight

Kept = Tensor | int | None  # the indices that stay, int64 [n]; how many; None for all


def resized(path: str, module: nn.Module, outputs: Kept = None, inputs: Kept = None) -> nn.Module:
    """Return a copy of a layer with fewer outputs or inputs; the layer itself stays as it is.

    Args:
        path: of the layer, for errors.
        module: nn.Linear, transformers' Conv1D, or an ActLinear whose slots are empty.
        outputs: which stay, in their new order, or how many.
        inputs: the same.

    Raises:
        EditError: the layer is of another class, a slot is filled, or an index is out of range or there twice.
    """
    if isinstance(module, ActLinear):
        if module.filled_slots:
            raise EditError(
                f"resize {path}: its {', '.join(module.filled_slots)} slot is filled already, and belongs to the width "
                f"that the layer has. Prune first, and apply the rest after."
            )
        stored = DenseWeight(_part(path, module.storage.dequantize(), outputs, inputs))
        return ActLinear(stored, _part_of_bias(path, module.bias, outputs)).train(module.training)
    transposed = is_conv1d(module)
    if not (isinstance(module, nn.Linear) or transposed) or why_unread(module) is not None:
        reason = why_unread(module)
        raise EditError(
            f"resize {path}: a {type(module).__name__} stands here{'' if reason is None else f', and {reason}'}; "
            f"allowed are nn.Linear, Conv1D and an ActLinear without filled slots. Leave it out."
        )
    narrower = copy.copy(module)
    narrower._parameters = dict(module._parameters)
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    narrower.weight = _part(path, weight, rows, columns)
    narrower.bias = _part_of_bias(path, module.bias, outputs)  # type: ignore[arg-type, assignment]
    sizes = ("nx", "nf") if transposed else ("out_features", "in_features")
    for name, size in zip(sizes, narrower.weight.shape, strict=True):
        setattr(narrower, name, size)
    return narrower


def _part(path: str, weight: Tensor, rows: Kept, columns: Kept) -> nn.Parameter:
    """Some rows and columns of a weight."""
    found = weight.detach()
    for axis, kept in enumerate((rows, columns)):
        found = _along(path, found, axis, kept)
    found = found.clone() if found is weight or found.data_ptr() == weight.data_ptr() else found
    return nn.Parameter(found.contiguous(), requires_grad=weight.requires_grad)


def _part_of_bias(path: str, bias: Tensor | None, kept: Kept) -> nn.Parameter | None:
    if bias is None:
        return None
    found = _along(path, bias.detach(), 0, kept)
    return nn.Parameter(found.clone() if kept is None else found, requires_grad=bias.requires_grad)


def _along(path: str, values: Tensor, axis: int, kept: Kept) -> Tensor:
    if kept is None:
        return values
    size = values.shape[axis]
    if isinstance(kept, int):
        return values.new_empty([kept if at == axis else length for at, length in enumerate(values.shape)])
    distinct = len(torch.unique(kept)) == len(kept)
    if (
        kept.dim() != 1
        or kept.is_floating_point()
        or not len(kept)
        or not distinct
        or not 0 <= kept.min() <= kept.max() < size
    ):
        raise EditError(
            f"resize {path}: the indices {kept.tolist()[:8]} were given; give some of 0 to {size - 1}, each once."
        )
    return values.index_select(axis, kept.to(values.device))
