"""The activity of neurons over a training: `neuron_activity` of one checkpoint after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import all_plain, plain, plotly
from actkit.core.ground.progress import track
from actkit.sparsity.lazy_neuron.neuron_activity import HIDDEN, NeuronActivity, neuron_activity
from actkit.zoo import Checkpoint
from actkit.zoo.loading import load

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class ActivityCurve:
    """The activity of several models, such as the checkpoints of a training.

    Attributes:
        points: label (a step) -> activity.
    """

    points: Mapping[Any, NeuronActivity]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"points": [{"label": label, **activity.to_dict()} for label, activity in self.points.items()]}

    def table(self) -> Table:
        """A row per model: the mean over its layers, the densest and the sparsest layer."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title="Neurons on, by checkpoint", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("checkpoint", "mean", "densest layer", "sparsest layer"):
            table.add_column(name, justify="right", no_wrap=True)
        for label, activity in self.points.items():
            shares = [layer.share for layer in activity.layers]
            table.add_row(str(label), f"{activity.share:.1%}", f"{max(shares):.1%}", f"{min(shares):.1%}")
        return table

    def figure(self) -> Figure:
        """Draw a line per layer over the labels.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graphs = plotly().graph_objects
        figure = graphs.Figure()
        labels = list(self.points)
        for name in dict.fromkeys(layer.site for activity in self.points.values() for layer in activity.layers):
            found = [{layer.site: layer.share for layer in self.points[label].layers}.get(name) for label in labels]
            shares = [None if share is None else 100 * share for share in found]
            figure.add_trace(graphs.Scatter(x=all_plain(labels), y=shares, name=plain(name), mode="lines+markers"))
        figure.update_layout(xaxis_title="checkpoint", yaxis_title="neurons on (%)", yaxis_rangemode="tozero")
        return figure


def activity_curve(
    models: Mapping[Any, nn.Module | str | Path] | Iterable[nn.Module | str | Path | Checkpoint],
    batches: Iterable[Any],
    *,
    site: str = HIDDEN,
    threshold: float = 0.0,
    progress: bool = True,
) -> ActivityCurve:
    """Measure `neuron_activity` of one model after another, on the same batches.

    Args:
        models: label -> a model, or whatever `actkit.load` takes (read in float32, one at a time); or a list of them,
            labelled 0, 1, 2 and so on. `zoo.checkpoints(name)` is labelled by its steps.
        batches: as in `neuron_activity`.
        site: as in `neuron_activity`.
        threshold: as in `neuron_activity`.
        progress: show a bar.

    Returns:
        The activity by label.

    Raises:
        DataError: the list is empty.
        ActkitError: what loading and measuring raise.
    """
    if not isinstance(models, Mapping):
        models = dict(_labelled(index, model) for index, model in enumerate(models))
    if not models:
        raise DataError("models: 0 were given; pass at least one model or folder.")
    batches = sequence_of(batches)
    points = {}
    for label, source in track(models.items(), "Measuring checkpoints", len(models), progress):
        model = source if isinstance(source, nn.Module) else load(source, dtype="float32")
        points[label] = neuron_activity(model, batches, site=site, threshold=threshold, progress=False)
    return ActivityCurve(points)


def _labelled(index: int, model: nn.Module | str | Path | Checkpoint) -> tuple[int, nn.Module | str | Path]:
    return (model.step, model.path) if isinstance(model, Checkpoint) else (index, model)
