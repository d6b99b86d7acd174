"""TrAct's claims: the algebra, and fewer epochs where images differ in contrast.

What is measured here: layers with random weights and inputs in float64; and a CNN (two convolutions of 16 and 32
channels, two linear layers) and a vision transformer (patches of 2 x 2, 2 blocks of width 32) trained from scratch on
the 8 x 8 digits, standardised, plain and varied: each image times a contrast from 0.2 to 1.8, plus a brightness from
-0.5 to 0.5 standard deviations (which the paper's experiments do not have; it is what TrAct is for), fixed for each
image. SGD with momentum 0.9, cosine schedule, no clipping, batches of 64, 40 epochs, 5 seeds. The rate is chosen for
the plain rule alone, from four, by the validation accuracy of the first seed at the end; TrAct takes it as it is, with
its own ridge of 0.1. Epochs are counted on 182 validation images: until their accuracy is that which the plain rule
has at its end in the mean over seeds (41 if it never is). Final accuracies are of the test images.

The vision transformer starts from weights of 0.1 standard deviations: from transformers' 0.02 SGD alone ended at 52 to
60 % (a first run; LOG.md), from 0.1 at 94 %, which says whether TrAct helps a net that learns. Its rates, a third of
the CNN's, were set by the plain rule too.

Digits of 64 pixels are no ImageNet, and an epoch here has 17 steps. The tables of the paper cannot be checked here.

About 10 minutes on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import nn

from actkit.claims.digit_arms import BATCH, DigitArms, Fitted, Images, accuracy
from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.layers.layer_rows import rows_of
from actkit.core.train.score import Score
from actkit.data import Split, digits
from actkit.finetuning.tract import Tract, tract_gradient
from actkit.zoo.cnn import DigitsCNN

CLOSE = 1e-5
SHARE, LOST = 0.8, 0.003  # of the epochs; of the accuracy
RATES = {"CNN": (0.01, 0.03, 0.1, 0.3), "ViT": (0.003, 0.01, 0.03, 0.1)}
CONTRAST, BRIGHTNESS = (0.2, 1.8), (-0.5, 0.5)
RIDGE = 0.1
NETS, DATA, ARMS = ("CNN", "ViT"), ("varied", "plain"), ("SGD", "TrAct")


@dataclass(frozen=True)
class Sizes:
    """How much is trained.

    Attributes:
        seeds: of weights and batches.
        epochs: of a training.
        training: images; None for all.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 40
    training: int | None = None


EXACT = Statement(
    "The gradient is the closed form, in both of its branches, and for convolutions too",
    "derived; in the released code one of two inverses is wrong",
    "random layers, float64: residual of the normal equations, the two branches, convolutions beside linear layers on "
    "what they see, and inputs x G^-1 for the gradient, each below 1e-5",
    SYNTHETIC,
)
FEWER = Statement(
    "A first layer under TrAct needs fewer epochs where images differ in contrast",
    "1.25 to 4 times fewer in 50 settings (CIFAR, ImageNet)",
    "varied digits, mean over 5 seeds, CNN and ViT each: epochs until the validation accuracy is SGD's final mean <= "
    "0.8 x those of SGD",
    SMALL,
)
KEPT = Statement(
    "It costs no accuracy",
    "ResNet-50 after 90 epochs 75.70 -> 76.20 %, ViT-S 81.23 -> 81.50 %",
    "plain and varied digits, mean over 5 seeds, CNN and ViT each: final test accuracy >= SGD's - 0.3 points",
    SMALL,
)
STATEMENTS = (EXACT, FEWER, KEPT)


def run(sizes: Sizes | None = None, subject: str | None = None, progress: bool = True) -> Outcome:
    """Run the claims.

    Args:
        sizes: how much.
        subject: only the claims on it; None for all.
        progress: show bars.
    """
    sizes = sizes or Sizes()
    arms = Arms(sizes, progress)
    experiments: list[Experiment] = [(EXACT, exact), (FEWER, partial(fewer, arms)), (KEPT, partial(kept, arms))]
    return conduct("tract", experiments, sizes, subject, progress)


# -- the algebra -------------------------------------------------------------------------------------------------------


def exact() -> Measurement:
    """Largest differences of the closed form from other ways to it."""
    drawn = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = {"normal equations": 0.0, "branches": 0.0, "other inputs": 0.0, "convolution": 0.0}
    for rows, inputs in ((50, 12), (12, 50), (30, 30)):
        x, gradient = drawn(rows, inputs), drawn(rows, 7)
        found = tract_gradient(gradient, x, RIDGE)
        square = x.t() @ x / rows + RIDGE * torch.eye(inputs, dtype=torch.float64)
        inner = x @ x.t() / rows
        one = torch.eye(rows, dtype=torch.float64)
        other = gradient.t() @ (one - inner @ torch.linalg.inv(inner + RIDGE * one)) @ x / RIDGE
        pairs = {
            "normal equations": (found @ square, gradient.t() @ x),
            "branches": (found, other),
            "other inputs": (found, gradient.t() @ (x @ torch.linalg.inv(square))),
        }
        errors |= {name: max(errors[name], float((one - two).abs().max())) for name, (one, two) in pairs.items()}
    layer, x = nn.Conv2d(3, 4, 3, stride=2, padding=1).double(), drawn(5, 3, 9, 9)
    seen = rows_of(layer, x)[0]  # [rows, inputs]
    assert layer.bias is not None
    with torch.no_grad():
        linear = (seen @ layer.weight.flatten(1).t() + layer.bias).view(5, -1, 4).mT.reshape(layer(x).shape)
        errors["convolution"] = float((linear - layer(x)).abs().max())
    rule = Tract(layer="", solve_in="float64").attach(layer)
    upstream = drawn(*layer(x).shape)
    layer(x).backward(upstream)
    rule.detach()
    assert layer.weight.grad is not None
    expected = tract_gradient(upstream.flatten(2).mT.flatten(0, 1), seen, RIDGE)
    difference = float((layer.weight.grad.flatten(1) - expected).abs().max())
    errors["convolution"] = max(errors["convolution"], difference)
    here = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return Measurement(here, max(errors.values()) < CLOSE)


