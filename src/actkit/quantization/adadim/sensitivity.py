"""The squared gradient of the loss in every weight: which rows or columns of a layer rounding must spare.

    S_ij = mean over batches of (dL / dW_ij)^2

With a batch per document it approximates the Fisher information, and E_ij^2 S_ij what an error E costs. AdaDim (2023,
arXiv:2309.15531) looks at it to see whether sensitive weights lie in columns (input channels) or in rows.
Cost: a forward and a backward pass per batch, and as much memory as the weights in float32, twice. `layers` limits it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import DenseWeight
from actkit.core.model.anatomy import anatomy
from actkit.core.train.objective import Loss
from actkit.core.train.squared_gradients import squared_gradients

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from rich.table import Table

CHOSEN = 0.01  # share of the rows or columns whose weight in the whole is told


@dataclass(frozen=True, eq=False)
class LayerSensitivity:
    """How the sensitivity of a layer's weights is spread.

    Attributes:
        path: of the layer.
        map: float32 [out, in], the mean squared gradient of each weight.
        columns: share of the whole that the most sensitive 1 % of the columns (inputs) hold.
        rows: the same of the rows (outputs).
    """

    path: str
    map: Tensor
    columns: float
    rows: float

    @classmethod
    def of(cls, path: str, sensitivity: Tensor) -> LayerSensitivity:
        """Summarise a map [out, in]."""

        def share(sums: Tensor) -> float:
            largest = sums.topk(max(1, round(CHOSEN * len(sums)))).values
            return float(largest.sum() / sums.sum()) if bool(sums.any()) else 0.0

        return cls(path, sensitivity, share(sensitivity.sum(0)), share(sensitivity.sum(1)))


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What `weight_sensitivity` found.

    Attributes:
        layers: one per linear layer.
        batches: how many were seen.
    """

    layers: tuple[LayerSensitivity, ...]
    batches: int

    @property
    def maps(self) -> dict[str, Tensor]:
        """The maps by the layer's path."""
        return {layer.path: layer.map for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """The shares of each layer, as JSON takes them, without the maps."""
        layers = [{"path": layer.path, "columns": layer.columns, "rows": layer.rows} for layer in self.layers]
        return {"batches": self.batches, "layers": layers}

    def table(self) -> Table:
        """A row per layer, for a terminal."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Share of the squared gradients that 1 % of the columns or rows hold ({self.batches} batches)"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("layer", "columns (inputs)", "rows (outputs)"):
            table.add_column(name, justify="left" if name == "layer" else "right")
        for layer in self.layers:
            table.add_row(layer.path, f"{layer.columns:.1%}", f"{layer.rows:.1%}")
        return table

    def figure(self) -> go.Figure:
        """Draw both shares by layer.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        go = plotly().graph_objects
        paths = all_plain(layer.path for layer in self.layers)
        bars = [
            go.Bar(x=paths, y=[getattr(layer, name) for layer in self.layers], name=name)
            for name in ("columns", "rows")
        ]
        return go.Figure(bars).update_layout(yaxis={"title": "share held by 1 %", "tickformat": ".0%"})


def weight_sensitivity(
    model: nn.Module, batches: Iterable[Any], *, layers: str = "*", loss: Loss | None = None, progress: bool = True
) -> Sensitivity:
    """Square the gradients of the loss in the weights of linear layers, and average them over batches.

    Args:
        model: its weights are dense; nothing of it is changed.
        batches: with labels if the model is no language model; best one document each.
        layers: a pattern of paths.
        loss: of (model, batch), a scalar; None for that of the model's task.
        progress: show a bar.

    Returns:
        The maps and a summary of each.

    Raises:
        ValueError: no linear layer with dense weights has such a path.
        DataError: there is no batch, or a batch has no labels.
        NonFiniteError: a gradient is NaN or infinite.
    """
    given = sequence_of(batches)
    if not len(given):
        raise DataError("calibration data: 0 batches were given; pass at least one dict of the model's keywords.")
    view = anatomy(model, given[0])
    found = [linear for block in view.blocks for linear in view.block(block.index).linears()]
    weights = {linear.path: _dense(linear.module) for linear in found if fnmatchcase(linear.path, layers)}
    parameters = {path: weight for path, weight in weights.items() if weight is not None}
    if not parameters:
        paths = ", ".join(linear.path for linear in found[:8])
        raise ValueError(f"layers: {layers!r} matches no linear layer with dense weights; this model has {paths}, ...")
    means = squared_gradients(model, parameters, given, loss=loss, progress=progress)
    turned = {linear.path for linear in found if isinstance(linear.module, Conv1D)}
    maps = {path: mean.t() if path in turned else mean for path, mean in means.items()}
    return Sensitivity(tuple(LayerSensitivity.of(path, each) for path, each in maps.items()), len(given))


def _dense(module: nn.Module) -> nn.Parameter | None:
    if isinstance(module, ActLinear):
        return module.storage.tensor if isinstance(module.storage, DenseWeight) else None
    return module.weight  # type: ignore[return-value]
