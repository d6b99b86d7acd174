"""The massive activations of every layer over a training: the law fitted to what a meter read, against its rivals.

with rules=[Meter(analysis="massive_activations", points=40)]:   r_l(t) for each layer l, at 40 steps t
dynamics(trajectories(trained))                                  the law and its rivals for each layer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plotly
from actkit.core.train.meter import readings
from actkit.interpretation.massive_activations.law import LAW, LAWS, Fitted, compare_laws

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

    from actkit.core.train.training import Trained

Trajectory = tuple[tuple[float, ...], tuple[float, ...]]  # times, ratios


@dataclass(frozen=True)
class LayerDynamics:
    """One layer over a training.

    Attributes:
        layer: its site.
        times: at which it was read.
        ratios: its ratios then.
        fits: of all laws by name, the least AIC first.
    """

    layer: str
    times: tuple[float, ...]
    ratios: tuple[float, ...]
    fits: Mapping[str, Fitted]

    @property
    def law(self) -> Fitted:
        """The law of five parameters."""
        return self.fits[LAW.name]

    @property
    def preferred(self) -> str:
        """The law with the least AIC."""
        return next(iter(self.fits))

    def prefers_law_to(self, *rivals: str) -> bool:
        """Whether the law has a smaller AIC than each of these.

        Args:
            rivals: names of laws.
        """
        return self.law.converged and all(not self.fits[each].aic <= self.law.aic for each in rivals)


@dataclass(frozen=True)
class Dynamics:
    """The layers of a model over a training.

    Attributes:
        layers: in the order of the model.
    """

    layers: tuple[LayerDynamics, ...]

    @property
    def r2(self) -> float:
        """Mean of the law's R2 over the layers whose fit converged; NaN if none did."""
        found = [layer.law.r2 for layer in self.layers if layer.law.converged]
        return mean(found) if found else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        layers = [
            {
                "layer": layer.layer,
                "times": list(layer.times),
                "ratios": list(layer.ratios),
                "preferred": layer.preferred,
                "fits": {name: fitted.to_dict() for name, fitted in layer.fits.items()},
            }
            for layer in self.layers
        ]
        return {"layers": layers, "r2": self.r2 if self.r2 == self.r2 else None}

    def table(self) -> Table:
        """A row per layer: R2 of the law and its rivals, peak, steady state, and which law AIC prefers."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Laws of massive activations, {len(self.layers)} layers; mean R2 of the law {self.r2:.3f}"
        caption = "peak: (later) lies behind the last reading and is a forecast"
        table = PlainTable(title=title, caption=caption, title_justify="left", caption_justify="left")
        table.box = box.SIMPLE_HEAD
        table.add_column("layer", overflow="fold")
        names = [law.name for law in LAWS]
        for name in (*(f"R2 {each}" for each in names), "peak", "steady state", "last", "preferred"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            law = layer.law
            peak = "none" if law.peak is None else f"{law.peak:,.0f}{'' if law.peak_observed else ' (later)'}"
            ends = "" if law.steady_state is None else f"{law.steady_state:,.3g}"
            scores = [f"{layer.fits[each].r2:.3f}" for each in names]
            table.add_row(layer.layer, *scores, peak, ends, f"{layer.ratios[-1]:,.3g}", layer.preferred)
        return table

    def figure(self) -> Figure:
        """Draw the readings of each layer and the law that was fitted.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        figure = graph_objects.Figure()
        for layer in self.layers:
            figure.add_trace(graph_objects.Scatter(x=layer.times, y=layer.ratios, mode="markers", name=layer.layer))
            if layer.law.converged:
                curve = layer.law.predict(layer.times).tolist()
                figure.add_trace(
                    graph_objects.Scatter(x=layer.times, y=curve, mode="lines", name=f"{layer.layer}, the law")
                )
        figure.update_xaxes(title="step").update_yaxes(title="largest / median")
        return figure


def dynamics(trajectories: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Dynamics:
    """Fit the law and its rivals to every layer.

    Args:
        trajectories: layer -> (times, ratios).

    Returns:
        The fits of each layer.

    Raises:
        DataError: there is no layer, or what `law.fit` raises.
    """
    if not trajectories:
        raise DataError("trajectories: no layer was given; give at least one, as trajectories(trained) does.")
    return Dynamics(
        tuple(
            LayerDynamics(layer, tuple(map(float, t)), tuple(map(float, r)), compare_laws(t, r, layer=layer))
            for layer, (t, r) in trajectories.items()
        )
    )


def trajectories(trained: Trained | str | Path) -> dict[str, Trajectory]:
    """The ratio of each layer over a training that a meter of `massive_activations` read.

    Args:
        trained: the result of a training, or the folder that it was saved to.

    Returns:
        Layer -> (steps, ratios).

    Raises:
        DataError: no such meter read.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for step, reading in readings(trained, "massive_activations"):
        for layer in reading["layers"]:
            times, ratios = found.setdefault(layer["site"], ([], []))
            times.append(float(step))
            ratios.append(float(layer["ratio"]))
    return {layer: (tuple(times), tuple(ratios)) for layer, (times, ratios) in found.items()}
