"""How much of what layers read lies in the directions that their adapters see.

    share of layer l = trace(Q C_l Q^T) / trace C_l,   rows of Q: an orthonormal basis of the rows of A_l

C_l is the scatter of the layer's inputs about their mean, on data that A was not made from. A random A of rank r in n
inputs explains r / n of white inputs; EVA's A the most that r directions of its own data can.
One pass over the data; the Gram matrices are held block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.ground.figures import all_plain, plotly
from actkit.finetuning.eva import EvaPlan, inputs_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class LayerVariance:
    """One layer.

    Attributes:
        path: of the layer.
        rank: of the directions.
        explained: share of the variance of its inputs that lies in them.
        most: the share that equally many principal directions of these inputs would explain.
    """

    path: str
    rank: int
    explained: float
    most: float


@dataclass(frozen=True)
class ExplainedVariance:
    """All layers.

    Attributes:
        layers: one each.
    """

    layers: tuple[LayerVariance, ...]

    @property
    def explained(self) -> float:
        """The mean over layers."""
        return mean(layer.explained for layer in self.layers)

    @property
    def most(self) -> float:
        """The mean over layers of what equally many principal directions would explain."""
        return mean(layer.most for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"explained": self.explained, "most": self.most, "layers": [asdict(layer) for layer in self.layers]}

    def table(self) -> Table:
        """A row per layer."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = (
            f"Variance of inputs in the directions: {self.explained:.1%} (at most {self.most:.1%}; means over layers)"
        )
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        for name in ("rank", "explained", "at most"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            table.add_row(layer.path, f"{layer.rank}", f"{layer.explained:.1%}", f"{layer.most:.1%}")
        return table

    def figure(self) -> Figure:
        """Draw the share of each layer, beside the most that its rank allows.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        names = all_plain(layer.path for layer in self.layers)
        bars = {"these directions": "explained", "the best of this rank": "most"}
        figure = graph_objects.Figure(
            [
                graph_objects.Bar(name=name, x=names, y=[100 * getattr(layer, key) for layer in self.layers])
                for name, key in bars.items()
            ]
        )
        figure.update_yaxes(title_text="variance explained (%)", range=[0, 100])
        return figure


def explained_variance(
    model: nn.Module,
    directions: EvaPlan | Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    centred: bool = True,
    progress: bool = True,
) -> ExplainedVariance:
    """Measure which share of the variance of layers' inputs lies in given directions.

    Args:
        model: in evaluation mode meanwhile.
        directions: of a plan, or by the path of a layer the rows of its A, [rank, in].
        batches: held-out ones. Tokens that are padding or labelled -100 do not count.
        centred: the mean of the inputs is left out.
        progress: show a bar.

    Returns:
        The share of each layer.

    Raises:
        ValueError: a path names no linear layer in the blocks, or the directions are of another width.
        DataError: no batch.
    """
    given = directions.directions if isinstance(directions, EvaPlan) else dict(directions)
    found: dict[str, LayerVariance] = {}
    for _, paths, spectrum in inputs_of(model, batches, set(given), centred=centred, progress=progress):
        scatter = spectrum.scatter
        total, values = float(scatter.diagonal().sum()), spectrum.values.square()
        for path in paths:
            rows = given[path]
            if rows.dim() != 2 or rows.shape[1] != len(scatter):
                raise ValueError(
                    f"directions: {path} was given rows of shape {list(rows.shape)}; give [rank, {len(scatter)}]."
                )
            basis = torch.linalg.svd(rows.double().to(scatter.device), full_matrices=False).Vh
            inside = float((basis @ scatter).mul(basis).sum())
            most = float(values[: len(rows)].sum())
            found[path] = LayerVariance(
                path, len(rows), inside / total if total else 0.0, most / total if total else 0.0
            )
    missing = [path for path in given if path not in found]
    if missing or not given:
        raise ValueError(
            f"directions: {', '.join(missing) or 'none were given'}; give those of linear layers in blocks, by path."
        )
    return ExplainedVariance(tuple(found[path] for path in given))
