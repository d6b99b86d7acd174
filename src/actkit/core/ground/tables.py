"""Tables for a terminal, in which text stays what it is."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table


class PlainTable(Table):
    """A table whose title and cells are no markup: a module called `[/x]` stands there as `[/x]`.

    What is to be coloured is given as `rich.text.Text`.
    """

    def __init__(self, *headers: str, title: str | None = None, caption: str | None = None, **settings: Any) -> None:
        super().__init__(
            title=None if title is None else escape(title),
            caption=None if caption is None else escape(caption),
            **settings,
        )
        for header in headers:
            self.add_column(header)

    def add_column(self, header: RenderableType = "", footer: RenderableType = "", **settings: Any) -> None:
        """As `Table.add_column`; text is taken as it is."""
        super().add_column(_plain(header), _plain(footer), **settings)

    def add_row(self, *cells: RenderableType | None, **settings: Any) -> None:
        """As `Table.add_row`; text is taken as it is."""
        super().add_row(*(None if cell is None else _plain(cell) for cell in cells), **settings)


def _plain(cell: RenderableType) -> RenderableType:
    return escape(cell) if isinstance(cell, str) else cell
