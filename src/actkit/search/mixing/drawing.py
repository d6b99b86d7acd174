"""Pictures of mixes: what each part of a model can stand, and what each mix gave it, as grids of blocks.

A column is a block, a row the layers that read one tensor. Titles of cells say the numbers, for whoever points at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container

from actkit.core.page.pictures import FAINT, FULL, grid
from actkit.search.mixing.mixing import AS_IT_IS, Mix, Mixing

DECADES = 3.0  # of damage between the two
COLOURS = ("c7", "c0", "c1", "c2", "c3", "c4", "c5", "c6")  # of the page; the first is for what is as it was

Cell = Callable[[int], tuple[str, float, str]]  # of a position: colour, opacity, words


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


def _grid(mixing: Mixing, label: str, cell: Cell, dots: Container[int] = ()) -> str:
    rows = list(dict.fromkeys(place.name for place in mixing.places))
    columns = sorted({place.block for place in mixing.places})
    positions = {(place.name, place.block): at for at, place in enumerate(mixing.places)}

    def at(row: int, column: int) -> tuple[str, float, str, bool] | None:
        position = positions.get((rows[row], columns[column]))
        if position is None:
            return None
        colour, opacity, text = cell(position)
        return colour, opacity, f"block {columns[column]}, {rows[row]}: {text}", position in dots

    return grid(rows, [str(block) for block in columns], label, at)
