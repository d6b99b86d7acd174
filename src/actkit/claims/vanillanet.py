"""VanillaNet's claims: folds are exact, and deep training and series activations help shallow nets.

What is measured here: every preset with random weights and batch norm statistics, in its trained form with faded
activations and folded, in float32 and float64, on one image. Nets of 4 convolutions (32 to 128 channels) for the digits
at 16 x 16 pixels, trained for 30 epochs on 1,085 images, with and without pairs of layers whose activation fades out in
the first third, with a series of order 3 or ReLU alone; Adam W, the rate of each the better of 1e-3 and 3e-3 by
validation with the first seed, three seeds (five would take half an hour here), accuracy on the 338 test images. The
net `tiny` on 64 images of 32 x 32 pixels, in its trained form and folded. And the zoo's CNN, deepened, trained on and
collapsed.

Digits are not ImageNet, and nets so small say little about 58 M parameters. The paper's accuracies and its latencies on
GPUs cannot be checked here.

About 10 minutes on one core.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import mean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit import zoo
from actkit.claims.digit_arms import BATCH, DigitArms, Images, accuracy, in_batches
from actkit.claims.outcome import SMALL, SYNTHETIC, Measurement, Outcome, Statement, conduct
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.recipe.runner import apply
from actkit.core.train.training import train
from actkit.data import Split, digits
from actkit.functions.vanillanet.deepen import Collapse, Deepen
from actkit.functions.vanillanet.faded import FadeActivations, FadedActivation
from actkit.functions.vanillanet.model import PRESETS, VanillaNet
from actkit.functions.vanillanet.series import SeriesActivation2d

NARROW, WIDE = 1e-4, 1e-10  # in float32 and float64
GAIN, CEILING, REDUCED = 0.005, 0.97, 0.15
LEAST, DEEPER = -0.002, -0.002
FASTER = 0.7
RATES = (1e-3, 3e-3)
CELLS = {"deep, series": (True, 3), "deep": (True, None), "series": (False, 3), "neither": (False, None)}


@dataclass(frozen=True)
class Sizes:
    """How much is folded, trained and timed.

    Attributes:
        seeds: of weights and batches.
        presets: that are folded.
        images: side of their image.
        epochs: of a training.
        fade: share of it in which activations fade.
        training: images; None for all.
        steps: of the CNN.
        rounds: of timings.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    presets: tuple[str, ...] = tuple(PRESETS)
    images: int = 64
    epochs: int = 30
    fade: float = 1 / 3
    training: int | None = None
    steps: int = 170
    rounds: int = 50


EXACT = Statement(
    "Once its activations have faded, a net is folded into a shallower one that computes the same",
    "in the release's own code; parameters of the folded nets from 15.5 M (v5) to 58.6 M (v13)",
    "every preset, random weights and statistics: the largest difference between trained form and folded net is below "
    "1e-4 in float32 and 1e-10 in float64, the folded one has fewer parameters, and a strength of 0.5 is refused",
    SYNTHETIC,
)
SERIES = Statement(
    "Series activations raise the accuracy of shallow nets",
    "6 layers: 59.58 % plain, 75.23 % with the series, ImageNet (quoted from memory)",
    "digits, 2 x 2 arms, 3 seeds: the mean accuracy with the series is at least 0.5 points above that without, or, "
    "above 97 %, the error is at least 15 % smaller",
    SMALL,
)
BOTH = Statement(
    "Deep training and series together are the best of the four",
    "6 layers: 76.36 % with both, 75.23 and 60.53 % with one (quoted from memory)",
    "digits, 3 seeds: mean accuracy with both >= that of every other arm - 0.2 points",
    SMALL,
)
DEEP = Statement(
    "Deep training costs shallow nets no accuracy",
    "+ 0.95 points without, + 1.13 with the series (6 layers, from memory)",
    "digits, 3 seeds: mean accuracy with deep training >= that without - 0.2 points",
    SMALL,
)
SPEED = Statement(
    "A folded net is faster than its trained form",
    "half of the layers are gone",
    "the net `tiny`, 64 images of 32 x 32 pixels, two threads, 50 interleaved rounds: median time of the folded one <= "
    "0.7 of the trained form's",
    SYNTHETIC,
)
ANY = Statement(
    "Any layer of a trained model can be deepened, trained and collapsed again",
    "not in the paper, which builds nets of pairs",
    "the zoo's CNN, all layers: outputs move by less than 1e-4 when it is deepened and when it is collapsed, "
    "afterwards it has as many numbers as before, and its test accuracy is at least that before - 0.5 points",
    "cnn",
)
STATEMENTS = (EXACT, SERIES, BOTH, DEEP, SPEED, ANY)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    arms = Arms(sizes, progress)
    experiments = [
        (EXACT, partial(exact, sizes)),
        (SERIES, partial(series, arms)),
        (BOTH, partial(both, arms)),
        (DEEP, partial(deep, arms)),
        (SPEED, partial(speed, sizes)),
        (ANY, partial(any_layer, sizes)),
    ]
    return conduct("vanillanet", experiments, sizes, subject, progress)


