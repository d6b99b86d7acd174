"""AWQ's claims: at 3 bits, scaling the channels that meet large activations saves most of what rounding costs.

Measured on the SwiGLU language model of the zoo and on its outlier twin: the same function with 4 channels per norm
made 30 times larger. (Small models have no outliers of their own, so those are planted, and the natural model is
reported beside them.) Groups of 64, calibration on 64 x 256 training tokens, perplexity on 33,000 held-out tokens.
First the method: round-to-nearest, AWQ with scales, AWQ with scales and clipping; at 3 bits with 3 calibration seeds,
at 4 bits with one, for comparison. Then the observation behind it: which 1 % of the input channels to keep exact, on
the twin and on MiniLM (post-norm, so that it has no twin), whose error is the distance of its sentence embeddings.
The search of the ratio runs on the first 4,096 calibration tokens, the statistics on all. Perplexities of 7B models and
the speed of kernels cannot be checked here.

About 5 minutes on two idle cores. On SmolLM2-135M (9 minutes on a busy machine, on the fewer rows of `REAL_SIZES`)
nothing is planted: it has such channels by itself. Its weights were rounded to 4 bits in groups of 32 before it was
published, so it is judged on its off-grid twin, whose weights lie on no grid; the model itself is reported beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import Any, Literal

import torch

from actkit import zoo
from actkit.claims.outcome import Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, moved_by, spread
from actkit.core.edit.edits import Replace
from actkit.core.grids.integers import Convention, IntegerGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import DenseWeight
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Moments, Quantiles
from actkit.quantization.awq import Awq, saliency_mask
from actkit.quantization.rtn import RoundToNearest
from actkit.zoo.off_grid import off_grid_twin
from actkit.zoo.outliers import outlier_twin

Choice = Literal["activation", "weight", "random", "nothing"]
GROUP = 64
CONVENTION: Convention = "llm-awq"  # the release's grid, on which the paper's numbers stand
RELEASE: Any = {"convention": CONVENTION, "scale_dtype": "float32"}
KEPT = 0.01  # share of the input channels kept exact


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the calibration text.
        calibration: rows of 256 tokens.
        held_out: rows of 256 tokens.
        sentences: of MiniLM.
        search: tokens for the search of the ratio.
        grid: ratios tried.
        draws: of random channels.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 64
    held_out: int = 130
    sentences: int = 400
    search: int = 4096
    grid: int = 20
    draws: int = 5


REAL_SIZES = Sizes(calibration=4, held_out=8, search=512)
TWIN = Statement(
    "Weight rounding loses less with AWQ than round-to-nearest where some channels carry large activations",
    "LLaMA-2-7B at 3 bits: perplexity 5.47 -> 6.66 by rounding, 6.24 with AWQ (65 % of the gap; from memory)",
    "outlier twin, whose float32 logits agree with the natural model's to 1e-4, 3 bits: the mean perplexity gap to "
    "float32 of AWQ with scales and clipping is at most 0.6 x that of round-to-nearest, and smaller in 3 of 3 "
    "calibration seeds",
    "swiglu",
)
NATURAL = Statement(
    "AWQ does no harm where there are no such channels",
    "better than round-to-nearest on every model tried",
    "natural model, 3 bits: the mean perplexity with AWQ is at most 1.01 x that of round-to-nearest",
    "swiglu",
)
SALIENCY = (
    "3 bits with 1 % of the input channels of each layer kept in float32: the error with channels chosen by mean |x| "
    "is less than 0.8 x the smaller of the error by column norm and the mean error of 5 random draws; error: {error}"
)
SALIENCY_TWIN, SALIENCY_ENCODER = (
    Statement(
        f"The channels to keep exact are those with large activations, not those with large weights: {name}",
        "OPT-6.7B at 3 bits: perplexity 23.54; with 1 % kept by activation about 11.4, at random hardly better "
        "(from memory)",
        SALIENCY.format(error=error),
        subject,
    )
    for name, error, subject in (
        ("the outlier twin", "perplexity gap to float32", "swiglu"),
        ("a sentence encoder", "1 - cosine to the float32 sentence embedding", "minilm"),
    )
)
OFF_GRID = replace(
    TWIN,
    condition="off-grid twin, whose float32 logits agree with the model's to 1e-4, 3 bits: the mean perplexity gap to "
    "float32 of AWQ with scales and clipping is at most 0.6 x that of round-to-nearest, and smaller in 3 of 3 "
    "calibration seeds",
)
STATEMENTS = (TWIN, NATURAL, SALIENCY_TWIN, SALIENCY_ENCODER, *(OFF_GRID.on(name) for name in REAL))


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        return _on_a_real_model(subject, progress, sizes or REAL_SIZES)
    sizes = sizes or Sizes()
    rows: dict[str, Any] = {"calibration": sizes.calibration, "split": "train"}
    natural = Subject("swiglu", held_out=sizes.held_out, **rows)
    twin = Subject(
        "swiglu", held_out=sizes.held_out, model=outlier_twin(natural.model, channels=4, factor=30.0), **rows
    )
    encoder = Subject("minilm", held_out=sizes.sentences, **rows)
    experiments = [
        (TWIN, partial(on_the_twin, twin, natural, sizes)),
        (NATURAL, partial(on_the_natural_model, natural, sizes)),
        (SALIENCY_TWIN, partial(saliency, twin, sizes)),
        (SALIENCY_ENCODER, partial(saliency, encoder, sizes)),
    ]
    return conduct("awq", experiments, sizes, subject, progress)


def _on_a_real_model(name: str, progress: bool, sizes: Sizes) -> Outcome:
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    published = Subject(name, model=zoo.load(name), **rows)  # float32: the differences are small
    twin = Subject(name, model=off_grid_twin(published.model), **rows)
    only: Experiment = (OFF_GRID.on(name), partial(on_the_off_grid_twin, twin, published, sizes))
    return conduct("awq", [only], sizes, name, progress)


# -- the method --------------------------------------------------------------------------------------------------------


def on_the_twin(twin: Subject, natural: Subject, sizes: Sizes) -> Measurement:
    """The gap that rounding opens on the twin, and how much of it is left with AWQ."""
    moved = moved_by(natural, twin)
    rounded, _, clipped = arms(twin, sizes, 3, sizes.seeds)
    left, holds = _left(twin, rounded[0], clipped)
    here = f"{described(twin, sizes)}; {spread(left, '.2f')} of the gap is left at 3 bits; logits differ by {moved:.0e}"
    return Measurement(here, moved <= 1e-4 and holds)


def on_the_off_grid_twin(twin: Subject, published: Subject, sizes: Sizes) -> Measurement:
    """The same on a model with large channels of its own, and the model beside its twin."""
    moved, seeds = moved_by(published, twin), sizes.seeds
    rounded, clipped = arms(twin, sizes, 3, seeds, scaled=False)
    left, holds = _left(twin, rounded[0], clipped)
    rounded_4, clipped_4 = arms(twin, sizes, 4, seeds[:1], scaled=False)
    beside = published.perplexity(RoundToNearest(bits=4, group_size=GROUP, **RELEASE))
    parts = [
        f"twin, 3 bits: rounded {rounded[0]:.2f}, AWQ {spread(clipped)}",
        f"4 bits, one seed: rounded {rounded_4[0]:.2f}, AWQ {clipped_4[0]:.2f}",
        f"the published model, which had been rounded to 4 bits before, rounded to 4 bits again {beside:.2f}",
    ]
    here = (
        f"perplexity {twin.perplexity():.2f} in float32; {'; '.join(parts)}. {spread(left, '.2f')} of the gap is left "
        f"at 3 bits; logits differ by {moved:.0e}. {_large_channels(published)}"
    )
    return Measurement(here, moved <= 1e-4 and holds)


def _left(twin: Subject, rounded: float, clipped: list[float]) -> tuple[list[float], bool]:
    """The share of the gap that rounding opens which AWQ leaves, per seed, and whether that is as little as claimed."""
    exact = twin.perplexity()
    gap = rounded - exact
    left = [(perplexity - exact) / gap for perplexity in clipped]
    return left, gap > 0 and mean(left) <= 0.6 and max(left) < 1


def _large_channels(subject: Subject) -> str:
    """How far the largest activations between blocks stand out of the others."""
    sites = [Site("block.output", block.index) for block in anatomy(subject.model).blocks]
    seen = record(subject.model, {site: Quantiles() for site in sites}, subject.calibration(0), progress=False)
    ratios = [seen[site].quantile(1.0) / seen[site].quantile(0.5) for site in sites]
    massive = sum(ratio >= 1000 for ratio in ratios)
    return (
        f"The largest activation between blocks is {max(ratios):,.0f} times the median, and 1,000 times or more behind "
        f"{massive} of {len(ratios)} blocks"
    )


def on_the_natural_model(natural: Subject, sizes: Sizes) -> Measurement:
    """The same arms on the model as it was trained."""
    rounded, _, clipped = arms(natural, sizes, 3, sizes.seeds)
    ratios = [perplexity / rounded[0] for perplexity in clipped]
    here = f"{described(natural, sizes)}; {spread(ratios, '.4f')} x round-to-nearest at 3 bits"
    return Measurement(here, mean(ratios) <= 1.01)


def arms(
    subject: Subject, sizes: Sizes, bits: int, seeds: tuple[int, ...], scaled: bool = True
) -> tuple[list[float], ...]:
    """Measure perplexities under the three ways of rounding.

    Args:
        subject: the model and its text.
        sizes: how much is measured.
        bits: of the weights.
        seeds: of the calibration text.
        scaled: False leaves out AWQ with scales alone.

    Returns:
        Of round-to-nearest (one), of AWQ with scales, and with scales and clipping (one per seed).
    """
    grid: Any = {"bits": bits, "group_size": GROUP, **RELEASE}
    awq = partial(Awq, **grid, n_grid=sizes.grid, search_tokens=sizes.search)
    rounded = [subject.perplexity(RoundToNearest(**grid))]
    clips = (False, True) if scaled else (True,)
    return rounded, *([subject.perplexity(awq(clip=clip), seed) for seed in seeds] for clip in clips)


def described(subject: Subject, sizes: Sizes) -> str:
    """All arms in a line; what was measured already is not measured again."""
    parts = []
    for bits, seeds in ((3, sizes.seeds), (4, sizes.seeds[:1])):
        rounded, scaled, clipped = (spread(found) for found in arms(subject, sizes, bits, seeds))
        parts.append(f"{bits} bits: rounded {rounded}, AWQ scales {scaled}, scales and clipping {clipped}")
    return f"perplexity {subject.perplexity():.2f} in float32; {'; '.join(parts)}"


# -- the observation behind it -----------------------------------------------------------------------------------------


def saliency(subject: Subject, sizes: Sizes) -> Measurement:
    """The error with exact channels chosen by activation (over calibration seeds), by weight, and at random."""
    is_language = hasattr(subject.model, "lm_head")
    form = ".2f" if is_language else ".4f"

    def error(by: Choice, seed: int = 0) -> float:
        edits = kept_exact(subject, by, seed)
        if is_language:
            return subject.edited_perplexity(edits) - subject.perplexity()
        return subject.edited_distance(edits)

    activation = [error("activation", seed) for seed in sizes.seeds]
    weight = error("weight")
    drawn = [error("random", draw) for draw in range(sizes.draws)]
    ratio = mean(activation) / min(weight, mean(drawn))
    here = (
        f"error by activation {spread(activation, form)}, by column norm {weight:{form}}, at random "
        f"{spread(drawn, form)} in {len(drawn)} draws, with nothing kept {error('nothing'):{form}}; "
        f"by activation {ratio:.2f} x the best of the others"
    )
    return Measurement(here, ratio < 0.8)


def kept_exact(subject: Subject, by: Choice, seed: int) -> list[Replace]:
    """Round every linear layer to 3 bits but for the columns of its salient inputs.

    Args:
        subject: the model and its text.
        by: how the salient inputs are chosen.
        seed: of the calibration text if they are chosen by activation; of the draw if at random.

    Returns:
        The edits.
    """
    grid = IntegerGrid(3, GROUP, convention=CONVENTION)
    inputs = [each for block in anatomy(subject.model).blocks for each in block.linear_inputs()]
    seen: Any = {}
    if by == "activation":
        wanted = {each.site: Moments() for each in inputs}
        seen = record(subject.model, wanted, subject.calibration(seed), progress=False)
    edits = []
    for number, each in enumerate(inputs):
        for linear in each.linears:
            weight = linear.weight.detach()
            rounded = grid.fake(weight)
            if by != "nothing":
                mean_abs = seen[each.site].mean_abs if by == "activation" else torch.zeros(weight.shape[1])
                kept = saliency_mask(mean_abs, weight, KEPT, by, seed=1000 * seed + number)
                rounded = torch.where(kept, weight, rounded)
            edits.append(Replace(linear.path, ActLinear.of(linear, weight=DenseWeight(rounded))))
    return edits
