"""AdaDim's claims: groups of weights along the outputs isolate large input channels, so let each layer choose its axis.

Measured on the SwiGLU language model of the zoo and on its outlier twin (the same function with 4 channels per norm
made 30 times larger), in float32. Groups of 64 at 3 and 4 bits, 64 x 256 training tokens for calibration, of which
4,096 serve the searches (AdaDim's of the axis, AWQ's of the ratio), 3 calibration seeds, perplexity on 16,384 held-out
tokens. Arms: round-to-nearest in groups of inputs and in groups of outputs, AdaDim over it, GPTQ, AdaDim over that, all
on the same grid, and beside them, with one seed, AWQ. The isolation itself is measured on random layers, one of whose
input channels is 100 times larger. MMLU, HumanEval and a kernel on the A100 cannot be checked here. 28 minutes on one
thread of a busy machine.

On SmolLM2-135M (in float32, 3 bits) nothing is planted; it is judged on its off-grid twin, as its weights were rounded
to 4 bits before they were published. That is a smaller run (`REAL_SIZES`), without AWQ: 8,192 held-out tokens, 8 x 256
for calibration, of which 1,024 serve the search. Gemma 3 270M likewise, with one calibration seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from actkit import zoo
from actkit.claims.outcome import SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, moved_by, spread
from actkit.core.grids.grid import GroupAxis
from actkit.core.grids.integers import IntegerGrid
from actkit.core.recipe.runner import apply
from actkit.quantization.adadim.adadim import AdaDim
from actkit.quantization.awq import Awq
from actkit.quantization.gptq import Gptq
from actkit.quantization.rtn import RoundToNearest
from actkit.zoo.off_grid import off_grid_twin
from actkit.zoo.outliers import outlier_twin

GROUP = 64
INPUT, OUTPUT, CHOSEN = "groups of inputs", "groups of outputs", "AdaDim"
GPTQ, GPTQ_CHOSEN, AWQ = "gptq", "AdaDim over gptq", "AWQ"
LARGE = 100.0  # how much larger the channel of a random layer is
WIDTH, TOKENS = 256, 1024  # of a random layer
AXES: tuple[GroupAxis, GroupAxis] = ("input", "output")


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the calibration text, and of the random layers.
        calibration: rows of 256 tokens.
        held_out: rows of 256 tokens.
        search: tokens that decide the axis, and AWQ's ratio.
        bits: of the weights.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 64
    held_out: int = 64
    search: int = 4096
    bits: tuple[int, ...] = (3, 4)


REAL_SIZES = Sizes(calibration=8, held_out=32, search=1024, bits=(3,))
LARGEST_MODEL = Sizes(seeds=(0,), calibration=8, held_out=32, search=1024, bits=(3,))  # gemma3: 1 MB of logits a token
GAINS = "up to 4.7 points of MMLU (base models) and 10 of HumanEval (instruction-tuned) over both (abstract)"
ISOLATION = Statement(
    "The error of a large input channel stays in groups of its own",
    "errors of layers up to some 6 times smaller (from a summary)",
    "random layers of 256 x 256, 3 bits, groups of 64, one input channel 100 times the others: the squared error of "
    "the output with groups of outputs is at most 0.3 x that with groups of inputs, on the mean over 3 seeds",
    SYNTHETIC,
)
TWIN = Statement(
    "Groups along the outputs lose less where some input channels are large",
    "errors of layers up to some 6 times smaller (from a summary)",
    "outlier twin, 3 bits: the perplexity gap of groups of outputs is at most 0.7 x that of groups of inputs",
    "swiglu",
)
CHOICE = Statement(
    "Letting each layer choose its axis is as good as the better axis for all",
    GAINS,
    "natural model and outlier twin, 3 and 4 bits, every calibration seed: no layer's error is above the smaller of "
    "both axes', and the perplexity with AdaDim is at most 1.02 x the smaller of both axes'",
    "swiglu",
)
SECOND_ORDER = Statement(
    "GPTQ is no worse with the axis that AdaDim chooses",
    GAINS,
    "natural model and outlier twin, 3 and 4 bits: the perplexity of AdaDim over gptq is at most that of gptq in at "
    "least 2 of 3 calibration seeds",
    "swiglu",
)
ON_REAL = (
    replace(
        TWIN,
        condition="off-grid twin, whose float32 logits agree with the model's to 1e-4, 3 bits: the perplexity gap of "
        "groups of outputs is at most 0.7 x that of groups of inputs",
    ),
    replace(
        CHOICE,
        condition="off-grid twin, 3 bits, every calibration seed: no layer's error is above the smaller of both axes', "
        "and the perplexity with AdaDim is at most 1.02 x the smaller of both axes'",
    ),
    replace(
        SECOND_ORDER,
        condition="off-grid twin, 3 bits: the perplexity of AdaDim over gptq is at most that of gptq in at least 2 of "
        "3 calibration seeds",
    ),
)
ONE_SEED = "off-grid twin, 3 bits, one calibration seed: the perplexity of AdaDim over gptq is at most that of gptq"


def on_real(name: str) -> tuple[Statement, ...]:
    """The claims about a real model; where there is one calibration seed, the last says so."""
    *others, last = (each.on(name) for each in ON_REAL)
    return (*others, replace(last, condition=ONE_SEED) if len(real_sizes(name).seeds) == 1 else last)


def real_sizes(subject: str) -> Sizes:
    """The sizes of a run on a real model."""
    return LARGEST_MODEL if subject == "gemma3" else REAL_SIZES


STATEMENTS = (ISOLATION, TWIN, CHOICE, SECOND_ORDER, *(each for name in REAL for each in on_real(name)))


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        return _on_a_real_model(subject, progress, sizes or real_sizes(subject))
    sizes = sizes or Sizes()
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    natural = Subject("swiglu", **rows)
    twin = Subject("swiglu", model=outlier_twin(natural.model, channels=4, factor=30.0), **rows)
    both = {"natural model": Arms(natural, sizes), "outlier twin": Arms(twin, sizes)}
    experiments: list[Experiment] = [
        (ISOLATION, partial(isolation, sizes)),
        (TWIN, partial(on_the_twin, both["outlier twin"], natural)),
        (CHOICE, partial(choice, both)),
        (SECOND_ORDER, partial(second_order, both)),
    ]
    return conduct("adadim", experiments, sizes, subject, progress)


def _on_a_real_model(name: str, progress: bool, sizes: Sizes) -> Outcome:
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    published = Subject(name, model=zoo.load(name), **rows)  # float32: the differences are small
    asked = on_real(name)
    twin = Arms(Subject(name, model=off_grid_twin(published.model), **rows), sizes)
    experiments: list[Experiment] = [
        (asked[0], partial(on_the_twin, twin, published)),
        (asked[1], partial(choice, {"off-grid twin": twin})),
        (asked[2], partial(second_order, {"off-grid twin": twin})),
    ]
    return conduct("adadim", experiments, sizes, name, progress)


# -- the isolation -----------------------------------------------------------------------------------------------------


def isolation(sizes: Sizes) -> Measurement:
    """The error of random layers with one large channel, and beside it what becomes of it if the weights differ too."""
    activations = [errors(seed) for seed in sizes.seeds]
    ratios = [outputs / inputs for (inputs, _), (outputs, _) in activations]
    own = [spread([pair[axis][1] for pair in activations], ".0%") for axis in (0, 1)]
    beside = {
        "with that channel's weights divided by 100, as in an outlier twin": 1 / LARGE,
        "with its weights 100 times larger instead": LARGE,
    }
    parts = []
    for name, factor in beside.items():
        found = [errors(seed, weights=factor, inputs=1.0 if factor > 1 else LARGE) for seed in sizes.seeds]
        parts.append(f"{name} {spread([outputs / inputs for (inputs, _), (outputs, _) in found])}")
    here = (
        f"{spread(ratios)} x; the large channel's own share of the error is {own[0]} with groups of inputs and "
        f"{own[1]} with groups of outputs. Beside it: {'; '.join(parts)}"
    )
    return Measurement(here, mean(ratios) <= 0.3)


def errors(seed: int, *, weights: float = 1.0, inputs: float = LARGE) -> list[tuple[float, float]]:
    """Round a random layer with one large channel to 3 bits.

    Args:
        seed: of weights and inputs.
        weights: what the channel's weights are multiplied by.
        inputs: what its inputs are multiplied by.

    Returns:
        For groups of inputs and of outputs: the mean squared error of the outputs, and the channel's own share, its
        squared error alone over the sum of those of all channels.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight[:, 0] *= weights
    x[:, 0] *= inputs
    return [_error(weight, x, axis) for axis in AXES]


