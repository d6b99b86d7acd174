"""What to do with a model: its profile, what that suggests, and the search for a model that pays."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actkit.search.results import Finding as Finding
    from actkit.search.results import Optimization as Optimization
    from actkit.search.results import Profile as Profile

# `profile`, the function, shares its name with its module, so it is not read lazily here: the import system would put
# the module in its place. Use `actkit.profile`, or `from actkit.search.profile import profile`.
_HOMES = {"Finding": "results", "Optimization": "results", "Profile": "results"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
