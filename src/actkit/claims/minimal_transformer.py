"""Claims of the minimal transformer: exact collapses, and digits without MLPs and with fewer matrices.

What is measured here: the collapse of random attention of one head with biases and masks, and of a trained vision
transformer of one head, in float32 and float64. Vision transformers for the digits (8 x 8 pixels, patches of 2, 16
tokens of width 32, 4 layers, norms in front), trained from scratch on 1,085 images shifted by one pixel in all
directions (9,765 in all; more labels than parameters in every arm): 4 heads with MLPs of 128 units; the same without
MLPs; that with query and key alike; one head with one matrix for query and key; and that with neither values nor output
(the minimum). Adam, 1e-3, cosine, batches of 128, 40 epochs, 3 seeds; nothing was tuned for an arm. Accuracy on the 338
test images; losses of the 1,085 unshifted training images and of 182 validation images.

Epochs, widths and rates are those of the sheet; its K is 12.9k, of all digits with no test split. The paper's
accuracies on MNIST and CIFAR-10 cannot be checked.

About 15 minutes on one core.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.digit_arms import DigitArms, Images, in_batches
from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.compression.minimal.budget import overdetermination, parameter_budget
from actkit.compression.minimal.collapse import CollapseAttention, collapsed
from actkit.compression.minimal.minimal_vit import MinimalViT
from actkit.compression.minimal.reduced_attention import ReducedAttention
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.recipe.runner import apply
from actkit.data import Split, digits

NARROW, WIDE = 1e-5, 1e-11  # of the largest value, in float32 and float64
LOST = {"symmetric": 0.015, "minimum": 0.06}
SHARE = {"symmetric": 0.4, "minimum": 0.15}  # of the parameters of the whole
RATE, BATCH, FEATURES = 1e-3, 128, 32
WHOLE, SINGLE = "whole", "one head"
ARMS: dict[str, dict[str, Any]] = {
    WHOLE: {"heads": 4, "mlp_ratio": 4},
    "no MLP": {"heads": 4, "mlp_ratio": None},
    "symmetric": {"heads": 4, "mlp_ratio": None, "qk": "shared"},
    "one matrix for query and key": {"mlp_ratio": None, "qk": "collapsed"},
    "minimum": {"mlp_ratio": None, "qk": "collapsed", "vo": "none"},
}


@dataclass(frozen=True)
class Sizes:
    """How much is trained.

    Attributes:
        seeds: of weights and batches.
        epochs: of a training.
        depth: layers.
        training: images, with their shifts; None for all.
        short: epochs of the model that is collapsed.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 40
    depth: int = 4
    training: int | None = None
    short: int = 5


EXACT = Statement(
    "Attention of one head collapses to two matrices, whatever it has learned",
    "derived without biases in the paper, with them here",
    "random attention of 16 to 64 channels with biases, masks and causal masks: outputs differ by at most 1e-5 of the "
    "largest value in float32, 1e-11 in float64; numbers are exactly 2 n^2 + 2 n for 4 n^2 + 4 n",
    SYNTHETIC,
)
TRAINED = Statement(
    "So does a trained model",
    "derived",
    "a digits ViT of one head with biases, trained for 5 epochs: logits differ by at most 1e-5 of the largest in "
    "float32, 1e-11 in float64",
    SMALL,
)
SYMMETRIC = Statement(
    "Without MLPs, and with query and key alike, a small vision transformer loses little",
    "as good as the whole on MNIST and CIFAR-10, with about 25 % of the parameters",
    "digits, mean over 3 seeds: accuracy >= that of the whole - 1.5 points, with at most 40 % of its parameters",
    SMALL,
)
MINIMUM = Statement(
    "With one matrix a layer it loses some",
    "slightly worse on MNIST, equal or better on CIFAR-10, with less than 10 % of the parameters",
    "digits, mean over 3 seeds: accuracy >= that of the whole - 6 points, with at most 15 % of its parameters",
    SMALL,
)
STATEMENTS = (EXACT, TRAINED, SYMMETRIC, MINIMUM)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    arms = Arms(sizes, progress)
    experiments: list[Experiment] = [
        (EXACT, exact),
        (TRAINED, partial(trained, sizes)),
        (SYMMETRIC, partial(judged, arms, "symmetric")),
        (MINIMUM, partial(judged, arms, "minimum")),
    ]
    return conduct("minimal-transformer", experiments, sizes, subject, progress)


