"""Whether a network is self-normalizing, layer by layer: weights, mean and variance against what the theory says.

    omega = sum of a unit's weights, tau = sum of their squares
    mean and variance of f(z),  z ~ N(omega mean + bias, tau variance + what omega mean + bias varies by over the units)

The theory (Klambauer et al. 2017, arXiv:1706.02515) keeps mean and variance of SELU networks in a box: mean and omega
in [-0.1, 0.1], variance in [0.8, 1.5], tau in [0.95, 1.1]. Any other function is predicted as well
(`core/layers/moments.py`).

When to use it: on a deep network of linear layers or convolutions, before a training to see whether signals get
through, and after it, as weights drift from omega 0 and tau 1.
Cost: one pass over the batches.
Settled here: mean and variance are over the units of a layer, for one input, and averaged over the inputs, as the
theory means them; the variance of a unit over the inputs, another number, is in a column of its own. Outputs are
measured where the next layer reads them, behind norms and dropout, if there are any between.
Our own reading: the theory has one omega; units of a real layer differ, and what that adds to the variance is predicted
too. The box is from memory of the paper.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.ground.errors import CoverageError
from actkit.core.ground.figures import all_plain, plotly
from actkit.core.layers.activation_function import ActivationFunction
from actkit.core.layers.activations import activation_function, function_names, record_of
from actkit.core.layers.moments import moment_map
from actkit.core.model.anatomy import Anatomy, Site, anatomy
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Moments
from actkit.core.watch.streaming import Rows, Statistic

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

FEW = 8  # features, of which a mean and a variance say little
MEANS, VARIANCES, OMEGAS, TAUS = (-0.1, 0.1), (0.8, 1.5), (-0.1, 0.1), (0.95, 1.1)


class RowMoments(Statistic):
    """Mean and variance over the channels of a row, averaged over the rows."""

    _sums: Tensor

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        return {"sums": torch.zeros(2, dtype=torch.float64, device=device)}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        wide = x.double()
        self._sums += torch.stack([wide.mean(1).sum(), wide.var(1, correction=0).sum()])

    def _merge(self, other: RowMoments) -> None:  # type: ignore[override]
        self._sums += other._sums.to(self._device)

    @property
    def mean(self) -> float:
        """Over the channels, averaged over the rows."""
        self._needs_rows()
        return float(self._sums[0]) / self.count

    @property
    def variance(self) -> float:
        """The same, of the variance."""
        self._needs_rows()
        return float(self._sums[1]) / self.count


@dataclass(frozen=True)
class LayerMoments:
    """One layer and the function behind it.

    Attributes:
        layer: path of the linear layer or convolution.
        function: what stands behind it.
        omega: sum of a unit's weights, averaged over the units.
        tau: sum of their squares, averaged over the units.
        mean: over the units that it reads, for an input.
        variance: the same.
        predicted_mean: of the function's outputs, by the theory.
        predicted_variance: the same.
        measured_mean: over the units of what the next layer reads.
        measured_variance: the same.
        variance_over_inputs: of a unit that the next layer reads, averaged over the units.
    """

    layer: str
    function: str
    omega: float
    tau: float
    mean: float
    variance: float
    predicted_mean: float
    predicted_variance: float
    measured_mean: float
    measured_variance: float
    variance_over_inputs: float

    @property
    def in_box(self) -> bool:
        """Whether weights and inputs are within the box of the theory."""
        values = ((self.mean, MEANS), (self.variance, VARIANCES), (self.omega, OMEGAS), (self.tau, TAUS))
        return all(low <= value <= high for value, (low, high) in values)


@dataclass(frozen=True)
class SelfNormalizing:
    """The layers of a network, against the theory.

    Attributes:
        layers: in the order of the network.
        skipped: layers that were left out, with the reason.
    """

    layers: tuple[LayerMoments, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every layer is a SELU's and within the box."""
        return all(layer.in_box and layer.function == "selu" for layer in self.layers)

    @property
    def error(self) -> float:
        """The mean of |predicted - measured variance| over the layers."""
        gaps = [abs(layer.predicted_variance - layer.measured_variance) for layer in self.layers]
        return sum(gaps) / len(gaps)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "holds": self.holds, "error": self.error}

    def table(self) -> Table:
        """One row per layer."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Self-normalizing: {'yes' if self.holds else 'no'}; predicted variances are off by {self.error:.3f}"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        table.add_column("function")
        for name in ("omega", "tau", "reads", "predicted", "measured", "over inputs", "in the box"):
            table.add_column(name, justify="right")
        for at in self.layers:
            pairs = (
                (at.mean, at.variance),
                (at.predicted_mean, at.predicted_variance),
                (at.measured_mean, at.measured_variance),
            )
            cells = (f"{mean:+.2f}, {variance:.2f}" for mean, variance in pairs)
            last = f"{at.variance_over_inputs:.2f}", "yes" if at.in_box else "no"
            table.add_row(at.layer, at.function, f"{at.omega:+.2f}", f"{at.tau:.2f}", *cells, *last)
        for path, reason in self.skipped:
            table.add_row(path, reason, *[""] * 7)
        return table

    def figure(self) -> Figure:
        """Draw predicted and measured variances by layer.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects

        paths = all_plain(at.layer for at in self.layers)
        figure = graph_objects.Figure()
        for name in ("predicted_variance", "measured_variance"):
            values = [getattr(at, name) for at in self.layers]
            figure.add_trace(
                graph_objects.Scatter(x=paths, y=values, name=name.replace("_", " "), mode="lines+markers")
            )
        return figure.update_yaxes(title="variance over the units", type="log")


