"""What a model can be called with: its context, its vocabulary, the shape of an example, the name of its input."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from actkit.data.batches import Batch


def context_length(model: nn.Module) -> int | None:
    """The longest input of a transformers model, in tokens; None where its configuration states none."""
    config = _text_config(model)
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            # RoBERTa's kin count positions from the padding token's id on.
            return value - (config.pad_token_id or 0) - 1 if "roberta" in getattr(config, "model_type", "") else value
    return None


def vocabulary_size(model: nn.Module) -> int | None:
    """How many tokens the model embeds; None where it embeds none."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if find is None else find()
    except NotImplementedError:  # a transformers model without tokens
        embedding = None
    count = getattr(embedding, "num_embeddings", None) or getattr(_text_config(model), "vocab_size", None)
    if count is None:
        first = _first_layer(model)
        count = first.num_embeddings if isinstance(first, nn.Embedding) else None
    return count


def input_shape(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of one example of a model that takes no tokens, where the model says it."""
    stated = getattr(model, "input_shape", None)
    if isinstance(stated, tuple | list):
        return tuple(int(size) for size in stated)
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return getattr(config, "num_channels", 3), height, width
    timm = getattr(model, "pretrained_cfg", None)
    if isinstance(timm, Mapping) and "input_size" in timm:
        return tuple(timm["input_size"])
    first = _first_layer(model) if config is None else None
    return (first.in_features,) if isinstance(first, nn.Linear) else None


def is_causal(model: nn.Module) -> bool:
    """Whether the model predicts the next token."""
    can_generate: Any = getattr(model, "can_generate", None)
    return can_generate is not None and bool(can_generate())


def as_batch(model: nn.Module, key: str, tensor: Tensor) -> Batch:
    """A dict where the model's call knows the keyword, else the bare tensor."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = any(p.name == key or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {key: tensor} if named else tensor


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first_layer(model: nn.Module) -> nn.Module | None:
    return next(
        (module for module in model.modules() if next(module.parameters(recurse=False), None) is not None), None
    )
