"""CFSP's claims: units chosen by activation lose far less than random ones, and shares of blocks do not hurt.

Measured on the zoo's SwiGLU language model: 64 x 256 training tokens for calibration, 3 seeds, perplexity on 33,000
held-out tokens, 30 and 50 % of the MLP units cut. Arms: random units, the smallest weights, Wanda's score, CFSP's fine
score, each with the same share in every block; and CFSP with the coarse shares; `relative` and `compensate` beside
them, reported and not judged. Random units are one draw, the same in each block and for each seed. Widths are exact, so
that arms have equal parameters to within a unit a block. The release's perplexities of LLaMA are not known to us, and
7B models cannot be run here.

On SmolLM2-135M (in bf16, as it is stored) the same arms at fewer rows (`REAL_SIZES`) and one seed; Gemma 3 270M
likewise. About 10 minutes on two idle cores for each of the first two.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import torch
from torch import nn

from actkit.claims.outcome import SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, spread
from actkit.compression.cfsp import Cfsp

FINE, BOTH = "fine scores, one share", "fine scores and shares"
ARMS = {
    "random": Cfsp(fine="random", coarse="constant", multiple_of=None),
    "magnitude": Cfsp(fine="magnitude", coarse="constant", multiple_of=None),
    "Wanda": Cfsp(fine="wanda", coarse="constant", multiple_of=None),
    FINE: Cfsp(coarse="constant", multiple_of=None),
    BOTH: Cfsp(multiple_of=None),
    "relative": Cfsp(fine="relative", multiple_of=None),
    "compensated": Cfsp(compensate=True, multiple_of=None),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the calibration text.
        sparsities: shares of the units that are cut.
        calibration: rows of 256 tokens.
        held_out: rows of 256 tokens.
        rounds: of timings.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    sparsities: tuple[float, ...] = (0.3, 0.5)
    calibration: int = 64
    held_out: int = 130
    rounds: int = 30


REAL_SIZES = Sizes(seeds=(0,), calibration=16, held_out=32)
LARGEST_MODEL = Sizes(seeds=(0,), calibration=8, held_out=32)  # gemma3: a token has 1 MB of logits
CHOSEN = Statement(
    "Units chosen by their activations lose less than random ones",
    "better than magnitude, Wanda-SP and FLAP on LLaMA and Qwen (abstract; tables not known to us)",
    "half of the units cut: the mean perplexity with CFSP is at most 0.85 x that with random units",
    "swiglu",
)
SHARED_OUT = Statement(
    "Shares of blocks by how far they turn the hidden state do not hurt",
    "coarse and fine scores together are best (abstract)",
    "half of the units cut: the mean perplexity with coarse and fine scores is at most 1.01 x that with fine scores "
    "and one share for all blocks; the gain is reported",
    "swiglu",
)
FASTER = Statement(
    "A narrower MLP is faster on any machine",
    "1.5 x (third parties' summaries)",
    "one gated MLP, 4096 x 11008, 64 tokens, float32, half of it cut to a multiple of 128: at most 0.62 x the time, "
    "medians of calls in turns",
    SYNTHETIC,
)
STATEMENTS = (CHOSEN, SHARED_OUT, FASTER, *(each.on(name) for name in REAL for each in (CHOSEN, SHARED_OUT)))


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    name = subject if subject in REAL else "swiglu"
    sizes = sizes or (real_sizes(name) if name in REAL else Sizes())
    split = "calibration" if subject in REAL else "train"
    model = None if subject == SYNTHETIC else Subject(
        name, calibration=sizes.calibration, split=split, held_out=sizes.held_out  # type: ignore[arg-type]
    )  # fmt: skip
    experiments: list[Experiment] = [
        (CHOSEN.on(name), partial(chosen, model, sizes)),  # type: ignore[arg-type]
        (SHARED_OUT.on(name), partial(shared_out, model, sizes)),  # type: ignore[arg-type]
    ]
    if subject not in REAL:
        experiments.append((FASTER, partial(faster, sizes)))
    return conduct("cfsp", experiments, sizes, subject, progress)


def real_sizes(name: str) -> Sizes:
    """How much is measured on a real model."""
    return LARGEST_MODEL if name == "gemma3" else REAL_SIZES


def perplexities(subject: Subject, sizes: Sizes, arm: str, sparsity: float) -> list[float]:
    """Of one arm, one per calibration seed."""
    return [subject.perplexity(ARMS[arm].model_copy(update={"sparsity": sparsity}), seed) for seed in sizes.seeds]


def chosen(subject: Subject, sizes: Sizes) -> Measurement:
    """Measure all arms at all sparsities."""
    found = {(s, arm): perplexities(subject, sizes, arm, s) for s in sizes.sparsities for arm in ARMS}
    worst = max(sizes.sparsities)
    ratio = mean(found[worst, BOTH]) / mean(found[worst, "random"])
    rows = [f"{s:.0%} cut: " + ", ".join(f"{arm} {spread(found[s, arm])}" for arm in ARMS) for s in sizes.sparsities]
    text = f"{ratio:.3f} x random (perplexity of the model {subject.perplexity():.2f}; {'; '.join(rows)})"
    return Measurement(text, ratio <= 0.85)


def shared_out(subject: Subject, sizes: Sizes) -> Measurement:
    """Compare shares of blocks with one share."""
    ratios = {
        s: mean(perplexities(subject, sizes, BOTH, s)) / mean(perplexities(subject, sizes, FINE, s))
        for s in sizes.sparsities
    }
    text = ", ".join(f"{ratio:.4f} x at {s:.0%}" for s, ratio in ratios.items())
    return Measurement(f"coarse and fine: {text} the perplexity of fine alone", ratios[max(ratios)] <= 1.01)


def faster(sizes: Sizes) -> Measurement:
    """Time one MLP whole and half, in turns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator)
    layers = {
        width: [
            nn.Linear(4096, width, bias=False),
            nn.Linear(4096, width, bias=False),
            nn.Linear(width, 4096, bias=False),
        ]
        for width in (11008, 5504)
    }
    seconds: dict[int, list[float]] = {width: [] for width in layers}
    with torch.inference_mode():
        for turn in range(sizes.rounds + 2):
            for width, (gate, up, down) in layers.items():
                started = time.perf_counter()
                down(nn.functional.silu(gate(x)) * up(x))
                if turn > 1:
                    seconds[width].append(time.perf_counter() - started)
    whole, half = (median(seconds[width]) for width in layers)
    text = f"{half / whole:.3f} x ({1e3 * half:.1f} and {1e3 * whole:.1f} ms, {torch.get_num_threads()} threads)"
    return Measurement(text, half / whole <= 0.62)
