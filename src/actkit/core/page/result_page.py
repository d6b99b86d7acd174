"""A page for any result: its own if it has one, else what its table and its figure say.

    write_whole(Path("activity.html"), page_of(result, "neuron_activity").html())

The tables that a terminal shows become tables to sort and filter, the panels of the figure small charts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Group
from rich.table import Table as Printed
from rich.text import Text

from actkit.core.ground.results import Result
from actkit.core.page.charts import charts
from actkit.core.page.page import Facts, HasPage, Page, Table

MOST_ROWS = 5000  # of a table; a page stays below 3 MB


def page_of(result: Result, title: str, about: str = "") -> Page:
    """The page of a result.

    Args:
        result: of an analysis.
        title: if it has no page of its own.
        about: a line below it.

    Returns:
        The page.

    Raises:
        ImportError: plotly (the extra `report`) is missing.
    """
    if isinstance(result, HasPage):
        return result.page()
    parts = list(_parts(result.table()))
    tables = [each for each in parts if not isinstance(each, str)]
    words = [each.strip() for each in parts if isinstance(each, str) and each.strip()]
    said = [Facts("In words", [("", line) for line in words])] if words else []
    return Page(title, about, (*charts(result.figure()), *tables, *said))


def _parts(shown: Any) -> Iterable[Table | str]:
    """The tables in what a terminal shows, and the words between them."""
    if isinstance(shown, Group):
        for each in shown.renderables:
            yield from _parts(each)
    elif not isinstance(shown, Printed):
        yield _words(shown)
    elif not shown.show_header and (len(shown.columns) <= 1 or any(map(_nested, _cells(shown)))):  # a page
        for cell in _cells(shown):
            yield from _parts(cell)
    else:
        rows = [[_words(cell) for cell in row] for row in zip(*(column.cells for column in shown.columns), strict=True)]
        title, caption = _words(shown.title or ""), _words(shown.caption or "")
        if len(rows) > MOST_ROWS:
            caption = f"The first {MOST_ROWS:,} of {len(rows):,} rows. {caption}"
        yield Table(
            title or "Table",
            [_words(column.header).replace("-\n", "").replace("\n", " ") for column in shown.columns],
            rows[:MOST_ROWS],
            caption,
        )


def _cells(shown: Printed) -> list[Any]:
    return [cell for column in shown.columns for cell in column.cells]


def _nested(cell: Any) -> bool:
    return isinstance(cell, Printed | Group)


def _words(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(cell).plain if isinstance(cell, str) else ""
