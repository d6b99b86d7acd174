"""The lazy neuron phenomenon and the Top-k Transformer at the size of a small vision transformer.

Vision transformers for the digits (8 x 8 pixels, patch 2, hidden 64, 4 layers, ReLU) are trained from random weights
for 40 epochs at one rate: on true labels, on random labels and on random images; at four widths; and with top-k of 16
of 256 neurons against all of them, with and without 40 % label noise. All are kept as they are at the last step, since
choosing by a clean validation loss would hide what label noise does. Activity is measured on the images that a model
was trained on, accuracy and calibration error on the 338 test images, which no training saw. ImageNet, T5 and the
speed on TPUs cannot be checked here.

Models are trained on 1085 images (60 % of the digits; calibration, search and test split hold the rest); those with
random labels or images on 512, so that 8 steps are an epoch instead of 17. Neither rate nor epochs were tuned for an
arm.

About 13 minutes on one idle core; the record took 21 on a busy one. The claim about the layers of a language model is
tested on SmolLM2-135M as well (a quarter of a minute). Its SiLU has no zeros, so that a neuron counts as on above a
magnitude of 0.01, as on docs/sparsity/lazy-neuron.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import copysign, inf, sqrt
from statistics import mean, stdev
from typing import Any, Literal

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, spread
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.progress import track
from actkit.core.measure.calibration_error import expected_calibration_error
from actkit.core.recipe.runner import apply
from actkit.core.train.training import train
from actkit.data import digits
from actkit.data.corruptions import CORRUPTIONS, SEVERITIES, add_label_noise, corrupt_images
from actkit.sparsity.lazy_neuron.neuron_activity import neuron_activity
from actkit.sparsity.lazy_neuron.top_k_mlp import TopKMlp

CLASSES, BATCH, RATE = 10, 64, 1e-3
NOISE = 0.4
Data = Literal["true labels", "random labels", "random images"]
DATA: tuple[Data, ...] = ("true labels", "random labels", "random images")


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured.

    Attributes:
        seeds: of the comparison with top-k.
        few: the first so many of them serve the rest.
        epochs: of each training.
        memorised: training images if labels or images are random.
        images: training images elsewhere; None for all.
        width: neurons of an MLP.
        widths: that are compared.
        k: of `width` neurons.
        language: rows of 256 tokens.
        draws: of a random last layer.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    few: int = 3
    epochs: int = 40
    memorised: int = 512
    images: int | None = None
    width: int = 256
    widths: tuple[int, ...] = (64, 128, 256, 512)
    k: int = 16
    language: int = 130
    draws: int = 20_000


REAL_SIZES = Sizes(seeds=(0,), language=16)
ON = 0.01  # the magnitude above which a neuron counts as on, behind a function without zeros

PAPER_SHARE = "3.0 % non-zero in T5-Base, 6.3 % in ViT-B/16; also with random labels or random images"
FALL = Statement(
    "Training makes the neurons of ReLU MLPs fall silent, whether labels and images mean something or not",
    PAPER_SHARE,
    "share of non-zeros, mean over layers: with true labels, random labels and random images it falls by at least 15 "
    "points from the start to the end of training, in each of 3 seeds",
    SMALL,
)
QUARTER = Statement(
    "After training fewer than a quarter of the hidden values are not zero",
    PAPER_SHARE,
    "share of non-zeros, mean over layers, below 25 % for each of the three kinds of data in each of 3 seeds",
    SMALL,
)
WIDTH = Statement(
    "In a wider MLP a smaller share of the neurons is on, yet more of them",
    "with width the percentage falls and the count rises (T5, ViT; figures only)",
    "d_ff in 64, 128, 256, 512, mean over 3 seeds of Spearman's correlation with d_ff: at most -0.8 for the share of "
    "non-zeros, at least 0.8 for their count",
    SMALL,
)
LABEL_NOISE = Statement(
    "Top-k makes training robust to label noise",
    "40 % noise: 59.44 % without, 62.13 % with top-128 of 3072 (ViT, ImageNet); 80 %: 25.35 and 30.80 %",
    "40 % label noise, top-16 of 256 against all 256, the same seeds and hyper-parameters: mean gain in clean test "
    "accuracy at least 1.0 point, with a paired t above 2, over 5 seeds",
    SMALL,
)
NATURAL = Statement(
    "Without noise, top-k costs no accuracy",
    "74.85 % without, 74.83 % with (ViT, ImageNet)",
    "true labels, mean over 5 seeds: test accuracies within 1.5 points",
    SMALL,
)
CORRUPTED = Statement(
    "Top-k makes the model robust to corrupted images",
    "Gaussian 39.54 and 42.29 %, impulse 37.37 and 40.07 %, shot noise 38.56 and 40.68 % (without, with)",
    "true labels, mean accuracy over the three noises at five severities of the test images: higher with top-k, with "
    "a paired t above 2, over 5 seeds",
    SMALL,
)
CALIBRATED = Statement(
    "Top-k makes the confidences more reliable",
    "expected calibration error 8.42 % without, 7.48 % with",
    "true labels, 15 bins, mean over 5 seeds: the error with top-k is at most 0.5 points above that without",
    SMALL,
)
LANGUAGE = Statement(
    "In a language model the layers in the middle are sparser than the first and the last",
    "first and last layers denser than those in between (T5)",
    "test text: the mean share of the neurons that are on over the layers in between is below that of the first layer "
    "and that of the last",
    "relu",
)
GRADIENT = Statement(
    "At a random last layer, the first gradient step lowers every positive activation, whatever the label",
    "proved (as we remember the appendix): E[dL/dp_i] > 0 for every p_i > 0",
    "cross-entropy of V relu(p), V normal, p normal with 64 entries, 3 seeds: the mean of dL/dp_i over draws of V is "
    "for no positive p_i below 0 by 4 standard errors, and their sum is above 0 by more than 10",
    SYNTHETIC,
)
STATEMENTS = (
    FALL,
    QUARTER,
    WIDTH,
    LABEL_NOISE,
    NATURAL,
    CORRUPTED,
    CALIBRATED,
    LANGUAGE,
    GRADIENT,
    *(LANGUAGE.on(name) for name in REAL),
)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        sizes = sizes or REAL_SIZES
        language = Subject(subject, calibration=1, split="calibration", held_out=sizes.language)
        only: Experiment = (LANGUAGE.on(subject), partial(layers_of_a_language_model, language, ON))
        return conduct("lazy-neuron", [only], sizes, subject, progress)
    sizes = sizes or Sizes()
    workshop = Workshop(sizes, progress)
    language = Subject("relu", calibration=1, split="calibration", held_out=sizes.language)
    experiments = [
        (FALL, partial(emergence, workshop)),
        (QUARTER, partial(emergence, workshop, judge_end=True)),
        (WIDTH, partial(width, workshop)),
        (LABEL_NOISE, partial(label_noise, workshop)),
        (NATURAL, partial(natural, workshop)),
        (CORRUPTED, partial(corrupted, workshop)),
        (CALIBRATED, partial(calibrated, workshop)),
        (LANGUAGE, partial(layers_of_a_language_model, language)),
        (GRADIENT, partial(first_gradient, sizes)),
    ]
    return conduct("lazy-neuron", experiments, sizes, subject, progress)


# -- models and their data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        seed: of weights and batches.
        width: neurons of an MLP.
        k: how many of them a token keeps; None for all.
        noise: share of the labels that are redrawn.
        data: what is learned.
    """

    seed: int
    width: int
    k: int | None = None
    noise: float = 0.0
    data: Data = "true labels"


