"""PanGu-pi's claims: attention alone makes tokens alike, shortcuts keep them apart, and both parts lower the loss.

What is measured here: stacks of 24 attentions without norms and MLPs (width 64, 4 heads, 32 tokens, all weights normal,
with a standard deviation of 1 / sqrt(inputs)), plain, with the residual sum, and with it and a shortcut of ratio 8;
every distance in them beside the theorem's bound. Llama-like language models (3 layers, width 96, 4 heads, 64 tokens)
trained from random weights for 250 steps of 1,024 tokens of the embedded text: plain, with a series of 2, with a
shortcut of ratio 8, with both; widths make parameters equal, the rate of each is the better of 1e-3 and 3e-3 by
validation with the first seed, losses are those of the test split. And the parts at the paper's settings (2, ratio 32)
put into trained models, whose outputs must not move.

Models so small, trained so briefly, say little about 7 B parameters and 1.6 T tokens. The paper's benchmark scores
and its latency cannot be checked here.

About 7 minutes on one core; with `--subject smollm2` or `gemma3` one more, in which the dimensions of its blocks are
read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
from torch import Tensor, nn

from actkit import zoo
from actkit.claims.outcome import SMALL, SYNTHETIC, Measurement, Outcome, Statement, conduct
from actkit.claims.small_models import TextArms, language_model
from actkit.claims.subject import REAL, Subject, spread
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.recipe.runner import apply
from actkit.functions.pangu_pi.add_nonlinearity import AddNonlinearity
from actkit.functions.pangu_pi.collapse import attention_factor, shortcut_factor
from actkit.functions.pangu_pi.diversity import distance, diversity
from actkit.functions.pangu_pi.shortcut import AugmentedShortcut

COLLAPSED, WIDER = 1e-3, 1.05
BETTER, NEAR = 0.01, 0.005  # nats
SAME, ROUNDING = 1e-5, 1e-12
RATIO, SERIES = 8, 2
WIDTHS = {"plain": 268, "series": 264, "shortcut": 260, "both": 256}  # of equal parameters, to 0.1 %
INSERTED = AddNonlinearity(series=2, ratio=32)


@dataclass(frozen=True)
class Sizes:
    """How much is drawn, trained and read.

    Attributes:
        seeds: of weights and texts.
        stacks: seeds of the stacks of attention.
        depth: attentions of a stack.
        tokens: in it.
        width: of it.
        heads: of it.
        layers: of the trained models.
        steps: of training.
        held_out: rows of 64 test tokens.
        rows: of 256 tokens that an insertion is tried on, and dimensions are read of.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    stacks: tuple[int, ...] = (0, 1, 2, 3, 4)
    depth: int = 24
    tokens: int = 32
    width: int = 64
    heads: int = 4
    layers: int = 3
    steps: int = 250
    held_out: int = 640
    rows: int = 16


REAL_SIZES = Sizes()  # of which a real model takes the rows

COLLAPSE = Statement(
    "Attention alone makes all tokens alike; the residual sum keeps them apart, an augmented shortcut more so",
    "proved as upper bounds",
    "24 attentions without norms, 5 seeds, |H - 1 mean(H)| / |H| at the end over that of the input: without the "
    "residual sum below 1e-3; with it more than without; with a shortcut as well (normal weights, ratio 8) at least "
    "1.05 times as much as with the residual sum alone, in the mean",
    SYNTHETIC,
)
BOUND = Statement(
    "The distance to all tokens being equal grows by no more than the theorem's factor",
    "sqrt(lambda heads) s v, + 1 with the residual sum, + sum L |W1| |W2| with shortcuts",
    "all layers of these stacks, 5 seeds, float64: never above the bound (by more than rounding, 1e-12 of |H|)",
    SYNTHETIC,
)
LOSS = Statement(
    "Series activation and augmented shortcut together lower the loss of a language model",
    "C-Eval of a 1 B model: 35.0 plain, 36.9 with the series, 36.3 with the shortcut, 37.9 with both",
    "3 seeds, equal parameters, tokens and tuning, mean test losses: both <= plain - 0.01 nats, and both <= the lower "
    "of the two alone + 0.005 nats",
    SMALL,
)
DIMENSION = Statement(
    "Both parts together give the last layer's tokens more dimensions",
    "removing either part lowers the effective dimension of every layer (in a figure)",
    "3 seeds, test text: mean number of principal components for 80 % of the variance at the last block, both > plain",
    SMALL,
)
INSERTION = Statement(
    "Put into a trained model, the parts leave its function as it is",
    "not in the paper: its models are trained from scratch",
    "series of 2 and shortcut of ratio 32 in every block: the largest difference of logits or embeddings on test text "
    "is below 1e-5",
    "swiglu",
)
STATEMENTS = (
    COLLAPSE,
    BOUND,
    LOSS,
    DIMENSION,
    INSERTION,
    INSERTION.on("minilm"),
    *(INSERTION.on(name) for name in REAL),
)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or (REAL_SIZES if subject in REAL else Sizes())
    if subject in REAL:
        return conduct(
            "pangu-pi", [(INSERTION.on(subject), partial(insertion, subject, sizes))], sizes, subject, progress
        )
    arms = text_arms(sizes, progress)
    experiments = [
        (COLLAPSE, partial(collapse, sizes)),
        (BOUND, partial(bound, sizes)),
        (LOSS, partial(losses, arms)),
        (DIMENSION, partial(dimensions, arms)),
        (INSERTION, partial(insertion, "swiglu", sizes)),
        (INSERTION.on("minilm"), partial(insertion, "minilm", sizes)),
    ]
    return conduct("pangu-pi", experiments, sizes, subject, progress)


