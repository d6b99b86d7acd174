"""CATS' claims: half of the gate values can go without training, far better than by ReLU; more with a little tuning.

What is measured: perplexity of the zoo's SwiGLU language model (5 M parameters) on 33,000 held-out tokens, with
thresholds from 64 rows of 256 calibration tokens, in three seeds that draw other texts, against the model itself and
against the same model with ReLU for SiLU at the same share of zeros; the share of zeros that each layer reaches on
held-out text; 200 steps of low-rank training at 70 %, against the same training of the model with ReLU; and sentence
embeddings of MiniLM, whose MLPs have no gate (of 296 calibration sentences its seeds take 256 each, so they share
most). The training takes batches of 8 x 128 tokens in bf16 (the paper's code: 8 x 1024), so that it takes minutes on
one core; the learning rate of each side is the best of three on the validation text, in the first seed. Speed is
measured in benchmarks/sparsity.py. Averages of tasks on 7B models cannot be checked here.

About 20 minutes on one core. The claims that need no training are tested on SmolLM2-135M as well, under the same
conditions, on the fewer rows of `REAL_SIZES`: 12 minutes on a busy machine.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from actkit import zoo
from actkit.claims.outcome import Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, spread
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.runner import apply
from actkit.core.recipe.transform import Transform
from actkit.data import Batches, Split, load_data
from actkit.functions.swap import Swap
from actkit.sparsity.cats.cats import Cats, finetune
from actkit.sparsity.cats.gate_sparsity import GateSparsity, gate_sparsity

CONTROLLED = (0.3, 0.5, 0.7, 0.9)
TUNED = 0.7
RELU = Swap(where=("silu",), new="relu")
GEMMAS = Swap(where=("gelu_tanh",), new="relu")  # its MLPs have another function


@dataclass(frozen=True)
class Sizes:
    """How much is measured and trained.

    Attributes:
        seeds: of the calibration and training text.
        calibration: rows of 256 tokens.
        held_out: rows of 256 tokens.
        sentences: of MiniLM, of each kind.
        steps: of the training.
        rows: of 128 tokens in its batches.
        validation: such rows.
        rank: of the changes.
        rates: learning rates to choose from.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 64
    held_out: int = 130
    sentences: int = 256
    steps: int = 200
    rows: int = 8
    validation: int = 64
    rank: int = 8
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)


REAL_SIZES = Sizes(calibration=16, held_out=16)

QUALITY = Statement(
    "Half of the gate values can be zeroed without training at little loss",
    "perplexity +1.06 % (Llama-7B) and +1.21 % (Mistral-7B) at 50 %, no training (a third party's note)",
    "k of 0.5, in each of 3 calibration seeds: perplexity on held-out text at most 3 % above the model's own",
    "swiglu",
)
SUBSTITUTION = Statement(
    "At the same share of zeros thresholds harm the model far less than ReLU in place of SiLU",
    "perplexity +1.06 % and +1.21 % with CATS, +42.4 % and +25.3 % with ReLU after training (a third party's note)",
    "no training; k is the share of zeros of the model with ReLU on the calibration text; in each of 3 seeds: "
    "perplexity of CATS at k at most 0.8 x that of the model with ReLU",
    "swiglu",
)
CONTROL = Statement(
    "The share of zeros is that which was asked for, on text that the calibration did not see",
    "by construction; no figure",
    "k of 0.3, 0.5, 0.7 and 0.9, in each of 3 calibration seeds: within 2 points of k in every layer of the changed "
    "model on held-out text",
    "swiglu",
)
TUNING = Statement(
    "After a little low-rank training, CATS at 70 % is better than the model with ReLU",
    "task average at 90 %: 0.4368 with CATS, 0.3230 with ReLU (Mistral-7B); 0.4764 and 0.3525 (Llama2-7B); without "
    "training",
    "200 steps of rank 8 on query, key, gate and down, the same texts and budget for both: loss on held-out text lower "
    "with CATS at 0.7 in 3 of 3 seeds",
    "swiglu",
)
ENCODER = Statement(
    "Half of the activations of MLPs without a gate can be zeroed as well",
    "gated MLPs only",
    "GELU, k of 0.5, in each of 3 calibration seeds: mean cosine to the original sentence embeddings at least 0.98 on "
    "held-out sentences",
    "minilm",
)
UNTRAINED = (QUALITY, SUBSTITUTION, CONTROL)
STATEMENTS = (*UNTRAINED, TUNING, ENCODER, *(statement.on(name) for name in REAL for statement in UNTRAINED))


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    name = subject if subject in REAL else "swiglu"
    sizes = sizes or (REAL_SIZES if subject in REAL else Sizes())
    language = Subject(name, calibration=sizes.calibration, split="calibration", held_out=sizes.held_out)
    experiments: list[Experiment] = [
        (QUALITY.on(name), partial(quality, language, sizes)),
        (SUBSTITUTION.on(name), partial(substitution, language, sizes)),
        (CONTROL.on(name), partial(control, language, sizes)),
    ]
    if subject not in REAL:
        encoder = Subject("minilm", calibration=sizes.sentences, split="calibration", held_out=sizes.sentences)
        experiments += [(TUNING, partial(tuning, language, sizes)), (ENCODER, partial(embeddings, encoder, sizes))]
    return conduct("cats", experiments, sizes, subject, progress)


# -- without training --------------------------------------------------------------------------------------------------