class Workshop:
    """Trains each arm once and keeps it."""

    def __init__(self, sizes: Sizes, progress: bool = True) -> None:
        self.sizes, self.progress = sizes, progress
        self._trained: dict[Arm, nn.Module] = {}

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """Test images and their labels."""
        return digits("test")

    def arms(self, seeds: Sequence[int], **settings: Any) -> list[Arm]:
        """One per seed, at the usual width."""
        return [Arm(seed, **{"width": self.sizes.width, **settings}) for seed in seeds]

    @property
    def few(self) -> tuple[int, ...]:
        """The seeds of what needs no comparison in pairs."""
        return self.sizes.seeds[: self.sizes.few]

    def untrained(self, arm: Arm) -> nn.Module:
        """The model of an arm before training; arms of one seed and width start from the same weights."""
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(arm.seed)
        model = ViTForImageClassification(
            ViTConfig(
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=64,
                intermediate_size=arm.width,
                num_hidden_layers=4,
                num_attention_heads=4,
                hidden_act="relu",
                id2label={index: str(index) for index in range(CLASSES)},
                label2id={str(index): index for index in range(CLASSES)},
            )
        )
        return model if arm.k is None else apply(model, TopKMlp(k=arm.k), undo="off", progress=False).model

    def trained(self, arms: Sequence[Arm], what: str) -> list[nn.Module]:
        """The trained model of each arm, from this run's memory if it was trained before."""
        for arm in track(arms, f"Training: {what}", enabled=self.progress):
            if arm not in self._trained:
                model = self.untrained(arm)
                images, labels = digits("search")
                train(
                    model,
                    self.batches(arm),
                    validation=[{"pixel_values": images, "labels": labels}],
                    epochs=self.sizes.epochs,
                    learning_rate=RATE,
                    seed=arm.seed,
                    keep="last",
                    evaluate_every=10**9,  # at the end only
                    progress=False,
                )
                self._trained[arm] = model.eval()
        return [self._trained[arm] for arm in arms]

    def batches(self, arm: Arm) -> list[dict[str, Tensor]]:
        """What an arm is trained on, drawn once by its seed."""
        images, labels = digits("train")
        count = self.sizes.images if arm.data == "true labels" else self.sizes.memorised
        generator = torch.Generator().manual_seed(arm.seed)
        order = torch.randperm(len(images), generator=generator)[:count]
        images, labels = images[order], labels[order]
        if arm.data == "random labels":
            labels = labels[torch.randperm(len(labels), generator=generator)]
        if arm.data == "random images":
            images = torch.randn(images.shape, generator=generator)
        labels = add_label_noise(labels, arm.noise, CLASSES, arm.seed)
        pairs = zip(images.split(BATCH), labels.split(BATCH), strict=True)
        return [{"pixel_values": x, "labels": y} for x, y in pairs]

    def logits(self, model: nn.Module, images: Tensor | None = None) -> Tensor:
        """Of the test images, or of those given: [n, classes]."""
        with evaluating(model):
            return first_tensor(forward(model, {"pixel_values": self.test[0] if images is None else images}))

    def accuracy(self, model: nn.Module, images: Tensor | None = None) -> float:
        """In percent, on the test images or on changed ones in the same order."""
        return 100 * float((self.logits(model, images).argmax(-1) == self.test[1]).float().mean())


