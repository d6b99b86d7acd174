"""A factor per channel moved from a producer into the layers that read it, in place: the function stays.

producer's channel j times s_j,   W[:, j] of every consumer divided by s_j
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import EqualizationSet, Norm
from actkit.core.model.architectures import find_architecture, known_model_types
from actkit.core.model.parts import Linear


def check_family(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model whose norms and linear layers are not described."""
    if find_architecture(getattr(getattr(model, "config", None), "model_type", None)) is None:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} is of no known family; known are {', '.join(known_model_types())}."
        )


def changed_before(group: EqualizationSet) -> str | None:
    """Why actkit's own changes stand in the way, or None."""
    if any(isinstance(linear.module, ActLinear) for linear in group.consumers):
        return "actkit has changed its layers already; make the twin of the original model"
    return None


@torch.no_grad()
def move_scale(group: EqualizationSet, scale: Tensor, repeats: Tensor | None = None) -> None:
    """Multiply the producer's channels by a scale and divide the consumers' columns by it, in place.

    Computed in float32 and rounded once, to the dtype of each weight.

    Args:
        group: the producer and what reads it.
        scale: [channels].
        repeats: which channel each column reads, int64 [columns], if one channel is read by several (value heads shared
            by query heads); None if it is one each.
    """
    producer = group.producer
    assert isinstance(producer, Norm | Linear)
    if isinstance(producer, Norm):
        weight, bias = producer.module.weight, getattr(producer.module, "bias", None)
        # a norm with an offset (Gemma) multiplies by offset + weight
        factor = scale.to(weight.device)  # type: ignore[union-attr, arg-type]
        weight.copy_((weight.float() + producer.offset) * factor - producer.offset)  # type: ignore[union-attr, operator]
    else:
        rows = scale.new_ones(producer.out_features)
        rows[slice(None) if group.producer_rows is None else group.producer_rows.indices()] = scale
        weight, bias = producer.weight, producer.bias
        factor = rows.to(weight.device)
        weight.copy_(weight.float() * factor[:, None])
    if bias is not None:
        bias.copy_(bias.float() * factor)
    columns = scale if repeats is None else scale[repeats]
    for linear in group.consumers:
        linear.weight.copy_(linear.weight.float() / columns.to(linear.weight.device))