def quality(subject: Subject, sizes: Sizes) -> Measurement:
    """Perplexity at 0.5, the one that is judged, and at the other shares."""
    dense = subject.perplexity()
    found = {k: [subject.perplexity(Cats(sparsity=k), seed) for seed in sizes.seeds] for k in CONTROLLED}
    parts = [f"{k}: {spread(values)}" for k, values in found.items()]
    here = f"perplexity {dense:.2f}; with CATS {', '.join(parts)}; at 0.5 {max(found[0.5]) / dense - 1:+.1%} at most"
    return Measurement(here, max(found[0.5]) <= 1.03 * dense)


def substitution(subject: Subject, sizes: Sizes) -> Measurement:
    """CATS at the share of zeros that ReLU makes."""
    swap = GEMMAS if subject.name == "gemma3" else RELU
    relu = subject.perplexity(swap)
    shares, ours = [], []
    for seed in sizes.seeds:
        shares.append(sparsity_under(subject, swap, subject.calibration(seed)).zeros)
        ours.append(subject.perplexity(Cats(sparsity=shares[-1]), seed))
    here = (
        f"{spread(shares, '.1%')} zeros: perplexity {relu:.2f} with ReLU, {spread(ours)} with CATS "
        f"({max(ours) / relu:.2f}x at most); {subject.perplexity():.2f} without either"
    )
    return Measurement(here, max(ours) <= 0.8 * relu)


def control(subject: Subject, sizes: Sizes) -> Measurement:
    """The share of zeros of every layer on held-out text, in the model as it is changed."""
    parts, off = [], 0.0
    for k in CONTROLLED:
        runs = [sparsity_under(subject, Cats(sparsity=k), subject.held_out, seed) for seed in sizes.seeds]
        zeros = [layer.zeros for run in runs for layer in run.layers if layer.zeros is not None]
        off = max(off, *(abs(share - k) for share in zeros))
        busiest = min(layer.zeros_p05 for run in runs for layer in run.layers if layer.zeros_p05 is not None)
        parts.append(
            f"{k}: layers {min(zeros):.1%} to {max(zeros):.1%} (5 % of the tokens below {busiest:.0%} in one), which "
            f"reads {runs[0].mlp_traffic:.0%} of the MLPs' weights and {runs[0].block_traffic:.0%} of the blocks'"
        )
    return Measurement(f"{'; '.join(parts)}. Largest distance {100 * off:.1f} points", off <= 0.02)


def sparsity_under(subject: Subject, transform: Transform, batches: Batches, seed: int = 0) -> GateSparsity:
    """The zeros of the model under a transform calibrated with that seed, which is undone after."""
    with subject.changed(transform, seed):
        return gate_sparsity(subject.model, batches, progress=False)


def embeddings(subject: Subject, sizes: Sizes) -> Measurement:
    """Cosines of MiniLM's sentence embeddings to the original ones."""
    original = copy.deepcopy(subject.model)
    cosines = []
    for seed in sizes.seeds:
        with subject.changed(Cats(sparsity=0.5), seed):
            found = measure_quality(
                subject.model, subject.held_out, reference=original, task="embedding", resamples=1, progress=False
            )
        cosines.append(found.metrics["fidelity"].value)
    return Measurement(f"cosine {spread(cosines, '.4f')}; {len(cosines)} calibration seeds", min(cosines) >= 0.98)


# -- with training -----------------------------------------------------------------------------------------------------


def tuning(subject: Subject, sizes: Sizes) -> Measurement:
    """Losses on held-out text after the same low-rank training of both."""
    parts, losses = [], []
    for name, transform in (("CATS", Cats(sparsity=TUNED)), ("ReLU", RELU)):
        tries = {rate: Tuned(subject, transform, rate, sizes.seeds[0], sizes) for rate in sizes.rates}
        rate = min(tries, key=lambda each: tries[each].validation)
        runs = [tries[rate], *(Tuned(subject, transform, rate, seed, sizes) for seed in sizes.seeds[1:])]
        losses.append([run.loss for run in runs])
        parts.append(
            f"{name}: {spread([run.before for run in runs], '.3f')} before, {spread(losses[-1], '.3f')} after, at "
            f"{spread([run.zeros for run in runs], '.0%')} zeros and learning rate {rate:g}"
        )
    dense = math.log(subject.perplexity())
    here = f"loss on held-out text, {dense:.3f} without either; {'; '.join(parts)}"
    return Measurement(here, all(cats < relu for cats, relu in zip(*losses, strict=True)))


class Tuned:
    """One training. before, loss: on the held-out text; validation: loss that chooses the rate; zeros: at the end."""

    def __init__(self, subject: Subject, transform: Transform, rate: float, seed: int, sizes: Sizes) -> None:
        model = copy.deepcopy(subject.model)
        apply(model, transform, subject.calibration(seed), undo="off", progress=False)
        self.before = _loss(model, subject.held_out)
        trained = finetune(
            model,
            _text(model, "train", sizes.steps * sizes.rows, seed, sizes),
            validation=_text(model, "search", sizes.validation, 0, sizes),
            rank=sizes.rank,
            steps=sizes.steps,
            learning_rate=rate,
            mixed_precision="bf16",
            seed=seed,
            progress=False,
        )
        self.validation, self.loss = trained.validation, _loss(model, subject.held_out)
        self.zeros = gate_sparsity(model, subject.held_out, progress=False).zeros


def _text(model: nn.Module, split: Split, rows: int, seed: int, sizes: Sizes) -> Batches:
    settings: dict[str, Any] = {"sequences": rows, "length": 128, "batch_size": sizes.rows}
    return load_data(None, model, zoo.tokenizer("swiglu"), seed=seed, split=split, **settings)


def _loss(model: nn.Module, batches: Batches) -> float:
    """Nats per token."""
    quality = measure_quality(model, batches, task="language", resamples=1, progress=False)
    return math.log(quality.metrics["perplexity"].value)
