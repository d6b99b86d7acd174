"""Names in plotly's figures: plotly reads texts as a small HTML, so what comes from a model or a user is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any


def plain(text: Any) -> str:
    """The text, so that plotly shows it as it is: no bold type, no link."""
    return escape(str(text), quote=False)


def all_plain(texts: Iterable[Any]) -> list[Any]:
    """Of each text; numbers stay numbers, so that an axis stays one of numbers."""
    return [plain(text) if isinstance(text, str) else text for text in texts]