# -- emergence ---------------------------------------------------------------------------------------------------------


def emergence(workshop: Workshop, judge_end: bool = False) -> Measurement:
    """Compare the share of non-zeros before and after training, on each kind of data.

    Args:
        workshop: where models are trained.
        judge_end: judge by what is left, not by the fall.
    """
    parts, falls, ends = [], [], []
    for data in DATA:
        arms = workshop.arms(workshop.few, data=data)
        models = workshop.trained(arms, data)
        before = [_activity(workshop.untrained(arm), workshop.batches(arm)).share for arm in arms]
        after = [_activity(model, workshop.batches(arm)).share for model, arm in zip(models, arms, strict=True)]
        fitted = [_fitted(workshop, model, arm) for model, arm in zip(models, arms, strict=True)]
        falls += [start - end for start, end in zip(before, after, strict=True)]
        ends += after
        parts.append(
            f"{data}: {spread(before, '.1%')} to {spread(after, '.1%')}, training accuracy {spread(fitted, '.0%')}"
        )
    test = [{"pixel_values": workshop.test[0]}]
    true = workshop.trained(workshop.arms(workshop.few), DATA[0])
    parts.append(f"true labels, on test images: {spread([_activity(model, test).share for model in true], '.1%')}")
    if judge_end:
        return Measurement(f"{spread(ends, '.1%')} after training, {len(ends)} models", max(ends) < 0.25)
    here = f"{'; '.join(parts)}; {len(workshop.few)} seeds, {workshop.sizes.epochs} epochs"
    return Measurement(here, min(falls) >= 0.15)


