"""Outlier twins: the same function with a few large channels in front of the linear layers.

    norm weight_j -> factor * norm weight_j,   W[:, j] -> W[:, j] / factor     for random channels j of each norm

Large language models have such channels by themselves, small ones do not; quantizers that care about them can only be
told apart if there are some. The outliers are planted, so report results on the natural model next to them.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from actkit.core.edit import changes
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.model.anatomy import EqualizationSet, Norm, anatomy, equalization_sets
from actkit.core.model.parts import Linear
from actkit.zoo.rescaling import changed_before, check_family, move_scale


def outlier_twin(model: nn.Module, *, channels: int = 4, factor: float = 30.0, seed: int = 0) -> nn.Module:
    """Copy a model and make random channels of each norm larger; the function stays.

    Every norm inside a block draws its own channels. Equal to rounding: use a float32 model if that matters.

    Args:
        model: left as it is.
        channels: how many per norm.
        factor: how much larger.
        seed: of the draws.

    Returns:
        The twin.

    Raises:
        ValueError: a value out of bounds.
        UnsupportedModelError: names the norm: no scale can be moved (post-norm, routers, weights that are shared), or
            actkit has changed the layers already.
    """
    if channels < 1:
        raise ValueError(f"channels: {channels} was given; give at least 1.")
    if not (factor > 0 and factor != float("inf")):
        raise ValueError(f"factor: {factor} was given; give a positive, finite number.")
    check_family(model)
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
            move_scale(block, group, scale)
    return twin


def _refuse(group: EqualizationSet) -> None:
    where = group.producer.path if isinstance(group.producer, Norm) else group.inspect
    reason = changed_before(group) or group.refused
    if reason is not None:
        raise UnsupportedModelError(f"model: {where}: no outliers can be planted here: {reason}.")
