"""LLM-FP4's claims: with an exponent for each channel, weights and inputs of 4-bit floats keep most of a model.

Measured on the SwiGLU language model of the zoo, on its outlier twin (the same function with 4 channels per norm made
30 times larger) and on MiniLM, whose channels differ by themselves. W4A4 in four arms: integers by their range (rows of
weights, one scale per tensor of inputs, with or without zero points, whichever errs less), E2M1 by its range, the
searched baseline with one bias per tensor, and the method. 32 rows of calibration, 3 seeds of them, perplexity on
16,384 held-out tokens, or the distance of 500 sentence embeddings. The search tries 20 biases of each format on 256
tokens, twice (the paper 100, three times): a smaller run.
The natural model is reported beside its twin. Averages of LLaMA's tasks, and hardware for FP4, cannot be checked here.

On SmolLM2-135M the same, with nothing planted, as a smaller run (`REAL_SIZES`): 12 biases in one round on 128 tokens,
one seed, 8,192 held-out tokens. Gemma 3 270M likewise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import Any

import torch

from actkit.claims.outcome import Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, spread
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import Norm, anatomy, equalization_sets
from actkit.core.recipe.runner import apply
from actkit.quantization.llm_fp4 import LlmFp4
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.zoo.outliers import outlier_twin


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the calibration text.
        calibration: rows of 256 tokens, or sentences.
        held_out: rows of 256 tokens.
        sentences: of MiniLM.
        candidates: biases tried for each format.
        rounds: of the search.
        tokens: that the search runs on.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 32
    held_out: int = 64
    sentences: int = 500
    candidates: int = 20
    rounds: int = 2
    tokens: int = 256


REAL_SIZES = Sizes(seeds=(0,), calibration=8, held_out=32, candidates=12, rounds=1, tokens=128)
GAINS = (
    "W4A4: the mean error of LLM-FP4 is at most 0.6 x that of the searched baseline with one bias per tensor, and that "
    "at most the smaller of integers and E2M1 by their ranges; error: {error}"
)
TWIN, ENCODER = (
    Statement(
        f"4-bit floats lose far less if every input channel has an exponent of its own: {name}",
        "LLaMA-7B, W4A4, six tasks: 66.3 in full precision, 58.1 with it, 42.7 with one bias, 38.1 with integers",
        GAINS.format(error=error),
        subject,
    )
    for name, error, subject in (
        ("the outlier twin", "perplexity gap to float32", "swiglu"),
        ("a sentence encoder", "1 - cosine to the float32 sentence embedding", "minilm"),
    )
)
EXACT = Statement(
    "The exponents move into norm and weights without changing a bit",
    "they are merged for free",
    "twin: the model with 2^k in its norms and that with 2^k in its layers give the same float32 logits, bit for bit, "
    "and some k of every norm is not 0",
    "swiglu",
)
ON_REAL = replace(
    TWIN,
    statement="4-bit floats lose far less if every input channel has an exponent of its own",
    condition=GAINS.format(error="perplexity gap to bf16")
    + "; and its perplexity is at most 10 x that of bf16, as of two models that have collapsed none is better",
)
STATEMENTS = (TWIN, ENCODER, EXACT, *(ON_REAL.on(name) for name in REAL))
COLLAPSED = 10.0


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        sizes = sizes or REAL_SIZES
        real = Subject(subject, calibration=sizes.calibration, held_out=sizes.held_out, split="train")
        only: Experiment = (ON_REAL.on(subject), partial(on_a_real_model, real, sizes))
        return conduct("llm-fp4", [only], sizes, subject, progress)
    sizes = sizes or Sizes()
    rows: dict[str, Any] = {"calibration": sizes.calibration, "split": "train"}
    natural = Subject("swiglu", held_out=sizes.held_out, **rows)
    twin = Subject(
        "swiglu", held_out=sizes.held_out, model=outlier_twin(natural.model, channels=4, factor=30.0), **rows
    )
    encoder = Subject("minilm", held_out=sizes.sentences, **rows)
    experiments: list[Experiment] = [
        (TWIN, partial(on_the_twin, twin, natural, sizes)),
        (ENCODER, partial(on_the_encoder, encoder, sizes)),
        (EXACT, partial(exactness, twin, sizes)),
    ]
    return conduct("llm-fp4", experiments, sizes, subject, progress)


# -- W4A4 --------------------------------------------------------------------------------------------------------------


def arms(subject: Subject, sizes: Sizes, seeds: Sequence[int]) -> dict[str, list[float]]:
    """The error of each arm, by seed."""
    searched: dict[str, Any] = {"candidates": sizes.candidates, "rounds": sizes.rounds, "tokens": sizes.tokens}
    e2m1: dict[str, Any] = {"search": "none", "exponent_bits": 2, "input_exponent_bits": 2}

    def integers(symmetric: bool) -> list[Any]:
        weights = RoundToNearest(bits=4, group_size=-1, symmetric=symmetric, scale_dtype="float32")
        return [weights, RoundInputs(bits=4, per="tensor", symmetric=symmetric)]

    recipes: dict[str, Any] = {
        "integers": integers(False),
        "symmetric integers": integers(True),
        "E2M1": LlmFp4(**e2m1, preshift=False, tokens=sizes.tokens),
        "one bias": LlmFp4(**searched, preshift=False),
        "LLM-FP4": LlmFp4(**searched),
    }
    return {name: [error(subject, recipe, seed) for seed in seeds] for name, recipe in recipes.items()}


def error(subject: Subject, recipe: Any, seed: int) -> float:
    """The perplexity gap under a recipe, or the distance of the sentence embeddings."""
    if hasattr(subject.model, "lm_head"):
        return subject.perplexity(recipe, seed) - subject.perplexity()
    original = copy.deepcopy(subject.model)
    with subject.changed(recipe, seed):
        quality = measure_quality(
            subject.model, subject.held_out, reference=original, task="embedding", resamples=1, progress=False
        )
    return 1 - quality.metrics["fidelity"].value


def judged(found: dict[str, list[float]]) -> bool:
    """Whether the method is as good as claimed."""
    means = {name: mean(values) for name, values in found.items()}
    baseline = means["one bias"]
    plain = min(means["integers"], means["symmetric integers"], means["E2M1"])
    return means["LLM-FP4"] <= 0.6 * baseline and baseline <= plain


def described(found: dict[str, list[float]], form: str) -> str:
    """All arms in a line."""
    ratio = mean(found["LLM-FP4"]) / mean(found["one bias"])
    parts = ", ".join(f"{name} {spread(values, form)}" for name, values in found.items())
    return f"{parts}; {ratio:.2f} of the searched baseline's"


def on_the_twin(twin: Subject, natural: Subject, sizes: Sizes) -> Measurement:
    """All arms on the twin, and with one seed on the natural model."""
    found, beside = arms(twin, sizes, sizes.seeds), arms(natural, sizes, sizes.seeds[:1])
    here = (
        f"perplexity {twin.perplexity():.2f} in float32; gaps: {described(found, '.2f')}. Natural model, one seed: "
        f"{described(beside, '.2f')}"
    )
    return Measurement(here, judged(found))


def on_the_encoder(encoder: Subject, sizes: Sizes) -> Measurement:
    """All arms on MiniLM."""
    found = arms(encoder, sizes, sizes.seeds)
    return Measurement(described(found, ".4f"), judged(found))


def on_a_real_model(real: Subject, sizes: Sizes) -> Measurement:
    """All arms on a real model."""
    found = arms(real, sizes, sizes.seeds)
    exact = real.perplexity()
    kept = mean(found["LLM-FP4"]) + exact <= COLLAPSED * exact
    here = f"perplexity {exact:.2f} in bf16; gaps: {described(found, '.2f')}"
    return Measurement(here, kept and judged(found))


# -- the fold ----------------------------------------------------------------------------------------------------------


def exactness(twin: Subject, sizes: Sizes) -> Measurement:
    """The largest difference of the logits with the exponents in norms and with them in the layers."""
    model = copy.deepcopy(twin.model)
    norms = {
        group.producer.path: group.producer.module
        for block in anatomy(model).blocks
        for group in equalization_sets(block)
        if isinstance(group.producer, Norm)
    }
    before = {path: norm.weight.detach().clone() for path, norm in norms.items()}  # type: ignore[union-attr, operator]
    recipe = LlmFp4(candidates=sizes.candidates, rounds=1, tokens=sizes.tokens, fold=True)
    apply(model, recipe, twin.calibration(sizes.seeds[0]), progress=False)
    folded = _logits(model, twin)
    moved = sum(bool((norms[path].weight != weight).any()) for path, weight in before.items())  # type: ignore[union-attr, operator]
    for path, weight in before.items():
        norms[path].weight.data.copy_(weight)  # type: ignore[union-attr, operator]
    for block in anatomy(model).blocks:
        for linear in block.linears():
            layer: Any = linear.module
            if layer.inputs.divisor is None and layer.storage.shift.any():
                layer.inputs.divisor = torch.exp2(-layer.storage.shift.float())
    difference = float((folded - _logits(model, twin)).abs().max())
    here = f"the logits of a batch differ by {difference:g} at most; {moved} of {len(norms)} norms took exponents"
    return Measurement(here, difference == 0 and moved == len(norms))


def _logits(model: Any, subject: Subject) -> torch.Tensor:
    with evaluating(model), torch.no_grad():
        return first_tensor(forward(model, subject.held_out[0]))