# -- folds -------------------------------------------------------------------------------------------------------------


def drawn(net: nn.Module, seed: int = 0) -> nn.Module:
    """As after a training: random statistics of batch norms, weights that keep the size of activations, faded."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.copy_(0.2 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
            elif isinstance(module, nn.Conv2d | SeriesActivation2d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    fade(net, 1.0)
    return net.eval()


def fade(net: nn.Module, strength: float) -> None:
    """Set the strength of all faded activations."""
    for module in net.modules():
        if isinstance(module, FadedActivation):
            module.strength.fill_(strength)


def exact(sizes: Sizes) -> Measurement:
    """The largest differences by preset."""
    parts, passed = [], True
    for name in sizes.presets:
        with torch.device("meta"):
            empty = VanillaNet.preset(name)
        net: VanillaNet = drawn(empty.to_empty(device="cpu")).double()  # type: ignore[assignment]
        shape = (1, net.settings["in_channels"], sizes.images, sizes.images)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        deployed: nn.Module = net.to_deploy()  # in float64 whatever the net's dtype, and rounded once
        counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (net, deployed)]
        gaps: list[float] = []
        for dtype in (torch.float64, torch.float32):
            net, deployed = net.to(dtype), deployed.to(dtype)
            with torch.no_grad():
                gaps.insert(0, float((net(x.to(dtype)) - deployed(x.to(dtype))).abs().max()))
        fade(net, 0.5)
        try:
            net.to_deploy()
            refused = False
        except ValueError:
            refused = True
        passed &= gaps[0] < NARROW and gaps[1] < WIDE and counts[1] < counts[0] and refused
        parts.append(f"{name} {gaps[0]:.0e} and {gaps[1]:.0e}, {counts[0] / 1e6:.1f} to {counts[1] / 1e6:.1f} M")
        del net, deployed
    return Measurement("; ".join(parts), passed)


def speed(sizes: Sizes) -> Measurement:
    """Median times of both forms, in random order, on two threads."""
    net = drawn(VanillaNet.preset("tiny"))
    forms: dict[str, nn.Module] = {"trained": net, "folded": net.to_deploy()}  # type: ignore[operator]
    x = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    order, shuffle, threads = list(forms), Random(0).shuffle, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            for number in range(sizes.rounds + 2):  # the first two warm up
                shuffle(order)
                for name in order:
                    start = time.perf_counter()
                    forms[name](x)
                    if number > 1:
                        seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    trained, folded = (median(seconds[name]) for name in ("trained", "folded"))
    here = f"{folded / trained:.2f}: {trained * 1e3:.1f} and {folded * 1e3:.1f} ms, medians of {sizes.rounds} rounds"
    return Measurement(here, folded / trained <= FASTER)


# -- nets for digits ---------------------------------------------------------------------------------------------------


def images(split: Split) -> Images:
    """Digits at 16 x 16 pixels, and their labels."""
    pixels, labels = digits(split)
    return F.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False), labels


def fresh(arm: str, seed: int) -> nn.Module:
    """The net of an arm with random weights."""
    torch.manual_seed(seed)
    deep, order = CELLS[arm]
    return VanillaNet.preset("digits", deep=deep, order=order)


class Arms(DigitArms):
    """The four trained nets.

    Args:
        sizes: how much is trained.
        progress: show bars.
    """

    def __init__(self, sizes: Sizes, progress: bool = False) -> None:
        super().__init__(
            fresh,
            seeds=sizes.seeds,
            rates=RATES,
            epochs=sizes.epochs,
            images=images,
            training=sizes.training,
            rules=lambda arm: [FadeActivations(share=sizes.fade)] if CELLS[arm][0] else [],
            progress=progress,
        )

    def all_described(self) -> str:
        """All four, for the record."""
        return ", ".join(self.described(arm) for arm in CELLS)

    def mean(self, *arms: str) -> float:
        """Mean accuracy over arms and seeds."""
        return mean(each for arm in arms for each in self.accuracies(arm))


def series(arms: Arms) -> Measurement:
    """The main effect of the series."""
    with_it, without = arms.mean("deep, series", "series"), arms.mean("deep", "neither")
    reduced = (with_it - without) / max(1 - without, 1e-9)
    passed = with_it - without >= GAIN or (with_it > CEILING and reduced >= REDUCED)
    here = f"{100 * (with_it - without):+.2f} points, {reduced:.0%} of the error; {arms.all_described()}"
    return Measurement(here, passed)


def both(arms: Arms) -> Measurement:
    """Both parts against each other arm."""
    gaps = {arm: arms.mean("deep, series") - arms.mean(arm) for arm in CELLS if arm != "deep, series"}
    here = ", ".join(f"{100 * gap:+.2f} points over {arm!r}" for arm, gap in gaps.items())
    return Measurement(here, min(gaps.values()) >= LEAST)


def deep(arms: Arms) -> Measurement:
    """The main effect of deep training."""
    gain = arms.mean("deep, series", "deep") - arms.mean("series", "neither")
    return Measurement(f"{100 * gain:+.2f} points", gain >= DEEPER)


# -- any layer ---------------------------------------------------------------------------------------------------------


def any_layer(sizes: Sizes) -> Measurement:
    """Deepen the zoo's CNN, train it, collapse it; beside it, the plain CNN trained as long."""
    model = zoo.load("cnn").float().eval()
    plain = copy.deepcopy(model)
    pixels, labels = digits("train")
    batches, held_out = in_batches((pixels[:1024], labels[:1024])), in_batches(digits("search"), rows=None)
    held = in_batches(digits("test"), rows=None)
    numbers, before = _numbers(model), accuracy(model, held)
    original = _logits(model)
    apply(model, Deepen(), batches, undo="off", progress=False)
    deepened = float((_logits(model) - original).abs().max())
    for each, rules in ((model, [FadeActivations(share=sizes.fade)]), (plain, [])):
        train(
            each,
            batches,
            validation=held_out,
            steps=sizes.steps,
            learning_rate=1e-3,
            rules=rules,
            evaluate_every=sizes.steps,
            keep="last",
            progress=False,
        )
    trained = _logits(model)
    apply(model.eval(), Collapse(), undo="off", progress=False)
    collapsed = float((_logits(model) - trained).abs().max())
    after = accuracy(model, held)
    here = (
        f"outputs move by {deepened:.0e} and {collapsed:.0e} (up to {float(trained.abs().max()):.0f}); {numbers} "
        f"numbers and {_numbers(model)}; accuracy {before:.2%} before, {after:.2%} after, {accuracy(plain, held):.2%} "
        f"of the plain CNN trained as long"
    )
    same = deepened < NARROW and collapsed < NARROW and _numbers(model) == numbers
    return Measurement(here, same and after >= before - 0.005)


def _numbers(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.state_dict().values())


def _logits(model: nn.Module) -> Tensor:
    with evaluating(model):
        return first_tensor(forward(model, {"pixel_values": digits("test")[0]}))
