"""Which node, or edge, of an S-KAN chose which basis (2024, arXiv:2408.08338).

When to use it: after a training under `choose_basis`, or in its midst, to see what was chosen and what pruning saves.
Cost: no pass over data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.ground.figures import plotly
from actkit.functions.s_kan.edges import PrunedEdges
from actkit.functions.s_kan.s_kan_layer import PrunedLayer, SKanLayer

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from rich.table import Table


@dataclass(frozen=True)
class LayerChoice:
    """What the nodes of one layer chose.

    Attributes:
        path: of the layer.
        chosen: the basis of each node; of each edge, node by node, if edges choose.
        pruned: whether the other bases are gone.
        parameters: of the layer now.
    """

    path: str
    chosen: tuple[str, ...]
    pruned: bool
    parameters: int

    @property
    def counts(self) -> dict[str, int]:
        """Nodes, or edges, by basis, the most chosen first."""
        names = sorted(set(self.chosen), key=lambda name: (-self.chosen.count(name), name))
        return {name: self.chosen.count(name) for name in names}


@dataclass(frozen=True)
class BasisChoice:
    """What `basis_choice` found.

    Attributes:
        layers: in the order of the model.
    """

    layers: tuple[LayerChoice, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"layers": [{**asdict(layer), "chosen": list(layer.chosen)} for layer in self.layers]}

    def table(self) -> Table:
        """A row per layer and basis, for a terminal."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title="Bases that nodes, or edges, chose", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("layer", "basis", "count", "which", "parameters"):
            table.add_column(name, justify="right" if name in ("count", "parameters") else "left")
        for layer in self.layers:
            for row, (name, count) in enumerate(layer.counts.items()):
                which = ", ".join(str(node) for node, each in enumerate(layer.chosen) if each == name)
                size = f"{layer.parameters:,}{'' if layer.pruned else ' (all bases)'}"
                table.add_row(layer.path if not row else "", name, str(count), which, size if not row else "")
        return table

    def figure(self) -> go.Figure:
        """Draw the nodes of each layer by basis.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        go = plotly().graph_objects
        names = list(dict.fromkeys(name for layer in self.layers for name in layer.counts))
        paths = [layer.path for layer in self.layers]
        figure = go.Figure(
            [go.Bar(name=name, x=paths, y=[layer.counts.get(name, 0) for layer in self.layers]) for name in names]
        )
        return figure.update_layout(barmode="stack", xaxis_title="layer", yaxis_title="nodes")


def basis_choice(model: nn.Module) -> BasisChoice:
    """Say which bases the nodes of a model's S-KAN layers chose.

    Args:
        model: before or after pruning.

    Returns:
        The choice, with a table and a figure.

    Raises:
        UnsupportedModelError: the model has no such layer.
    """
    found = [
        LayerChoice(
            path or "model",
            tuple(module.selection()),
            isinstance(module, PrunedLayer | PrunedEdges),
            sum(parameter.numel() for parameter in module.parameters()),
        )
        for path, module in model.named_modules()
        if isinstance(module, SKanLayer | PrunedLayer | PrunedEdges)
    ]
    if not found:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} has no S-KAN layer, so that nothing was chosen; give one with SKanLayers."
        )
    return BasisChoice(tuple(found))
