"""The picture of docs/mixed-recipes.md, from results/optimize.json: python benchmarks/optimize_page.py."""

from __future__ import annotations

import json
from math import log10
from pathlib import Path

import svg

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 620, 380, 60, 20, 46
KINDS = (("random", "30 mixes by chance", 1), ("uniform", "one setting everywhere", 0), ("mixed", "mixes as chosen", 3))
LEAST, MOST = 0.004, 2.0  # of the losses that are drawn
FEWEST, ALL = 0.25, 1.0  # of the bytes


def main() -> None:
    """Draw it."""
    record = json.loads((ROOT / "benchmarks" / "results" / "optimize.json").read_text())["smollm2"]

    def x(share: float) -> float:
        return LEFT + (share - FEWEST) / (ALL - FEWEST) * (WIDTH - LEFT - 20)

    def y(loss: float) -> float:
        height = log10(min(MOST, max(LEAST, loss)) / LEAST) / log10(MOST / LEAST)
        return HEIGHT - BOTTOM - height * (HEIGHT - BOTTOM - TOP)

    parts = []
    for loss in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
        parts.append(svg.line([(LEFT, y(loss)), (WIDTH - 20, y(loss))], "#e0e0e0", width=1))
        parts.append(svg.text(LEFT - 6, y(loss) + 4, f"{loss:.1%}" if loss < 0.01 else f"{loss:.0%}", "end"))
    for percent in range(30, 101, 10):
        parts.append(svg.text(x(percent / 100), HEIGHT - BOTTOM + 18, f"{percent} %"))
    parts.append(svg.text((LEFT + WIDTH) / 2, HEIGHT - 8, "bytes read per token, of the original's"))
    for at, (kind, words, colour) in enumerate(KINDS):
        points = sorted((x(each["read"]), y(each["loss"])) for each in record[kind])
        if kind == "mixed":
            parts.append(svg.line(points, svg.COLOURS[colour]))
        parts += [svg.circle(*point, svg.COLOURS[colour], 4) for point in points]
        parts.append(svg.circle(WIDTH - 190, TOP + 14 + 18 * at, svg.COLOURS[colour], 4))
        parts.append(svg.text(WIDTH - 180, TOP + 18 + 18 * at, words, "start"))
    (ROOT / "docs" / "assets" / "mixed-recipes.svg").write_text(svg.picture(WIDTH, HEIGHT, parts))


if __name__ == "__main__":
    main()
