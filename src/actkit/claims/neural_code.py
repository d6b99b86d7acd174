"""The claims of neural codes: nets that are wide enough give each sample a code of its own, and codes know the class.

The 8 x 8 digits: 70 % of them are trained on (the splits train and calibration), 20 % are the test; the search split
is the validation of each training, from which nothing is chosen. Nets of linear layers with batch norm and ReLU, of one
hidden layer and of three, whose units together are 4 to 100, as the paper counts. Adam at 1e-2 with a cosine (the
paper: a tenth every 20 epochs), batches of 64, 60 epochs, 3 seeds.

Shuffled labels: a permutation of the training labels and one of the test labels.
The zoo has no checkpoints of its CNN along a training; one of its shape is trained again and read by the meter at 8
steps and before the first, with 3 seeds.

CIFAR-10, SVHN and the 200 epochs of the paper cannot be checked here. About 4 minutes of one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from statistics import mean

import torch
from torch import Tensor, nn

from actkit.claims.outcome import SMALL, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.train.meter import Meter, readings
from actkit.core.train.training import train
from actkit.data import digits
from actkit.interpretation.neural_code.phase_chart import CodeNet, PhaseChart, phase_chart
from actkit.zoo.cnn import DigitsCNN

DEPTHS = (1, 3)
BATCH, RATE = 64, 1e-2
FALLING, NARROW, WIDE = -0.9, 0.10, 0.01
KNN, NEAR, OVER_START = 0.93, 0.05, 0.05
SHUFFLED_REDUNDANCY, SHUFFLED_KNN = 0.02, 0.2
GAIN = 0.03


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        seeds: of weights and batches; 0 and on.
        widths: units of all hidden layers together; the first is narrow, the last two are wide.
        epochs: of a training.
        cnn_epochs: of the CNN's.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    widths: tuple[int, ...] = (4, 8, 16, 32, 64, 100)
    epochs: int = 60
    cnn_epochs: int = 20


DETERMINED = Statement(
    "Each sample has a code of its own once a net is wide enough",
    "near-zero redundancy on MNIST and CIFAR-10 with enough width (figures)",
    "in both depths: Spearman's correlation of the training redundancy with the width <= -0.9, >= 10 % at 4 units, "
    "<= 1 % at 64 and 100; means over seeds",
    SMALL,
)
CATEGORIZED = Statement(
    "Simple algorithms find the class from codes",
    "K-means, K-NN and logistic regression on codes come near the net (figures)",
    "100 units, in both depths: K-NN >= 93 % of the test samples and within 5 points of the net; K-means at least 5 "
    "points above that on the codes of the untrained net",
    SMALL,
)
APART = Statement(
    "With shuffled labels a net still tells samples apart, and its codes know no class",
    "not in the paper in this form",
    "100 units, in both depths: redundancy <= 2 %, K-NN on test samples with shuffled labels <= 20 %",
    SMALL,
)
ALONG = Statement(
    "Codes of a CNN come to know the class along its training",
    "accuracies on codes rise with training time (figures)",
    "K-NN on all codes behind the training at least 3 points above that before it; mean over seeds",
    SMALL,
)
STATEMENTS = (DETERMINED, CATEGORIZED, APART, ALONG)


def run(sizes: Sizes | None = None, subject: str | None = None, progress: bool = True) -> Outcome:
    """Run the claims.

    Args:
        sizes: how much.
        subject: only the claims on it; None for all.
        progress: show bars.
    """
    sizes = sizes or Sizes()
    charts = _Charts(sizes, progress)
    experiments: list[Experiment] = [
        (DETERMINED, partial(determined, charts)),
        (CATEGORIZED, partial(categorized, charts)),
        (APART, partial(apart, charts)),
        (ALONG, partial(along, sizes)),
    ]
    return conduct("neural-code", experiments, sizes, subject, progress)


def images(*splits: str) -> dict[str, Tensor]:
    """The digits of some splits, by keyword."""
    pixels, labels = zip(*(digits(split) for split in splits), strict=True)  # type: ignore[arg-type]
    return {"pixel_values": torch.cat(pixels), "labels": torch.cat(labels)}


class _Charts:
    """The trainings of each depth; each is made when it is first needed."""

    def __init__(self, sizes: Sizes, progress: bool) -> None:
        self.sizes, self.progress = sizes, progress
        self.chart = cache(self._chart)

    @property
    def steps(self) -> int:
        return self.sizes.epochs * -(-len(images("train", "calibration")["labels"]) // BATCH)

    def _chart(self, depth: int, shuffled: bool = False) -> PhaseChart:
        data, held_out = images("train", "calibration"), images("test")
        if shuffled:
            draw = torch.Generator().manual_seed(0)
            for each in (data, held_out):
                each["labels"] = each["labels"][torch.randperm(len(each["labels"]), generator=draw)]

        def build(width: int, seed: int) -> nn.Module:
            torch.manual_seed(seed)
            return CodeNet((1, 8, 8), 10, width, depth)

        return phase_chart(
            build,
            data,
            held_out,
            sizes=self.sizes.widths[-1:] if shuffled else self.sizes.widths,
            steps=self.steps,
            repeats=len(self.sizes.seeds),
            batch_size=BATCH,
            learning_rate=RATE,
            optimizer="adam",
            weight_decay=1e-6,
            progress=self.progress,
        )

    def means(self, depth: int, metric: str, *, shuffled: bool = False, start: bool = False) -> list[float]:
        """A metric by width, over seeds, behind the training or before it."""
        chart = self.chart(depth, shuffled)
        (samples,) = chart.axis("samples")
        return [chart.mean(metric, size, 0 if start else self.steps, samples) for size in chart.axis("size")]


def determined(charts: _Charts) -> Measurement:
    """Redundancy over widths."""
    from scipy.stats import spearmanr

    texts, passed = [], True
    for depth in DEPTHS:
        found = charts.means(depth, "redundancy")
        rank = float(spearmanr(charts.sizes.widths, found).statistic)
        passed &= rank <= FALLING and found[0] >= NARROW and max(found[-2:]) <= WIDE
        listed = ", ".join(f"{value:.1%} at {width}" for value, width in zip(found, charts.sizes.widths, strict=True))
        texts.append(f"depth {depth}: {listed}; Spearman {rank:.2f}")
    return Measurement("; ".join(texts), passed)


def categorized(charts: _Charts) -> Measurement:
    """Accuracies on codes at the largest width."""
    texts, passed = [], True
    for depth in DEPTHS:
        knn, net, kmeans, logistic = (
            charts.means(depth, name)[-1] for name in ("knn", "accuracy", "kmeans", "logistic")
        )
        before, knn_before = (charts.means(depth, name, start=True)[-1] for name in ("kmeans", "knn"))
        passed &= knn >= KNN and knn >= net - NEAR and kmeans >= before + OVER_START
        texts.append(
            f"depth {depth}: K-NN {knn:.1%} ({knn_before:.1%} untrained), logistic {logistic:.1%}, net {net:.1%}, "
            f"K-means {kmeans:.1%} ({before:.1%} untrained)"
        )
    return Measurement(f"{'; '.join(texts)}; K-NN on pixels {100 * on_pixels():.1f} %", passed)


def on_pixels() -> float:
    """What nine nearest neighbours find on raw pixels."""
    from sklearn.neighbors import KNeighborsClassifier

    (x, labels), (other, wanted) = (
        (each["pixel_values"].flatten(1).numpy(), each["labels"].numpy())
        for each in (images("train", "calibration"), images("test"))
    )
    return float(KNeighborsClassifier(9).fit(x, labels).score(other, wanted))


def apart(charts: _Charts) -> Measurement:
    """Shuffled labels."""
    texts, passed = [], True
    for depth in DEPTHS:
        redundant, knn = (charts.means(depth, name, shuffled=True)[-1] for name in ("redundancy", "knn"))
        passed &= redundant <= SHUFFLED_REDUNDANCY and knn <= SHUFFLED_KNN
        texts.append(f"depth {depth}: redundancy {redundant:.2%}, K-NN {knn:.1%}")
    return Measurement("; ".join(texts), passed)


def along(sizes: Sizes) -> Measurement:
    """The CNN under a meter."""
    data, held_out = images("train", "calibration"), images("test")
    batches = [
        dict(zip(data, each, strict=True)) for each in zip(*(x.split(BATCH) for x in data.values()), strict=True)
    ]
    steps = sizes.cnn_epochs * len(batches)
    curves = []
    for seed in sizes.seeds:
        torch.manual_seed(seed)
        meter = Meter(
            analysis={"neural_code": {"fitted": len(data["labels"])}},
            points=9,
            spacing="both",
            batches=[data, held_out],
        )
        trained = train(
            DigitsCNN(),
            batches,
            validation=[images("search")],
            steps=steps,
            learning_rate=1e-3,
            rules=[meter],
            seed=seed,
            keep="last",
            evaluate_every=steps,
            progress=False,
        )
        curves.append([(step, read) for step, read in readings(trained)])
    first, last = ([curve[at][1]["knn"] for curve in curves] for at in (0, -1))
    layers = ", ".join(
        f"{layer['path']} {100 * mean(c[0][1]['layers'][at]['knn'] for c in curves):.1f} to "
        f"{100 * mean(c[-1][1]['layers'][at]['knn'] for c in curves):.1f} %"
        for at, layer in enumerate(curves[0][0][1]["layers"])
    )
    redundant = [curve[-1][1]["redundancy"] for curve in curves]
    gain = mean(last) - mean(first)
    text = (
        f"all codes {spread([100 * each for each in first])} % to {spread([100 * each for each in last])} %, "
        f"{100 * gain:+.1f} points; by layer {layers}; redundancy at the end "
        f"{spread([100 * each for each in redundant])} %"
    )
    return Measurement(text, gain >= GAIN)
