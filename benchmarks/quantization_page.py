"""The table and the picture of benchmarks/quantization.py, from its recorded result.

python benchmarks/quantization_page.py [RESULT.json]   # writes docs/quantization/which-one.svg, and the table beside it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from svg import COLOURS, circle, line, picture, text

PAGE = Path(__file__).parents[1] / "docs" / "quantization" / "which-one.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
WIDTH, HEIGHT, LEFT, TOP = 520, 320, 60, 30  # of the panel and around it, in pixels
MOST_BITS, HIGHEST = 9.0, 2.5  # of the picture: bits per weight, and times the perplexity of bf16
DASHES = ("", "7 3", "2 3")
COLUMNS = {
    "bits": ("bits per weight", "{:.2f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "x bf16": ("times bf16's", "{:.3f}"),
    "interval": ("interval", "{}"),
    "seconds": ("seconds", "{:,.0f}"),
    "peak MB": ("peak beside the model", "{:,.0f} MB"),
    "weights MB": ("weight files", "{:,.0f} MB"),
    "tokens/s": ("tokens/s", "{:.0f}"),
}


def write(result: Mapping[str, Any]) -> None:
    """Write the picture, and the table into the page."""
    PAGE.with_suffix(".svg").write_text(plot(result["rows"]), encoding="utf-8")
    PAGE.write_text(page(result, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def page(result: Mapping[str, Any], before: str) -> str:
    """The page with what was measured between its two marks."""
    head, rest = before.split(BEGIN)
    lines = [["", *(title for title, _ in COLUMNS.values())], ["---"] * (1 + len(COLUMNS))]
    for row in result["rows"]:
        if row["missing"]:
            lines.append([row["row"], f"missing: {row['missing'].replace('|', '/')}", *[""] * (len(COLUMNS) - 1)])
            continue
        values = [(row.get(name), form) for name, (_, form) in COLUMNS.items()]
        lines.append([row["row"], *("" if value is None else form.format(value) for value, form in values)])
    targets = [["target", "bound", "measured", ""], ["---"] * 4]
    for each in result["targets"]:
        bound = f"{each['sense']} {each['target']:g}"
        targets.append([each["name"], bound, f"{each['value']:.2f}", "met" if each["met"] else "**missed**"])
    where, ran = result["machine"], any(row["row"].startswith("AutoRound") for row in result["rows"])
    iterations = f"; AutoRound with {result['iterations']} iterations" if ran else ""
    parts = [
        BEGIN,
        _table(lines),
        "![Loss of perplexity over bits per weight](which-one.svg)\n",
        _table(targets),
        f"Calibration on {result['calibration']} x 256 tokens, held-out text of {result['held_out']} x 256"
        f"{iterations}. {result['date'][:10]}, {where['processor']}, threads: {result['threads']}, "
        f"load {result['load']:.1f}, torch {result['versions']['torch']}, commit {result['commit']}.",
    ]
    return head + "\n".join(parts) + f"\n{END}" + rest.split(END)[1]


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity, as a multiple of bf16's, over bits per weight: a line per quantizer."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = row["row"].split(", ")
        if not row["missing"] and name[-1].endswith("bits") and row["bits"] <= MOST_BITS:
            curves.setdefault(", ".join(name[:-1]), []).append((row["bits"], row["x bf16"]))
    least = min(bits for curve in curves.values() for bits, _ in curve) - 0.1
    most = max(bits for curve in curves.values() for bits, _ in curve) + 0.1

    def place(bits: float, ratio: float) -> tuple[float, float]:
        x = LEFT + WIDTH * (bits - least) / (most - least)
        return x, TOP + HEIGHT * (HIGHEST - min(ratio, HIGHEST)) / (HIGHEST - 1)

    parts = [
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>',
        text(LEFT + WIDTH / 2, TOP - 12, "SmolLM2-135M: perplexity, times that of bf16 (lower is better)"),
        text(LEFT + WIDTH / 2, TOP + HEIGHT + 40, "bits per rounded weight, scales included"),
    ]
    for step in range(5):
        ratio = 1 + (HIGHEST - 1) * step / 4
        beyond = "+" if step == 4 and any(y > HIGHEST for curve in curves.values() for _, y in curve) else ""
        parts.append(text(LEFT - 6, place(least, ratio)[1] + 4, f"{ratio:.2f}{beyond}", "end"))
    for tenth in range(int(least * 2 + 1), int(most * 2) + 1):
        parts.append(text(place(tenth / 2, 1)[0], TOP + HEIGHT + 18, f"{tenth / 2:.1f}"))
    for index, (name, curve) in enumerate(curves.items()):
        colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS)]
        points = [place(*each) for each in sorted(curve)]
        parts += [line(points, colour, dashes), *(circle(x, y, colour, 4) for x, y in points)]
        y = TOP + 16 + 18 * index
        key = LEFT + WIDTH + 20
        parts += [line([(key, y - 4), (key + 28, y - 4)], colour, dashes), text(key + 36, y, name, "start")]
    return picture(LEFT + WIDTH + 290, TOP + HEIGHT + 55, parts)


def main(path: Path = common.RESULTS / "quantization.json") -> None:
    """Write what a record says; the full run's, if no other is given."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist; run python benchmarks/quantization.py first.")
    write(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
