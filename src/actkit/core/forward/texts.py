"""Texts that a tokenizer can read."""

from __future__ import annotations

from typing import Any

from actkit.core.ground.errors import DataError


def check_text(text: Any, name: str) -> None:
    """Refuse what is no text, or holds half of a character.

    Args:
        text: to check.
        name: of the text, in the error.

    Raises:
        DataError: it is refused.
    """
    if not isinstance(text, str):
        raise DataError(f"{name} is a {type(text).__name__}; it must be a string.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} holds {text[error.start]!a} at character {error.start}, a lone surrogate: half of a character, "
            f"which no tokenizer reads; correct or remove it."
        ) from error
