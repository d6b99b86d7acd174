"""The gallery shows what is registered, and its picture what the records compute."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from actkit.core.layers.activations import activation_function

ROOT = Path(__file__).parents[2]
PICTURE, PAGE = (ROOT / "docs" / "functions" / name for name in ("gallery.svg", "gallery.md"))


def test_every_function_is_in_the_gallery() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "function_gallery.py"))
    again = "run python scripts/function_gallery.py"
    shown = re.findall(r'text-anchor="middle">(.*?)<', PICTURE.read_text(encoding="utf-8"))
    assert shown == list(script["drawn"]()), again
    page = PAGE.read_text(encoding="utf-8")
    assert script["written"](page) == page, again


def test_a_panel_is_the_function() -> None:
    """The last polyline of a panel, mapped back, against the function; where it jumps, the line ends."""
    script = runpy.run_path(str(ROOT / "scripts" / "function_gallery.py"))
    for name, pieces in (("tanh", 1), ("hardshrink", 3)):
        record = activation_function(name)
        lines = [part for part in script["_panel"](name, record, 0.0, 0.0) if "#0072B2" in part]
        assert len(lines) == pieces
        for each in lines:
            for pair in re.findall(r"([\d.]+),([\d.]+)", each.partition('"')[2].partition('"')[0]):
                x, y = -4 + float(pair[0]) / 112 * 8, 4 - float(pair[1]) / 102 * 6
                assert abs(record.at(x) - y) < 0.01 or min(abs(x - 0.5), abs(x + 0.5)) < 0.06
