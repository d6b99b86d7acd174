"""Where the packages are that interpretation is compared with: `.venv-interpretation` (`make interpretation-peers`)."""

from __future__ import annotations

import sys
from pathlib import Path


def add_peers() -> None:
    """Let packages of that environment be imported, behind those of this one."""
    site = next(
        (Path(__file__).resolve().parent.parent / ".venv-interpretation").glob("lib/python*/site-packages"), None
    )
    if site is not None and str(site) not in sys.path:
        sys.path.append(str(site))