def _fitted(workshop: Workshop, model: nn.Module, arm: Arm) -> float:
    """The accuracy on the labels that it was trained on."""
    hits = [
        workshop.logits(model, batch["pixel_values"]).argmax(-1) == batch["labels"] for batch in workshop.batches(arm)
    ]
    return float(torch.cat(hits).float().mean())


def _activity(model: nn.Module, batches: list[dict[str, Tensor]]) -> Any:
    return neuron_activity(model, batches, progress=False)


def width(workshop: Workshop) -> Measurement:
    """Share and count of non-zeros at several widths."""
    shares: dict[int, list[float]] = {}
    counts: dict[int, list[float]] = {}
    for size in workshop.sizes.widths:
        arms = workshop.arms(workshop.few, width=size)
        for arm, model in zip(arms, workshop.trained(arms, f"width {size}"), strict=True):
            activity = _activity(model, workshop.batches(arm))
            shares.setdefault(size, []).append(activity.share)
            counts.setdefault(size, []).append(mean(layer.count for layer in activity.layers))
    falling, rising = (
        [float(spearmanr(workshop.sizes.widths, values).statistic) for values in zip(*found.values(), strict=True)]
        for found in (shares, counts)
    )
    listed = ", ".join(f"{size}: {mean(shares[size]):.1%} ({mean(counts[size]):.1f})" for size in shares)
    here = (
        f"share (count) of non-zeros: {listed}; Spearman {spread(falling)} for the share, {spread(rising)} for the "
        f"count; {len(workshop.few)} seeds"
    )
    return Measurement(here, mean(falling) <= -0.8 and mean(rising) >= 0.8)


# -- top-k against all neurons -----------------------------------------------------------------------------------------


def label_noise(workshop: Workshop) -> Measurement:
    """Clean test accuracy after training on noisy labels."""
    dense, top_k = ([workshop.accuracy(model) for model in models] for models in _pair(workshop, noise=NOISE))
    gains = _gains(dense, top_k)
    here = f"{NOISE:.0%} noise, test accuracy in %: {_compared(dense, top_k)}"
    return Measurement(here, mean(gains) >= 1.0 and _paired_t(gains) > 2)


def natural(workshop: Workshop) -> Measurement:
    """Test accuracy after training on true labels."""
    dense, top_k = ([workshop.accuracy(model) for model in models] for models in _pair(workshop))
    return Measurement(f"test accuracy in %: {_compared(dense, top_k)}", abs(mean(_gains(dense, top_k))) <= 1.5)


def corrupted(workshop: Workshop) -> Measurement:
    """Accuracy on the test images under each noise, mean over five severities."""
    found: dict[str, list[list[float]]] = {}  # noise -> one list for all neurons, one for top-k
    for kind in CORRUPTIONS:
        damaged = [corrupt_images(workshop.test[0], kind, severity) for severity in SEVERITIES]
        found[kind] = [
            [mean(workshop.accuracy(model, images) for images in damaged) for model in models]
            for models in _pair(workshop)
        ]
    dense, top_k = ([mean(each) for each in zip(*(pair[i] for pair in found.values()), strict=True)] for i in (0, 1))
    gains = _gains(dense, top_k)
    listed = "; ".join(f"{kind} {mean(pair[0]):.1f} and {mean(pair[1]):.1f}" for kind, pair in found.items())
    here = f"accuracy in %, mean of all: {_compared(dense, top_k)}; all neurons and top-k: {listed}"
    return Measurement(here, mean(gains) > 0 and _paired_t(gains) > 2)


