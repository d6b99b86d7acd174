"""RePaViT's claims: folds are exact and cheap, and a vision transformer with idle channels learns as well.

What is measured here: MLPs with random weights and batch norm statistics, and the zoo's ViT with idle channels whose
statistics are those of 512 digits, before and after the fold, in float32 and float64. The time of one MLP with norm and
sum, of ViT-Base's and ViT-Large's shape (8 images of 197 tokens, two threads), as it was and folded. Vision
transformers for the digits (8 x 8 pixels, patches of 2, width 64, 6 blocks), trained from scratch for 30 epochs on
1,085 images: plain, with batch norms and all channels active, with 50, 75 and 100 % of the channels idle, and the
folded form of 75 % trained as it is. Arms of a seed begin with the same weights, the folded form as the same function.
AdamW, the rate of each arm the better of 1e-3 and 3e-3 by validation with the first seed, 3 seeds, accuracy on the 338
test images.

The sheet has 60 epochs, or 30 if that is slow here, as it is. ImageNet, and gains that grow with size, cannot be
checked here; times on a CPU stand for those on an A6000.

About 15 minutes on one core.
"""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import torch
from torch import Tensor, nn

from actkit import zoo
from actkit.claims.digit_arms import DigitArms, in_batches
from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.small_models import vision_transformer
from actkit.compression.repavit.folded import FoldedMlp, Reparameterize, fold
from actkit.compression.repavit.idle import IdleMlp, Repavit, TokenBatchNorm, active_channels
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.recipe.runner import apply
from actkit.data import digits

NARROW, WIDE = 1e-5, 1e-10  # of the largest value, in float32 and float64
SHARE, FASTER = 0.375, 0.6
LOST, TRAINED = 0.015, 0.005  # of the accuracy
ACTS, SHARES = ("gelu", "relu", "silu"), (0.0, 0.25, 0.5, 0.75, 1.0)
RATES = (1e-3, 3e-3)
PLAIN, ALL, HALF, MOST, NONE, FOLDED = "plain", "0 % idle", "50 % idle", "75 % idle", "100 % idle", "folded form"
ARMS = {ALL: 0.0, HALF: 0.5, MOST: 0.75, NONE: 1.0, FOLDED: 0.75}


@dataclass(frozen=True)
class Sizes:
    """How much is folded, timed and trained.

    Attributes:
        seeds: of weights and batches.
        epochs: of a training.
        training: images; None for all.
        layers: blocks of the vision transformers.
        widths: hidden states of the MLPs that are timed.
        rounds: of timings.
        images: of the digits that give the zoo's ViT its statistics.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 30
    training: int | None = None
    layers: int = 6
    widths: tuple[int, ...] = (768, 1024)
    rounds: int = 20
    images: int = 512


EXACT = Statement(
    "A folded MLP computes what its training form does",
    "in the release's own code",
    "GELU, ReLU and SiLU, 0 to 100 % idle, with and without biases, random weights and statistics: the largest "
    "difference of the block's output is at most 1e-5 of the largest value in float32, 1e-10 in float64",
    SYNTHETIC,
)
WHOLE = Statement(
    "So does a whole model",
    "in the release's own code",
    "the zoo's ViT, 25 to 100 % idle, statistics of 512 digits: logits of the test images move by at most 1e-5 of the "
    "largest in float32, 1e-10 in float64",
    "vit",
)
TRAINED_EXACT = Statement(
    "So do trained models",
    "in the release's own code",
    "the digits ViTs with idle channels of all seeds, after training: the same bounds",
    SMALL,
)
CHEAP = Statement(
    "A folded MLP is smaller and faster",
    "DeiT-Base 86.6 to 51.1 M parameters, + 57.8 % images a second, ViT-Large + 66.8 % (A6000)",
    "75 % idle: the weights are exactly 0.375 of the MLP's; shape of ViT-Base and ViT-Large, 8 x 197 tokens, float32, "
    "two threads, 20 interleaved rounds: median time with norm and sum <= 0.6 x that of the plain MLP",
    SYNTHETIC,
)
KEPT = Statement(
    "Idle channels cost little accuracy",
    "DeiT-Base 81.8 -> 81.3 %, ViT-Large 80.3 -> 82.0 % at 75 %; 73.7 % at 100 %",
    "digits, mean over 3 seeds: accuracy at 75 % idle >= that of the plain ViT - 1.5 points; 100 % is reported",
    SMALL,
)
FULL = Statement(
    "Training with all channels and folding is no worse than training the folded form",
    "DeiT-Base 81.3 and 80.6 %, ViT-Large 82.0 and 80.6 %",
    "digits, mean over 3 seeds: accuracy at 75 % idle >= that of the folded form trained as it is - 0.5 points",
    SMALL,
)
STATEMENTS = (EXACT, WHOLE, TRAINED_EXACT, CHEAP, KEPT, FULL)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    arms = Arms(sizes, progress)
    experiments: list[Experiment] = [
        (EXACT, exact),
        (WHOLE, partial(whole, sizes)),
        (TRAINED_EXACT, partial(trained_exact, arms)),
        (CHEAP, partial(cheap, sizes)),
        (KEPT, partial(kept, arms)),
        (FULL, partial(full, arms)),
    ]
    return conduct("repavit", experiments, sizes, subject, progress)


# -- folds -------------------------------------------------------------------------------------------------------------


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def drawn(norm: TokenBatchNorm, mlp: IdleMlp) -> None:
    """Random weights that keep the size of activations, and random statistics."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*norm.parameters(), *mlp.parameters()):
            deviation = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.normal_(std=deviation, generator=generator)
        for each in (norm, mlp.norm):
            assert isinstance(each.running_mean, Tensor) and isinstance(each.running_var, Tensor)
            each.running_mean.normal_(generator=generator)
            each.running_var.uniform_(0.5, 2.0, generator=generator)