# -- collapses ---------------------------------------------------------------------------------------------------------


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def exact() -> Measurement:
    """The largest differences of random attention, and its numbers."""
    gaps, counted = {torch.float64: 0.0, torch.float32: 0.0}, True
    generator = torch.Generator().manual_seed(0)
    real = torch.arange(12) < torch.tensor([12, 5, 1, 9])[:, None]
    for features in (16, 32, 64):
        attention = ReducedAttention(features).double()
        with torch.no_grad():
            for parameter in attention.parameters():
                scale = features**-0.5 if parameter.dim() == 2 else 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        x = torch.randn(4, 12, features, generator=generator, dtype=torch.float64)
        for dtype in gaps:
            attention, rows = attention.to(dtype), x.to(dtype)
            small = collapsed(attention)
            with torch.no_grad():
                for causal in (False, True):
                    found = gap(small(rows, real, causal), attention(rows, real, causal))
                    gaps[dtype] = max(gaps[dtype], found)
        numbers = [sum(parameter.numel() for parameter in each.parameters()) for each in (attention, small)]
        counted &= numbers == [4 * features**2 + 4 * features, 2 * features**2 + 2 * features]
    here = (
        f"{gaps[torch.float32]:.1e} in float32, {gaps[torch.float64]:.1e} in float64; numbers "
        f"{'as the formulas say' if counted else 'others than the formulas say'}"
    )
    return Measurement(here, counted and gaps[torch.float32] <= NARROW and gaps[torch.float64] <= WIDE)


def trained(sizes: Sizes) -> Measurement:
    """Logits of a trained model of one head before and after the collapse."""
    arms = DigitArms(
        lambda arm, seed: net({"mlp_ratio": 4}, seed, sizes.depth),
        seeds=sizes.seeds[:1],
        rates=(RATE,),
        epochs=sizes.short,
        training=sizes.training,
    )
    model = arms.fitted(SINGLE, sizes.seeds[0]).model
    gaps = []
    for dtype in (torch.float32, torch.float64):
        each = copy.deepcopy(model).to(dtype)
        before = logits(each, digits("test"))
        apply(each, CollapseAttention(), undo="off", progress=False)
        gaps.append(gap(logits(each, digits("test")), before))
    here = f"logits move by {gaps[0]:.1e} in float32, {gaps[1]:.1e} in float64"
    return Measurement(here, gaps[0] <= NARROW and gaps[1] <= WIDE)


# -- digits ------------------------------------------------------------------------------------------------------------


def net(settings: dict[str, Any], seed: int, depth: int) -> MinimalViT:
    """A vision transformer with random weights."""
    torch.manual_seed(seed)
    return MinimalViT(8, 2, FEATURES, depth, 10, channels=1, **settings)


def images(split: Split) -> Images:
    """Digits; of the training split each in nine places, one pixel apart."""
    pixels, labels = digits(split)
    if split != "train":
        return pixels, labels
    padded = F.pad(pixels, (1, 1, 1, 1))
    shifted = [padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    return torch.stack(shifted, 1).flatten(0, 1), labels.repeat_interleave(9)


def logits(model: nn.Module, of: Images) -> Tensor:
    """Of some images."""
    with evaluating(model):
        return first_tensor(forward(model, in_batches(of, rows=None)[0]))


class Arms(DigitArms):
    """The vision transformers.

    Args:
        sizes: how much is trained.
        progress: show bars.
    """

    def __init__(self, sizes: Sizes, progress: bool = False) -> None:
        super().__init__(
            lambda arm, seed: net(ARMS[arm], seed, sizes.depth),
            seeds=sizes.seeds,
            rates=(RATE,),
            epochs=sizes.epochs,
            images=images,
            training=sizes.training,
            batch=BATCH,
            progress=progress,
            optimizer="adam",
            weight_decay=0.0,
        )

    def parameters(self, arm: str) -> int:
        """How many an arm has."""
        return parameter_budget(self.fitted(arm, self.seeds[0]).model).parameters

    def losses(self, arm: str) -> tuple[float, float]:
        """Mean losses over seeds of unshifted training images and of validation images."""
        models = [self.fitted(arm, seed).model for seed in self.seeds]
        found = [
            mean(float(F.cross_entropy(logits(model, of), of[1])) for model in models)
            for of in (digits("train"), digits("search"))
        ]
        return found[0], found[1]

    def told(self, arm: str) -> str:
        """All that is recorded of an arm."""
        models = [self.fitted(arm, seed) for seed in self.seeds]
        learned, held_out = self.losses(arm)
        count = len(images("train")[1][: self.training])
        return (
            f"{self.described(arm)}, {self.parameters(arm):,} parameters, "
            f"Q {overdetermination(models[0].model, count, 10):.1f}, losses {learned:.3f} and {held_out:.3f}, "
            f"{mean(each.seconds for each in models):.0f} s"
        )


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference in points with its standard error, seeds paired."""
    gaps = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return f"{mean(gaps):+.2f} +- {error:.2f} points"


def judged(arms: Arms, name: str) -> Measurement:
    """An arm against the whole; all arms for the record."""
    lost = mean(arms.accuracies(WHOLE)) - mean(arms.accuracies(name))
    share = arms.parameters(name) / arms.parameters(WHOLE)
    here = f"{-100 * lost:+.2f} points with {share:.1%} of the parameters"
    if name == "symmetric":
        symmetric, full = arms.accuracies("symmetric"), arms.accuracies("no MLP")
        here += f"; {difference(symmetric, full)} beside two matrices; " + "; ".join(map(arms.told, ARMS))
    else:
        here += f"; {spread([100 * each for each in arms.accuracies(name)])} %"
    return Measurement(here, lost <= LOST[name] and share <= SHARE[name])
