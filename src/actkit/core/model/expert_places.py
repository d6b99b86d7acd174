"""Where the experts of a model stand, and their sizes, whether or not they are in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.model.architectures import ExpertsRow, find_architecture

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configs call the number of experts


@dataclass(frozen=True)
class ExpertPlace:
    """The experts of one block.

    Attributes:
        layer: index of the block.
        path: of the module that holds the experts.
        router: path of the module that chooses.
        row: how the family stores them.
    """

    layer: int
    path: str
    router: str
    row: ExpertsRow

    def activation(self, model: nn.Module) -> nn.Module:
        """The nonlinearity of the experts, which all of the block share."""
        found: nn.Module = getattr(model.get_submodule(self.path), self.row.activation or "")
        return found


@dataclass(frozen=True)
class ExpertShape:
    """The sizes of a mixture of experts.

    Attributes:
        layers: the indices of the blocks that have experts.
        experts: of each of these blocks.
        top_k: experts that a token takes in a block.
        hidden: channels of a token.
        intermediate: hidden units of an expert.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    intermediate: int


def expert_places(model: nn.Module) -> tuple[ExpertPlace, ...]:
    """Find the blocks with experts, in order.

    Args:
        model: of transformers, on any device, its experts opened, replaced or as they come.

    Raises:
        UnsupportedModelError: it has none that actkit knows as plain gated experts.
    """
    config: Any = getattr(model, "config", None)
    row = None if config is None else find_architecture(getattr(config, "model_type", ""))
    if row is None or row.experts is None or row.experts.bias or row.experts.transposed:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} has no plain gated experts that actkit knows; docs/sparsity/edgemoe.md "
            f"lists the families that have."
        )
    base = getattr(model, "base_model_prefix", "")
    blocks = f"{base}.{row.blocks}" if base and hasattr(model, base) else row.blocks
    found = []
    stack: Any = model.get_submodule(blocks)
    for index, block in enumerate(stack):
        experts = row.of_block(config, index).experts
        if experts is not None and _has(block, experts.path):
            path = f"{blocks}.{index}"
            found.append(ExpertPlace(index, f"{path}.{experts.path}", f"{path}.{experts.router}", experts))
    if not found:
        raise UnsupportedModelError(f"model: no block of this {type(model).__name__} has experts.")
    return tuple(found)


def expert_shape(model: nn.Module) -> ExpertShape:
    """Read the sizes off a model and its config; arguments and errors as in `expert_places`."""
    layers = tuple(place.layer for place in expert_places(model))
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    count = next(int(getattr(config, name)) for name in COUNTS if getattr(config, name, None))
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return ExpertShape(layers, count, int(config.num_experts_per_tok), int(config.hidden_size), int(width))


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