# -- digits ------------------------------------------------------------------------------------------------------------


def images(split: Split, varied: bool) -> Images:
    """Standardised digits with labels; varied: each with a contrast and a brightness of its own."""
    pixels, labels = digits(split)
    known = digits("train")[0]
    pixels = (pixels - known.mean()) / known.std()
    if varied:
        generator = torch.Generator().manual_seed(["train", "search", "test"].index(split))
        drawn = torch.rand(2, len(pixels), 1, 1, 1, generator=generator)
        (low, high), (dark, bright) = CONTRAST, BRIGHTNESS
        pixels = pixels * (low + (high - low) * drawn[0]) + dark + (bright - dark) * drawn[1]
    return pixels, labels


def net(name: str, seed: int) -> nn.Module:
    """A CNN or a vision transformer with random weights."""
    torch.manual_seed(seed)
    if name == "CNN":
        return DigitsCNN()
    from transformers import ViTConfig, ViTForImageClassification

    shape: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32}
    depth: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    more: dict[str, Any] = {"num_labels": 10, "initializer_range": 0.1}
    return ViTForImageClassification(ViTConfig(**shape, **depth, **more))


class Arms:
    """The trained nets; each is trained when it is first needed.

    Args:
        sizes: how much is trained.
        progress: show bars.
    """

    def __init__(self, sizes: Sizes, progress: bool = False) -> None:
        self.sizes, self.progress = sizes, progress
        self._arms: dict[tuple[str, str], DigitArms] = {}

    def rate(self, name: str, data: str) -> float:
        """The rate that SGD does best with, by the validation accuracy of the first seed."""
        arms, seed = self._of(name, data), self.sizes.seeds[0]
        return max(RATES[name], key=lambda rate: arms.fitted("SGD", seed, rate).course[-1])

    def courses(self, name: str, data: str, arm: str) -> list[list[float]]:
        """The validation accuracy after each epoch, of each seed."""
        return [each.course for each in self._fitted(name, data, arm)]

    def accuracies(self, name: str, data: str, arm: str) -> list[float]:
        """The test accuracy at the end, of each seed."""
        return [each.accuracy for each in self._fitted(name, data, arm)]

    def epochs(self, name: str, data: str, arm: str) -> list[int]:
        """Epochs of each seed until SGD's final mean validation accuracy; one more than all if never."""
        goal = mean(course[-1] for course in self.courses(name, data, "SGD"))
        never = self.sizes.epochs + 1
        return [
            next((epoch for epoch, reached in enumerate(course, 1) if reached >= goal), never)
            for course in self.courses(name, data, arm)
        ]

    def _fitted(self, name: str, data: str, arm: str) -> list[Fitted]:
        return [self._of(name, data).fitted(arm, seed, self.rate(name, data)) for seed in self.sizes.seeds]

    def _of(self, name: str, data: str) -> DigitArms:
        """The arms of a net on one kind of images, validated after each epoch."""
        if (name, data) not in self._arms:
            rows = len(images("train", False)[1][: self.sizes.training])
            self._arms[name, data] = DigitArms(
                lambda arm, seed: net(name, seed),
                seeds=self.sizes.seeds,
                rates=RATES[name],
                epochs=self.sizes.epochs,
                images=lambda split: images(split, data == "varied"),
                training=self.sizes.training,
                rules=lambda arm: [Tract(ridge=RIDGE)] if arm == "TrAct" else [],
                progress=self.progress,
                optimizer="sgd:momentum=0.9",
                weight_decay=0.0,
                max_grad_norm=None,
                evaluate_every=-(-rows // BATCH),
                score=Score(accuracy, "higher"),
            )
        return self._arms[name, data]


def fewer(arms: Arms) -> Measurement:
    """Epochs on varied digits; those on plain ones beside them."""
    parts, shares = [], []
    for name in NETS:
        for data in DATA:
            plain, ours = (arms.epochs(name, data, arm) for arm in ARMS)
            share = mean(ours) / mean(plain)
            parts.append(
                f"{name}, {data}: {share:.2f} ({spread(ours, '.1f')} for {spread(plain, '.1f')} epochs, rate "
                f"{arms.rate(name, data):g})"
            )
            if data == "varied":
                shares.append(share)
    return Measurement("; ".join(parts), max(shares) <= SHARE)


def kept(arms: Arms) -> Measurement:
    """Final accuracies."""
    parts, gains = [], []
    for name in NETS:
        for data in DATA:
            plain, ours = (arms.accuracies(name, data, arm) for arm in ARMS)
            gains.append(mean(ours) - mean(plain))
            parts.append(
                f"{name}, {data}: {100 * gains[-1]:+.2f} points ({spread([100 * each for each in ours])} for "
                f"{spread([100 * each for each in plain])} %)"
            )
    return Measurement("; ".join(parts), min(gains) >= -LOST)
