"""Charts of the figures that analyses draw: lines, bars and grids as small SVG, without plotly's four megabytes.

Panels, names and values are read off the figure; what else it says about its looks is left out, and so are traces of
other kinds than lines, bars and heat maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape, unescape
from math import isfinite, log10
from typing import Any

from actkit.core.page.axes import number, scale, svg, ticks, upright
from actkit.core.page.page import Picture, Pictures
from actkit.core.page.pictures import DIGIT, FAINT, FULL, grid

WIDTH, HEIGHT, TOP, BOTTOM, RIGHT = 420, 250, 10, 42, 12
COLOURS = 8  # classes c0 to c7
MOST_POINTS = 200  # of a line; of a longer one so many are drawn, evenly
MOST_DOTS = 60  # of a line; a longer one is a line alone

Point = tuple[float, float, str]  # place on the axis, value, the place in words


def charts(figure: Any) -> list[Pictures]:
    """Draw each panel of a figure.

    Args:
        figure: of plotly.

    Returns:
        Pictures of the panels, those of the same traces together, with a legend if there are few.
    """
    panels: dict[tuple[str, str], list[Any]] = {}
    for trace in figure.data:
        if trace.type in ("scatter", "scattergl", "bar", "heatmap"):
            panels.setdefault((trace.xaxis or "x", trace.yaxis or "y"), []).append(trace)
    titles = [_text(each.text) for each in figure.layout.annotations]
    groups: dict[tuple[str, ...], list[Picture]] = {}
    for index, ((x, y), traces) in enumerate(panels.items()):
        names = tuple(dict.fromkeys(_text(trace.name) for trace in traces if trace.name))
        across, up = (figure.layout[f"{name[0]}axis{name[1:]}"] for name in (x, y))
        above = titles[index] if len(titles) == len(panels) else _text(up.title.text)
        maps = [trace for trace in traces if trace.type == "heatmap"]
        drawn = _heat_map(maps[-1], above) if maps else _panel(traces, names, across, up, above, figure.layout.barmode)
        groups.setdefault(names, []).append(Picture(above, drawn))
    return [
        Pictures("Pictures", pictures, legend=[(_colour(at), name) for at, name in enumerate(names)])
        if len(names) <= COLOURS
        else Pictures("Pictures", pictures, "What is pointed at is named below.")
        for names, pictures in groups.items()
    ]


def _heat_map(trace: Any, label: str) -> str:
    values = [[_number(value) for value in row] for row in trace.z]
    rows = [_text(each) for each in trace.y] if trace.y is not None else [str(at) for at in range(len(values))]
    width = max(map(len, values), default=0)
    columns = [_text(each) for each in trace.x] if trace.x is not None else [str(at) for at in range(width)]
    most = max((abs(value) for row in values for value in row if value is not None), default=0.0) or 1.0

    def cell(row: int, column: int) -> tuple[str, float, str, bool] | None:
        value = values[row][column] if column < len(values[row]) else None
        if value is None:
            return None
        opacity = FAINT + (FULL - FAINT) * abs(value) / most
        return "c0" if value >= 0 else "c3", opacity, f"{rows[row]}, {columns[column]}: {value:.4g}", False

    return grid(rows, columns, label, cell)


def _panel(traces: Sequence[Any], names: Sequence[str], across: Any, up: Any, label: str, mode: str | None) -> str:
    """Lines and bars over one pair of axes."""
    given = [(trace, *_values(trace)) for trace in traces]
    places = list(dict.fromkeys(place for _, x, _ in given for place in x))
    numeric = all(trace.type != "bar" for trace in traces) and all(_number(place) is not None for place in places)
    logarithmic, powers = up.type == "log", across.type == "log" and numeric and min(map(float, places)) > 0
    at = {place: log10(place) if powers else float(place) if numeric else index for index, place in enumerate(places)}
    spreads = [_spread(trace, y) for trace, _, y in given]
    stacked = mode == "stack"
    seen = [value for _, _, y in given for value in y if value is not None]
    seen += [end for spread in spreads for ends in spread if ends for end in ends]
    bars = [(trace, x, y) for trace, x, y in given if trace.type == "bar"]
    if stacked and bars:
        seen += [sum(dict(zip(x, y, strict=True)).get(place) or 0.0 for _, x, y in bars) for place in places]
    y_scale, y_ticks = upright([v for v in seen if v > 0 or not logarithmic], logarithmic, HEIGHT - BOTTOM, TOP)
    percent = (up.tickformat or "").endswith("%")
    words = [f"{100 * tick:g}%" if percent else number(tick) for tick in y_ticks]
    left = max(36, 12 + round(DIGIT * max(map(len, words), default=0)))
    ends = (min(at.values(), default=0.0), max(at.values(), default=1.0)) if numeric else (-0.5, len(places) - 0.5)
    x_scale = scale(*ends, left + 6, WIDTH - RIGHT)
    parts = [
        f'<line class="grid" x1="{left}" x2="{WIDTH - 4}" y1="{y_scale(tick):.1f}" y2="{y_scale(tick):.1f}"/>'
        f'<text class="tick" x="{left - 5}" y="{y_scale(tick) + 4:.1f}" text-anchor="end">{text}</text>'
        for tick, text in zip(y_ticks, words, strict=True)
    ]
    for where, text in _below(places, numeric, powers, ends):
        parts.append(
            f'<text class="tick" x="{x_scale(where):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>'
        )
    title = _text(across.title.text) or ("" if numeric or not places else f"1 is {_text(places[0])}")
    parts.append(
        f'<text class="axis" x="{(left + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(title)}</text>'
    )
    floor: dict[Any, float] = {}
    for (trace, x, y), spread in zip(given, spreads, strict=True):
        name = _text(trace.name) if trace.name else ""
        colour = _colour(names.index(name) if name in names else 0)

        def said(place: Any, value: float, name: str = name) -> str:
            return escape(f"{', '.join(each for each in (name, _text(place)) if each)}: {value:.4g}")

        points = [
            (at[place], value, said(place, value)) for place, value in zip(x, y, strict=True) if value is not None
        ]
        if trace.type == "bar":
            width = 0.8 * (x_scale(1) - x_scale(0)) / (1 if stacked else len(bars))
            shift = (
                0.0 if stacked else (next(i for i, each in enumerate(bars) if each[0] is trace) - (len(bars) - 1) / 2)
            )
            for where, value, text in points:
                below = floor.get(where, 0.0) if stacked else 0.0
                floor[where] = below + value
                one, other = sorted((y_scale(below), y_scale(below + value)))
                box = f'x="{x_scale(where) + width * (shift - 0.5):.1f}" y="{one:.1f}" width="{width:.1f}"'
                parts.append(
                    f'<g class="{colour}"><title>{text}</title>'
                    f'<rect class="cell" {box} height="{max(0.5, other - one):.1f}"/></g>'
                )
            for place, low_high in zip(x, spread, strict=True):
                if low_high:
                    middle = x_scale(at[place]) + width * shift
                    low, high = map(y_scale, low_high)
                    parts.append(f'<path class="interval" d="M{middle:.1f} {low:.1f}V{high:.1f}"/>')
        else:
            parts += _line([each for each in points if each[1] > 0 or not logarithmic], colour, x_scale, y_scale, trace)
    return svg(parts, label or title, WIDTH, HEIGHT, f"max-width:{round(1.5 * WIDTH)}px")


def _line(
    points: Sequence[Point], colour: str, x: Callable[[float], float], y: Callable[[float], float], trace: Any
) -> list[str]:
    if len(points) > MOST_POINTS:
        points = [points[round(at * (len(points) - 1) / (MOST_POINTS - 1))] for at in range(MOST_POINTS)]
    parts = []
    if "lines" in (trace.mode or "lines"):
        path = " ".join(f"{x(where):.1f},{y(value):.1f}" for where, value, _ in points)
        dashed = ' stroke-dasharray="5 4"' if trace.line.dash else ""
        parts.append(f'<polyline class="line {colour}"{dashed} points="{path}"/>')
    if len(points) <= MOST_DOTS:
        parts += [
            f'<g class="{colour}"><title>{text}</title><circle class="dot" cx="{x(where):.1f}" cy="{y(value):.1f}" '
            f'r="2.6"/></g>'
            for where, value, text in points
        ]
    return parts


def _below(
    places: Sequence[Any], numeric: bool, powers: bool, ends: tuple[float, float]
) -> Iterable[tuple[float, str]]:
    """The ticks of the axis across: what has no number is counted from 1."""
    if not numeric:
        every = max(1, -(-len(places) // 12))
        return [(index, str(index + 1)) for index in range(0, len(places), every)]
    if powers:
        return [(log10(place), number(place)) for place in places[:: max(1, -(-len(places) // 6))]]
    return [(tick, number(tick)) for tick in ticks(*ends, 6)]


def _values(trace: Any) -> tuple[list[Any], list[float | None]]:
    values = [_number(value) for value in (trace.y if trace.y is not None else [])]
    return (list(range(len(values))) if trace.x is None else [*trace.x]), values


def _spread(trace: Any, values: Sequence[float | None]) -> list[tuple[float, float] | None]:
    """From where to where each value may be; None if nothing is said."""
    error = trace.error_y
    if error is None or error.array is None:
        return [None] * len(values)
    minus = error.array if error.arrayminus is None else error.arrayminus
    found = zip(values, error.array, minus, strict=True)
    return [None if value is None else (value - float(below), value + float(above)) for value, above, below in found]


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if isfinite(found) else None


def _text(value: Any) -> str:
    """A text as it was before it was escaped for plotly."""
    return "" if value is None else unescape(str(value))


def _colour(index: int) -> str:
    return f"c{index % COLOURS}"
