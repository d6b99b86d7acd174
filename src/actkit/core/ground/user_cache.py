"""The folder of the user in which actkit keeps what it made once and can make again."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "ACTKIT_CACHE"


def cache_folder() -> Path:
    """The folder: what the environment variable ACTKIT_CACHE names, else the system's place for caches."""
    import platformdirs

    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_path("actkit"))