def self_normalizing(model: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> SelfNormalizing:
    """Compare mean and variance of every layer's activations with what the theory says.

    Args:
        model: linear layers or convolutions with functions between; gated MLPs are left out.
        batches: dicts of the model's keywords, or single arguments; standardised, or a warning says so.
        progress: show a bar.

    Returns:
        A row for each layer that a known function and another layer follow.

    Raises:
        CoverageError: there is no such layer.
        ActkitError: what `record` raises.
    """
    batches = list(batches)
    view = anatomy(model, batches[0] if batches else None)
    places, skipped = _places(view)
    if not places:
        raise CoverageError(
            "model: no layer with a known function and another layer behind it was found; give another."
        )
    wanted = {Site("layer.input", path=path): [RowMoments(), Moments()] for each in places for path in each[::2]}
    seen = record(model, wanted, batches, anatomy=view, progress=progress)
    rows = []
    for first, function, second in places:
        reads, gives = (seen[Site("layer.input", path=path)] for path in (first, second))
        if reads[0].count:
            rows.append(_row(model.get_submodule(first), first, function, reads[0], gives))
    features = seen[Site("layer.input", path=places[0][0])][0].channels or 0
    standard = not rows or (abs(rows[0].mean) <= 0.1 and 0.8 <= rows[0].variance <= 1.2)
    if features >= FEW and not standard:
        warnings.warn(
            f"batches: inputs have mean {rows[0].mean:.3g} and deviation {math.sqrt(rows[0].variance):.3g} over their "
            f"features; the theory is about standardised ones, 0 and 1.",
            stacklevel=2,
        )
    return SelfNormalizing(tuple(rows), tuple(skipped))


def _places(view: Anatomy) -> tuple[list[tuple[str, ActivationFunction, str]], list[tuple[str, str]]]:
    """(layer, function, next layer) of every chain and MLP without a gate; and what is left out."""
    found: dict[str, tuple[str, str]] = {}
    skipped: dict[str, str] = {}
    for block in view.blocks:
        for chain in block.chains:
            first, second = (end if isinstance(end, str) else end.path for end in (chain.first, chain.second))
            found.setdefault(first, (chain.nonlinearity, second))
        for _, mlp in block.mlps():
            if mlp.gated:
                skipped[mlp.path] = "left out: it is gated"
            else:
                found.setdefault(mlp.up.path, (mlp.activation, mlp.down.path))
    places = []
    modules = dict(view.model.named_modules())
    for first, (nonlinearity, second) in found.items():
        known = record_of(modules[nonlinearity]) if nonlinearity in modules else _by_name(nonlinearity)
        if known is None or known.mixes:
            skipped[first] = f"left out: nothing is known of {nonlinearity}"
        elif not isinstance(getattr(modules[first], "weight", None), Tensor):
            skipped[first] = "left out: its weight is not read"
        else:
            places.append((first, known, second))
    return places, list(skipped.items())


def _by_name(name: str) -> ActivationFunction | None:
    return activation_function(name) if name in function_names() else None


def _row(module: nn.Module, path: str, function: ActivationFunction, reads: RowMoments, gives: Any) -> LayerMoments:
    weight: Tensor = module.weight.detach().double()  # type: ignore[operator, union-attr, assignment]
    weight = weight.t() if type(module).__name__ == "Conv1D" else weight.flatten(1)
    bias: Any = module.bias
    shift = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double().cpu()
    omegas, tau = weight.sum(1).cpu(), float((weight**2).sum(1).mean())
    centers = omegas * reads.mean + shift
    spread = tau * reads.variance + float(centers.var(correction=0))
    mapped = moment_map(function, float(centers.mean()), max(spread, 1e-30), omega=1.0)
    rows, channels = gives
    return LayerMoments(
        path,
        function.name,
        float(omegas.mean()),
        tau,
        reads.mean,
        reads.variance,
        mapped.mean,
        mapped.variance,
        rows.mean,
        rows.variance,
        float(channels.variance.mean()),
    )