def calibrated(workshop: Workshop) -> Measurement:
    """Expected calibration error on the test images, judged for true labels."""

    def errors(models: list[nn.Module]) -> list[float]:
        return [100 * expected_calibration_error(workshop.logits(model), workshop.test[1]) for model in models]

    dense, top_k = (errors(models) for models in _pair(workshop))
    noisy = [mean(errors(models)) for models in _pair(workshop, noise=NOISE)]
    here = (
        f"expected calibration error in %: {_compared(dense, top_k)}; after {NOISE:.0%} label noise {noisy[0]:.1f} "
        f"with all neurons, {noisy[1]:.1f} with top-k"
    )
    return Measurement(here, mean(_gains(dense, top_k)) <= 0.5)


def _pair(workshop: Workshop, noise: float = 0.0) -> list[list[nn.Module]]:
    """The models with all neurons and those with top-k, one per seed."""
    arms = workshop.arms(workshop.sizes.seeds, noise=noise)
    return [
        workshop.trained(arms, f"all neurons, {noise:.0%} label noise"),
        workshop.trained([replace(arm, k=workshop.sizes.k) for arm in arms], f"top-k, {noise:.0%} label noise"),
    ]


def _gains(dense: Sequence[float], top_k: Sequence[float]) -> list[float]:
    return [after - before for before, after in zip(dense, top_k, strict=True)]


def _paired_t(gains: Sequence[float]) -> float:
    """The mean over its standard error; infinite if all gains are the same."""
    deviation = stdev(gains)
    return mean(gains) * sqrt(len(gains)) / deviation if deviation else copysign(inf, mean(gains))


def _compared(dense: Sequence[float], top_k: Sequence[float]) -> str:
    gains = _gains(dense, top_k)
    return (
        f"all neurons {spread(dense)}, top-k {spread(top_k)}; difference {mean(gains):+.2f} points, paired t "
        f"{_paired_t(gains):.1f}, {len(gains)} seeds"
    )


# -- a language model, and the theory ----------------------------------------------------------------------------------


def layers_of_a_language_model(subject: Subject, above: float = 0.0) -> Measurement:
    """The share of the neurons of each layer that are on (of a magnitude above that) on the held-out text."""
    activity = neuron_activity(subject.model, list(subject.held_out), threshold=above, progress=False)
    first, *middle, last = [layer.share for layer in activity.layers]
    dead = sum(len(layer.dead) for layer in activity.layers)
    listed = ", ".join(f"{layer.share:.1%}" for layer in activity.layers)
    what = f"{dead} neurons never on" if not above else f"{dead} neurons never above {above:g}"
    here = f"first to last layer {listed} on {activity.layers[0].tokens:,} tokens; {what}"
    return Measurement(here, mean(middle) < min(first, last))


def first_gradient(sizes: Sizes, neurons: int = 64) -> Measurement:
    """The gradient of the cross-entropy with respect to pre-activations, mean over draws of the last layer."""
    lowest, totals = [], []
    for seed in sizes.seeds[: sizes.few]:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(neurons, generator=generator).relu()
        gradients = last_layer_gradients(hidden, label=seed % CLASSES, draws=sizes.draws, generator=generator)
        gradients = gradients[:, hidden > 0]
        lowest.append(float((gradients.mean(0) / (gradients.std(0) / sqrt(sizes.draws))).min()))
        total = gradients.sum(1)
        totals.append(float(total.mean() / (total.std() / sqrt(sizes.draws))))
    here = (
        f"smallest mean over its standard error {spread(lowest, '.1f')}, of the sum {spread(totals, '.0f')}; "
        f"{len(lowest)} seeds of {sizes.draws:,} draws"
    )
    return Measurement(here, min(lowest) > -4 and min(totals) > 10)


def last_layer_gradients(hidden: Tensor, label: int, draws: int, generator: torch.Generator) -> Tensor:
    """Draw dL/dp of the cross-entropy of V relu(p) at p > 0, for random V [classes, neurons] of variance 1 / neurons.

    Args:
        hidden: relu(p), [neurons].
        label: the class.
        draws: how many V.
        generator: of the draws.

    Returns:
        [draws, neurons].
    """
    last = torch.randn(draws, CLASSES, len(hidden), generator=generator) / sqrt(len(hidden))
    wrong = (last @ hidden).softmax(-1)
    wrong[:, label] -= 1
    return torch.einsum("dc,dcn->dn", wrong, last)