def _error(weight: Tensor, x: Tensor, axis: GroupAxis) -> tuple[float, float]:
    lost = IntegerGrid(3, GROUP, axis).fake(weight) - weight
    alone = x.square().mean(0) * lost.square().mean(0)  # of each channel
    return float((x @ lost.t()).square().mean()), float(alone[0] / alone.sum())


# -- the arms ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Arms:
    """A model under each way of rounding, measured when first asked for.

    Attributes:
        subject: the model and its text.
        sizes: how much is measured.
        chosen: by bits and seed, the perplexity with AdaDim, and for each layer the axis and the errors of both.
    """

    subject: Subject
    sizes: Sizes
    chosen: dict[tuple[int, int], tuple[float, dict[str, Any]]] = field(default_factory=dict)

    def of(self, name: str, bits: int) -> list[float]:
        """The perplexities of an arm, one per calibration seed (plain rounding takes none, AWQ is shown with one)."""
        if name == CHOSEN:
            return [self.choice(bits, seed)[0] for seed in self.sizes.seeds]
        seeds = self.sizes.seeds[:1] if name in (INPUT, OUTPUT, AWQ) else self.sizes.seeds
        return [self.subject.perplexity(self._recipes(bits)[name], seed) for seed in seeds]

    def choice(self, bits: int, seed: int) -> tuple[float, dict[str, Any]]:
        """The perplexity with AdaDim, and what it chose."""
        if (bits, seed) not in self.chosen:
            recipe, text = self._recipes(bits)[CHOSEN], self.subject.calibration(seed)
            applied = apply(self.subject.model, recipe, text, undo="memory", progress=False)
            try:
                perplexity = self.subject.edited_perplexity([])
            finally:
                applied.undo()
            layers = {path: each for _, _, block in applied.report.values for path, each in block.items()}
            self.chosen[bits, seed] = perplexity, layers
        return self.chosen[bits, seed]

    def _recipes(self, bits: int) -> dict[str, Any]:
        grid: dict[str, Any] = {"bits": bits, "group_size": GROUP}
        search: dict[str, Any] = {"search_tokens": self.sizes.search}
        return {
            INPUT: RoundToNearest(**grid),
            OUTPUT: RoundToNearest(**grid, group_axis="output"),
            CHOSEN: AdaDim(**grid, **search),
            GPTQ: Gptq(**grid),
            GPTQ_CHOSEN: AdaDim(**grid, **search, method="gptq"),
            AWQ: Awq(**grid, **search),
        }

    def described(self, *names: str) -> str:
        """Some arms in a line, at all bits."""
        parts = (
            f"{bits} bits: " + ", ".join(f"{name} {spread(self.of(name, bits))}" for name in names)
            for bits in self.sizes.bits
        )
        return f"perplexity {self.subject.perplexity():.2f}; {'; '.join(parts)}"


