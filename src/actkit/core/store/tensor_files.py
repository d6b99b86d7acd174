"""Nested dicts of tensors and JSON values on disk without pickle.

A safetensors file and a JSON file in a folder, with their digests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actkit.core.ground.errors import CheckpointError
from actkit.core.store import checksums

TENSOR = "$tensor"  # in the JSON file, {"$tensor": name} stands for a tensor of the other


def write_values(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a dict of tensors, JSON values and dicts of these to `folder`, which is made if it is missing.

    Args:
        folder: to write to.
        values: by name.

    Raises:
        CheckpointError: a value of another kind, or a key that is no string.
    """
    tensors: dict[str, Tensor] = {}
    content = _split(values, "", tensors)
    try:
        text = json.dumps(content, indent=1, allow_nan=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state: it holds what neither safetensors nor JSON can keep: {error}.") from error
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "values.json").write_text(text, encoding="utf-8")
    checksums.write(folder)


def read_values(folder: Path) -> dict[str, Any]:
    """Read the dict that `write_values` wrote.

    Args:
        folder: that was written.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    checksums.verify(folder, advice="start the training anew")
    try:
        content = json.loads((folder / "values.json").read_text(encoding="utf-8"))
        return _join(content, load_file(folder / "tensors.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: its saved state is not readable ({error}); start the training anew."
        ) from error


def _split(values: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return dict(_entries(values, prefix, tensors))


def _entries(values: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if not isinstance(key, str):
            raise CheckpointError(f"state: the key {key!r} is a {type(key).__name__}; keys are strings.")
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors takes no shared memory
            yield key, {TENSOR: name}
        elif isinstance(value, Mapping):
            yield key, _split(value, f"{name}/", tensors)
        else:
            yield key, value


def _join(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            joined[key] = tensors[value[TENSOR]] if set(value) == {TENSOR} else _join(value, tensors)
        else:
            joined[key] = value
    return joined
