"""`load`: one way to every model: a name of the zoo, a local folder, a GGUF file, or a hub id.

A zoo name wins over a folder of the same name; write `./swiglu` for the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actkit import zoo
from actkit.core.edit import changes
from actkit.core.ground.errors import CheckpointError
from actkit.core.store import checkpoint
from actkit.gguf.cached import cached, gguf_file

Source = str | Path


def load(
    source: Source,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    base: Callable[[], nn.Module] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a model in evaluation mode; every key must match.

    source: a zoo name (`actkit.zoo.names()`), a local folder, a GGUF file (or a folder that holds a single one) or a
    hub id (safetensors only). dtype: as stored where None (the zoo's own models are stored in bf16; what a GGUF file
    holds quantized is dequantized to bf16). base: builds the unchanged model, for a folder that `actkit.save` wrote of
    one's own nn.Module. trust_remote_code: run code that a hub repository brings; off unless asked for.
    device: where its tensors go.
    Raises CheckpointError naming the file, the keys, or what is not there.
    """
    folder = locate(source, dtype)
    return checkpoint.load(folder, device=device, dtype=dtype, base=base, trust_remote_code=trust_remote_code)


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model. source, trust_remote_code: as in `load`. Raises CheckpointError without one."""
    return checkpoint.load_tokenizer(locate(source), trust_remote_code=trust_remote_code)


def find_tokenizer(
    source: Source, *, dtype: torch.dtype | str | None = None, trust_remote_code: bool = False
) -> Any | None:
    """The tokenizer beside a model, or None where its folder holds none. dtype: that the model is loaded with."""
    folder = locate(source, dtype)
    if not checkpoint.has_tokenizer(folder):
        return None
    return checkpoint.load_tokenizer(folder, trust_remote_code=trust_remote_code)


def locate(source: Source, dtype: torch.dtype | str | None = None) -> Path:
    """The local folder of a source; a hub id is downloaded, and a GGUF file is converted into the cache once.

    dtype: that the model is to be loaded with, for a GGUF file. Raises CheckpointError where there is none.
    """
    if isinstance(source, str) and source in zoo.names():
        return zoo.path(source, checkpoint.parse_dtype(dtype))
    file = gguf_file(source)
    if file is not None:
        return cached([file], checkpoint.parse_dtype(dtype))
    try:
        return checkpoint.resolve(source)
    except CheckpointError as error:
        if isinstance(source, str) and "/" not in source:
            raise CheckpointError(f"{error} Embedded models are {', '.join(zoo.names())}.") from error
        raise


def open_model(
    model: nn.Module | Source,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    base: Callable[[], nn.Module] | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any | None]:
    """A model and its tokenizer (None where there is none), from a source as in `load`, or the model itself.

    A model in memory is taken as it is; its tokenizer is that of the folder it was loaded from.
    Raises ValueError where device, dtype or base are given for a model in memory.
    """
    if not isinstance(model, nn.Module):
        loaded = load(model, device=device, dtype=dtype, base=base, trust_remote_code=trust_remote_code)
        return loaded, find_tokenizer(model, dtype=dtype, trust_remote_code=trust_remote_code)
    if str(device) != "cpu" or dtype is not None or base is not None:
        raise ValueError("device, dtype, base: the model is in memory already; move it yourself, with model.to(...).")
    origin = changes.source(model)
    return model, None if origin is None else find_tokenizer(origin.name, trust_remote_code=trust_remote_code)
