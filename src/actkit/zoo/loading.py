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
from actkit.core.store.adapter_folder import is_adapter, merged, read_base
from actkit.core.store.opening import open_pending
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

    Args:
        source: a zoo name (`actkit.zoo.names()`), a local folder, a GGUF file (or a folder that holds a single one) or
            a hub id (safetensors only).
        device: where its tensors go.
        dtype: default as stored (the zoo's own models are stored in bf16; what a GGUF file holds quantized is
            dequantized to bf16).
        base: builds the unchanged model, for a folder that `actkit.save` wrote of your own nn.Module, if its class is
            not registered under `actkit.models`; or the model that an adapter was trained on, if it has moved.
        trust_remote_code: run code that a hub repository brings; off unless asked for.

    Returns:
        The model; of a folder that holds an adapter (`actkit train --adapter`) the model that it was trained on, with
        the adapter merged, by default in the dtype in which it was trained.

    Raises:
        CheckpointError: names the file, the keys, or what is not there; an adapter was trained on another model.
    """
    folder = locate(source, dtype)
    if is_adapter(folder):
        return _load_adapter(folder, device, checkpoint.parse_dtype(dtype), base, trust_remote_code)
    return checkpoint.load(folder, device=device, dtype=dtype, base=base, trust_remote_code=trust_remote_code)


def _load_adapter(
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype | None,
    base: Callable[[], nn.Module] | None,
    trust_remote_code: bool,
) -> nn.Module:
    known = read_base(folder)
    if base is not None:
        model = base()
    elif known.name is None:
        raise CheckpointError(
            f"{folder}: it holds an adapter of a model that had no name; give base=, a function that builds that model."
        )
    else:
        try:
            model = load(known.name, dtype=known.dtype, trust_remote_code=trust_remote_code)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder}: the model that its adapter was trained on, {known.name!r}, does not load: {error} If it "
                f"has moved, give base=, a function that loads it."
            ) from error
    model = merged(model, folder).to(device)
    return (model if dtype is None else model.to(dtype)).eval()


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer beside a model.

    Args:
        source: as in `load`.
        trust_remote_code: as in `load`.

    Returns:
        The tokenizer of transformers.

    Raises:
        CheckpointError: there is none.
    """
    folder = locate(source)
    name = read_base(folder).name if is_adapter(folder) else None  # it stands beside the model that was adapted
    return checkpoint.load_tokenizer(folder if name is None else locate(name), trust_remote_code=trust_remote_code)


def find_tokenizer(
    source: Source, *, dtype: torch.dtype | str | None = None, trust_remote_code: bool = False
) -> Any | None:
    """Load the tokenizer beside a model; None if its folder holds none.

    Args:
        source: as in `load`.
        dtype: that the model is loaded with.
        trust_remote_code: as in `load`.
    """
    folder = locate(source, dtype)
    if is_adapter(folder):
        name = read_base(folder).name
        return None if name is None else find_tokenizer(name, trust_remote_code=trust_remote_code)
    if not checkpoint.has_tokenizer(folder):
        return None
    return checkpoint.load_tokenizer(folder, trust_remote_code=trust_remote_code)


def locate(source: Source, dtype: torch.dtype | str | None = None) -> Path:
    """Find the local folder of a source; a hub id is downloaded, and a GGUF file is converted into the cache once.

    Args:
        source: as in `load`.
        dtype: that the model is to be loaded with, for a GGUF file.

    Raises:
        CheckpointError: there is none.
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
    to_decode: bool = False,
) -> tuple[nn.Module, Any | None]:
    """Return a model and its tokenizer (None if there is none), from a source as in `load`, or the model itself.

    Args:
        model: a source; or a model in memory, which is taken as it is, with the tokenizer of the folder that it was
            loaded from.
        device: as in `load`.
        dtype: as in `load`.
        base: as in `load`.
        trust_remote_code: as in `load`.
        to_decode: the model is decoded from and nothing else: its weights stay in its files until a decoder packs them
            (`core.store.pending`), on the CPU and in the stored dtype.

    Raises:
        ValueError: device, dtype or base are given for a model in memory.
    """
    if not isinstance(model, nn.Module):
        if to_decode and str(device) == "cpu" and dtype is None and base is None and not is_adapter(locate(model)):
            loaded = open_pending(locate(model), trust_remote_code=trust_remote_code)
        else:
            loaded = load(model, device=device, dtype=dtype, base=base, trust_remote_code=trust_remote_code)
        return loaded, find_tokenizer(model, dtype=dtype, trust_remote_code=trust_remote_code)
    if str(device) != "cpu" or dtype is not None or base is not None:
        raise ValueError("device, dtype, base: the model is in memory already; move it yourself, with model.to(...).")
    origin = changes.source(model)
    return model, None if origin is None else find_tokenizer(origin.name, trust_remote_code=trust_remote_code)
