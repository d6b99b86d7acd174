"""Off-grid twins: the same function with weights that lie on no grid, for models whose weights were rounded before.

    channel j of each norm, value and up projection times s_j,   W[:, j] of what reads it divided by s_j

with random s_j from 0.7 to 1.4.

The weights of a GGUF file, or of any quantized source, lie on the grid that they were rounded to. Rounding them to it
again costs nothing and proves nothing. Different factors in one group of inputs leave no such grid, and the twin's
weights are about as large as the original's.
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

SMALLEST, LARGEST = 0.7, 1.4


def off_grid_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """Copy a model so that it computes the same, each channel between its layers scaled by a factor of 0.7 to 1.4.

    Scaled are norm -> linear, value -> output and up -> down in every block. Equal to rounding: within 1e-4 of the
    outputs in float32; a bf16 model's weights are rounded to bf16 once more.

    Args:
        model: left as it is.
        seed: of the factors.

    Returns:
        The twin.

    Raises:
        UnsupportedModelError: names the layer: no scale can be moved, or actkit has changed the layers.
    """
    check_family(model)
    twin = copy.deepcopy(model)
    twin.__dict__.pop(changes.SOURCE, None)  # its weights are no longer those of the files, nor on their grid
    generator = torch.Generator().manual_seed(seed)
    for block in anatomy(twin).blocks:
        for group in equalization_sets(block):
            _refuse(group)
            shared = group.shared
            width = group.consumers[0].in_features if shared is None else shared.heads * shared.width
            spread = torch.rand(width, generator=generator)
            move_scale(block, group, SMALLEST * (LARGEST / SMALLEST) ** spread)
    return twin


def _refuse(group: EqualizationSet) -> None:
    reason = changed_before(group) or group.refused
    if reason is None and not isinstance(group.producer, Norm | Linear):
        reason = "a nonlinearity stands between it and what produces its input"
    where = group.consumers[0].path if group.consumers else group.inspect
    if reason is not None:
        raise UnsupportedModelError(f"model: {where}: it cannot leave its grid here: {reason}.")
