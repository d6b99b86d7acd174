"""What an analysis gives back: one protocol, so that whoever shows, draws or keeps results knows one kind of thing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@runtime_checkable
class Result(Protocol):
    """The frozen result of an analysis. `actkit.testing.check_analysis` asks for more than the three names."""

    def table(self) -> Table:
        """For a terminal: what `rich` prints; a page of several parts is one `Table.grid`."""

    def figure(self) -> Figure:
        """Draw it for a browser.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
