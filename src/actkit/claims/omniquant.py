"""OmniQuant's claims: learned clipping saves 2 and 3 bits, learned scales save 4-bit inputs.

Weights alone are rounded on the SwiGLU language model of the zoo, in float32, in groups of 64. 4-bit weights by whole
rows with 4-bit inputs per token are judged on its outlier twin (the same function with 4 channels per norm made 30
times larger); keys and values stay as they are, in all arms. 32 x 256 training tokens, 10 epochs, 3 calibration seeds,
perplexity on 33,000 held-out tokens. Models of 7 billion parameters and more, and the phone, cannot be checked here.

On SmolLM2-135M and Gemma 3 270M (in bf16, as they are stored) nothing is planted, and the models are judged on their
off-grid twins, as their weights were rounded to 4 bits before they were published. A run there is a smaller one: one
seed of 8 x 256 tokens, 4,096 held-out ones, and 2 epochs (4 on Gemma) in place of 10. As these are 16 steps (32), and a
step moves a range by a rate, the rates are `FASTER` times those of the release.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

from actkit.claims.outcome import Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, moved_by, spread
from actkit.quantization.awq import Awq
from actkit.quantization.omniquant import OmniQuant
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth
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
        epochs: of learning.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 32
    held_out: int = 130
    epochs: int = 10


REAL_SIZES = Sizes(seeds=(0,), calibration=8, held_out=16, epochs=2)
LARGEST_MODEL = Sizes(seeds=(0,), calibration=8, held_out=32, epochs=4)  # of gemma3: a token has 1 MB of logits
FASTER = 5.0
TWO_BITS = Statement(
    "Learned clipping saves weights of 2 bits, which rounding and AWQ lose",
    "LLaMA-2-7B, W2A16 in groups of 128: perplexity 11.06 (from memory)",
    "natural model, 2 bits in groups of 64: the mean perplexity with learned clipping is at most 0.8 x that of "
    "round-to-nearest, and below AWQ's (scales and clipping) in at least two thirds of the seeds",
    "swiglu",
)
THREE_BITS = Statement(
    "At 3 bits it closes a part of the gap",
    "LLaMA-2-7B, W3A16 in groups of 128: perplexity 6.03 (from memory)",
    "natural model, 3 bits in groups of 64: the mean perplexity gap to the exact model is at most 0.85 x that of "
    "round-to-nearest",
    "swiglu",
)
FOUR_FOUR = Statement(
    "Learned scales save 4-bit weights with 4-bit inputs",
    "LLaMA-7B, W4A4: perplexity 11.26 (from memory)",
    "twin, 4 bits by rows and 4-bit inputs per token: the mean perplexity with clipping and scales is below that with "
    "clipping alone, and at most 0.8 x that of SmoothQuant (0.5) with rounding",
    "swiglu",
)
SIX_SIX = Statement(
    "With 6-bit weights and inputs little is lost",
    "LLaMA-7B, W6A6: perplexity 5.96 (from memory)",
    "6 bits by rows and 6-bit inputs per token: the mean perplexity gap to the exact model is at most that of "
    "SmoothQuant (0.5) with rounding",
    "swiglu",
)
STATEMENTS = (
    *(TWO_BITS, THREE_BITS, FOUR_FOUR),
    *(statement.on(name) for name in REAL for statement in (THREE_BITS, SIX_SIX, FOUR_FOUR)),
)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        return _on_a_real_model(subject, progress, sizes or real_sizes(subject))
    sizes = sizes or Sizes()
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    natural = Subject("swiglu", **rows)
    twin = Subject("swiglu", model=outlier_twin(natural.model, channels=4, factor=30.0), **rows)
    experiments: list[Experiment] = [
        (TWO_BITS, partial(two_bits, natural, sizes)),
        (THREE_BITS, partial(three_bits, natural, sizes)),
        (FOUR_FOUR, partial(inputs_too, twin, natural, sizes, 4)),
    ]
    return conduct("omniquant", experiments, sizes, subject, progress)


def real_sizes(subject: str) -> Sizes:
    """The sizes of a run on a real model."""
    return LARGEST_MODEL if subject == "gemma3" else REAL_SIZES


def _on_a_real_model(name: str, progress: bool, sizes: Sizes) -> Outcome:
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    published = Subject(name, **rows)
    twin = Subject(name, model=off_grid_twin(published.model), **rows)
    experiments: list[Experiment] = [
        (THREE_BITS.on(name), partial(three_bits, twin, sizes)),
        (SIX_SIX.on(name), partial(six_bits, twin, published, sizes)),
        (FOUR_FOUR.on(name), partial(inputs_too, twin, published, sizes, 4)),
    ]
    return conduct("omniquant", experiments, sizes, name, progress)


# -- weights alone -----------------------------------------------------------------------------------------------------


def learning(subject: Subject, sizes: Sizes) -> dict[str, Any]:
    """The epochs, and on a real model larger rates."""
    rates = {"clip_rate": FASTER * 1e-2, "scale_rate": FASTER * 5e-3} if subject.name in REAL else {}
    return {"epochs": sizes.epochs, **rates}


def weights_alone(subject: Subject, sizes: Sizes, bits: int, awq: bool) -> dict[str, list[float]]:
    """The perplexities under each way of rounding, one per calibration seed (rounding takes none)."""
    grid: dict[str, Any] = {"bits": bits, "group_size": GROUP}
    recipes: dict[str, Any] = {"OmniQuant": OmniQuant(**grid, **learning(subject, sizes))}
    if awq:
        recipes["AWQ"] = Awq(**grid)
    found = {name: [subject.perplexity(recipe, seed) for seed in sizes.seeds] for name, recipe in recipes.items()}
    return {"rounded": [subject.perplexity(RoundToNearest(**grid))], **found}


def described(subject: Subject, found: dict[str, list[float]]) -> str:
    """All arms in a line."""
    arms = ", ".join(f"{name} {spread(values)}" for name, values in found.items())
    return f"perplexity {subject.perplexity():.2f}; {arms}"


def two_bits(natural: Subject, sizes: Sizes) -> Measurement:
    """Learned clipping beside rounding and AWQ."""
    found = weights_alone(natural, sizes, 2, awq=True)
    ratio = mean(found["OmniQuant"]) / found["rounded"][0]
    better = sum(ours < theirs for ours, theirs in zip(found["OmniQuant"], found["AWQ"], strict=True))
    here = f"{described(natural, found)}; {ratio:.2f} x rounding; below AWQ in {better} of {len(sizes.seeds)} seeds"
    return Measurement(here, ratio <= 0.8 and 3 * better >= 2 * len(sizes.seeds))


def three_bits(subject: Subject, sizes: Sizes) -> Measurement:
    """What is left of the gap that rounding opens."""
    found = weights_alone(subject, sizes, 3, awq=False)
    exact = subject.perplexity()
    gap = found["rounded"][0] - exact
    left = (mean(found["OmniQuant"]) - exact) / gap
    return Measurement(f"{described(subject, found)}; {left:.2f} of the gap is left", gap > 0 and left <= 0.85)


# -- weights and inputs ------------------------------------------------------------------------------------------------


def with_inputs(subject: Subject, sizes: Sizes, bits: int, clipping_alone: bool = True) -> dict[str, list[float]]:
    """The perplexities with weights by rows and inputs per token, both of so many bits."""
    inputs = RoundInputs(bits=bits, symmetric=False)
    rounded: list[Any] = [RoundToNearest(bits=bits, group_size=-1), inputs]
    learned: dict[str, Any] = {"bits": bits, "input_bits": bits, "group_size": -1}
    learned |= learning(subject, sizes)
    recipes: dict[str, Any] = {"SmoothQuant": [Smooth(), *rounded]}
    if clipping_alone:
        recipes["clipping alone"] = OmniQuant(**learned, equalize=False)
    recipes["clipping and scales"] = OmniQuant(**learned)
    found = {name: [subject.perplexity(recipe, seed) for seed in sizes.seeds] for name, recipe in recipes.items()}
    return {"rounded": [subject.perplexity(rounded)], **found}


def inputs_too(twin: Subject, published: Subject, sizes: Sizes, bits: int) -> Measurement:
    """Clipping and scales beside clipping alone, and beside SmoothQuant."""
    moved = moved_by(published, twin)
    found = with_inputs(twin, sizes, bits)
    ours, alone, smoothed = (mean(found[name]) for name in ("clipping and scales", "clipping alone", "SmoothQuant"))
    here = f"{described(twin, found)}; {ours / smoothed:.2f} x SmoothQuant; the twin's logits differ by {moved:.0e}"
    return Measurement(here, ours < alone and ours <= 0.8 * smoothed)


def six_bits(twin: Subject, published: Subject, sizes: Sizes) -> Measurement:
    """The gap at 6 bits beside SmoothQuant's."""
    moved = moved_by(published, twin)
    found = with_inputs(twin, sizes, 6, clipping_alone=False)
    ours, theirs = (mean(found[name]) - twin.perplexity() for name in ("clipping and scales", "SmoothQuant"))
    here = f"{described(twin, found)}; gap {ours:.2f}, SmoothQuant's {theirs:.2f}; the twin's logits differ by "
    return Measurement(f"{here}{moved:.0e}", ours <= theirs)
