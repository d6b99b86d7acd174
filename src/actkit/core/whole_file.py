"""A text file that is complete or not there: whoever reads it never sees the half that a killed process wrote."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 beside `path`, wait for the disk, and rename; what stood there is replaced by the whole text."""
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
