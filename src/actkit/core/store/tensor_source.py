"""The tensors of safetensors files, read one at a time, or a part of one: nothing else is in memory, or mapped into it.

    source = TensorSource(weight_files(folder))
    source.read("model.norm.weight")
    source.read("model.layers.0.mlp.experts.gate_up_proj", 3)  # the fourth matrix alone

A file is opened for a read and closed after it, and its bytes go where they stay, so that what a process takes is what
it keeps. Headers are read once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from actkit.core.ground.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
LARGEST_HEADER = 100_000_000  # bytes, as the format has it


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: that holds it.
        offset: of its first byte in the file.
        dtype: of its values.
        shape: of the whole.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return prod(self.shape) * self.dtype.itemsize


class TensorSource:
    """The tensors of some safetensors files by name.

    Args:
        files: each tensor is in one of them.

    Attributes:
        tensors: where each lies.

    Raises:
        CheckpointError: a file is no safetensors file, is truncated, or holds a dtype that torch has not.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        for file in files:
            self.tensors |= _header(file)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor into memory of its own.

        Args:
            name: of the tensor.
            index: of its first dimension, to read that part alone; None reads the whole.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{name}: the files hold no tensor of that name; copy or download the folder again.")
        stored = self.tensors[name]
        shape = stored.shape if index is None else stored.shape[1:]
        size = prod(shape) * stored.dtype.itemsize
        values = torch.empty(size, dtype=torch.uint8)
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.offset + (index or 0) * size)
                read = _fill(file, memoryview(values.numpy()))  # type: ignore[arg-type]
        except OSError as error:
            raise CheckpointError(f"{stored.file}: {name} is not readable ({error}); copy the folder again.") from error
        if read != size:
            raise CheckpointError(f"{stored.file}: it ends inside of {name}; copy or download the folder again.")
        return values.view(stored.dtype).reshape(shape)


def _fill(file: object, view: memoryview) -> int:
    """Read until the view is full or the file ends; one call may give less than was asked."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors that one file says it holds."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(LARGEST_HEADER, size - 8):
                raise ValueError("its header is longer than the file")
            entries = json.loads(opened.read(length))
        found = {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            stored = StoredTensor(file, 8 + length + start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if end - start != stored.nbytes or start < 0 or 8 + length + end > size:
                raise ValueError(f"{name} does not lie in it as its header says")
            found[name] = stored
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not readable ({error}); copy or download the folder again.") from error
    return found
