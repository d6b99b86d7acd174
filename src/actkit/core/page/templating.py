"""What all pages share: the template engine, the style, words on the machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from actkit.core.ground.memory import format_bytes


def check_pages() -> None:
    """Raise ImportError if no page can be written: before hours of work, not after them."""
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("report: jinja2 is missing, with which pages are written; pip install 'actkit[report]'.")


def template(name: str, package: str = "actkit.core.page", **filters: Callable[..., Any]) -> Any:
    """Return a template of jinja2.

    Args:
        name: of the file.
        package: whose folder `templates` has it; `base.html` and the style are those of all pages.
        filters: further ones, by their names in the template.

    Raises:
        ImportError: jinja2 (the extra `report`) is missing.
    """
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            "report: jinja2 is missing, with which pages are written; pip install 'actkit[report]'."
        ) from error
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(each) for each in dict.fromkeys((package, "actkit.core.page"))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)


def about_machine(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say on what something was measured: label and words.

    Args:
        info: from `core.ground.machine.machine`, and `last_level_cache` if it is known.
    """
    cache = info.get("last_level_cache")
    return [
        ("machine", f"{info['processor']}, {info['cores']} cores, {format_bytes(info['memory_bytes'])} memory"),
        (
            "vector units",
            f"{info['capability']}" + ("" if cache is None else f"; last-level cache {format_bytes(cache)}"),
        ),
        ("system", info["system"]),
        ("GPU", info["gpu"] or "none"),
    ]
