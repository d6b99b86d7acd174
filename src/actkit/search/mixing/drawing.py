"""Pictures of mixes: what each part of a model can stand, and what each mix gave it, as grids of blocks.

A column is a block, a row the layers that read one tensor. Titles of cells say the numbers, for whoever points at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from actkit.search.mixing.mixing import AS_IT_IS, Mix, Mixing

CELL, GAP, NAMES, TOP = 18, 2, 128, 20
FAINT, FULL = 0.06, 1.0  # opacity of the least and of the most damage
DECADES = 3.0  # of damage between the two
COLOURS = ("c7", "c0", "c1", "c2", "c3", "c4", "c5", "c6")  # of the page; the first is for what is as it was


def damage_grid(mixing: Mixing, name: str) -> str:
    """Draw the damage that an ingredient does at each place: the darker, the more.

    Args:
        mixing: with ingredients.
        name: of the ingredient.

    Returns:
        SVG.
    """
    values = mixing.damage_of(name)
    most = max(values)

    def cell(position: int) -> tuple[str, float, str]:
        value = values[position]
        depth = 0.0 if value <= 0 or not most else 1 + math.log10(value / most) / DECADES
        opacity = FAINT + (FULL - FAINT) * max(0.0, min(1.0, depth))
        return "c3", opacity, f"{value:.2g} nats per token, {value / most:.0%} of the most" if most else "no damage"

    return _grid(mixing, f"Damage of {name}", cell)


def chosen_grid(mixing: Mixing, mix: Mix) -> str:
    """Draw what a mix gave each place; a dot says that it also selects inputs.

    Args:
        mixing: that made it.
        mix: the mix.

    Returns:
        SVG.
    """
    colours = colours_of(mixing)

    def cell(position: int) -> tuple[str, float, str]:
        option = mix.options[position]
        storage = storage_of(option, mixing)
        return colours[storage], 0.25 if storage == AS_IT_IS else 0.9, option

    dots = {position for position, option in enumerate(mix.options) if selection_of(option, mixing)}
    return _grid(mixing, f"What {mix.name} gives each part", cell, dots)


def colours_of(mixing: Mixing) -> dict[str, str]:
    """Return the colour of each way to store weights, for pictures and their legend."""
    storages = [AS_IT_IS, *(each.name for each in mixing.ingredients if each.slot == "weight")]
    return {name: COLOURS[min(at, len(COLOURS) - 1)] for at, name in enumerate(storages)}


def storage_of(option: str, mixing: Mixing) -> str:
    """Return how an option stores weights."""
    parts = option.split(" over ")
    return next((x.name for x in mixing.ingredients if x.slot == "weight" and x.name in parts), AS_IT_IS)


def selection_of(option: str, mixing: Mixing) -> str:
    """Return how an option selects inputs; '' if it does not."""
    parts = option.split(" over ")
    return next((x.name for x in mixing.ingredients if x.slot == "select" and x.name in parts), "")


Cell = Callable[[int], tuple[str, float, str]]


def _grid(mixing: Mixing, label: str, cell: Cell, dots: Sequence[int] | set[int] = ()) -> str:
    rows = list(dict.fromkeys(place.name for place in mixing.places))
    columns = sorted({place.block for place in mixing.places})
    step = CELL + GAP
    width, height = NAMES + step * len(columns) + 4, TOP + step * len(rows) + 4
    every = max(1, math.ceil(len(columns) / 12))
    parts = [
        f'<text class="tick" x="{NAMES + step * at + CELL / 2:.0f}" y="13" text-anchor="middle">{block}</text>'
        for at, block in enumerate(columns)
        if at % every == 0
    ]
    parts += [
        f'<text class="tick" x="{NAMES - 8}" y="{TOP + step * at + 13}" text-anchor="end">{escape(name)}</text>'
        for at, name in enumerate(rows)
    ]
    for position, place in enumerate(mixing.places):
        x, y = NAMES + step * columns.index(place.block), TOP + step * rows.index(place.name)
        colour, opacity, text = cell(position)
        title = f"block {place.block}, {place.name}: {text}"
        parts.append(
            f'<g class="{colour}"><title>{escape(title)}</title><rect class="cell" x="{x}" y="{y}" width="{CELL}" '
            f'height="{CELL}" rx="3" fill-opacity="{opacity:.2f}"/>'
            + (f'<circle class="hole" cx="{x + CELL / 2}" cy="{y + CELL / 2}" r="3.5"/>' if position in dots else "")
            + "</g>"
        )
    sized = f'style="max-width:{round(1.3 * width)}px"'  # few blocks are not blown up to the page's width
    opening = f'<svg viewBox="0 0 {width} {height}" {sized} role="img" aria-label="{escape(label, quote=True)}">'
    return opening + "".join(parts) + "</svg>"