def exact() -> Measurement:
    """The largest differences of random blocks."""
    gaps = {torch.float64: 0.0, torch.float32: 0.0}
    features, width = 96, 384
    x = torch.randn(4, 50, features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for act, share, biases in itertools.product(ACTS, SHARES, (True, False)):
        norm = TokenBatchNorm(features).double().eval()
        mlp = IdleMlp(features, width, active_channels(width, share), act, biases=(biases, biases)).double().eval()
        drawn(norm, mlp)
        for dtype in gaps:
            norm, mlp, rows = norm.to(dtype), mlp.to(dtype), x.to(dtype)
            with torch.no_grad():
                found = gap(rows + fold(norm, mlp)(rows), rows + mlp(norm(rows)))
            gaps[dtype] = max(gaps[dtype], found)
    here = f"{gaps[torch.float32]:.1e} in float32, {gaps[torch.float64]:.1e} in float64, {len(ACTS) * 10} blocks"
    return Measurement(here, gaps[torch.float32] <= NARROW and gaps[torch.float64] <= WIDE)


def folded_gaps(model: nn.Module) -> tuple[float, float]:
    """How far the logits of the test images move when a model is folded, in float32 and float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        each = copy.deepcopy(model).to(dtype).eval()
        before = logits(each)
        apply(each, Reparameterize(), undo="off", progress=False)
        found.append(gap(logits(each), before))
    return found[0], found[1]


def logits(model: nn.Module) -> Tensor:
    """Of the test images."""
    with evaluating(model):
        return first_tensor(forward(model, {"pixel_values": digits("test")[0]}))


def within(gaps: list[tuple[float, float]]) -> Measurement:
    """Whether folds are exact to rounding."""
    narrow, wide = (max(each) for each in zip(*gaps, strict=True))
    here = f"logits move by {narrow:.1e} in float32, {wide:.1e} in float64, {len(gaps)} models"
    return Measurement(here, narrow <= NARROW and wide <= WIDE)


def whole(sizes: Sizes) -> Measurement:
    """The zoo's ViT, with statistics of digits."""
    gaps = []
    batches = in_batches((digits("train")[0][: sizes.images], digits("train")[1][: sizes.images]))
    for share in SHARES[1:]:
        model = zoo.load("vit").float().eval()
        apply(model, Repavit(idle=share), undo="off", progress=False)
        with torch.no_grad():
            model.train()
            for batch in batches:
                forward(model, batch)
        gaps.append(folded_gaps(model))
    return within(gaps)


def cheap(sizes: Sizes) -> Measurement:
    """Weights and median times of one MLP with norm and sum, in turns, on two threads."""
    parts, passed, threads = [], True, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for features in sizes.widths:
            norm = nn.LayerNorm(features)
            mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))
            folded = FoldedMlp(features, features)
            weights = [
                sum(parameter.numel() for parameter in each.parameters() if parameter.dim() == 2)
                for each in (mlp, folded)
            ]
            x = torch.randn(8, 197, features, generator=torch.Generator().manual_seed(0))
            seconds: dict[str, list[float]] = {"plain": [], "folded": []}
            with torch.inference_mode():
                for number in range(sizes.rounds + 2):  # the first two warm up
                    for name in seconds:
                        start = time.perf_counter()
                        _ = x + (mlp(norm(x)) if name == "plain" else folded(x))
                        if number > 1:
                            seconds[name].append(time.perf_counter() - start)
            plain, ours = (median(seconds[name]) for name in seconds)
            ratio = weights[1] / weights[0]
            passed &= ratio == SHARE and ours / plain <= FASTER
            parts.append(
                f"width {features}: {ours / plain:.2f} x the time ({ours * 1e3:.0f} and {plain * 1e3:.0f} ms), "
                f"{ratio:g} x the weights"
            )
    finally:
        torch.set_num_threads(threads)
    return Measurement("; ".join(parts), passed)


# -- digits ------------------------------------------------------------------------------------------------------------


class Arms(DigitArms):
    """The vision transformers.

    Args:
        sizes: how much is trained.
        progress: show bars.
    """

    def __init__(self, sizes: Sizes, progress: bool = False) -> None:
        def fresh(arm: str, seed: int) -> nn.Module:
            model = vision_transformer(layers=sizes.layers, seed=seed).eval()
            if arm != PLAIN:
                apply(model, Repavit(idle=ARMS[arm]), undo="off", progress=False)
            if arm == FOLDED:
                apply(model, Reparameterize(), undo="off", progress=False)
            return model

        super().__init__(
            fresh,
            seeds=sizes.seeds,
            rates=RATES,
            epochs=sizes.epochs,
            training=sizes.training,
            progress=progress,
        )

    def mean(self, arm: str) -> float:
        """Mean accuracy over seeds."""
        return mean(self.accuracies(arm))


def trained_exact(arms: Arms) -> Measurement:
    """Folds of the trained models."""
    return within([folded_gaps(arms.fitted(arm, seed).model) for arm in (HALF, MOST, NONE) for seed in arms.seeds])


def kept(arms: Arms) -> Measurement:
    """75 % idle against the plain model; all arms for the record."""
    difference = arms.mean(MOST) - arms.mean(PLAIN)
    listed = ", ".join(arms.described(arm) for arm in (PLAIN, *ARMS))
    return Measurement(f"{100 * difference:+.2f} points; {listed}", difference >= -LOST)


def full(arms: Arms) -> Measurement:
    """75 % idle, trained with all channels, against the folded form trained as it is."""
    difference = arms.mean(MOST) - arms.mean(FOLDED)
    return Measurement(f"{100 * difference:+.2f} points", difference >= -TRAINED)
