"""Draw docs/interpretation/massive-activations.svg: the largest magnitudes of each block beside the median.

actkit analyze smollm2 massive_activations --sequences 8 --length 256 --out found.json
python scripts/massive_picture.py found.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLOURS = {"largest": "#c0392b", "third largest": "#e67e22", "median": "#2471a3"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 70, 120, 20, 45


def draw(found: dict) -> str:
    """The picture as SVG."""
    layers = found["layers"]
    lines = {
        "largest": [abs(layer["top"][0]["value"]) for layer in layers],
        "third largest": [abs(layer["top"][-1]["value"]) for layer in layers],
        "median": [layer["median"] for layer in layers],
    }
    low = math.floor(math.log10(min(map(min, lines.values()))))
    high = math.ceil(math.log10(max(map(max, lines.values()))))

    def x(block: int) -> float:
        return LEFT + block / (len(layers) - 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - math.log10(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for block in range(0, len(layers), 5):
        parts.append(f'<text x="{x(block):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{block}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">block</text>')
    parts.append(f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle">')
    parts.append("magnitude behind the block</text>")
    for name, values in lines.items():
        points = " ".join(f"{x(block):.1f},{y(value):.1f}" for block, value in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="2.5"/>')
        below = 14 if name == "third largest" else -2
        parts.append(
            f'<text x="{WIDTH - RIGHT + 8}" y="{y(values[-1]) + below:.1f}" fill="{COLOURS[name]}">{name}</text>'
        )
    return "\n".join((*parts, "</svg>")) + "\n"


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    (ROOT / "docs/interpretation/massive-activations.svg").write_text(draw(found))