# -- stacks of attention -----------------------------------------------------------------------------------------------


class Attentions:
    """A stack of attentions with normal weights, in float64.

    Args:
        seed: of weights and input.
        sizes: of the stack.
    """

    def __init__(self, seed: int, sizes: Sizes) -> None:
        generator = torch.Generator().manual_seed(seed)
        d, h = sizes.width, sizes.heads

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

        self.layers = [
            (draw(h, d // h, d), draw(h, d // h, d), draw(h, d // h, d), draw(d, d)) for _ in range(sizes.depth)
        ]
        self.shortcuts = [AugmentedShortcut(d, RATIO).double() for _ in range(sizes.depth)]
        for shortcut in self.shortcuts:
            for parameter in shortcut.parameters():
                parameter.data = draw(*parameter.shape)
        self.input = torch.randn(sizes.tokens, d, generator=generator, dtype=torch.float64)

    def run(self, kind: str) -> tuple[list[float], list[float]]:
        """Run it.

        Args:
            kind: 'plain', with the 'residual' sum, or 'augmented'.

        Returns:
            The distances, of the input and behind each layer; the factors of the bound for each layer.
        """
        x, distances, factors = self.input, [float(distance(self.input))], []
        for (query, key, value, output), shortcut in zip(self.layers, self.shortcuts, strict=True):
            scores = (x @ query.mT) @ (x @ key.mT).mT / math.sqrt(query.shape[1])
            weights = scores.softmax(-1)
            mixed = torch.cat(tuple(weights @ (x @ value.mT)), -1) @ output.mT
            factor = attention_factor(weights, value, output)
            if kind != "plain":
                mixed, factor = mixed + x, factor + 1
            if kind == "augmented":
                mixed, factor = mixed + shortcut(x).detach(), factor + shortcut_factor(shortcut)
            x = mixed
            found = float(distance(x))
            distances.append(found if found > ROUNDING * float(x.norm()) else 0.0)  # all tokens are equal
            factors.append(factor)
        self.share = distances[-1] / float(x.norm())
        return distances, factors


def collapse(sizes: Sizes) -> Measurement:
    """Shares that are left at the end, over those of the input."""
    left: dict[str, list[float]] = {"plain": [], "residual": [], "augmented": []}
    for seed in sizes.stacks:
        for kind, found in left.items():
            stack = Attentions(seed, sizes)
            stack.run(kind)
            found.append(stack.share / (float(distance(stack.input)) / float(stack.input.norm())))
    plain, residual, augmented = left.values()
    ratio = mean(augmented) / mean(residual)
    passed = max(plain) < COLLAPSED and all(a > b for a, b in zip(residual, plain, strict=True)) and ratio >= WIDER
    parts = ", ".join(f"{kind} {spread(found, '.2g')}" for kind, found in left.items())
    return Measurement(f"{parts}; augmented over residual {ratio:.3f}", passed)


def bound(sizes: Sizes) -> Measurement:
    """The largest share of its bound that a distance reaches, in one layer and in all from the input on."""
    reached = dict.fromkeys(("plain", "residual", "augmented"), 0.0)
    for seed in sizes.stacks:
        for kind in reached:
            distances, factors = Attentions(seed, sizes).run(kind)
            for before, after, factor in zip(distances[:-1], distances[1:], factors, strict=True):
                share = after / (factor * before) if factor * before else math.inf
                reached[kind] = max(reached[kind], share if after else 0.0)
    here = ", ".join(f"{kind} {share:.3f}" for kind, share in reached.items())
    return Measurement(f"largest share of a layer's bound: {here}", max(reached.values()) <= 1 + 1e-12)


# -- language models ---------------------------------------------------------------------------------------------------


def text_arms(sizes: Sizes, progress: bool = False) -> TextArms:
    """The compared models, those of WIDTHS."""
    return TextArms(
        partial(fresh, layers=sizes.layers),
        seeds=sizes.seeds,
        rates=(1e-3, 3e-3),
        steps=sizes.steps,
        held_out=sizes.held_out,
        progress=progress,
    )


def fresh(arm: str, seed: int, layers: int = 3) -> nn.Module:
    """A model with random weights."""
    model = language_model(hidden=96, intermediate=WIDTHS[arm], layers=layers, seed=seed)
    parts = AddNonlinearity(
        series=SERIES if arm in ("series", "both") else 1,
        ratio=RATIO if arm in ("shortcut", "both") else None,
        seed=seed,
    )
    return apply(model, parts, undo="off", min_coverage=0.0, progress=False).model


def losses(arms: TextArms) -> Measurement:
    """Mean test losses of the four."""
    means = {arm: mean(arms.losses(arm)) for arm in WIDTHS}
    passed = (
        means["both"] <= means["plain"] - BETTER and means["both"] <= min(means["series"], means["shortcut"]) + NEAR
    )
    gaps = [a - b for a, b in zip(arms.losses("both"), arms.losses("plain"), strict=True)]
    here = f"{', '.join(map(arms.described, WIDTHS))}; both minus plain {spread(gaps, '+.3f')}"
    return Measurement(here, passed)


def dimensions(arms: TextArms) -> Measurement:
    """Dimensions of the last block's tokens."""
    found = {}
    for arm in WIDTHS:
        models = [arms.model(arm, seed) for seed in arms.seeds]
        found[arm] = [float(diversity(model, arms.test(model), progress=False).at(-1).dimension) for model in models]
    here = ", ".join(f"{arm} {spread(values, '.1f')}" for arm, values in found.items())
    return Measurement(f"{here} of 96", mean(found["both"]) > mean(found["plain"]))


# -- trained models ----------------------------------------------------------------------------------------------------


def insertion(name: str, sizes: Sizes) -> Measurement:
    """The largest difference of the outputs; of a real model the dimensions of its blocks as well."""
    subject = Subject(name, calibration=1, split="calibration", held_out=sizes.rows, model=zoo.load(name).float())
    model = subject.model
    before = _outputs(model, subject)
    read = ""
    if name in REAL:
        places = [
            place for place in diversity(model, subject.held_out, progress=False).places if place.after == "block"
        ]
        read = (
            f". Before: components for 80 % of the variance by block "
            f"{', '.join(str(place.dimension) for place in places)} of {places[0].width}; diversity "
            f"{', '.join(f'{place.diversity:.2f}' for place in places)}"
        )
    weights = sum(parameter.numel() for parameter in model.parameters())
    applied = apply(model, INSERTED, undo="off", progress=False)
    more = sum(parameter.numel() for parameter in model.parameters()) / weights - 1
    gap = max(float((a - b).abs().max()) for a, b in zip(_outputs(model, subject), before, strict=True))
    largest = max(float(each.abs().max()) for each in before)
    here = (
        f"largest difference {gap:.1e} (outputs up to {largest:.1f}), {len(applied.edits)} parts, {more:.1%} more "
        f"parameters{read}"
    )
    return Measurement(here, gap < SAME and len(applied.edits) > 0)


def _outputs(model: nn.Module, subject: Subject) -> list[Tensor]:
    """Of the first batch alone, which is large enough: logits of 4,096 tokens."""
    with evaluating(model):
        return [first_tensor(forward(model, subject.held_out[0])).float()]
