"""Names from the entry-point groups `actkit.methods`, `actkit.modules` (saved modules) and `actkit.decoders`.

Our own names and those of third parties are read the same way, lazily: listing names imports nothing, and a plug-in
that does not import is an error that names it and its package.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from actkit.core.errors import RecipeError

METHODS, MODULES, DECODERS = "actkit.methods", "actkit.modules", "actkit.decoders"


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        known = found.get(entry.name)
        if known is not None and known.value != entry.value:
            raise RecipeError(f"{group}: {entry.name!r} is registered twice, by {known.value} and by {entry.value}.")
        found[entry.name] = entry
    return dict(sorted(found.items()))


@cache
def _load(group: str, name: str) -> Any:
    entries = _entries(group)
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise RecipeError(
            f"{group.split('.')[1]}: {name!r} is not known.{hint} Known are {', '.join(entries) or 'none'}."
        )
    entry = entries[name]
    try:
        return entry.load()
    except Exception as error:
        package = entry.dist.name if entry.dist else "unknown"
        raise RecipeError(
            f"{group}: {name!r} ({entry.value}, of the package {package}) does not import: {error}"
        ) from error


def method_names() -> list[str]:
    """The names of all installed methods; imports none of them."""
    return list(_entries(METHODS))


def method_class(name: str) -> Any:
    """The Transform class registered as `name`. Raises RecipeError for an unknown name or a broken plug-in."""
    return _load(METHODS, name)


def method_name(cls: type) -> str:
    """The registered name of a Transform class."""
    return _name_of(METHODS, cls)


def module_class(name: str) -> Any:
    """The module class registered as `name`."""
    return _load(MODULES, name)


def module_name(cls: type) -> str:
    """The registered name of a module class."""
    return _name_of(MODULES, cls)


def decoder_names() -> list[str]:
    """The names of all installed decoders; imports none of them."""
    return list(_entries(DECODERS))


def decoder_class(name: str) -> Any:
    """The class registered as the decoder `name` (`core.decoding.Decoder` says what it offers). Raises RecipeError."""
    return _load(DECODERS, name)


def _name_of(group: str, cls: type) -> str:
    target = f"{cls.__module__}:{cls.__qualname__}"
    for name, entry in _entries(group).items():
        if entry.value == target:
            return name
    raise RecipeError(
        f'{cls.__name__} is not registered: add `name = "{target}"` to the entry-point group {group} of its package, '
        f"so that recipes and checkpoints can name it."
    )
