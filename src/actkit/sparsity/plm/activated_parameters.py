"""How many parameters a token uses, if units of an MLP that are exactly 0 are not read (2025, arXiv:2503.12167).

    activated = all - sum over layers of  zeros * (weights of down  +  weights before the activation, if predicted)

zeros is the share of the units of a layer that are exactly 0, the mean over tokens. The down projection's are known
when it is computed and are left out exactly; what stands before the activation could be left out only by a predictor of
its zeros. So both numbers are given, and the first is what the decoder here reads.

When to use it: to compare models by what a token costs, as the paper does. `neuron_activity` says more about the units.
Cost: one pass over the data, in evaluation mode; an integer per unit and layer.
Settled here: embeddings count as parameters, and as read, although a token reads one row: so the numbers of models with
equal vocabularies compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import CoverageError
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Density

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

HIDDEN = "mlp.hidden"


@dataclass(frozen=True)
class LayerParameters:
    """One MLP.

    Attributes:
        site: where its units were read.
        zeros: share of them that are exactly 0, the mean over tokens.
        before: weights before the activation.
        down: weights of the down projection.
    """

    site: str
    zeros: float
    before: int
    down: int


@dataclass(frozen=True)
class ActivatedParameters:
    """The parameters that a token uses.

    Attributes:
        layers: the MLPs.
        dense: all parameters of the model.
    """

    layers: tuple[LayerParameters, ...]
    dense: int

    @property
    def zeros(self) -> float:
        """Mean of the layers' shares."""
        return mean(layer.zeros for layer in self.layers)

    @property
    def activated(self) -> float:
        """Parameters that a token uses if the down projections leave zeros out."""
        return self.dense - sum(layer.zeros * layer.down for layer in self.layers)

    @property
    def predicted(self) -> float:
        """The same if a perfect predictor also said what to leave out before the activation."""
        return self.dense - sum(layer.zeros * (layer.down + layer.before) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        totals = {"dense": self.dense, "activated": self.activated, "predicted": self.predicted, "zeros": self.zeros}
        return {**totals, "layers": [asdict(layer) for layer in self.layers]}

    def table(self) -> Table:
        """A row per layer, and the sums."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"{self.activated:,.0f} of {self.dense:,} parameters per token; {self.predicted:,.0f} if predicted"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        for name in ("zeros", "before", "down"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            table.add_row(
                layer.site.removesuffix(f".{HIDDEN}"), f"{layer.zeros:.1%}", f"{layer.before:,}", f"{layer.down:,}"
            )
        return table

    def figure(self) -> Figure:
        """Draw the zeros by layer.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects

        names = all_plain([layer.site for layer in self.layers])
        figure = graph_objects.Figure(graph_objects.Bar(x=names, y=[layer.zeros for layer in self.layers]))
        return figure.update_yaxes(title="units that are exactly 0", tickformat=".0%")


def activated_parameters(model: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> ActivatedParameters:
    """Count the parameters that a token uses.

    Args:
        model: with MLPs that the anatomy describes.
        batches: text, padding left out.
        progress: show a bar.

    Returns:
        The counts.

    Raises:
        CoverageError: there is no MLP.
    """
    blocks = {block.index: block.mlp for block in anatomy(model).blocks if block.mlp is not None}
    if not blocks:
        raise CoverageError("model: the anatomy shows no MLP in it, so that no unit can be counted; give another.")
    seen = record(model, {HIDDEN: Density()}, sequence_of(batches, "batches"), progress=progress)
    layers = []
    for index, mlp in blocks.items():
        before = sum(linear.in_features * linear.out_features for linear in mlp.inputs)
        down = mlp.down.in_features * mlp.down.out_features
        site = Site(HIDDEN, index)
        layers.append(LayerParameters(str(site), 1 - seen[site].density, before, down))
    return ActivatedParameters(tuple(layers), sum(parameter.numel() for parameter in model.parameters()))
