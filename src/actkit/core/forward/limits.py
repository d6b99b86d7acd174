"""How long a sequence a model takes, and by which numbers it counts the positions of its tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")


def text_config(model: nn.Module) -> Any:
    """The part of a transformers model's configuration that is about tokens; None for any other module."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: nn.Module) -> int | None:
    """The longest input of a transformers model, in tokens; None if its configuration states none."""
    config = text_config(model)
    for key in LENGTHS:
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value - _padding_offset(model, value)
    return None


def first_position(model: nn.Module) -> int:
    """The number that the model gives to the first token of a sequence: 0 but for a few encoders."""
    length = getattr(text_config(model), LENGTHS[0], None)
    offset = _padding_offset(model, length) if isinstance(length, int) else 0
    if offset:
        return offset
    numbers = (buffer for name, buffer in model.named_buffers() if name.endswith("embeddings.position_ids"))
    return next((int(found.flatten()[0]) for found in numbers if found.numel()), 0)


def has_position_table(model: nn.Module) -> bool:
    """Whether a table of positions is looked up, so that a token's absolute position counts."""
    return any(_is_position_table(name, module) for name, module in model.named_modules())


def _padding_offset(model: nn.Module, length: int) -> int:
    """How many rows of the position table stand before a sequence's first position.

    RoBERTa and its kin (CamemBERT, MPNet, ESM, Longformer ...) count from the padding token's id on. The padding index
    of the table and of its owner says so, whatever the model is called.
    """
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and _is_position_table(name, module) and len(module.weight) == length:
            owner = model.get_submodule(name.rpartition(".")[0])
            if getattr(owner, "padding_idx", None) == padding:
                return padding + 1
    return 0


def _is_position_table(name: str, module: nn.Module) -> bool:
    own = name.rpartition(".")[2]
    return ("pos" in own or own == "wpe") and type(module).__name__.endswith("Embedding") and hasattr(module, "weight")
