"""The importance map of R-Sparse: which pairs of input channel and singular direction matter (2025, arXiv:2504.19449).

    S_ji = mean over tokens of |x_j s_i v_ji|,   W = U diag(s) V^T

As |x_j s_i v_ji| = |x_j| |s_i v_ji|, the mean over tokens is that of |x_j| alone: one pass, and one decomposition in
float64. Channels are sorted by their energy (the sum of S^2 over directions), directions by their singular value. What
the top left block of a few channels and a few directions holds of the whole energy is our reading of the paper's
figure, which shows a bright corner and gives no number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.ground.figures import plotly
from actkit.core.model.anatomy import Linear, Site, is_linear
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Moments

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
LARGEST_FIGURE = 256  # cells along a side; larger maps are averaged down


@dataclass(frozen=True, eq=False)
class ImportanceMap:
    """Which pairs of input channel and singular direction matter, sorted both ways.

    Attributes:
        path: of the layer.
        importance: float64 [channels, directions].
        channels: int64 [channels], the input of each row.
        tokens: how many the mean is over.
    """

    path: str
    importance: Tensor
    channels: Tensor
    tokens: int

    def captured(self, channels: float, directions: float) -> float:
        """Return the share of the energy that the top left block holds; the energy is the sum of the squares.

        Args:
            channels: the block's share of the channels.
            directions: its share of the directions.

        Raises:
            ValueError: a share is outside [0, 1].
        """
        for name, share in (("channels", channels), ("directions", directions)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: {share} was given; it is a share, give 0 to 1.")
        energy = self.importance.square()
        rows, columns = (round(share * size) for share, size in zip((channels, directions), energy.shape, strict=True))
        return float(energy[:rows, :columns].sum() / energy.sum())

    def table(self) -> Table:
        """The captured energy for a terminal: shares of channels down, of directions across."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"{self.path}: energy captured, {self.tokens:,} tokens"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("channels \\ directions", justify="right")
        for share in SHARES:
            table.add_column(f"{share:.0%}", justify="right")
        for rows in SHARES:
            table.add_row(f"{rows:.0%}", *(f"{self.captured(rows, columns):.1%}" for columns in SHARES))
        return table

    def figure(self) -> Figure:
        """Draw a heat map of log10 S, averaged down to 256 cells a side.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        go = plotly().graph_objects

        cells = (min(len(self.importance), LARGEST_FIGURE), min(self.importance.shape[1], LARGEST_FIGURE))
        shown = torch.nn.functional.adaptive_avg_pool2d(self.importance[None], cells)[0]
        shown = shown.clamp(min=1e-6 * float(shown.max().clamp(min=1e-30))).log10()
        axes = [[(at + 0.5) / cell for at in range(cell)] for cell in cells]
        figure = go.Figure(go.Heatmap(z=shown.tolist(), x=axes[1], y=axes[0], colorbar={"title": "log10 S"}))
        figure.update_xaxes(title="singular directions, large first (share)")
        figure.update_yaxes(title="input channels, large first (share)", autorange="reversed")
        return figure.update_layout(title=f"Importance map of {self.path}")

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "path": self.path,
            "tokens": self.tokens,
            "channels": self.channels.tolist(),
            "importance": self.importance.tolist(),
        }


def importance_map(model: nn.Module, path: str, batches: Iterable[Any], *, progress: bool = True) -> ImportanceMap:
    """Compute the importance map of the linear layer at `path`.

    Args:
        model: the model to read.
        path: of the layer.
        batches: dicts of the model's keywords, or tensors.
        progress: show a bar.

    Returns:
        The map, sorted both ways.

    Raises:
        ValueError: no linear layer is at `path`.
        ActkitError: what `core.watch.capture.record` raises.
    """
    module = dict(model.named_modules()).get(path)
    if module is None or not is_linear(module):
        found = [name for name, each in model.named_modules() if is_linear(each)]
        raise ValueError(f"path: {path!r} is no linear layer; this model has {', '.join(found[:8])}, ...")
    site = Site("layer.input", path=path)
    moments = record(model, {site: Moments()}, batches, progress=progress)[site]
    weight = Linear(path, "layer", module).weight.detach().double()
    _, s, vh = torch.linalg.svd(weight, full_matrices=False)
    importance = moments.mean_abs[:, None] * (s[:, None] * vh).abs().t()
    order = importance.square().sum(1).argsort(descending=True, stable=True)
    return ImportanceMap(path, importance[order], order, moments.count)
