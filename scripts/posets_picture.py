"""Draw docs/functions/posets.svg: the Hasse diagrams of the 16 posets on four points, with their up-sets."""

from __future__ import annotations

from pathlib import Path

from actkit.functions.posets.poset import LETTERS, NAMES, Poset

ROOT = Path(__file__).parents[1]
CELL, COLUMNS, RADIUS = 120, 8, 9


def levels(poset: Poset) -> list[int]:
    """How many points at most are below each."""
    found = [0] * poset.n
    for _ in range(poset.n):
        for low, high in poset.relations:
            found[high] = max(found[high], found[low] + 1)
    return found


def places(poset: Poset) -> dict[int, tuple[float, float]]:
    """Where each point stands in its cell, what is above higher up."""
    level, found = levels(poset), {}
    for height in set(level):
        row = [point for point in range(poset.n) if level[point] == height]
        for index, point in enumerate(row):
            found[point] = (CELL * (index + 1) / (len(row) + 1), CELL - 32 - 24 * height)
    return found


def draw() -> str:
    """The picture as SVG."""
    names = {number: name for name, number in NAMES.items()}
    rows = -(-16 // COLUMNS)
    width, height = CELL * COLUMNS, (CELL + 34) * rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" text-anchor="middle"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for number, poset in enumerate(Poset.all(4)):
        left, top = CELL * (number % COLUMNS), (CELL + 34) * (number // COLUMNS)
        place = {point: (left + x, top + y) for point, (x, y) in places(poset).items()}
        for low, high in poset.cover():
            (x1, y1), (x2, y2) = place[low], place[high]
            parts.append(f'<path d="M{x1:.0f} {y1:.0f}L{x2:.0f} {y2:.0f}" stroke="#888" stroke-width="1.5"/>')
        for point, (x, y) in place.items():
            parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{RADIUS}" fill="#d6e4f0" stroke="#2471a3"/>')
            parts.append(f'<text x="{x:.0f}" y="{y + 4:.0f}">{LETTERS[point]}</text>')
        called = f"{number}: {names[number]}" if number in names else str(number)
        middle = left + CELL / 2
        parts.append(f'<text x="{middle:.0f}" y="{top + CELL:.0f}" font-weight="bold">{called}</text>')
        parts.append(
            f'<text x="{middle:.0f}" y="{top + CELL + 15:.0f}" fill="#666">{len(poset.upsets())} up-sets</text>'
        )
    return "\n".join((*parts, "</svg>")) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/functions/posets.svg").write_text(draw())
