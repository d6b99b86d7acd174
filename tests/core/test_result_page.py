"""The page of a result that has none of its own: its tables and charts say what the result's table and figure say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import unescape
from itertools import pairwise
from typing import Any

import pytest
from rich.table import Table as Printed
from rich.text import Text

from actkit.core.ground.tables import PlainTable
from actkit.core.page.charts import charts
from actkit.core.page.page import LARGEST, Facts, Pictures, Table
from actkit.core.page.result_page import page_of

HOSTILE = "</script><b>[red]x[/red]</b>"


@dataclass(frozen=True)
class Found:
    shown: Any
    drawn: Any

    def table(self) -> Any:
        return self.shown

    def figure(self) -> Any:
        return self.drawn

    def to_dict(self) -> dict[str, Any]:
        return {}


def said(svg: str) -> list[str]:
    return [unescape(each) for each in re.findall(r"<title>(.*?)</title>", svg)]


def test_bars_are_as_high_as_their_values_and_named() -> None:
    go = pytest.importorskip("plotly.graph_objects")
    figure = go.Figure([go.Bar(name="a", x=["p", "q"], y=[1.0, 4.0]), go.Bar(name="b", x=["p", "q"], y=[2.0, 3.0])])
    (part,) = charts(figure)
    assert part.legend == [("c0", "a"), ("c1", "b")]
    svg = part.pictures[0].svg
    assert said(svg) == ["a, p: 1", "a, q: 4", "b, p: 2", "b, q: 3"]
    heights = [float(each) for each in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)]
    assert [each / heights[0] for each in heights] == pytest.approx([1, 4, 2, 3], abs=0.02)
    boxes = [(float(x), float(w)) for x, w in re.findall(r'<rect[^>]* x="([\d.]+)"[^>]* width="([\d.]+)"', svg)]
    ends = sorted(boxes)
    assert all(x + w <= other + 0.11 for (x, w), (other, _) in pairwise(ends))  # side by side
    stacked = charts(figure.update_layout(barmode="stack"))[0].pictures[0].svg
    tops = [(float(y), float(h)) for y, h in re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', stacked)]
    assert tops[2][0] + tops[2][1] == pytest.approx(tops[0][0], abs=0.2)  # b stands on a


def test_lines_on_a_logarithmic_axis_leave_out_what_is_not_there() -> None:
    go = pytest.importorskip("plotly.graph_objects")
    figure = go.Figure(go.Scatter(x=[1, 2, 3, 4], y=[1.0, None, 100.0, 0.0], mode="lines+markers"))
    svg = charts(figure.update_yaxes(type="log"))[0].pictures[0].svg
    assert said(svg) == ["1: 1", "3: 100"]
    (x1, y1), (x3, y3) = ((float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg))
    ticks = {text: float(y) - 4 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d,.]+)<', svg)}
    assert x1 < x3 and y1 == pytest.approx(ticks["1"], abs=0.2) and y3 == pytest.approx(ticks["100"], abs=0.2)
    long = charts(go.Figure([go.Scatter(y=list(range(50_000)), mode="lines") for _ in range(30)]))[0].pictures[0].svg
    assert len(long) < LARGEST / 10


def test_panels_are_pictures_and_heat_maps_grids() -> None:
    pytest.importorskip("plotly")
    from plotly.graph_objects import Heatmap, Scatter
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, subplot_titles=("left", "right"))
    figure.add_trace(Scatter(x=[0, 1], y=[-1.0, 1.0]), row=1, col=1)
    figure.add_trace(Heatmap(z=[[1.0, -2.0], [None, 0.0]], y=["one", "two"]), row=1, col=2)
    (part,) = charts(figure)
    assert [each.title for each in part.pictures] == ["left", "right"]
    assert said(part.pictures[1].svg) == ["one, 0: 1", "one, 1: -2", "two, 1: 0"]


def test_tables_within_tables_and_hostile_names(browser, tmp_path) -> None:
    from plotly.graph_objects import Figure, Scatter
    from selenium.webdriver import Keys

    from actkit.core.ground.figures import plain

    inner = PlainTable("name", "out-\nliers", title=HOSTILE, caption="about")
    inner.add_row(HOSTILE, Text("3", style="bold"))
    shown = Printed.grid()
    shown.add_row("[bold]words[/bold]")
    shown.add_row(inner)
    figure = Figure([Scatter(name=plain(name), x=[1, 2], y=[1.0, 2.0]) for name in (HOSTILE, "other")])
    page = page_of(Found(shown, figure), "Title", "model")
    pictures, table, facts = page.parts
    assert isinstance(pictures, Pictures) and isinstance(table, Table) and isinstance(facts, Facts)
    assert (table.title, table.columns, table.rows, table.about) == (
        HOSTILE, ["name", "outliers"], [[HOSTILE, "3"]], "about",
    )  # fmt: skip
    assert facts.rows == [("", "words")]
    (tmp_path / "page.html").write_text(page.html(), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    browser.execute_script("document.querySelector('.beside .scroll').focus()")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script("return document.querySelector('.pointed').textContent") == f"{HOSTILE}, 1: 1"
    assert not browser.execute_script("return document.querySelectorAll('td b, figure b').length")
    assert browser.get_log("browser") == []
