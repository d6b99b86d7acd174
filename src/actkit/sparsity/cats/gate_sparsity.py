"""Measure how sparse the MLPs of a model are on real text, and how many weight bytes a decode step still reads.

    gated:     bytes(gate) + (1 - k) (bytes(up) + bytes(down)),  k = share of the gate values that are exactly zero
    ungated:   bytes(up) + (1 - k) bytes(down)

"50 % sparse" means half of the gate values (CATS, 2024, arXiv:2404.08763), which is a third of the MLP's weights and
less of the model's: both are counted here, over the linear layers of the blocks. Experts count by the share of the
tokens that they get. Inputs that `ActLinear` layers select are not counted (that is `core/measure/cost.py`).
Cost: one pass over the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit.core.ground.errors import CoverageError
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import Anatomy, Linear, Mlp, Site, anatomy, has_row
from actkit.core.watch.capture import opened_experts, record
from actkit.core.watch.statistics import Density

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from rich.table import Table


@dataclass(frozen=True)
class LayerSparsity:
    """The zeros of one MLP. The shares are None if no token reached it.

    Attributes:
        path: of the MLP.
        gated: whether it has a gate.
        tokens: that reached it; fewer than all for an expert.
        zeros: share of its gate values (ungated: of its hidden values) that are exactly zero, over all tokens.
        zeros_p05: 5th percentile over tokens of a token's own share.
        zeros_p95: 95th percentile of the same.
        traffic: share of its weight bytes that are read for one token.
    """

    path: str
    gated: bool
    tokens: int
    zeros: float | None
    zeros_p05: float | None
    zeros_p95: float | None
    traffic: float | None


@dataclass(frozen=True)
class GateSparsity:
    """What `gate_sparsity` found: shares of the weight bytes that a decode step of one token reads on average.

    Attributes:
        layers: one per MLP.
        mlp_traffic: share of the weight bytes of all MLPs.
        block_traffic: share of the weight bytes of all linear layers in the blocks.
        tokens: that were measured.
    """

    layers: tuple[LayerSparsity, ...]
    mlp_traffic: float
    block_traffic: float
    tokens: int

    @property
    def zeros(self) -> float:
        """The mean over the layers that got tokens."""
        found = [layer.zeros for layer in self.layers if layer.zeros is not None]
        return sum(found) / len(found)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    def table(self) -> Table:
        """A row per layer, for a terminal."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = (
            f"Zeros in the MLPs ({self.tokens:,} tokens): a decode step reads {self.mlp_traffic:.1%} of the weights of "
            f"the MLPs, {self.block_traffic:.1%} of those of the blocks"
        )
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("layer", "zeros", "5 % of tokens below", "5 % of tokens above", "weights read"):
            table.add_column(name, justify="left" if name == "layer" else "right")
        for layer in self.layers:
            shares = (layer.zeros, layer.zeros_p05, layer.zeros_p95, layer.traffic)
            table.add_row(layer.path, *("no token" if share is None else f"{share:.1%}" for share in shares))
        return table

    def figure(self) -> go.Figure:
        """Draw the share of zeros by layer, with the range of 90 % of the tokens.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        go = plotly().graph_objects
        found = [layer for layer in self.layers if layer.zeros is not None]
        means, above, below = [], [], []
        for layer in found:
            assert layer.zeros is not None and layer.zeros_p05 is not None and layer.zeros_p95 is not None
            means.append(layer.zeros)
            above.append(layer.zeros_p95 - layer.zeros)
            below.append(layer.zeros - layer.zeros_p05)
        spread = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        figure = go.Figure(go.Bar(x=all_plain(layer.path for layer in found), y=means, error_y=spread))
        return figure.update_layout(yaxis={"title": "share of zeros, 90 % of tokens", "tickformat": ".0%"})


def gate_sparsity(model: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> GateSparsity:
    """Count the exact zeros that a model's MLPs compute on batches; padding is left out.

    Args:
        model: the model to measure.
        batches: dicts of the model's keywords.
        progress: show a bar.

    Returns:
        The zeros of each MLP, and the shares of the weights that are read.

    Raises:
        CoverageError: actkit does not know the model's MLPs.
        ActkitError: what `record` raises for unusable data.
    """
    if not has_row(model):
        raise CoverageError(
            f"model: actkit knows no MLP with an activation in this {type(model).__name__}; describe its family with "
            f"register_architecture."
        )
    view = anatomy(model)
    with opened_experts(view):
        places = [(index, *each) for index in range(len(view.blocks)) for each in view.block(index).mlps()]
        sites = {mlp.path: mlp.zeros_at(index, expert) for index, expert, mlp in places}
        everyone = Site("mlp.input", places[0][0])  # in a mixture of experts, what comes before the choice
        seen = record(model, {site: Density() for site in (*sites.values(), everyone)}, batches, progress=progress)
        tokens = seen[everyone].count
        layers = tuple(_layer(mlp, seen[sites[mlp.path]]) for _, _, mlp in places)
        mlps = read = 0.0
        for layer, (_, _, mlp) in zip(layers, places, strict=True):
            size = _bytes((*mlp.inputs, mlp.down)) * layer.tokens / tokens
            mlps += size
            read += size * (layer.traffic or 0.0)
        others = _others(view)
    return GateSparsity(layers, read / mlps, (others + read) / (others + mlps), tokens)


def _layer(mlp: Mlp, seen: Density) -> LayerSparsity:
    if not seen.count:
        return LayerSparsity(mlp.path, mlp.gated, 0, None, None, None, None)
    zeros = 1 - seen.density
    up = _bytes((mlp.up,)) * mlp.width / mlp.up.out_features if mlp.gated else 0  # its rows of a layer for both
    skipped = (up + _bytes((mlp.down,))) / _bytes((*mlp.inputs, mlp.down))
    low, high = 1 - seen.spread(0.95), 1 - seen.spread(0.05)
    return LayerSparsity(mlp.path, mlp.gated, seen.count, zeros, low, high, 1 - zeros * skipped)


def _bytes(linears: Iterable[Linear]) -> int:
    """Bytes of the weights as they are stored: codes and scales if they are quantized."""
    modules = [linear.module for linear in linears]
    return sum((m.storage if isinstance(m, ActLinear) else m.weight).nbytes for m in modules)  # type: ignore[union-attr, misc]


def _others(view: Anatomy) -> int:
    """Weight bytes of the linear layers in the blocks outside the MLPs."""
    blocks = [view.block(index) for index in range(len(view.blocks))]
    inside = {linear.path for block in blocks for _, mlp in block.mlps() for linear in (*mlp.inputs, mlp.down)}
    return _bytes(linear for block in blocks for linear in block.linears() if linear.path not in inside)
