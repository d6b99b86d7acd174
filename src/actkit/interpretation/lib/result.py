"""What `lib` found: networks in their interaction bases, as a table, a page, a picture and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from actkit.core.ground.figures import plotly
from actkit.core.page.page import Page, Picture, Pictures
from actkit.core.page.page import Table as Sorted
from actkit.core.page.pictures import lines_over
from actkit.interpretation.lib.basis import Kind
from actkit.interpretation.lib.drawing import layered

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

KINDS: tuple[Kind, ...] = ("lib", "pca", "neuron")
NAMES = {"lib": "interaction basis", "pca": "principal components", "neuron": "neurons"}
SHORT = {"lib": "LIB", "pca": "PCA", "neuron": "neurons"}
SHOWN = (1, 4, 16, 64)  # directions kept, in the table


@dataclass(frozen=True)
class Curve:
    """How far predictions move if only so much is kept.

    Attributes:
        kept: directions or edges.
        divergence: in nats, a mean over held-out rows.
    """

    kept: tuple[int, ...]
    divergence: tuple[float, ...]


@dataclass(frozen=True)
class NodeLayer:
    """A layer of a network in its interaction basis.

    Attributes:
        name: of the layer.
        width: its neurons.
        importance: of each direction, falling; of an output, its channels' mean squares in their order.
        participation: over how many directions the importance spreads.
        nodes: by basis, for the most important directions; empty for the output.
        edges: by basis, for the strongest edges to the next layer; empty for the output.
        carrying: by basis, how many edges to the next layer carry 90 % of the interaction; empty for the output.
    """

    name: str
    width: int
    importance: tuple[float, ...]
    participation: float
    nodes: Mapping[str, Curve]
    edges: Mapping[str, Curve]
    carrying: Mapping[str, int]


@dataclass(frozen=True)
class Edge:
    """One edge of the graph.

    Attributes:
        layer: that it starts from; it ends in the next one.
        start: the direction there, from 0.
        end: the direction in the next layer.
        share: of the interaction of this pair of layers.
    """

    layer: int
    start: int
    end: int
    share: float


@dataclass(frozen=True)
class InteractionNetwork:
    """One network.

    Attributes:
        name: of what it is.
        layers: the output last.
        edges: of the graph, the strongest of each pair first.
        modules: communities of (layer, direction), the largest first.
        modularity: of them.
    """

    name: str
    layers: tuple[NodeLayer, ...]
    edges: tuple[Edge, ...]
    modules: tuple[tuple[tuple[int, int], ...], ...]
    modularity: float

    def module_of(self) -> dict[tuple[int, int], int]:
        """The number of the module of each (layer, direction) of the graph, from 0."""
        return {node: number for number, group in enumerate(self.modules) for node in group}


@dataclass(frozen=True)
class LocalInteraction:
    """Networks in their interaction bases.

    Attributes:
        rows: that each basis was found on.
        held_out: rows that predictions were compared on.
        directions: of each layer, between which edges were measured.
        networks: in their order.
    """

    rows: int
    held_out: int
    directions: int
    networks: tuple[InteractionNetwork, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)

    def table(self) -> Table:
        """A row per layer and basis: edges that carry the interaction, and how predictions move with few directions."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Interaction bases from {self.rows} rows; nats by which predictions of {self.held_out} others move"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        table.add_column("basis", no_wrap=True)
        for name in ("spread", "edges for 90 %", *(f"{count} kept" for count in SHOWN)):
            table.add_column(name, justify="right")
        for network in self.networks:
            for layer in network.layers[:-1]:
                name = f"{network.name} {layer.name} ({layer.width})"
                spread = f"{layer.participation:.1f}"
                for kind in KINDS:
                    moved = dict(zip(layer.nodes[kind].kept, layer.nodes[kind].divergence, strict=True))
                    cells = ("" if count not in moved else f"{moved[count]:.3f}" for count in SHOWN)
                    table.add_row(name, SHORT[kind], spread, f"{layer.carrying[kind]:,}", *cells)
                    name = spread = ""
        return table

    def page(self) -> Page:
        """The graph of each network, its curves beside those of the other bases, and all of its directions."""
        parts: list[Pictures | Sorted] = []
        legend = [(f"c{at}", NAMES[kind]) for at, kind in enumerate(KINDS)]
        for network in self.networks:
            joined = ", ".join(str(len(nodes)) for nodes in network.modules)
            drawn = layered(
                [f"{layer.name}, {layer.width} wide" for layer in network.layers],
                [(edge.layer, edge.start, edge.end, edge.share) for edge in network.edges],
                network.module_of(),
                f"graph of {network.name}",
            )
            parts.append(
                Pictures(
                    f"{network.name}: the graph",
                    [Picture("Directions of each layer, 1 the most important, and their interactions", drawn)],
                    f"The strongest edges that carry 90 % of the interaction between neighbouring layers (at most 60 "
                    f"of a pair are drawn), among the {self.directions} most important directions of each. Colours "
                    f"are modules (directions in each: {joined}; modularity {network.modularity:.2f}); grey edges "
                    f"join two.",
                )
            )
            curves = []
            for layer in network.layers[:-1]:
                curves.append(Picture(f"{layer.name}: directions kept", _curves(layer.nodes)))
                curves.append(Picture(f"{layer.name}: edges to the next layer kept", _curves(layer.edges)))
            about = (
                f"By how many nats the predictions of {self.held_out:,} held-out rows move if only the most important "
                f"directions, or the strongest edges between the {self.directions} most important ones, are kept."
            )
            parts.append(Pictures(f"{network.name}: what may be cut", curves, about, legend, small=True))
            parts.append(_listed(network))
        return Page(
            "Local interaction basis",
            f"{self.rows:,} rows. Directions that vary and that the next layer reads, and what they do to each other.",
            tuple(parts),
        )

    def figure(self) -> Figure:
        """Draw how predictions move with the directions that are kept.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        figure = graph_objects.Figure()
        for network in self.networks:
            for layer in network.layers[:-1]:
                for kind, curve in layer.nodes.items():
                    name = f"{network.name} {layer.name}: {NAMES[kind]}"
                    figure.add_trace(graph_objects.Scatter(x=curve.kept, y=curve.divergence, name=name))
        figure.update_xaxes(type="log", title="directions kept").update_yaxes(title="divergence in nats")
        return figure


def _curves(curves: Mapping[str, Curve]) -> str:
    places = sorted({kept for curve in curves.values() for kept in curve.kept})
    lines = [
        [(places.index(kept), value) for kept, value in zip(curve.kept, curve.divergence, strict=True)]
        for curve in curves.values()
    ]
    return lines_over(lines, "divergence in nats", places, False)


def _listed(network: InteractionNetwork) -> Sorted:
    owner = network.module_of()
    rows = []
    for at, layer in enumerate(network.layers):
        total = sum(layer.importance) or 1.0
        for number, importance in enumerate(layer.importance):
            if (at, number) not in owner and number >= 32:
                continue
            ins = [edge for edge in network.edges if edge.layer == at - 1 and edge.end == number]
            outs = [edge for edge in network.edges if edge.layer == at and edge.start == number]
            read = ", ".join(f"{edge.start + 1} ({edge.share:.1%})" for edge in ins[:3])
            sent = ", ".join(f"{edge.end + 1} ({edge.share:.1%})" for edge in outs[:3])
            group: int | str = owner[at, number] + 1 if (at, number) in owner else ""
            rows.append((layer.name, number + 1, importance / total, group, read, sent))
    headings = ("layer", "direction", "share of importance", "module", "strongest from", "strongest to")
    return Sorted(f"{network.name}: directions", headings, rows, "Shares in brackets are of the layers' interaction.")
