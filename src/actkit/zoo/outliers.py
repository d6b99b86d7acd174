"""Outlier twins: the same function with a few large channels in front of the linear layers.

    norm weight_j -> factor * norm weight_j,   W[:, j] -> W[:, j] / factor     for random channels j of each norm

Large language models have such channels by themselves, small ones do not; quantizers that care about them can only be
told apart where there are some. The outliers are planted, so report results on the natural model next to them.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from actkit.core import changes
from actkit.core.anatomy import EqualizationSet, Norm, anatomy, equalization_sets
from actkit.core.architectures import find_architecture, known_model_types
from actkit.core.errors import UnsupportedModelError
from actkit.core.linear import ActLinear
from actkit.core.parts import Linear


def outlier_twin(model: nn.Module, *, channels: int = 4, factor: float = 30.0, seed: int = 0) -> nn.Module:
    """A copy of a model with `channels` random channels per norm made `factor` times larger; the function stays.

    Every norm inside a block draws its own channels. Equal to rounding: use a float32 model where that matters.
    Raises ValueError for values out of bounds and UnsupportedModelError, naming the norm, where no scale can be moved
    (post-norm, routers, weights that are shared), or where actkit has changed the layers already.
    """
    if channels < 1:
        raise ValueError(f"channels: {channels} was given; give at least 1.")
    if not (factor > 0 and factor != float("inf")):
        raise ValueError(f"factor: {factor} was given; give a positive, finite number.")
    if find_architecture(getattr(getattr(model, "config", None), "model_type", None)) is None:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} is of no known family; known are {', '.join(known_model_types())}."
        )
    twin = copy.deepcopy(model)
    twin.__dict__.pop(changes.SOURCE, None)  # its weights are no longer those of the files
    generator = torch.Generator().manual_seed(seed)
    for block in anatomy(twin).blocks:
        for group in equalization_sets(block):
            if isinstance(group.producer, Linear | str):
                continue
            _refuse(group)
            width = group.consumers[0].in_features
            if channels > width:
                raise ValueError(f"channels: {channels} were given, {group.inspect} has {width} inputs.")
            scale = torch.ones(width)
            scale[torch.randperm(width, generator=generator)[:channels]] = factor
            _plant(group, scale)
    return twin


def _refuse(group: EqualizationSet) -> None:
    where = group.producer.path if isinstance(group.producer, Norm) else group.inspect
    reason = group.refused
    if reason is None and any(isinstance(linear.module, ActLinear) for linear in group.consumers):
        reason = "actkit has changed its layers already; make the twin of the original model"
    if reason is not None:
        raise UnsupportedModelError(f"model: {where}: no outliers can be planted here: {reason}.")


@torch.no_grad()
def _plant(group: EqualizationSet, scale: torch.Tensor) -> None:
    """Multiply the norm's channels by scale [in] and divide the consumers' columns by it, in place."""
    assert isinstance(group.producer, Norm)
    weight = group.producer.module.weight  # a norm with an offset (Gemma) multiplies by offset + weight
    offset, scale = group.producer.offset, scale.to(weight.device)  # type: ignore[union-attr, arg-type]
    weight.copy_((weight.float() + offset) * scale - offset)  # type: ignore[union-attr, operator]
    bias = getattr(group.producer.module, "bias", None)
    if bias is not None:
        bias.copy_(bias.float() * scale)
    for linear in group.consumers:
        linear.weight.copy_(linear.weight.float() / scale)
