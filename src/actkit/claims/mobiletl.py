"""MobileTL's claims: half the bytes of a block, the gradients of its parts, and the accuracy of plain fine-tuning.

Bytes: one block in training, 24 channels, expansion 6, 28 x 28 positions, 8 images; MobileNetV2's (ReLU6), and
MobileNetV3's with squeeze and excitation (hard-swish). The baseline is the paper's: ReLU6 keeps one bit in it already,
hard-swish its input. Beside it stands what torch keeps, for which ReLU6 keeps its input too.

Transfer: a net of MobileNetV3's kind (five blocks of 8 to 16 channels with squeeze and excitation, hard-swish) learns
the 8 x 8 digits, for each of 5 seeds anew, and is then fine-tuned on 320 images that are inverted and turned by 90
degrees. Arms: the classifier; the last three blocks as torch trains them; MobileTL with these; the shifts of their
norms alone. All train the classifier. AdamW and a cosine, 30 epochs of batches of 64; the rate of each arm is the best
of three by the validation loss of its first seed.

Operations of the backward pass are counted for the trained blocks: a convolution's two products (of weight and input);
for each number 10 of a batch norm in training mode (its normalised input 2, gamma 2, beta 1, input 5), 2 of a frozen
one (input 1, beta 1), 5 of hard-swish (two comparisons, the slope 2, the product 1), 1 of a step; squeeze and
excitation alike in both.

The data sets of the paper, its 36 % of operations on the whole MobileNetV3 and times on devices are not checkable here.
About 4 minutes of one core.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.claims.digit_arms import DigitArms, Images
from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.core.edit.edits import standing_in
from actkit.core.forward.hooks import hooked
from actkit.core.layers.coded import CodedActivation, FrozenNorm
from actkit.core.layers.known_functions import RELU6
from actkit.core.layers.packed_codes import DerivativeCode
from actkit.core.measure.saved_tensors import saved_tensors
from actkit.core.train.choice import trained_parameters
from actkit.core.train.rules import attached
from actkit.data import Split, digits
from actkit.finetuning.mobiletl import SIGN, MobileTL, find_inverted_residuals

HEAD, FULL, OURS, SHIFTS = ARMS = ("classifier", "blocks", "MobileTL", "shifts")
V2, V3 = (0.46, 0.04), (0.53, 0.05)  # saved bytes: the paper's, and how far off they may be
LOST, GAINED, OPERATIONS = 0.015, 0.02, 0.8
BLOCKS = 3
OF_NORM, OF_FROZEN, OF_SWISH, OF_STEP = 10, 2, 5, 1  # operations for each number


@dataclass(frozen=True)
class Sizes:
    """How much is trained.

    Attributes:
        seeds: of nets and orders.
        pretraining: epochs on the digits as they are.
        epochs: of the fine-tuning.
        images: that it is on.
        rates: that are tried.
        side: positions of a block whose bytes are counted, along an edge.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    pretraining: int = 20
    epochs: int = 30
    images: int = 320
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    side: int = 28


HALF = Statement(
    "A block keeps about half the bytes",
    "MobileNetV2 -46 % (46.3), MobileNetV3 -53 % (53.3)",
    "saved bytes against the paper's baseline: V2 block -46 % +- 4 points, V3 block with squeeze and excitation -53 % "
    "+- 5 points; each mask has one bit for each number",
    SYNTHETIC,
)
GRADIENTS = Statement(
    "Its parts have the gradients that they should have",
    "the step approximates the slope (its appendix was not seen)",
    "a frozen norm: those of a batch norm in evaluation mode to 1e-6; ReLU6 with its exact mask: autograd's; a step "
    "for hard-swish: cosine >= 0.85 for standard normal inputs",
    SYNTHETIC,
)
TRANSFERS = Statement(
    "It transfers as plain fine-tuning of the same blocks does",
    "MobileNetV3, 5 blocks: 0.6 points lost on CIFAR-10 (abstract)",
    "mean test accuracy over 5 seeds >= that of the blocks as torch trains them - 1.5 points, and >= that of the "
    "classifier alone + 2 points",
    SMALL,
)
CHEAPER = Statement(
    "Its backward pass is cheaper",
    "36 % fewer operations (MobileNetV3, 5 blocks, abstract; of the whole, by a count that was not seen)",
    "operations of the backward pass of the trained blocks, by count: at most 0.8 x plain fine-tuning",
    SMALL,
)
STATEMENTS = (HALF, GRADIENTS, TRANSFERS, CHEAPER)


def run(sizes: Sizes | None = None, subject: str | None = None, progress: bool = True) -> Outcome:
    """Run the claims.

    Args:
        sizes: how much.
        subject: only the claims on it; None for all.
        progress: show bars.
    """
    sizes = sizes or Sizes()
    arms = Arms(sizes, progress)
    experiments: list[Experiment] = [
        (HALF, partial(half, sizes)),
        (GRADIENTS, gradients),
        (TRANSFERS, partial(transfers, arms)),
        (CHEAPER, cheaper),
    ]
    return conduct("mobiletl", experiments, sizes, subject, progress)


