"""The phase chart: codes over the size of a model, the time of its training and the size of its data.

    regime   under-expressive     redundancy > 1 %
             critical             redundancy <= 1 %, K-NN more than 1 point below its best along the sizes
             sufficient           redundancy <= 1 %, K-NN within 1 point of it

The three names are the paper's (arXiv:2101.05490); its borders were not at hand, and these are ours.

When to use it: to find the smallest network that tells samples apart, and the smallest that sorts them.
Cost: one training for each size, number of samples and repeat.
Settled here: every training has the same steps; few samples come round more often. Codes of the samples trained on are
counted once each, however often they came round. Classifiers are fitted on them and scored on the held-out samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plotly
from actkit.core.ground.progress import track
from actkit.core.train.meter import Meter, readings
from actkit.core.train.training import train

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

REDUNDANT, BELOW_BEST = 0.01, 0.01
METRICS = ("redundancy", "test_redundancy", "knn", "kmeans", "logistic", "accuracy")


@dataclass(frozen=True)
class Reading:
    """One model at one time.

    Attributes:
        size: as it was given to `build`.
        step: of the training; 0 is before it.
        samples: that it is trained on.
        repeat: the seed.
        redundancy: of codes of these samples.
        test_redundancy: of the held-out ones.
        knn: accuracy on the held-out ones from codes, as those below.
        kmeans: by clusters.
        logistic: by logistic regressions.
        accuracy: of the model itself.
    """

    size: int
    step: int
    samples: int
    repeat: int
    redundancy: float
    test_redundancy: float
    knn: float
    kmeans: float
    logistic: float
    accuracy: float


@dataclass(frozen=True)
class PhaseChart:
    """All readings.

    Attributes:
        readings: in the order of sizes, samples, repeats and steps.
    """

    readings: tuple[Reading, ...]

    def mean(self, metric: str, size: int, step: int, samples: int) -> float:
        """A metric at a cell, over its repeats.

        Args:
            metric: such as 'redundancy'.
            size: of the model.
            step: of the training.
            samples: trained on.
        """
        cell = (size, step, samples)
        return mean(getattr(r, metric) for r in self.readings if (r.size, r.step, r.samples) == cell)

    def axis(self, name: str) -> list[int]:
        """The values along an axis, in order: 'size', 'step' or 'samples'."""
        return sorted({getattr(reading, name) for reading in self.readings})

    def regime(self, size: int, step: int, samples: int) -> str:
        """Name the regime of a cell: 'under-expressive', 'critical' or 'sufficient'.

        Args:
            size: of the model.
            step: of the training.
            samples: trained on.
        """
        if self.mean("redundancy", size, step, samples) > REDUNDANT:
            return "under-expressive"
        best = max(self.mean("knn", each, step, samples) for each in self.axis("size"))
        return "critical" if self.mean("knn", size, step, samples) < best - BELOW_BEST else "sufficient"

    def cells(self) -> list[tuple[int, int, int]]:
        """All (size, step, samples)."""
        return list(dict.fromkeys((reading.size, reading.step, reading.samples) for reading in self.readings))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        regimes = [
            {"size": size, "step": step, "samples": samples, "regime": self.regime(size, step, samples)}
            for size, step, samples in self.cells()
        ]
        return {"readings": [asdict(reading) for reading in self.readings], "regimes": regimes}

    def table(self) -> Table:
        """A row per cell: means over the repeats, and the regime."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title="Phase chart of codes", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("size", "step", "samples", "redundancy", "K-NN", "K-means", "logistic", "model"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("regime", no_wrap=True)
        for cell in self.cells():
            shares = [self.mean(name, *cell) for name in ("redundancy", "knn", "kmeans", "logistic", "accuracy")]
            table.add_row(*map(str, cell), *(f"{share:.1%}" for share in shares), self.regime(*cell))
        return table

    def figure(self) -> Figure:
        """Draw redundancy and the nearest neighbours' accuracy over the sizes, a line for each step and sample size.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        subplots = plotly().subplots
        figure: Figure = subplots.make_subplots(rows=1, cols=2, subplot_titles=["redundancy", "K-NN on codes"])
        sizes = self.axis("size")
        for step in self.axis("step"):
            for samples in self.axis("samples"):
                for column, metric in enumerate(("redundancy", "knn"), start=1):
                    values = [self.mean(metric, size, step, samples) for size in sizes]
                    line = graph_objects.Scatter(
                        x=sizes, y=values, name=f"step {step}, {samples} samples", showlegend=column == 1
                    )
                    figure.add_trace(line, row=1, col=column)
        return figure.update_xaxes(type="log", title="size")


class CodeNet(nn.Module):
    """The paper's net: linear layers with batch norm and ReLU for images or rows of features, and a linear readout.

    Args:
        inputs: shape of a sample.
        classes: outputs.
        width: units of all hidden layers together, divided equally, as the paper counts.
        depth: hidden layers.
    """

    def __init__(self, inputs: tuple[int, ...], classes: int, width: int, depth: int = 1) -> None:
        super().__init__()
        if depth < 1 or width < depth:
            raise ValueError(f"width, depth: {width} and {depth} were given; give a unit or more for each layer.")
        self.input_shape = inputs
        sizes = [torch.Size(inputs).numel(), *[width // depth] * depth]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [batch, classes]."""
        found: Tensor = self.layers(pixel_values)
        return found


