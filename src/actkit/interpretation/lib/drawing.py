"""The picture of an interaction graph: layers side by side, their directions below each other, edges between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from actkit.core.page.axes import svg

MOST = 60  # edges of a pair of layers that are drawn
ACROSS, DOWN, MARGIN, TOP = 230, 15, 46, 34
COLOURS, OTHER = 7, "c7"
HALO = 'style="paint-order:stroke;stroke:var(--card);stroke-width:4px"'  # so that a number stands out from edges


def layered(
    names: Sequence[str],
    edges: Sequence[tuple[int, int, int, float]],
    module_of: Mapping[tuple[int, int], int],
    label: str,
) -> str:
    """Draw the graph.

    Args:
        names: of the layers, from left to right.
        edges: (layer, direction there, direction in the next layer, share), the strongest of each pair first.
        module_of: (layer, direction) -> its number, from 0.
        label: what is shown.

    Returns:
        SVG.
    """
    drawn = [edge for layer in range(len(names)) for edge in [each for each in edges if each[0] == layer][:MOST]]
    used = {(layer, start) for layer, start, _, _ in drawn} | {(layer + 1, end) for layer, _, end, _ in drawn}
    columns = [
        sorted((node for node in used if node[0] == at), key=lambda n: (module_of[n], n)) for at in range(len(names))
    ]
    tallest = max(len(column) for column in columns)
    width, height = 2 * MARGIN + ACROSS * (len(names) - 1), TOP + DOWN * tallest + 10
    place = {}
    for at, column in enumerate(columns):
        free = (tallest - len(column)) * DOWN / 2
        for row, node in enumerate(column):
            place[node] = MARGIN + ACROSS * at, TOP + free + DOWN * (row + 0.5)
    strongest = {layer: max(edge[3] for edge in drawn if edge[0] == layer) for layer in {edge[0] for edge in drawn}}
    parts = []
    for layer, start, end, share in reversed(drawn):
        (x1, y1), (x2, y2) = place[layer, start], place[layer + 1, end]
        mine, other = module_of[layer, start], module_of[layer + 1, end]
        colour = _colour(mine) if mine == other else OTHER
        strength = (share / strongest[layer]) ** 0.5
        said = f"{names[layer]} {start + 1} to {names[layer + 1]} {end + 1}: {share:.2%}"
        parts.append(
            f'<g class="{colour}"><title>{escape(said)}</title><line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" '
            f'y2="{y2:.1f}" stroke="currentColor" stroke-width="{0.6 + 3.4 * strength:.2f}" '
            f'stroke-opacity="{0.2 + 0.6 * strength:.2f}"/></g>'
        )
    for node, (x, y) in place.items():
        at, number = node
        said = f"{names[at]}, direction {number + 1}, module {module_of[node] + 1}"
        left = at < len(names) - 1
        text = f'x="{x - 9 if left else x + 9:.1f}" y="{y + 4:.1f}" text-anchor="{"end" if left else "start"}"'
        parts.append(
            f'<g class="{_colour(module_of[node])}"><title>{escape(said)}</title><circle class="dot" cx="{x:.1f}" '
            f'cy="{y:.1f}" r="5"/></g><text class="tick" {text} {HALO}>{number + 1}</text>'
        )
    for at, name in enumerate(names):
        anchor = "start" if at == 0 else "end" if at == len(names) - 1 else "middle"
        x = MARGIN + ACROSS * at + (-MARGIN + 4 if at == 0 else MARGIN - 4 if at == len(names) - 1 else 0)
        parts.append(f'<text class="tick" x="{x}" y="14" text-anchor="{anchor}">{escape(name)}</text>')
    return svg(parts, label, width, height, f"min-width:{width * 9 // 10}px;max-width:{width * 3 // 2}px")


def _colour(module: int) -> str:
    return f"c{module}" if module < COLOURS else OTHER