# -- the net -----------------------------------------------------------------------------------------------------------


class Excitation(nn.Module):
    """Squeeze and excitation: x times a gate for each channel.

    Args:
        channels: of x.
        hidden: of the gate's hidden layer.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, channels, height, width] -> the same shape."""
        return x * self.gate(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


class InvertedBlock(nn.Module):
    """An inverted residual block.

    Args:
        into: channels.
        out: channels.
        stride: of the depthwise convolution.
        act: class of the activations.
        excited: with squeeze and excitation.
        expansion: how many times wider it is inside.
    """

    def __init__(
        self, into: int, out: int, stride: int = 1, act: Any = nn.Hardswish, excited: bool = True, expansion: int = 6
    ) -> None:
        super().__init__()
        wide = expansion * into
        self.layers = nn.Sequential(
            nn.Conv2d(into, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            act(),
            nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            act(),
            Excitation(wide, max(4, wide // 24)) if excited else nn.Identity(),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.adds = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, into, height, width] -> [batch, out, ...]."""
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


class DigitsMobileNet(nn.Module):
    """A net of MobileNetV3's kind for images [batch, 1, 8, 8]: five blocks, 10 classes.

    Args:
        dropout: behind the first layer.
    """

    input_shape = (1, 8, 8)

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(), nn.Dropout(dropout)
        )
        shapes = ((8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1))
        self.blocks = nn.Sequential(*(InvertedBlock(*shape) for shape in shapes))
        self.classifier = nn.Linear(16, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [batch, 10]."""
        return self.classifier(self.blocks(self.stem(pixel_values)).mean((2, 3)))  # type: ignore[no-any-return]


# -- bytes and gradients -----------------------------------------------------------------------------------------------


def half(sizes: Sizes) -> Measurement:
    """Saved bytes of one block of each kind."""
    x = torch.randn(8, 24, sizes.side, sizes.side, generator=torch.Generator().manual_seed(0))
    parts, fine = [], []
    for name, act, excited, (goal, off) in (("V2", nn.ReLU6, False, V2), ("V3", nn.Hardswish, True, V3)):
        torch.manual_seed(0)
        block = InvertedBlock(24, 24, act=act, excited=excited).train()
        torch_s = kept(block, x)
        baseline = torch_s if excited else kept(block, x, bit_masks=True)
        ours = kept(block, x, rules=[MobileTL(blocks=1, head=False)])
        saved = 1 - ours / baseline
        fine.append(abs(saved - goal) <= off)
        parts.append(
            f"{name} -{saved:.1%} ({baseline / 1e6:.2f} -> {ours / 1e6:.2f} MB; against what torch keeps, "
            f"{torch_s / 1e6:.2f} MB, -{1 - ours / torch_s:.1%})"
        )
    mask = SIGN.encode(x)
    fine.append(mask.nbytes == x.numel() // 8)
    return Measurement(f"{'; '.join(parts)}; a mask of {x.numel():,} numbers: {mask.nbytes:,} bytes", all(fine))


def kept(block: nn.Module, x: Tensor, rules: Iterable[Any] = (), bit_masks: bool = False) -> int:
    """Bytes that autograd keeps of a block in training. bit_masks: ReLU6 keeps one bit."""
    model, rules = nn.Sequential(copy.deepcopy(block)), list(rules)
    with ExitStack() as stack:
        stack.enter_context(trained_parameters(model, rules))
        stack.enter_context(attached(rules, model))
        if bit_masks:
            code = DerivativeCode.fit(RELU6, 1)
            acts = {path: each for path, each in model.named_modules() if isinstance(each, nn.ReLU6)}
            stack.enter_context(standing_in(model, {path: CodedActivation(each, code) for path, each in acts.items()}))
        meter = stack.enter_context(saved_tensors(model))
        model.train()(x)
        return meter.bytes


def gradients() -> Measurement:
    """Differences from autograd's gradients."""
    drawn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(drawn(6))  # type: ignore[union-attr]
    norm = norm.eval()
    norm.weight.requires_grad_(False)
    x, upstream = drawn(4, 6, 5, 5).requires_grad_(), drawn(4, 6, 5, 5)
    pairs = [torch.autograd.grad(module(x), (x, norm.bias), upstream) for module in (norm, FrozenNorm(norm))]
    frozen = max(float((one - two).abs().max()) for one, two in zip(*pairs, strict=True))
    x, upstream = (3 * drawn(100_000)).requires_grad_(), drawn(100_000)
    exact = torch.autograd.grad(F.relu6(x), x, upstream)[0]
    masked = torch.autograd.grad(CodedActivation(nn.ReLU6(), DerivativeCode.fit(RELU6, 1))(x), x, upstream)[0]
    x = drawn(100_000).requires_grad_()
    swish = torch.autograd.grad(F.hardswish(x), x, upstream)[0]
    step = torch.autograd.grad(CodedActivation(nn.Hardswish(), SIGN)(x), x, upstream)[0]
    cosine = float(torch.cosine_similarity(step, swish, 0))
    same = torch.equal(exact, masked)
    text = f"frozen norm {frozen:.1e}; ReLU6 {'equal' if same else 'differs'}; hard-swish cosine {cosine:.3f}"
    return Measurement(text, frozen <= 1e-6 and same and cosine >= 0.85)


# -- transfer ----------------------------------------------------------------------------------------------------------


def turned(split: Split) -> Images:
    """Digits that are inverted and turned by 90 degrees."""
    pixels, labels = digits(split)
    return torch.rot90(1 - pixels, 1, (2, 3)), labels


class Arms:
    """The fine-tuned nets; each is trained when it is first needed.

    Args:
        sizes: how much is trained.
        progress: show bars.
    """

    def __init__(self, sizes: Sizes, progress: bool = False) -> None:
        self.sizes = sizes
        self._plain = DigitArms(
            lambda arm, seed: fresh(seed),
            seeds=sizes.seeds,
            rates=(3e-3,),
            epochs=sizes.pretraining,
            progress=progress,
        )
        self.arms = {
            arm: DigitArms(
                lambda arm, seed: copy.deepcopy(self._plain.fitted("plain", seed).model),
                seeds=sizes.seeds,
                rates=sizes.rates,
                epochs=sizes.epochs,
                images=turned,
                training=sizes.images,
                rules=lambda arm: [MobileTL(blocks=BLOCKS)] if arm == OURS else [],
                progress=progress,
                trainable=patterns(arm),
            )
            for arm in ARMS
        }

    def accuracies(self, arm: str) -> list[float]:
        """Of the test split, in each seed."""
        return self.arms[arm].accuracies(arm)

    def before(self) -> float:
        """The mean accuracy of the nets on the digits that they were trained on first."""
        return mean(self._plain.accuracies("plain"))


def fresh(seed: int) -> nn.Module:
    """A net with random weights."""
    torch.manual_seed(seed)
    return DigitsMobileNet()


def patterns(arm: str) -> list[str] | None:
    """The parameters that an arm trains; None for what its rule says."""
    blocks = range(5 - BLOCKS, 5)
    norms = [f"blocks.{index}.layers.{layer}.bias" for index in blocks for layer in (1, 4, 8)]
    more = {HEAD: [], FULL: [f"blocks.{index}.*" for index in blocks], SHIFTS: norms}
    return None if arm == OURS else ["classifier.*", *more[arm]]


def transfers(arms: Arms) -> Measurement:
    """Accuracies after the fine-tuning."""
    found = {arm: arms.accuracies(arm) for arm in ARMS}
    ours = mean(found[OURS])
    lost, gained = ours - mean(found[FULL]), ours - mean(found[HEAD])
    each = ", ".join(arms.arms[arm].described(arm) for arm in ARMS)
    text = f"{100 * lost:+.1f} points against the blocks, {100 * gained:+.1f} against the classifier; {each}"
    return Measurement(f"{text}; before, on plain digits {arms.before():.1%}", lost >= -LOST and gained >= GAINED)


def cheaper() -> Measurement:
    """Operations of the backward pass of the trained blocks, for one image."""
    net = DigitsMobileNet().eval()
    chosen = find_inverted_residuals(net)[-BLOCKS:]
    paths = [path for block in chosen for path in (*block.convolutions, *block.norms, *block.activations)]
    outputs: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            outputs[path] = output

        return hook

    with torch.no_grad(), hooked(net, after={path: note(path) for path in paths}):
        net(torch.zeros(1, 1, 8, 8))
    products = norms = frozen = swish = steps = 0
    for index, block in enumerate(chosen):
        for place, path in enumerate(block.convolutions):
            weight = net.get_submodule(path).get_parameter("weight")
            both = 1 if index == 0 and place == 0 else 2  # nothing in front of the first block trains
            products += both * 2 * outputs[path].numel() * weight[0].numel()
        for path in block.norms:
            last = path == block.norms[-1]
            norms += OF_NORM * outputs[path].numel()
            frozen += (OF_NORM if last else OF_FROZEN) * outputs[path].numel()
        for path in block.activations:
            if isinstance(net.get_submodule(path), nn.Hardswish):
                swish += OF_SWISH * outputs[path].numel()
                steps += OF_STEP * outputs[path].numel()
    plain, ours = products + norms + swish, products + frozen + steps
    text = f"{ours / plain:.3f} x ({ours:,} of {plain:,} per image; convolutions {products:,})"
    return Measurement(text, ours <= OPERATIONS * plain)
