"""The last-level cache: weights that fit in it are read from it, so reading fewer of them saves next to nothing."""

from __future__ import annotations

import os
from pathlib import Path

from actkit.core.ground.memory import parse_bytes


def last_level_cache() -> int | None:
    """Return the bytes of the largest cache of the first core, or None if the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            sizes.append(parse_bytes(path.read_text(encoding="ascii").strip().replace("K", "KiB").replace("M", "MiB")))
        except (OSError, ValueError):
            continue
    if sizes:
        return max(sizes)
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or None
    except (AttributeError, ValueError, OSError):
        return None
