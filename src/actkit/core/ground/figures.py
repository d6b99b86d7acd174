"""Plotly, which only pictures need, and names in its figures: it reads texts as a small HTML, so they are escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any


def plotly() -> Any:
    """The package plotly, with `graph_objects` and `subplots` loaded.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        import plotly.graph_objects
        import plotly.subplots
    except ImportError as error:
        raise ImportError("figure: plotly is missing; pip install 'actkit[report]'.") from error
    return plotly


def plain(text: Any) -> str:
    """The text, so that plotly shows it as it is: no bold type, no link."""
    return escape(str(text), quote=False)


def all_plain(texts: Iterable[Any]) -> list[Any]:
    """Of each text; numbers stay numbers, so that an axis stays one of numbers."""
    return [plain(text) if isinstance(text, str) else text for text in texts]
