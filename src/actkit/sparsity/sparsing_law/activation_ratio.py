"""Count active neurons by four criteria, and the perplexity: CETT and its baselines (2024, arXiv:2411.02335).

    zero    s_i != 0                                              s: output of the nonlinearity (the gate, if gated)
    fat     |s_i| >= eps, one eps for all layers
    topk    |s_i| among the largest of its layer, over all tokens of a batch together, as in the release
    cett    |h_i| * ||W_out[:, i]|| > eps of its layer            h: into the output layer (gate times up)

A neuron is dropped by setting s or h to 0. Shares count real tokens; padding is left out. Everything runs in float32,
on a copy if the model has 16-bit parameters; the model is left as it is.
Cost: two passes over the data for a point, and for 'cett' the sort of `cett.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import get_module, set_module
from actkit.core.forward.batch import BatchContext
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.ground.progress import track
from actkit.core.layers.activations import Thresholded
from actkit.core.model.anatomy import Anatomy, Site
from actkit.core.train.objective import Loss, Objective
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Density, Sample
from actkit.sparsity.sparsing_law.shared_cett import SharedCett, in_float32, measure, ratios, sequence

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


Criterion = Literal["zero", "fat", "topk", "cett"]
EPSILON = 1e-18  # so that a threshold of 0 drops exact zeros


# -- one criterion -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationRatio:
    """The active neurons by one criterion.

    Attributes:
        method: the criterion.
        value: eps (fat), share (topk) or CETT (cett).
        ratio: the share of neurons that are active, over all layers and tokens.
        ratios: the same by the path of each MLP's nonlinearity or output layer.
        perplexity: of the model that drops the other neurons.
        dense_perplexity: of the model as it is.
    """

    method: Criterion
    value: float
    ratio: float
    ratios: dict[str, float]
    perplexity: float
    dense_perplexity: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)

    def table(self) -> Table:
        """One row per layer, and the whole."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        change = f"perplexity {self.dense_perplexity:.4g} to {self.perplexity:.4g}"
        title = f"Active by {self.method!r} at {self.value:.4g}: {self.ratio:.1%}; {change}"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        table.add_column("active", justify="right")
        for path, ratio in self.ratios.items():
            table.add_row(path, f"{ratio:.1%}")
        return table

    def figure(self) -> Figure:
        """Draw the active neurons by layer.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects

        figure = graph_objects.Figure(graph_objects.Bar(x=all_plain(self.ratios), y=list(self.ratios.values())))
        return figure.update_yaxes(title=f"active neurons by {self.method!r}", tickformat=".0%")


def activation_ratio(
    model: nn.Module,
    batches: Sequence[Any],
    method: Criterion = "zero",
    value: float = 0.0,
    *,
    calibration: Sequence[Any] | None = None,
    sample: int = 1024,
    loss: Loss | None = None,
    progress: bool = True,
) -> ActivationRatio:
    """Measure active neurons and perplexity by one criterion.

    Args:
        model: the model to measure.
        batches: as in `ppl_sparsity`.
        method: the criterion.
        value: eps for 'fat', the share that is kept for 'topk', the shared CETT for 'cett'; 'zero' takes none.
        calibration: batches for the thresholds of 'cett'; by default the same.
        sample: tokens per layer that these thresholds are computed from.
        loss: as in `ppl_sparsity`.
        progress: show a bar.

    Returns:
        The shares, and both perplexities.

    Raises:
        ValueError: the method is unknown, or the value is out of bounds.
        DataError: batches are padded under 'topk', or the model has no loss.
        CoverageError: there is no MLP.
        NonFiniteError: the loss is NaN.
    """
    batches = sequence(batches)
    _check(method, value)
    with in_float32(model, batches[0]) as view:
        dense = measure(view, batches, Objective(view.model, loss), {})[0]
        search = None
        if method == "cett":
            search = SharedCett(view, sequence(calibration or batches), sample=sample, loss=loss, progress=progress)
        return _ratio(view, batches, method, value, dense, loss, search)


def _ratio(
    view: Anatomy,
    batches: Sequence[Any],
    method: Criterion,
    value: float,
    dense: float,
    loss: Loss | None,
    search: SharedCett | None,
) -> ActivationRatio:
    if search is not None and method == "cett":
        found = search.at(value, batches, dense)
        return ActivationRatio(method, value, found.ratio, found.ratios, math.exp(dense + found.rise), math.exp(dense))
    masks = [BatchContext.of(batch, view.model).mask for batch in batches]
    if method == "topk" and not all(mask is None or bool(mask.all()) for mask in masks):
        raise DataError("batches: some are padded, and 'topk' chooses among all positions of a batch; give full rows.")
    places = gates(view)
    with _replaced_activations(view, list(places.values()), method, value):
        nats, seen = measure(view, batches, Objective(view.model, loss), dict.fromkeys(places, Density()))
    overall, each, _ = ratios({places[site]: density for site, density in seen.items() if density.count})
    return ActivationRatio(method, value, overall, each, math.exp(nats), math.exp(dense))


def gates(view: Anatomy) -> dict[Site, str]:
    """Return the site of the output s of every MLP's nonlinearity, and the path of the nonlinearity."""
    found = {}
    for block in view.blocks:
        for expert, mlp in view.block(block.index).mlps():
            name = "mlp.gate" if mlp.gated else "mlp.hidden"
            found[Site(name, block.index, expert)] = mlp.activation
    return found


