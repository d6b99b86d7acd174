"""What the codes of a model say about data: how many regions, and how much of the class is in the bits.

    redundancy = (samples - distinct codes) / samples        accuracies: of simple algorithms on bits

`codes` says what a code is, `categories` what the algorithms are. They are fitted on the first samples and scored on
the others; redundancy is counted for both apart.

When to use it: to see whether a classifier only stores its data (redundancy 0, low accuracies, as with shuffled labels)
or sorts them, layer by layer; along a training by the rule `meter`, over sizes too by `phase_chart`.
Cost: a forward pass, and the classifiers: seconds for some thousand samples.
Compare with raw inputs and with the untrained model: on easy data both already read high.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from actkit.core.forward.batch import first_tensor, forward, sequence_of
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import DataError
from actkit.core.ground.figures import plotly
from actkit.core.page.page import Facts, Page, Picture, Pictures
from actkit.core.page.page import Table as Sorted
from actkit.core.page.pictures import lines_over
from actkit.interpretation.neural_code.categories import code_kmeans, code_knn, code_logistic
from actkit.interpretation.neural_code.codes import Codes, Samples, distinct, neural_codes, redundancy

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table


@dataclass(frozen=True)
class LayerCode:
    """The code of one layer.

    Attributes:
        path: of its activation.
        bits: how many.
        soft: the sign of a smooth function's input, which cuts no regions.
        always_on: bits that are on at all samples.
        always_off: bits that are off at all samples: dead units.
        near_zero: pre-activations within 1e-6 of 0, whose bits may flip with another batch size.
        redundancy: of the samples that are fitted.
        knn: accuracy of the nearest neighbours in this layer's code; None without labels.
    """

    path: str
    bits: int
    soft: bool
    always_on: int
    always_off: int
    near_zero: int
    redundancy: float
    knn: float | None


@dataclass(frozen=True)
class NeuralCode:
    """The codes of a model on data.

    Attributes:
        samples: what a sample is, and how many are fitted and held out.
        regions: different codes of all samples.
        redundancy: of the samples that are fitted.
        test_redundancy: of those that are held out.
        knn: accuracy of the nearest neighbours on codes; None without labels, as those below.
        kmeans: of clusters that stand for classes.
        logistic: of logistic regressions.
        accuracy: of the model itself on the samples held out; None if its outputs are no classes.
        layers: in the order of the model.
    """

    samples: tuple[str, int, int]
    regions: int
    redundancy: float
    test_redundancy: float
    knn: float | None
    kmeans: float | None
    logistic: float | None
    accuracy: float | None
    layers: tuple[LayerCode, ...]

    @property
    def bits(self) -> int:
        """Of a code."""
        return sum(layer.bits for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "samples": list(self.samples), "layers": [asdict(layer) for layer in self.layers]}

    def table(self) -> Table:
        """A row per layer and one for all."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        kind, fitted, held_out = self.samples
        accuracies = [(name, getattr(self, name)) for name in ("knn", "kmeans", "logistic", "accuracy")]
        found = ", ".join(f"{name} {value:.1%}" for name, value in accuracies if value is not None)
        title = (
            f"Codes of {fitted} and {held_out} {kind}s: {self.regions} regions, redundancy {self.redundancy:.2%} and "
            f"{self.test_redundancy:.2%} held out{'; ' if found else ''}{found}"
        )
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        for name in ("bits", "always on", "off", "redundancy", "K-NN"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            counts = (f"{layer.bits}", f"{layer.always_on}", f"{layer.always_off}", f"{layer.redundancy:.2%}")
            knn = "" if layer.knn is None else f"{layer.knn:.1%}"
            table.add_row(f"{layer.path}{' (soft)' if layer.soft else ''}", *counts, knn)
        return table

    def page(self) -> Page:
        """Redundancy and accuracy layer by layer, and all numbers."""
        kind, fitted, held_out = self.samples
        places = [layer.path for layer in self.layers]
        drawn = []
        if any(layer.redundancy > 0 for layer in self.layers):
            drawn.append(("redundancy", [(at, layer.redundancy) for at, layer in enumerate(self.layers)]))
        if self.knn is not None:
            found = [(at, layer.knn) for at, layer in enumerate(self.layers) if layer.knn is not None]
            drawn.append(("accuracy of the nearest neighbours", found))
        pictures = [Picture(title, lines_over([line], title, places, False)) for title, line in drawn]
        names = {
            "knn": "nearest neighbours",
            "kmeans": "clusters that stand for classes",
            "logistic": "logistic regression",
            "accuracy": "the model itself",
        }
        scores = [(text, getattr(self, name)) for name, text in names.items()]
        facts = [
            ("regions", f"{self.regions} different codes of {self.bits} bits"),
            (
                "redundancy",
                f"{self.redundancy:.2%} of fitted samples, {self.test_redundancy:.2%} held out",
            ),
            *((text, f"{value:.1%} of the samples held out") for text, value in scores if value is not None),
        ]
        headings = ("number", "layer", "bits", "always on", "always off", "near zero", "redundancy", "K-NN", "soft")
        rows = []
        for at, layer in enumerate(self.layers, start=1):
            counts = (layer.bits, layer.always_on, layer.always_off, layer.near_zero, layer.redundancy)
            knn = "" if layer.knn is None else layer.knn
            rows.append((at, layer.path, *counts, knn, "soft" if layer.soft else ""))
        return Page(
            "Neural codes",
            f"{fitted} {kind}s are fitted, {held_out} held out.",
            (
                Facts("All layers together", facts),
                Pictures("By layer", pictures, "Layers by their number in the table below.", small=True),
                Sorted("Layers", headings, rows),
            ),
        )

    def figure(self) -> Figure:
        """Draw redundancy, and accuracy if there are labels, layer by layer.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        graph_objects = plotly().graph_objects
        names = [layer.path for layer in self.layers]
        figure = graph_objects.Figure(
            graph_objects.Scatter(x=names, y=[layer.redundancy for layer in self.layers], name="redundancy")
        )
        if self.knn is not None:
            figure.add_trace(
                graph_objects.Scatter(x=names, y=[layer.knn for layer in self.layers], name="K-NN on the layer's code")
            )
        return figure.update_yaxes(range=[-0.02, 1.02], title="share")


def neural_code(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: tuple[str, ...] | None = None,
    samples: Literal["example", "row"] | None = None,
    pool: Literal["any"] | None = None,
    fitted: int | None = None,
    k: int = 9,
    progress: bool = True,
) -> NeuralCode:
    """Count regions, and find classes from codes by simple algorithms.

    Args:
        model: in evaluation mode meanwhile.
        batches: as for `neural_codes`; with labels classes are looked for.
        layers: patterns of paths of activations; None for all.
        samples: 'example' or 'row', as in `neural_codes`.
        pool: as there.
        fitted: the classifiers are fitted on so many first examples; None for three quarters of them.
        k: neighbours that vote.
        progress: show a bar.

    Returns:
        Regions and accuracies.

    Raises:
        DataError: no example is left on one side, or what `neural_codes` and the classifiers raise.
        ValueError: `k` is below 1, or what `neural_codes` raises.
        ImportError: there are labels, and scikit-learn (the extra `interpretation`) is missing.
    """
    if k < 1:
        raise ValueError(f"k: {k} was given; let at least 1 neighbour vote.")
    given = sequence_of(batches)
    codes = neural_codes(model, given, layers=layers, samples=samples, pool=pool, progress=progress)
    examples = int(codes.examples.max()) + 1
    first = round(0.75 * examples) if fitted is None else fitted
    if not 0 < first < examples:
        raise DataError(
            f"fitted: {first} of {examples} examples were asked for; give 1 to {examples - 1}, or more data."
        )
    train, test = codes.chosen(codes.examples < first), codes.chosen(codes.examples >= first)
    labelled = codes.labels is not None
    kind: Samples = samples or ("example" if len(np.unique(codes.examples)) == len(codes) else "row")
    return NeuralCode(
        samples=(kind, len(train), len(test)),
        regions=distinct(codes),
        redundancy=redundancy(train),
        test_redundancy=redundancy(test),
        knn=code_knn(train, test, k=k) if labelled else None,
        kmeans=code_kmeans(train, test) if labelled else None,
        logistic=code_logistic(train, test) if labelled else None,
        accuracy=_own_accuracy(model, given, first) if labelled else None,
        layers=tuple(_layer(codes, train, test, at, k) for at in range(len(codes.layers))),
    )


def _layer(codes: Codes, train: Codes, test: Codes, at: int, k: int) -> LayerCode:
    layer, on = codes.layers[at], codes.counts()
    own, held_out = train.of_layer(layer.path), test.of_layer(layer.path)
    counted = on[layer.start : layer.stop]
    return LayerCode(
        layer.path,
        len(counted),
        layer.soft,
        int((counted == len(codes)).sum()),
        int((counted == 0).sum()),
        layer.near_zero,
        redundancy(own),
        code_knn(own, held_out, k=k) if codes.labels is not None else None,
    )


def _own_accuracy(model: nn.Module, batches: Sequence[Any], first: int) -> float | None:
    """The share of labels that the model itself finds in the examples from `first` on; None if it has no classes."""
    right, start = [], 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            labels = batch["labels"]
            skipped, start = max(0, first - start), start + len(labels)
            if skipped >= len(labels):
                continue
            logits = first_tensor(forward(model, {key: value for key, value in batch.items() if key != "labels"}))
            if labels.dim() != 1 or logits.dim() != 2:
                return None
            right.append((logits.argmax(-1) == labels)[skipped:])
    return float(torch.cat(right).double().mean())
