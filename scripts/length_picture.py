"""Draw docs/functions/softplus-attention.svg: loss by length, from the recorded evidence; no library is needed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLOURS = {"softmax": "#c0392b", "LSSA": "#e67e22", "LSSAR": "#2471a3", "softmax, re-weighted": "#8e44ad"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 60, 180, 20, 45


def courses() -> tuple[list[int], dict[str, list[float]]]:
    """The lengths, and the losses of each arm."""
    claims = json.loads((ROOT / "src/actkit/claims/evidence/softplus-attention.json").read_text())["claims"]
    lengths: list[int] = []
    found: dict[str, list[float]] = {}
    for here in (claim["here"] for claim in claims if claim["here"].count("read at") and ";" in claim["here"]):
        head, _, rest = here.removeprefix("read at ").partition(": ")
        lengths = [int(each) for each in head.split(", ")]
        for name in COLOURS:
            match = re.search(rf"(?:^|; ){re.escape(name)} ([\d., ]+)", rest)
            if match:
                found[name] = [float(each) for each in match[1].split(", ")]
    return lengths, found


def draw() -> str:
    """The picture as SVG."""
    lengths, found = courses()
    low = math.floor(2 * min(min(losses) for losses in found.values())) / 2
    high = math.ceil(2 * max(max(losses) for losses in found.values())) / 2

    def x(length: int) -> float:
        share = math.log(length / lengths[0]) / math.log(lengths[-1] / lengths[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for step in range(round(2 * (high - low)) + 1):
        loss = low + step / 2
        parts.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.1f}</text>')
    for length in lengths:
        parts.append(f'<text x="{x(length):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{length}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">tokens read (trained at 64)</text>')
    parts.append(f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle">')
    parts.append("loss of the last 64 tokens (nats)</text>")
    ends: list[float] = []  # of the names, kept apart
    for name, losses in sorted(found.items(), key=lambda each: -each[1][-1]):
        points = " ".join(f"{x(length):.1f},{y(loss):.1f}" for length, loss in zip(lengths, losses, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="2.5"/>')
        ends.append(max(y(losses[-1]), ends[-1] + 15 if ends else 0))
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{ends[-1] + 4:.1f}" fill="{COLOURS[name]}">{name}</text>')
    return "\n".join((*parts, "</svg>")) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/functions/softplus-attention.svg").write_text(draw())