def on_the_twin(twin: Arms, published: Subject) -> Measurement:
    """The gap that groups of outputs leave over that of groups of inputs."""
    moved = moved_by(published, twin.subject)
    exact = twin.subject.perplexity()
    inputs, outputs = (twin.of(name, 3)[0] - exact for name in (INPUT, OUTPUT))
    here = (
        f"{twin.described(INPUT, OUTPUT)}; the gap is {outputs / inputs:.2f} x at 3 bits; the twin's logits differ by "
        f"{moved:.0e}"
    )
    return Measurement(here, moved <= 1e-4 and inputs > 0 and outputs <= 0.7 * inputs)


def choice(models: dict[str, Arms]) -> Measurement:
    """AdaDim over round-to-nearest beside both axes, and each layer's error beside both."""
    parts, worst, best = [], 0.0, True
    for name, arms in models.items():
        along = []
        for bits in arms.sizes.bits:
            better = min(arms.of(INPUT, bits)[0], arms.of(OUTPUT, bits)[0])
            worst = max(worst, max(arms.of(CHOSEN, bits)) / better)
            for seed in arms.sizes.seeds:
                layers = arms.choice(bits, seed)[1].values()
                best = best and all(each[each["axis"]] <= min(each[axis] for axis in AXES) for each in layers)
                along.append(mean(each["axis"] == "output" for each in layers))
        shown = arms.described(INPUT, OUTPUT, CHOSEN)
        parts.append(f"{name}: {shown}; groups of outputs in {spread(along, '.0%')} of the layers")
    here = (
        f"{'. '.join(parts)}. {worst:.4f} x the better axis at worst; "
        f"{'every layer' if best else 'not every layer'} took the axis of its smaller error"
    )
    return Measurement(here, best and worst <= 1.02)


def second_order(models: dict[str, Arms]) -> Measurement:
    """AdaDim over GPTQ beside GPTQ, and AWQ where it was run."""
    parts, holds = [], True
    for name, arms in models.items():
        won = []
        for bits in arms.sizes.bits:
            pairs = zip(arms.of(GPTQ_CHOSEN, bits), arms.of(GPTQ, bits), strict=True)
            won.append(sum(chosen <= plain for chosen, plain in pairs))
            holds = holds and 3 * won[-1] >= 2 * len(arms.sizes.seeds)
        beside = () if arms.subject.name in REAL else (AWQ,)
        counts = " and ".join(f"{each} of {len(arms.sizes.seeds)}" for each in won)
        parts.append(f"{name}: {arms.described(GPTQ, GPTQ_CHOSEN, *beside)}; no worse in {counts} seeds")
    return Measurement(". ".join(parts), holds)
