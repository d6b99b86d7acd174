"""The page of a result: facts, pictures and tables in one file that needs no network.

    page = Page("Effects", "swiglu, 8 pairs", (Pictures("Where", (Picture("block.output", svg),)), Table(...)))
    Path("effects.html").write_text(page.html())

A result that is rather looked at than read has a method `page()`; `actkit analyze --html` writes it. Some kilobytes of
plain script sort and filter tables, open the contexts of a row and read a grid's cells out; without it all is there
but the contexts. What comes from a model stays text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from actkit.core.page.templating import template

LARGEST = 3_000_000  # bytes of a page; a larger one opens slowly and is not sent around


@dataclass(frozen=True)
class Facts:
    """Labels with words.

    Attributes:
        title: of the section.
        rows: (label, words).
        about: below the title.
    """

    kind: ClassVar[str] = "facts"
    title: str
    rows: Sequence[tuple[str, str]]
    about: str = ""


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        title: above it.
        svg: from `core.page.pictures`.
    """

    title: str
    svg: str


@dataclass(frozen=True)
class Pictures:
    """Pictures below each other; a grid's cells are read out below them.

    Attributes:
        title: of the section.
        pictures: in their order.
        about: below the title.
        legend: (colour, name).
        small: side by side.
    """

    kind: ClassVar[str] = "pictures"
    title: str
    pictures: Sequence[Picture]
    about: str = ""
    legend: Sequence[tuple[str, str]] = ()
    small: bool = False


@dataclass(frozen=True)
class Context:
    """Tokens with the strength of something at each.

    Attributes:
        tokens: their texts, in order.
        strengths: from 0; the strongest is shaded fully.
    """

    tokens: Sequence[str]
    strengths: Sequence[float]

    def shades(self, most: float) -> str:
        """One digit for each token, 0 to 9.

        Args:
            most: the strength of 9.
        """
        return "".join(str(max(0, min(9, round(9 * each / most)))) if most > 0 else "0" for each in self.strengths)


@dataclass(frozen=True)
class Table:
    """A table that is sorted by its headings and filtered by a word.

    Attributes:
        title: of the section.
        columns: headings.
        rows: cells, numbers or texts.
        about: below the title.
        contexts: of each row, shown if it is opened; strengths of a row are on one scale.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    about: str = ""
    contexts: Sequence[Sequence[Context]] = ()


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        title: of the page.
        about: what it shows, in a line.
        parts: sections in their order.
    """

    title: str
    about: str
    parts: Sequence[Facts | Pictures | Table]

    def html(self) -> str:
        """Write the page.

        Returns:
            HTML.

        Raises:
            ImportError: jinja2 (the extra `report`) is missing.
            ValueError: a table's rows, columns and contexts do not match, or the page is above 3 MB.
        """
        page = template("page.html", short=_short, json=_json)
        for part in self.parts:
            if isinstance(part, Table):
                _check(part)
        written = str(page.render(page=self))
        if len(written.encode()) > LARGEST:
            size = len(written.encode()) / 1e6
            raise ValueError(f"page: it has {size:.1f} MB, and 3 are allowed; show fewer rows, contexts or places.")
        return written


@runtime_checkable
class HasPage(Protocol):
    """A result with a page of its own."""

    def page(self) -> Page:
        """What `actkit analyze --html` writes."""


def _check(table: Table) -> None:
    wide = next((index for index, row in enumerate(table.rows) if len(row) != len(table.columns)), None)
    if wide is not None:
        raise ValueError(
            f"page: row {wide} of {table.title!r} has {len(table.rows[wide])} cells for {len(table.columns)} columns; "
            f"give one for each."
        )
    if table.contexts and len(table.contexts) != len(table.rows):
        raise ValueError(
            f"page: {table.title!r} has contexts for {len(table.contexts)} of {len(table.rows)} rows; give a list for "
            f"each, empty for none."
        )


def _short(value: float) -> str:
    """A number of at most four digits that count; whole ones as they are."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _json(contexts: Sequence[Sequence[Context]]) -> Any:
    from markupsafe import Markup

    rows = []
    for each in contexts:
        most = max((strength for context in each for strength in context.strengths), default=0.0)
        rows.append([[list(context.tokens), context.shades(most)] for context in each])
    return Markup(json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