def phase_chart(
    build: Callable[[int, int], nn.Module],
    data: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    *,
    sizes: Sequence[int],
    steps: int,
    checkpoints: Sequence[int] | None = None,
    samples: Sequence[int] | None = None,
    repeats: int = 3,
    batch_size: int = 64,
    progress: bool = True,
    **settings: Any,
) -> PhaseChart:
    """Train a model for each size, number of samples and repeat, and read its codes.

    Args:
        build: (size, seed) -> an untrained model.
        data: tensors by keyword, with "labels" [n], that are trained on.
        held_out: the same, not trained on.
        sizes: of models.
        steps: of each training.
        checkpoints: steps at which codes are read; None for before and after.
        samples: how many of `data` are trained on, the first in an order drawn by the repeat; None for all.
        repeats: seeds 0 and on.
        batch_size: samples of a step.
        progress: show a bar.
        settings: of `train`, such as learning_rate and optimizer.

    Returns:
        The chart.

    Raises:
        DataError: labels are missing, or more samples are asked for than there are.
        ImportError: scikit-learn (the extra `interpretation`) is missing.
        ActkitError: what `train` raises.
    """
    if "labels" not in data or "labels" not in held_out:
        raise DataError('data, held_out: they have no "labels"; give tensors by keyword with labels [n].')
    total = len(data["labels"])
    numbers = list(samples or (total,))
    if not all(1 < number <= total for number in numbers):
        raise DataError(f"samples: {numbers} were asked for, and there are {total}; give 2 to {total}.")
    at = tuple(checkpoints) if checkpoints is not None else (0, steps)
    cells = [(size, number, repeat) for size in sizes for number in numbers for repeat in range(repeats)]
    found: list[Reading] = []
    for size, number, repeat in track(cells, "Training", len(cells), progress):
        order = list(range(total))
        random.Random(repeat).shuffle(order)
        chosen = {key: value[order[:number]] for key, value in data.items()}
        meter = Meter(
            analysis={"neural_code": {"fitted": number}},
            at=at,
            batches=[*_batches(chosen, 256), *_batches(held_out, 256)],
        )
        trained = train(
            build(size, repeat),
            _batches(chosen, batch_size),
            validation=_batches(held_out, len(held_out["labels"])),
            steps=steps,
            rules=[meter],
            seed=repeat,
            keep="last",
            evaluate_every=steps,
            progress=False,
            **settings,
        )
        for step, read in readings(trained):
            found.append(Reading(size, step, number, repeat, **{name: read[name] for name in METRICS}))
    return PhaseChart(tuple(found))


def _batches(data: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    parts = {key: value.split(size) for key, value in data.items()}
    return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]
