"""Arrays in one file that is mapped into memory as it lies: nothing is read before it is used, and processes share it.

    with Writer(path) as file:
        place = file.add(array)                  {"at": 4096, "dtype": "uint8", "shape": [3, 5]}
    file.facts                                   {"bytes": ..., "digests": [...]}
    mapped = Mapped(path, file.facts)            checks size and digests, then maps
    mapped.array(place)

Each array begins on a page. The digests are SHA-256 of parts of 64 MB, so that several cores check them side by side;
the check reads the file through the page cache and maps none of it.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from actkit.core.ground.errors import CheckpointError

HEADER = "packed.json"  # of a folder that only a decoder reads (`runtime.packed`)
PAGE = 4096
SLACK = 192  # bytes behind an array that kernels may read
PART = 64 << 20  # bytes of one digest
THREADS = 4
ADVICE = "copy the folder again, or export the model again"


class Writer:
    """Writes arrays one after another.

    Args:
        path: of the file.

    Attributes:
        facts: what `Mapped` checks, once the file is complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._file: BinaryIO = self.path.open("wb")
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()
        if error[0] is None:
            size = self.path.stat().st_size
            self.facts = {"bytes": size, "digests": digests_of(self.path, size)}

    def add(self, array: np.ndarray) -> dict[str, Any]:
        """Write an array, and return where it lies, as JSON takes it."""
        at = self._file.tell()
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b"")
        self._file.write(b"\0" * (SLACK + -(self._file.tell() + SLACK) % PAGE))
        return {"at": at, "dtype": array.dtype.name, "shape": list(array.shape)}


class Mapped:
    """The arrays of a file.

    Args:
        path: of the file.
        facts: what its writer said of it.

    Raises:
        CheckpointError: it is missing, or not as it was written.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing; {ADVICE}.")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise CheckpointError(
                f"{path}: it has {size} bytes, its header says {facts['bytes']}; the file is truncated or was changed. "
                f"{ADVICE.capitalize()}."
            )
        found = digests_of(path, size)
        if found != facts["digests"]:
            wrong = [index for index, pair in enumerate(zip(found, facts["digests"])) if pair[0] != pair[1]]
            where = f"between bytes {wrong[0] * PART} and {(wrong[0] + 1) * PART}" if wrong else "somewhere"
            raise CheckpointError(
                f"{path}: the file is damaged or was changed since it was written, {where} (its SHA-256 differs); "
                f"{ADVICE}."
            )
        with path.open("rb") as file:  # pages that nobody writes to stay the page cache's, and are shared
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def array(self, place: Mapping[str, Any]) -> np.ndarray:
        """Return an array, mapped. place: as `Writer.add` gave it."""
        kind, shape = np.dtype(place["dtype"]), tuple(place["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        if not count:
            return np.empty(shape, kind)
        return np.frombuffer(self._memory, kind, count, place["at"]).reshape(shape)


def digests_of(path: Path, size: int) -> list[str]:
    """SHA-256 of each part of a file. Raises CheckpointError if it cannot be read."""

    def digest(start: int) -> str:
        sha, buffer, left = hashlib.sha256(), memoryview(bytearray(1 << 20)), min(PART, size - start)
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while left > 0:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    break
                sha.update(buffer[:count])
                left -= count
        return sha.hexdigest()

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(digest, range(0, size, PART)))
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error}); copy the folder again.") from error
