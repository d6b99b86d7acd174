"""Pictures that several pages draw: lines over the places of a model, and grids of cells.

Small inline SVG that follows the page's colours and needs no script. Colours are CSS classes of the page
(`templates/style.css`): c0 to c7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from actkit.core.page.axes import number, scale, svg, upright

CELL, GAP, TOP = 18, 2, 20
FAINT, FULL = 0.06, 1.0  # opacity of the least and of the most
LONGEST_NAME, LETTER = 128, 6.4  # of a row beside a grid, in the picture's own units
DIGIT = 7.4  # of a number beside lines


def lines_over(
    lines: Sequence[Sequence[tuple[int, float]]], title: str, places: Sequence[int | str], logarithmic: bool
) -> str:
    """Draw lines over places, such as the blocks of a model.

    Args:
        lines: each of (index of the place, value).
        title: what is drawn.
        places: their names; what is no number is shown as its index from 1.
        logarithmic: over powers of ten; values of 0 and below count as the least.

    Returns:
        SVG.
    """
    width, height, bottom, top = 300, 170, 22, 8
    values = [value for line in lines for _, value in line if value > 0 or not logarithmic]
    y, ticks = upright(values, logarithmic, height - bottom, top)
    left = max(44, 8 + round(DIGIT * max((len(number(tick)) for tick in ticks), default=0)))
    x = scale(0, max(1, len(places) - 1), left + 6, width - 10)
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 4}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    numbered = all(isinstance(place, int) for place in places)
    for index in range(0, len(places), max(1, -(-len(places) // 8))):
        text = str(places[index]) if numbered else str(index + 1)
        middle = min(x(index), width - DIGIT * len(text) / 2)  # a long number at the end stays inside
        parts.append(f'<text class="tick" x="{middle:.1f}" y="{height - 6}" text-anchor="middle">{escape(text)}</text>')
    for which, line in enumerate(lines):
        points = [(x(place), y(value)) for place, value in line]
        if len(points) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline class="line c{which}" points="{path}"/>')
        parts += [f'<circle class="dot c{which}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in points]
    return svg(parts, title, width, height)


Cell = Callable[[int, int], tuple[str, float, str, bool] | None]


def grid(rows: Sequence[str], columns: Sequence[str], label: str, cell: Cell, *, upright_names: bool = False) -> str:
    """Draw a grid of cells whose titles say the numbers, for whoever points at them.

    Args:
        rows: their names.
        columns: their names; numbers stand above, as many as there is room for.
        label: what the grid shows.
        cell: of (row, column): colour, opacity, words, and whether it has a dot; None for no cell.
        upright_names: all names of columns, turned by 90 degrees.

    Returns:
        SVG.
    """
    step = CELL + GAP
    names = round(max(24.0, min(LONGEST_NAME, LETTER * max(map(len, rows), default=0)))) + 12
    longest = max(map(len, columns), default=0)
    top = TOP if not upright_names else round(LETTER * min(longest, 16)) + 12
    width, height = names + step * len(columns) + 4, top + step * len(rows) + 4
    every = 1 if upright_names else max(1, -(-len(columns) // 12))
    parts = []
    for at in range(0, len(columns), every):
        x, text = names + step * at + CELL / 2, escape(_shorter(columns[at], 16))
        if upright_names:
            turned = f'transform="translate({x + 4:.0f} {top - 6}) rotate(-90)"'
            parts.append(f'<text class="tick" {turned}>{text}</text>')
        else:
            parts.append(f'<text class="tick" x="{x:.0f}" y="13" text-anchor="middle">{text}</text>')
    for at, name in enumerate(rows):
        y = top + step * at + 13
        parts.append(
            f'<text class="tick" x="{names - 8}" y="{y}" text-anchor="end">{escape(_shorter(name, 20))}</text>'
        )
    for row in range(len(rows)):
        for column in range(len(columns)):
            found = cell(row, column)
            if found is None:
                continue
            colour, opacity, text, dotted = found
            x, y = names + step * column, top + step * row
            dot = f'<circle class="hole" cx="{x + CELL / 2}" cy="{y + CELL / 2}" r="3.5"/>' if dotted else ""
            parts.append(
                f'<g class="{colour}"><title>{escape(text)}</title><rect class="cell" x="{x}" y="{y}" width="{CELL}" '
                f'height="{CELL}" rx="3" fill-opacity="{opacity:.2f}"/>{dot}</g>'
            )
    sized = f"max-width:{round(1.3 * width)}px"  # few cells are not blown up to the page's width
    return svg(parts, label, width, height, sized)


def signed_grid(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    most: float | None = None,
) -> str:
    """Draw values of both signs: the stronger the colour, the larger; blue above 0, orange below.

    Args:
        values: [rows, columns].
        rows: their names.
        columns: their names, such as the tokens of a sentence.
        label: what is shown.
        most: the magnitude of full colour, for several grids of one scale; None for the largest here.

    Returns:
        SVG.
    """
    full = most or max((abs(value) for line in values for value in line), default=0.0) or 1.0

    def cell(row: int, column: int) -> tuple[str, float, str, bool]:
        value = values[row][column]
        opacity = FAINT + (FULL - FAINT) * min(1.0, abs(value) / full)
        return "c0" if value >= 0 else "c3", opacity, f"{rows[row]}, {columns[column]}: {value:.4g}", False

    return grid(rows, columns, label, cell, upright_names=True)


def _shorter(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