def gate_quantile(view: Anatomy, batches: Sequence[Any], share: float, sample: int = 1024) -> float:
    """Return the eps of 'fat' that keeps about `share` of all neurons: a quantile of |s| over all layers."""
    seen = record(view.model, dict.fromkeys(gates(view), Sample(sample)), batches, anatomy=view, progress=False)
    values = torch.cat([each.rows.abs().flatten() for each in seen.values() if each.count]).sort().values
    dropped = round(len(values) * (1 - share))
    return float(values[dropped]) if dropped < len(values) else float(values[-1]) * 2


class _LargestOfBatch(nn.Module):
    """base(x) with all but the largest share of its magnitudes, over the whole tensor, set to 0."""

    def __init__(self, base: nn.Module, share: float) -> None:
        super().__init__()
        self.base, self.share = base, share

    def forward(self, x: Tensor) -> Tensor:
        s = self.base(x)
        dropped = int(s.numel() * (1 - self.share))
        weakest = s.abs().flatten().topk(dropped, largest=False).indices
        return s.flatten().index_fill(0, weakest, 0.0).view_as(s)


@contextmanager
def _replaced_activations(view: Anatomy, paths: Sequence[str], method: Criterion, value: float) -> Iterator[None]:
    """The nonlinearities under 'fat' or 'topk'; afterwards the old ones stand again."""
    old = {path: get_module(view.model, path) for path in paths}
    try:
        for path, base in old.items():
            if method == "fat":
                set_module(view.model, path, Thresholded(base, value + EPSILON))
            elif method == "topk":
                set_module(view.model, path, _LargestOfBatch(base, value))
        yield
    finally:
        for path, base in old.items():
            set_module(view.model, path, base)


# -- several, side by side ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pareto:
    """Perplexity over the share of active neurons, by criterion.

    Attributes:
        points: in the order of methods and grid.
    """

    points: tuple[ActivationRatio, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"points": [point.to_dict() for point in self.points]}

    def table(self) -> Table:
        """One row per point."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        dense = self.points[0].dense_perplexity
        table = PlainTable(title=f"Perplexity (dense {dense:.4g})", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("method", "value", "active", "perplexity", "ratio"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for at in self.points:
            cells = f"{at.value:.4g}", f"{at.ratio:.1%}", f"{at.perplexity:.4g}", f"{at.perplexity / dense:.4f}"
            table.add_row(at.method, *cells)
        return table

    def figure(self) -> Figure:
        """Draw a line per criterion.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects

        figure = graph_objects.Figure()
        for method in dict.fromkeys(point.method for point in self.points):
            chosen = sorted((p.ratio, p.perplexity) for p in self.points if p.method == method)
            figure.add_trace(graph_objects.Scatter(x=[x for x, _ in chosen], y=[y for _, y in chosen], name=method))
        figure.update_xaxes(title="active neurons", tickformat=".0%")
        return figure.update_yaxes(title="perplexity", type="log")


def pareto(
    model: nn.Module,
    batches: Sequence[Any],
    methods: Sequence[Criterion] = ("fat", "topk", "cett"),
    grid: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    *,
    calibration: Sequence[Any] | None = None,
    sample: int = 1024,
    loss: Loss | None = None,
    progress: bool = True,
) -> Pareto:
    """Measure perplexity at several shares of active neurons, by several criteria.

    Args:
        model: the model to measure.
        batches: as in `ppl_sparsity`.
        methods: the criteria; 'zero' gives one point.
        grid: shares to set each method to. 'topk' keeps exactly that share; 'fat' and 'cett' get the threshold that
            keeps it on the dense model's states. The result holds the share that was measured.
        calibration: batches for these thresholds; by default the same.
        sample: tokens per layer of them.
        loss: as in `ppl_sparsity`.
        progress: show a bar.

    Returns:
        One point per method and share.

    Raises:
        ActkitError: what `activation_ratio` raises.
    """
    batches = sequence(batches)
    calibration = batches if calibration is None else sequence(calibration)
    wanted = [(method, share) for method in methods for share in (grid if method != "zero" else (0.0,))]
    if not wanted:
        raise ValueError("methods, grid: no point was given; give at least one method and one share.")
    for method, share in wanted:
        _check("topk" if method in ("fat", "cett") else method, share)
    points = []
    with in_float32(model, batches[0]) as view:
        dense = measure(view, batches, Objective(view.model, loss), {})[0]
        search = (
            SharedCett(view, calibration, sample=sample, loss=loss, progress=progress) if "cett" in methods else None
        )
        for method, share in track(wanted, "Measuring perplexities", enabled=progress):
            value = share
            if method == "fat":
                value = gate_quantile(view, calibration, share, sample)
            elif search is not None and method == "cett":
                value = search.cett_for(share)
            points.append(_ratio(view, batches, method, value, dense, loss, search))
    return Pareto(tuple(points))


def _check(method: str, value: float) -> None:
    if method not in get_args(Criterion):
        raise ValueError(f"method: {method!r} was given, allowed are {', '.join(get_args(Criterion))}.")
    most = {"fat": math.inf, "topk": 1.0, "cett": 1.0, "zero": 0.0}[method]
    if not 0 <= value <= most:
        raise ValueError(f"value: {value} was given for {method!r}; give 0 to {most:g}.")
