"""Where compiled kernels are kept between processes. Imports no Numba, so that one can look without it."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of the compile cache.

    It is named after the sources: Numba watches the file of a kernel, but not those of the functions that it calls.
    """
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return base / "actkit" / "numba" / hashlib.sha256(sources).hexdigest()[:16]


def nothing_compiled() -> bool:
    """Return whether the cache can hold kernels and holds none, so that the first to decode has to wait for them."""
    try:
        folder = Path(os.environ.get("NUMBA_CACHE_DIR") or cache_folder())
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK) and next(folder.rglob("*.nbi"), None) is None
    except (OSError, RuntimeError):  # no home, or a read-only one
        return False
