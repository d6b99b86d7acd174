"""WINA's claims: weighing a channel by the norm of its weight column makes better masks than magnitude (TEAL).

What is measured, at zoo size: the output error of single layers (all 42 of the SwiGLU language model, all 36 of
MiniLM) and of a layer with orthogonal columns, for which the mask is provably the best; perplexity on 33,000 held-out
tokens with every token sparse, for both masks, as top-k and with calibrated thresholds; TEAL's greedy allocation; the
rotation that makes columns orthogonal; and the time of the kernel at 4096 -> 11008. If a mask needs calibration
(thresholds, greedy), three seeds draw other texts. Averages of benchmarks on 7B models cannot be checked here.

About 5 minutes on two idle cores. The claims about a language model, but for the rotation, are tested on SmolLM2-135M
as well (in bf16, as it is stored), under the same conditions, on the fewer rows of `REAL_SIZES`: 19 minutes on a busy
machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from random import Random
from statistics import mean, median, quantiles
from typing import Any

import torch
from torch import Tensor

from actkit import kernels
from actkit.claims.outcome import SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, spread
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.layers.selections import TopK
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.rotate_columns import RotateColumns
from actkit.sparsity.wina.wina import Wina, column_norms

JUDGED = (0.5, 0.65)  # sparsities of whole models
SPEEDS = {0.5: 1.15, 0.7: 1.7}  # sparsity -> the least gain over the kernel without sparsity


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the calibration text.
        sparsities: of the top-k.
        calibration: rows of 256 tokens.
        greedy: rows of 256 tokens.
        held_out: rows of 256 tokens.
        tokens: whose layer errors are taken.
        step: of the greedy search (the release's is 0.008 in these units: more than twice the time, the same result
            here).
        layer: inputs and outputs of the one that is timed.
        copies: of its weight.
        rounds: of timings.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    sparsities: tuple[float, ...] = (0.25, 0.4, 0.5, 0.65)
    calibration: int = 20
    greedy: int = 4
    held_out: int = 130
    tokens: int = 1024
    step: float = 0.02
    layer: tuple[int, int] = (4096, 11008)
    copies: int = 6
    rounds: int = 60


REAL_SIZES = Sizes(sparsities=JUDGED, calibration=8, greedy=2, held_out=16, tokens=512, step=0.05)
LAYERS = (
    "in each of 3 seeds, for at least 90 % of the linear layers the mean over tokens of the relative "
    "output error at sparsity 0.65 is at most TEAL's (each matrix with its own norms, top-k), and the sum over the "
    "layers is at least 3 % lower"
)
LAYERS_LANGUAGE, LAYERS_ENCODER = (
    Statement(f"WINA's masks give smaller output errors of single layers than TEAL's: {name}", paper, LAYERS, subject)
    for name, paper, subject in (
        ("all linear layers of a language model", "argued by expectation; no figure per layer", "swiglu"),
        ("all linear layers of a sentence encoder", "language models only", "minilm"),
    )
)
THEOREM = Statement(
    "Where the columns of a weight are orthogonal, WINA's mask has the smallest error of all masks of its size",
    "proved",
    "orthogonal columns with log-normal norms, sparsity 0.65: the error is at most TEAL's for 100 % of the tokens (256 "
    "inputs), and equals that of the best of all masks for 12 inputs (1e-6 relative, as scores are float32)",
    SYNTHETIC,
)
TOP_K = Statement(
    "At equal sparsity the model is better with WINA's masks than with TEAL's: top-k of each token",
    "up to 2.94 points more average task accuracy (Qwen-2.5-7B, 65 %)",
    "uniform sparsity, every token sparse: perplexity at most TEAL's at 0.5 and at 0.65, and at least 1 % lower at "
    "0.65",
    "swiglu",
)
THRESHOLD = Statement(
    "At equal sparsity the model is better with WINA's masks than with TEAL's: calibrated thresholds",
    "up to 2.94 points more average task accuracy (Qwen-2.5-7B, 65 %)",
    "uniform sparsity, every token sparse, in each of 3 calibration seeds: perplexity at most TEAL's at 0.5 and at "
    "0.65, and at least 1 % lower at 0.65",
    "swiglu",
)
GREEDY = Statement(
    "TEAL's greedy allocation within blocks is better than the same sparsity everywhere",
    "40 to 50 % sparsity with small loss, allocated greedily (TEAL)",
    "TEAL at effective sparsity 0.5, in each of 3 calibration seeds: perplexity(greedy) < perplexity(uniform)",
    "swiglu",
)
ROTATION = Statement(
    "A rotation makes the columns of the key and gate matrices orthogonal and leaves the function as it is",
    "1.41 points over TEAL with the same rotation (Qwen-2.5-7B, 65 %; a third party's note)",
    "largest difference of the logits over the largest logit below 1e-4 in float32; largest product of two columns of "
    "the key (and gate) matrix at most 1e-5 of the largest squared column. Perplexities are reported, not judged",
    "swiglu",
)
SPEED = Statement(
    "Dropping inputs makes the product of one token with a layer faster",
    "no kernel for WINA; TEAL: decode up to 1.53x at 40 % and 1.8x at 50 % (7B to 70B, on GPUs)",
    "4096 -> 11008 in bf16 on this CPU, random masks, rotating over more weights than the caches hold: the kernel at "
    "sparsity 0.5 and 0.7 is at least 1.15x and 1.7x faster than the same kernel without sparsity. (The other half, "
    "against a pure read of the same rows, is in benchmarks/kernels.py; a GPU is not measured.)",
    SYNTHETIC,
)
LANGUAGE = (LAYERS_LANGUAGE, TOP_K, THRESHOLD, GREEDY)
STATEMENTS = (
    *LANGUAGE,
    ROTATION,
    LAYERS_ENCODER,
    THEOREM,
    SPEED,
    *(statement.on(name) for name in REAL for statement in LANGUAGE),
)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        sizes = sizes or REAL_SIZES
        real = Subject(subject, calibration=sizes.calibration, split="calibration", held_out=sizes.held_out)
        return conduct("wina", _about_language(real, sizes), sizes, subject, progress)
    sizes = sizes or Sizes()
    rows: dict[str, Any] = {"split": "calibration", "held_out": sizes.held_out}
    language = Subject("swiglu", calibration=sizes.calibration, **rows)
    encoder = Subject("minilm", calibration=sizes.tokens // 8, **rows)  # sentences are short
    experiments: list[Experiment] = [
        *_about_language(language, sizes),
        (ROTATION, partial(rotation, language)),
        (LAYERS_ENCODER, partial(layer_errors, encoder, sizes)),
        (THEOREM, partial(theorem, sizes)),
        (SPEED, partial(speed, sizes)),
    ]
    return conduct("wina", experiments, sizes, subject, progress)


def _about_language(language: Subject, sizes: Sizes) -> list[Experiment]:
    """The claims about a language model of the zoo."""
    name = language.name
    short = Subject(name, calibration=sizes.greedy, split="calibration", held_out=sizes.held_out, model=language.model)
    return [
        (LAYERS_LANGUAGE.on(name), partial(layer_errors, language, sizes)),
        (TOP_K.on(name), partial(top_k, language, sizes)),
        (THRESHOLD.on(name), partial(threshold, language, sizes)),
        (GREEDY.on(name), partial(greedy, short, sizes)),
    ]


# -- layers ------------------------------------------------------------------------------------------------------------


def layer_errors(subject: Subject, sizes: Sizes, sparsity: float = 0.65) -> Measurement:
    """Relative output error of every linear layer on the tokens that it really reads, by three masks of one size."""
    blocks = anatomy(subject.model).blocks
    inputs = [each for block in blocks for each in block.linear_inputs()]
    better, lower, lower_joint = [], [], []
    for seed in sizes.seeds:
        wanted = {each.site: Sample(sizes.tokens, seed) for each in inputs}
        seen = record(subject.model, wanted, subject.calibration(seed), progress=False)
        errors: list[tuple[float, float, float]] = []  # per layer: TEAL, WINA each, WINA joint
        for each in inputs:
            x = seen[each.site].rows
            for linear in each.linears:
                scores = (None, column_norms([linear]), column_norms(each.linears))
                weight = linear.weight.detach().float()
                errors.append(tuple(float(_error(weight, x, score, sparsity).mean()) for score in scores))  # type: ignore[arg-type]
        better.append(mean(wina <= teal for teal, wina, _ in errors))
        teal, wina, joint = (sum(column) for column in zip(*errors))
        lower.append(1 - wina / teal)
        lower_joint.append(1 - joint / teal)
    norms = [column_norms([linear]) for each in inputs for linear in each.linears]
    varied = mean(float(each.std() / each.mean()) for each in norms)
    here = (
        f"WINA at most TEAL in {spread(better, '.0%')} of {len(errors)} layers; summed error lower by "
        f"{spread(lower, '.1%')}, with norms shared by layers of one input by {spread(lower_joint, '.1%')}; "
        f"{len(sizes.seeds)} seeds of {sizes.tokens} tokens. The norms of a layer's columns vary by {varied:.0%}"
    )
    return Measurement(here, min(better) >= 0.9 and min(lower) >= 0.03)


def _error(weight: Tensor, x: Tensor, score: Tensor | None, sparsity: float) -> Tensor:
    """||W (x - m x)|| / ||W x|| of each row of x [tokens, in], the m of TEAL (score None) or WINA: [tokens]."""
    kept = TopK(int(x.shape[1] * (1 - sparsity)), score)(x)
    return ((x - kept) @ weight.t()).norm(dim=1) / (x @ weight.t()).norm(dim=1)


def theorem(sizes: Sizes, sparsity: float = 0.65) -> Measurement:
    """The optimality for orthogonal columns: against TEAL at 256 inputs, against every mask at 12."""
    shares, gains, excess = [], [], 0.0
    for seed in sizes.seeds:
        generator = torch.Generator().manual_seed(seed)
        weight, x = _orthogonal(256, generator), torch.randn(sizes.tokens, 256, generator=generator, dtype=torch.double)
        teal, wina = (_error(weight, x, score, sparsity) for score in (None, weight.norm(dim=0)))
        shares.append(float((wina <= teal * (1 + 1e-6)).double().mean()))
        gains.append(float(1 - wina.mean() / teal.mean()))
        weight, x = _orthogonal(12, generator), torch.randn(200, 12, generator=generator, dtype=torch.double)
        wina = _error(weight, x, weight.norm(dim=0), sparsity)
        best = torch.full_like(wina, float("inf"))
        for dropped in combinations(range(12), 12 - int(12 * (1 - sparsity))):
            columns = list(dropped)
            error = (x[:, columns] @ weight[:, columns].t()).norm(dim=1) / (x @ weight.t()).norm(dim=1)
            best = torch.minimum(best, error)
        excess = max(excess, float((wina / best - 1).abs().max()))
    here = (
        f"at most TEAL for {min(shares):.0%} of {sizes.tokens} tokens in each of {len(shares)} seeds, error lower by "
        f"{spread(gains, '.0%')}; at most {excess:.0e} relative from the best of all masks"
    )
    return Measurement(here, min(shares) == 1 and excess <= 1e-6)


def _orthogonal(inputs: int, generator: torch.Generator) -> Tensor:
    """float64 [2 inputs, inputs], its columns orthogonal, their norms log-normal."""
    square = torch.randn(2 * inputs, inputs, generator=generator, dtype=torch.double)
    return torch.linalg.qr(square).Q * torch.randn(inputs, generator=generator, dtype=torch.double).exp()


# -- the model ---------------------------------------------------------------------------------------------------------


def top_k(subject: Subject, sizes: Sizes) -> Measurement:
    """Perplexities at several sparsities; a top-k needs no calibration, so there is one run of each."""
    pairs = {
        p: tuple(subject.perplexity(method(sparsity=p, mode="top_k")) for method in (Teal, Wina))
        for p in sizes.sparsities
    }
    each = subject.perplexity(Wina(sparsity=JUDGED[-1], mode="top_k", norms="each"))
    here = _pairs(subject, {p: ([teal], [wina]) for p, (teal, wina) in pairs.items()})
    return Measurement(f"{here} ({each:.2f} if each matrix has its own norms)", _better([pairs]))


def threshold(subject: Subject, sizes: Sizes) -> Measurement:
    """Perplexities at the two sparsities that are judged, with thresholds from other texts for each seed."""
    runs = [
        {p: tuple(subject.perplexity(method(sparsity=p), seed) for method in (Teal, Wina)) for p in JUDGED}
        for seed in sizes.seeds
    ]
    found = {p: tuple([pairs[p][i] for pairs in runs] for i in (0, 1)) for p in JUDGED}
    return Measurement(_pairs(subject, found), _better(runs))


def _better(runs: list[dict[float, Any]]) -> bool:
    """The condition of both: sparsity -> (TEAL, WINA) in every run."""
    return all(r[0.5][1] <= r[0.5][0] and r[0.65][1] <= r[0.65][0] * 0.99 for r in runs)


def _pairs(subject: Subject, found: dict[float, Any]) -> str:
    parts = [f"{p}: TEAL {spread(teal)}, WINA {spread(wina)}" for p, (teal, wina) in found.items()]
    return f"perplexity, dense {subject.perplexity():.2f}; " + "; ".join(parts)


def greedy(subject: Subject, sizes: Sizes) -> Measurement:
    """TEAL with thresholds at effective sparsity 0.5, uniform and greedy, calibrated on the same texts."""
    uniform, allocated = (
        [subject.perplexity(method, seed) for seed in sizes.seeds]
        for method in (Teal(sparsity=0.5), Teal(sparsity=0.5, allocation="greedy", step=sizes.step))
    )
    here = f"perplexity: uniform {spread(uniform)}, greedy {spread(allocated)}; {len(uniform)} calibration seeds"
    return Measurement(here, all(g < u for g, u in zip(allocated, uniform)))


def rotation(subject: Subject, sparsity: float = 0.65) -> Measurement:
    """Logits and columns after the rotation, and the perplexities of both methods on the rotated model."""
    model, batch = subject.model, subject.held_out[0]
    with evaluating(model):
        before = first_tensor(forward(model, batch))
        applied = apply(model, RotateColumns(), undo="memory", progress=False)
        moved = float((first_tensor(forward(model, batch)) - before).abs().max() / before.abs().max())
        blocks = anatomy(model).blocks
        linears = [linear for block in blocks for linear in block.linears() if linear.role in ("key", "gate")]
        angles = [_largest_product(linear.weight.detach().double()) for linear in linears]
        norms = [column_norms([linear]) for linear in linears if linear.role == "key"]
        empty = mean(float((each < 1e-5 * each.max()).double().mean()) for each in norms)
        applied.undo()
    found = {
        method.__name__: tuple(
            subject.perplexity([*first, method(sparsity=sparsity, mode="top_k")]) for first in ((), (RotateColumns(),))
        )
        for method in (Teal, Wina)
    }
    block = anatomy(model).blocks[0]
    weights = sum(linear.weight.numel() for linear in block.linears())
    width = block.linears()[0].in_features
    here = (
        f"logits moved by {moved:.0e}; columns: {max(angles):.0e}; perplexity at {sparsity}, before and after the "
        f"rotation: TEAL {found['Teal'][0]:.2f}, {found['Teal'][1]:.2f}; WINA {found['Wina'][0]:.2f}, "
        f"{found['Wina'][1]:.2f}. It costs 2 x {width}^2 = {2 * width**2:,} products per layer and token, the sparsity "
        f"saves {int(sparsity * weights):,} of {weights:,}; {empty:.0%} of the key's columns are empty after it "
        f"(grouped-query attention)"
    )
    return Measurement(here, moved < 1e-4 and max(angles) <= 1e-5)


def _largest_product(weight: Tensor) -> float:
    """The largest |product| of two columns of a weight [out, in], over the largest squared column."""
    gram = weight.t() @ weight
    return float((gram - gram.diag().diag()).abs().max() / gram.diag().max())


# -- the kernel --------------------------------------------------------------------------------------------------------


def speed(sizes: Sizes) -> Measurement:
    """Seconds of the kernel with and without sparsity, interleaved in random order, a new mask in every round."""
    inputs, outputs = sizes.layer
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    packed = [kernels.pack(weight) for _ in range(sizes.copies)]
    seconds: dict[float, list[float]] = {p: [] for p in (0.0, *SPEEDS)}
    order, shuffle, turn = list(seconds), Random(0).shuffle, 0
    for timed in range(sizes.rounds + 1):  # the first one warms up
        x = torch.randn(1, inputs, generator=generator).bfloat16()
        score = torch.rand(inputs, generator=generator) / x[0].float().abs().clamp(min=1e-3)  # so masks are random
        active = {p: kernels.compact(x, k=round(inputs * (1 - p)), score=score) for p in order}
        shuffle(order)
        for p in order:
            turn = (turn + 1) % len(packed)  # the weight that was not read for longest
            start = time.perf_counter()
            kernels.sparse_linear(active[p], packed[turn])
            if timed:
                seconds[p].append(time.perf_counter() - start)
    parts, passed = [], True
    for p, bound in SPEEDS.items():
        gain = median(seconds[0.0]) / median(seconds[p])
        deciles = quantiles([a / b for a, b in zip(seconds[0.0], seconds[p])], n=10, method="inclusive")
        parts.append(f"{p}: {gain:.2f}x ({deciles[0]:.2f} to {deciles[-1]:.2f}), {median(seconds[p]) * 1e3:.2f} ms")
        passed &= gain >= bound
    here = (
        f"{'; '.join(parts)}; without sparsity {median(seconds[0.0]) * 1e3:.2f} ms. Medians of {sizes.rounds} "
        f"interleaved rounds (deciles of their ratios), {torch.get_num_threads()} threads, "
        f"{sum(each.nbytes for each in packed) >> 20} MB of weights"
    )
    return Measurement(here, passed)
