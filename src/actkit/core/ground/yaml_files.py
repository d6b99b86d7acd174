"""YAML from outside, as plain data only: no tags, no anchors, no key twice, and bounded in size and depth.

Recipes and rules are lists of names and settings, so nothing else is needed; an anchor that is referred to ten times
on each of ten levels would be ten billion values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from actkit.core.ground.errors import RecipeError

LARGEST = 256 * 1024  # bytes: some 4000 layers with a setting each
MOST = 10_000  # names and values
DEEPEST = 20  # levels of lists and mappings
SHOWN = 120  # characters of a value in an error


def read_yaml(path: Path, what: str) -> Any:
    """Read a file of plain data.

    Args:
        path: of the file.
        what: 'recipe' or 'rules', with which an error begins.

    Returns:
        Its content.

    Raises:
        RecipeError: the file is missing, too large, not UTF-8, no YAML, or not plain data.
    """
    if not path.is_file():
        raise RecipeError(f"{what}: there is no file {path}.")
    size = path.stat().st_size
    if size > LARGEST:
        raise RecipeError(f"{what}: {path} has {size} bytes, allowed are {LARGEST}; it is hardly a file of settings.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{what}: {path} is not valid YAML: {error}") from error
    return parse_yaml(text, what, str(path))


def parse_yaml(text: str, what: str, source: str) -> Any:
    """Read a text of plain data.

    Args:
        text: YAML.
        what: 'recipe' or 'rules', with which an error begins.
        source: where it stands, for errors.

    Returns:
        Its content.

    Raises:
        RecipeError: as in `read_yaml`.
    """
    try:
        return yaml.load(text, _Plain)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # ValueError: a date or number
        raise RecipeError(f"{what}: {source} is not valid YAML: {shorten(str(error), 1000)}") from error


def parse_call(text: str, what: str) -> dict[str, Any]:
    """The name and the settings of 'name:setting=value,setting=value', as the command line takes it.

    Args:
        text: to read.
        what: with which an error begins, such as 'rules'.

    Returns:
        {name: settings}.

    Raises:
        RecipeError: it is not written like that.
    """
    name, colon, settings = text.partition(":")
    try:
        values = parse_yaml("{" + settings.replace("=", ": ") + "}", what, repr(text)) if colon else {}
    except RecipeError as error:
        raise RecipeError(f"{what}: {text!r} was given; write it like 'name:setting=value,setting=value'.") from error
    return {name.strip(): values}


def shorten(text: str, most: int = SHOWN) -> str:
    """A text cut in its middle, for values in errors."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """pydantic's complaints as one sentence each: setting, what was given, what is allowed."""
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "settings"
        if item["type"] == "extra_forbidden":
            # those that a class shares with all of its kind come last
            kind = next(each for each in reversed(cls.__mro__) if issubclass(each, BaseModel) and each is not BaseModel)
            allowed = sorted(cls.model_fields, key=lambda name: kind is not cls and name in kind.model_fields)
            parts.append(f"{where}: no such setting; allowed are {', '.join(allowed)}")
        else:
            parts.append(
                f"{where}: {shorten(repr(item['input']))} was given; {item['msg'][0].lower()}{item['msg'][1:]}"
            )
    return "; ".join(parts) + "."


class _Plain(yaml.SafeLoader):
    """Refuses what is not plain data, before anything is built from it."""

    depth = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self._refuse(event, "an anchor or alias", "write the value out")
        if getattr(event, "tag", None) is not None:
            self._refuse(event, f"the tag {event.tag!r}", "write plain names, numbers and texts")
        if self.depth >= DEEPEST:
            self._refuse(event, f"more than {DEEPEST} levels of lists and mappings", "a recipe needs four")
        self.nodes += 1
        if self.nodes > MOST:
            self._refuse(event, f"more than {MOST} names and values", "it is hardly a recipe")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                self._refuse(key, f"the key {shorten(str(key.value))!r} twice", "keep one of the two")
            seen.add(name)
        return super().construct_mapping(node, deep)

    def _refuse(self, where: Any, what: str, advice: str) -> None:
        raise yaml.MarkedYAMLError(problem=f"it holds {what}; {advice}", problem_mark=where.start_mark)
