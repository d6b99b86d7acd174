"""What a model takes: tokens or a shape, how long a sequence, and by which numbers it counts positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from actkit.core.ground.errors import DataError
from actkit.core.layers.linear import ActLinear

# The first input of a model of tokens, and the second one of an encoder-decoder, as transformers calls them.
TOKENS, DECODER_TOKENS = "input_ids", "decoder_input_ids"
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


def check_length(model: nn.Module, length: int, name: str, *, beyond_context: bool = False) -> int | None:
    """Refuse sequences that are longer than the model's context, unless that is what is wanted and can be.

    Args:
        model: that reads them.
        length: of a sequence, in tokens.
        name: of the parameter or the data, for the text.
        beyond_context: read longer ones; a model that looks positions up in a table cannot.

    Returns:
        The context; None if the configuration states none.

    Raises:
        DataError: the length is beyond the context.
    """
    context = context_length(model)
    if context is None or length <= context:
        return context
    if not beyond_context:
        raise DataError(
            f"{name}: a batch has sequences of {length} tokens, the model's context is {context}; cut them to at most "
            f"{context}, or read them beyond it: load_data(..., beyond_context=True), --beyond-context."
        )
    if has_position_table(model):
        raise DataError(
            f"beyond_context: {type(model).__name__} looks positions up in a table of {context}, so there is nothing "
            f"beyond it; cut the sequences to at most {context} tokens."
        )
    return context


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


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model takes two sequences: one to encode, one to decode. Its encoder alone does not."""
    return DECODER_TOKENS in inspect.signature(model.forward).parameters


def vocabulary_size(model: nn.Module) -> int | None:
    """How many tokens the model embeds; None if it embeds none, or takes something else (audio, images)."""
    if getattr(model, "main_input_name", TOKENS) != TOKENS:
        return None
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if find is None else find()
    except NotImplementedError:  # a transformers model without tokens
        embedding = None
    count = getattr(embedding, "num_embeddings", None) or getattr(text_config(model), "vocab_size", None)
    if count is None:
        first = _first_layer(model)
        count = first.num_embeddings if isinstance(first, nn.Embedding) else None
    return count


def input_shape(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of one example of a model that takes no tokens, if the model says it."""
    stated: Any = getattr(model, "input_shape", None)
    if isinstance(stated, tuple | list):
        return tuple(int(size) for size in stated)
    config: Any = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return getattr(config, "num_channels", 3), height, width
    timm: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(timm, Mapping) and "input_size" in timm:
        return tuple(timm["input_size"])
    first = _first_layer(model) if config is None else None
    features = getattr(first, "in_features", None)  # nn.Linear or what replaced it
    return None if features is None else (int(features),)


def _first_layer(model: nn.Module) -> nn.Module | None:
    owners = (m for m in model.modules() if isinstance(m, ActLinear) or any(True for _ in m.parameters(recurse=False)))
    return next(owners, None)
