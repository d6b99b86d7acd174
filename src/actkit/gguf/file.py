"""The content of one GGUF file: settings, a table of tensors, and their values as float32.

Little-endian, after the format's description (versions 2 and 3): the magic bytes, counts, settings with a type each,
the table of tensors, and after the next multiple of the alignment their data. Only the settings and the table are read
at once; the rest is read when it is needed. The package gguf reads this too, and takes seconds for the vocabulary
alone.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actkit.core.ground.errors import CheckpointError

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
STRING, ARRAY = 8, 9  # types of a setting
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOATS = ("F32", "F16", "BF16", "F64")
AGAIN = "download or copy the file again"
INSTALL = "pip install 'actkit[zoo]'"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the table.

    Attributes:
        name: in the file.
        shape: outputs first, as torch has it.
        kind: its type as GGUF calls it, such as 'Q4_K'.
        offset: of its bytes in the file.
        size: of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    size: int


class GgufFile:
    """An open GGUF file.

    Args:
        path: of the file.

    Attributes:
        settings: name -> number, text or list of these.
        tensors: name -> entry.

    Raises:
        CheckpointError: the file is of another kind or version, is truncated or one part of several, or has tensors of
            a type that the package gguf does not know.
        ImportError: that package is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        split = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", self.path.name)
        if split and split[2] != "00001":
            raise CheckpointError(
                f"{self.path}: it is part {int(split[1])} of {int(split[2])}, and actkit reads single files; join the "
                f"parts with llama.cpp's `llama-gguf-split --merge`."
            )
        try:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise CheckpointError(f"{self.path}: not readable ({error}); {AGAIN}.") from error
        if self._bytes[:4] != MAGIC:
            raise CheckpointError(f"{self.path}: not readable as GGUF (it does not begin with {MAGIC!r}); {AGAIN}.")
        self._at = 4
        try:
            self.settings, self.tensors = self._read()
        except (struct.error, ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: not readable as GGUF ({error}); {AGAIN}.") from error

    def values(self, entry: TensorEntry) -> np.ndarray:
        """The values of a tensor, float32 of its shape, as the package gguf dequantizes them."""
        from gguf.quants import dequantize

        from gguf import GGMLQuantizationType

        raw = np.frombuffer(self._bytes, np.uint8, entry.size, entry.offset)
        if entry.kind == "F64":
            return raw.view(np.float64).astype(np.float32).reshape(entry.shape)
        kind = GGMLQuantizationType[entry.kind]
        if entry.kind in ("F32", "F16"):
            return raw.view(np.float32 if entry.kind == "F32" else np.float16).astype(np.float32).reshape(entry.shape)
        rows = raw.reshape(*entry.shape[:-1], -1)
        return dequantize(rows, kind).astype(np.float32, copy=False).reshape(entry.shape)

    # -- the header ----------------------------------------------------------------------------------------------------

    def _read(self) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        (version,) = self._unpack("I")
        if version not in VERSIONS:
            allowed = " and ".join(map(str, VERSIONS))
            raise CheckpointError(f"{self.path}: GGUF version {version}; actkit reads {allowed}. Convert it anew.")
        tensors, settings = self._unpack("QQ")
        found = {self._text(): self._value(*self._unpack("I")) for _ in range(settings)}
        if found.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{self.path}: it is part {found.get('split.no', 0) + 1} of {found['split.count']}, and actkit reads "
                f"single files; join the parts with llama.cpp's `llama-gguf-split --merge`."
            )
        table = [(self._text(), self._unpack(f"{self._unpack('I')[0]}Q"), *self._unpack("IQ")) for _ in range(tensors)]
        alignment = found.get("general.alignment", ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        return found, {name: self._entry(name, shape, kind, start + at) for name, shape, kind, at in table}

    def setting(self, name: str) -> Any:
        """Return a setting that must be there. Raises CheckpointError if it is missing."""
        if name not in self.settings:
            raise CheckpointError(f"{self.path}: the setting {name} is missing; {AGAIN}.")
        return self.settings[name]

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorEntry:
        try:
            from gguf.quants import _type_traits

            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        except ImportError as error:
            raise ImportError(f"{self.path}: reading GGUF needs the package gguf; {INSTALL}.") from error
        known = kind in set(GGMLQuantizationType)
        named = GGMLQuantizationType(kind) if known else None
        if named is None or not (named in _type_traits or named.name in FLOATS):
            raise CheckpointError(
                f"{self.path}: {name} is stored as {named.name if named else f'type {kind}'}, which the package gguf "
                f"cannot dequantize; take a file of another quantization, such as Q4_K_M or Q8_0."
            )
        count, bytes_each = GGML_QUANT_SIZES[named]
        size = math.prod(shape) // count * bytes_each
        if offset + size > len(self._bytes):
            raise CheckpointError(
                f"{self.path}: it has {len(self._bytes)} bytes, and {name} ends at {offset + size}; the file is "
                f"truncated, {AGAIN}."
            )
        return TensorEntry(name, tuple(reversed(shape)), named.name, offset, size)

    def _unpack(self, kinds: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{kinds}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{kinds}")
        return found

    def _text(self) -> str:
        (length,) = self._unpack("Q")
        if self._at + length > len(self._bytes):
            raise IndexError(f"a text of {length} bytes at {self._at}, past the end")
        self._at += length
        return self._bytes[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self._unpack(NUMBERS[kind])[0]
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise IndexError(f"a setting of type {kind}, which the format does not know")
        kind, count = self._unpack("IQ")
        if kind in NUMBERS:
            return list(self._unpack(f"{count}{NUMBERS[kind]}"))
        return [self._value(kind) for _ in range(count)]
