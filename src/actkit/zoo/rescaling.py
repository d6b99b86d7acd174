"""What the twins of the zoo share: which models can have one, and how a factor moves between layers in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import apply_edit
from actkit.core.edit.folding import fold
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import Block, EqualizationSet
from actkit.core.model.architectures import find_architecture, known_model_types


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
def move_scale(block: Block, group: EqualizationSet, factor: Tensor) -> None:
    """Multiply the producer's channels by a factor and divide the consumers' columns by it, in place.

    Args:
        block: of the model that is changed.
        group: the producer and what reads it.
        factor: [channels] of the producer.
    """
    columns = factor if group.shared is None else factor[group.shared.channels()]
    for edit in fold(block, group, 1 / columns.double()):
        apply_edit(block.root, edit, remember=False)
