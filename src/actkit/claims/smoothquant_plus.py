"""SmoothQuant+'s claims: one strength for the whole model, searched on its own loss, makes 4 bits nearly lossless.

Measured on the SwiGLU language model of the zoo and on its outlier twin (the same function with 4 channels per norm
made 30 times larger), in float32. Groups of 64, 64 x 256 training tokens for calibration, of which 4,096 serve the
search, 3 calibration seeds, perplexity on 33,000 held-out tokens. Arms: round-to-nearest, SmoothQuant with strength 0.5
before it, SmoothQuant+, and AWQ's scales without clipping. HumanEval of Code Llama and the speed on an A100 cannot be
checked here.

On SmolLM2-135M and Gemma 3 270M (in bf16, as they are stored) nothing is planted, and the models are judged on their
off-grid twins, as their weights were rounded to 4 bits before they were published. These are smaller runs: of SmolLM2
(`REAL_SIZES`) 8 x 256 tokens for calibration, of which 1,024 serve the searches, 11 strengths, 8,192 held-out tokens,
AWQ with one seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from actkit.claims.outcome import Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, moved_by, spread
from actkit.core.grids.integers import IntegerGrid
from actkit.core.model.anatomy import anatomy
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import AbsMax, Gram
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth
from actkit.quantization.smoothquant_plus import SmoothQuantPlus
from actkit.zoo.off_grid import off_grid_twin
from actkit.zoo.outliers import outlier_twin

GROUP = 64


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the calibration text.
        calibration: rows of 256 tokens.
        held_out: rows of 256 tokens.
        search: tokens that the search of the strength runs on.
        steps: strengths tried.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 64
    held_out: int = 130
    search: int = 4096
    steps: int = 21


REAL_SIZES = Sizes(calibration=8, held_out=32, search=1024, steps=11)
LARGEST_MODEL = Sizes(seeds=(0,), calibration=8, held_out=32, search=1024)  # of gemma3: a token has 1 MB of logits
CENTRAL = Statement(
    "One smoothing strength, searched on the whole rounded model, saves most of what rounding to 4 bits costs",
    "Code Llama 7B to 34B at 4 bits: better than rounding and AWQ on HumanEval, no figure known to us",
    "twin, 4 bits: the mean perplexity gap to the exact model of SmoothQuant+ is at most 0.6 x that of "
    "round-to-nearest, and at most that of the fixed strength 0.5 + 2 % of round-to-nearest's",
    "swiglu",
)
NATURAL = Statement(
    "It does no harm where no channels are large",
    "better than round-to-nearest on every model tried (from memory)",
    "natural model, 4 bits: the mean perplexity with SmoothQuant+ is at most 1.01 x that of round-to-nearest",
    "swiglu",
)
LOSSLESS = Statement(
    "4 bits are lossless with it",
    "Code Llama-34B at 4 bits: the accuracy of FP16",
    "natural model, 4 bits: the mean perplexity with SmoothQuant+ is at most 1.02 x that of float32",
    "swiglu",
)
PREMISE = Statement(
    "The error of a rounded weight is multiplied by the activation that it meets",
    "layers with outliers in their inputs lose most (a figure without numbers)",
    "over all linear layers of the natural model: the rank correlation of the largest over the median channel of a "
    "layer's input with the relative error of its output under 4-bit weights is above 0.3",
    "swiglu",
)
STATEMENTS = (CENTRAL, NATURAL, LOSSLESS, PREMISE, *(CENTRAL.on(name) for name in REAL))


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        return _on_a_real_model(subject, progress, sizes or real_sizes(subject))
    sizes = sizes or Sizes()
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    natural = Subject("swiglu", **rows)
    twin = Subject("swiglu", model=outlier_twin(natural.model, channels=4, factor=30.0), **rows)
    experiments: list[Experiment] = [
        (CENTRAL, partial(on_the_twin, twin, natural, sizes)),
        (NATURAL, partial(no_harm, natural, sizes)),
        (LOSSLESS, partial(lossless, natural, sizes)),
        (PREMISE, partial(amplification, natural, twin)),
    ]
    return conduct("smoothquant-plus", experiments, sizes, subject, progress)


def real_sizes(subject: str) -> Sizes:
    """The sizes of a run on a real model."""
    return LARGEST_MODEL if subject == "gemma3" else REAL_SIZES


def _on_a_real_model(name: str, progress: bool, sizes: Sizes) -> Outcome:
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    published = Subject(name, **rows)
    twin = Subject(name, model=off_grid_twin(published.model), **rows)
    only: Experiment = (CENTRAL.on(name), partial(on_the_twin, twin, published, sizes))
    return conduct("smoothquant-plus", [only], sizes, name, progress)


# -- the method --------------------------------------------------------------------------------------------------------


def arms(subject: Subject, sizes: Sizes, bits: int) -> dict[str, list[float]]:
    """The perplexities under each way of rounding, one per calibration seed (rounding takes none)."""
    grid: dict[str, Any] = {"bits": bits, "group_size": GROUP, "scale_dtype": "float32"}
    rounded = RoundToNearest(**grid)
    recipes: dict[str, Any] = {
        "strength 0.5": [Smooth(), rounded],
        "SmoothQuant+": SmoothQuantPlus(**grid, search_tokens=sizes.search, steps=sizes.steps),
    }
    awq = Awq(**grid, clip=False, search_tokens=sizes.search)
    found = {name: [subject.perplexity(recipe, seed) for seed in sizes.seeds] for name, recipe in recipes.items()}
    # AWQ is judged by no claim
    shown = sizes.seeds[:1] if subject.name in REAL else sizes.seeds
    found["AWQ's scales"] = [subject.perplexity(awq, seed) for seed in shown]
    return {"rounded": [subject.perplexity(rounded)], **found}


def described(subject: Subject, found: dict[str, list[float]]) -> str:
    """All arms in a line."""
    return f"perplexity {subject.perplexity():.2f}; 4 bits: " + ", ".join(
        f"{name} {spread(values)}" for name, values in found.items()
    )


def on_the_twin(twin: Subject, published: Subject, sizes: Sizes) -> Measurement:
    """The gap that rounding opens, and how much of it is left."""
    moved = moved_by(published, twin)
    found = arms(twin, sizes, 4)
    exact = twin.perplexity()
    gap = found["rounded"][0] - exact
    left = {name: (mean(values) - exact) / gap for name, values in found.items()}
    here = f"{described(twin, found)}; left of the gap: " + ", ".join(f"{k} {v:.2f}" for k, v in left.items())
    holds = gap > 0 and left["SmoothQuant+"] <= 0.6 and left["SmoothQuant+"] <= left["strength 0.5"] + 0.02
    return Measurement(f"{here}; the twin's logits differ by {moved:.0e}", holds)


def no_harm(natural: Subject, sizes: Sizes) -> Measurement:
    """The same arms on the model as it was trained."""
    found = arms(natural, sizes, 4)
    ratio = mean(found["SmoothQuant+"]) / found["rounded"][0]
    return Measurement(f"{described(natural, found)}; {ratio:.4f} x round-to-nearest", ratio <= 1.01)


def lossless(natural: Subject, sizes: Sizes) -> Measurement:
    """Perplexity at 4 bits over that in float32."""
    found = arms(natural, sizes, 4)["SmoothQuant+"]
    ratio = mean(found) / natural.perplexity()
    return Measurement(f"{natural.perplexity():.2f} -> {spread(found)}, {ratio:.4f} x", ratio <= 1.02)


# -- the premise -------------------------------------------------------------------------------------------------------


def amplification(natural: Subject, twin: Subject) -> Measurement:
    """The rank correlation on the natural model, and beside it that on the twin."""
    found, beside = correlation(natural), correlation(twin)
    return Measurement(f"{found:.2f} over all layers; {beside:.2f} on the outlier twin", found > 0.3)


def correlation(subject: Subject) -> float:
    """Spearman's correlation, over all linear layers, of the spread of the inputs with the output's relative error."""
    grid = IntegerGrid(4, GROUP)
    inputs = [each for block in anatomy(subject.model).blocks for each in block.linear_inputs()]
    wanted = {each.site: [AbsMax(), Gram()] for each in inputs}
    seen: Any = record(subject.model, wanted, subject.calibration(0), progress=False)
    ratios, errors = [], []
    for each in inputs:
        largest, gram = seen[each.site]
        for linear in each.linears:
            weight = linear.weight.detach().double()
            lost = grid.fake(linear.weight.detach().float()).double() - weight
            # |x W^T|^2 over all tokens is the trace of W G W^T
            error, norm = (float(((w @ gram.value.double()) * w).sum()) for w in (lost, weight))
            ratios.append(float(largest.value.max() / largest.value.median()))
            errors.append((error / norm) ** 0.5)
    return float(spearmanr(ratios, errors).statistic)
