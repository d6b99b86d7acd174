"""Axes of pictures: scales, round ticks, the frame, and the element around all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 560, 400
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 18, 46

Scale = Callable[[float], float]


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """Return what takes values from low to high to places from start to end."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    raw = (high - low) / about or 1.0
    power = 10.0 ** floor(log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = -floor(-low / step)
    return [round(index * step, 12) for index in range(first, floor(high / step + 1e-9) + 1)]


def upright(values: Sequence[float], logarithmic: bool, start: float, end: float) -> tuple[Scale, list[float]]:
    """An axis for values, from 0 or over powers of ten; with its ticks."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    if logarithmic:
        first, last = floor(log10(low)), floor(log10(high)) + 1
        powers = scale(first, last, start, end)
        tens = [10.0**power for power in range(first, last + 1)]
        return lambda value: powers(log10(max(value, 10.0**first))), tens[:: max(1, len(tens) // 4)]
    low, high = min(0.0, low), max(1.05 * high, 1e-9)
    return scale(low, high, start, end), ticks(low, high, 4)


def frame(xs: Sequence[float], x: Scale, ys: Sequence[float], y: Scale, percent: bool) -> str:
    """Lines and numbers of the ticks of both axes."""
    parts = []
    for tick in ys:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        text = f"{100 * tick:g}%" if percent else number(tick)
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in xs:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        text = f"{100 * tick:g}%" if percent else number(tick)
        middle = f'x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle"'
        parts.append(f'<text class="tick" {middle}>{text}</text>')
    return "".join(parts)


def titles(x_title: str, y_title: str) -> str:
    """What the two axes show."""
    middle = (LEFT + WIDTH - RIGHT) / 2
    across = f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
    up = f'<text class="axis" transform="translate(14 {(HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
    return f"{across}{up}{escape(y_title)}</text>"


def number(value: float) -> str:
    """A tick in words."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def svg(parts: Iterable[str], label: str, width: int = WIDTH, height: int = HEIGHT, style: str = "") -> str:
    """The element around a picture's parts.

    Args:
        parts: SVG.
        label: what the picture shows, for who does not see it.
        width: in the picture's own units.
        height: the same.
        style: of the element.
    """
    styled = f' style="{style}"' if style else ""
    opening = f'<svg viewBox="0 0 {width} {height}"{styled} role="img" aria-label="{escape(label, quote=True)}">'
    return opening + "".join(parts) + "</svg>"
