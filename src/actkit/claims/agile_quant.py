"""Agile-Quant's claims: log2 attention weights, 4-bit weights with static 8-bit activations, and pruned prompts.

Measured on the zoo's SwiGLU model and its perplexity on 33,000 held-out tokens; weights by `gptq` at 4 bits (groups of
128, by activity, true sequential), activations of all sites as in the release: a scale per channel, per head for
queries, keys and values, attention weights to 4-bit powers of two with its 17 values. 128 x 256 training tokens for
calibration, 3 seeds. Pruning: rows of 512 tokens, the longest that this model reads, in the positions that the release
gives; its perplexity is over kept tokens, and that over all stands beside it. Speed: random weights of Llama's shape.

SmolLM2-135M and Gemma 3 270M (in bf16, as they are stored) are asked for the first two, on the off-grid twins, in
smaller runs: of SmolLM2 (`REAL_SIZES`) one seed of 8 x 256 tokens for calibration, 8,192 held-out tokens, and beside
all sites the weights alone. Its integer kernels, phones and LLaMA's perplexities cannot be checked here.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import exp, nan
from statistics import mean, median
from typing import Any

import torch

from actkit import zoo
from actkit.claims.outcome import SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import REAL, Subject, spread
from actkit.core.recipe.runner import apply
from actkit.data import load_data
from actkit.quantization.agile_quant.agile_quant import AgileQuant
from actkit.quantization.agile_quant.prune_schedule import PruneSchedule
from actkit.quantization.agile_quant.pruned_quality import PositionLosses, PrunedQuality
from actkit.quantization.agile_quant.token_pruner import TokenPruner
from actkit.quantization.gptq import Gptq
from actkit.zoo.off_grid import off_grid_twin

LENGTH = 512  # tokens of a prompt that is pruned
SPARSITIES = (0.02, 0.05, 0.1, 0.2)
JUDGED = (0.02, 0.05)
START, COLUMN, RANDOM = "start_token", "column_mean", "random"
REPEATS = 5  # of each timing


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the calibration text.
        calibration: rows of 256 tokens.
        held_out: rows of 256 tokens.
        prompts: rows of 512 tokens that are pruned.
        tokens: of the prompt whose time is taken.
        width: of the blocks whose time is taken.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 128
    held_out: int = 130
    prompts: int = 16
    tokens: int = 1024
    width: int = 512


REAL_SIZES = Sizes(seeds=(0,), calibration=8, held_out=32)
LARGEST_MODEL = Sizes(seeds=(0,), calibration=8, held_out=32)  # of gemma3: a token has 1 MB of logits
LOG2 = Statement(
    "4-bit attention weights lose less as powers of two than in even steps",
    "taken over from vision transformers; no ablation of it known to us",
    "natural model, attention weights alone in 4 bits: the perplexity gap of powers of two is at most 0.7 x that of "
    "even steps from 0 to 1, the range of their static largest value",
    "swiglu",
)
W4A8 = Statement(
    "4-bit weights with static 8-bit activations everywhere cost little",
    "LLaMA-7B on WikiText2: 5.68 -> 6.16 (paper), with 4-bit weights alone 5.85",
    "natural model, gptq at 4 bits and activations of all sites: the mean perplexity over the seeds is at most 1.10 x "
    "that of the model as it is",
    "swiglu",
)
PRUNED = Statement(
    "Dropping a few tokens that attend little to the first one improves the quantized model",
    "LLaMA-7B on WikiText2, 8-bit activations: 6.16 -> 6.09 (paper), over the remaining tokens",
    "W4A8, rows of 512: at a token sparsity of 2 or of 5 %, in at least 2 of 3 seeds, the perplexity over kept tokens "
    "is below that without pruning and below that of random pruning at the same sparsity, also over kept tokens",
    "swiglu",
)
SPEED = Statement(
    "A pruned prompt is read faster",
    "LLaMA-7B on a phone: 10.6 s -> 5.89 s, with 8-bit integers (paper, Table 4)",
    "random weights, 8 blocks of Llama's shape, a prompt of 1024 tokens, half of them dropped behind the 4th block: "
    "the median time to the first token is at least 1.2 x shorter than without pruning, with the same attention "
    "function",
    SYNTHETIC,
)
STATEMENTS = (LOG2, W4A8, PRUNED, SPEED, *(each.on(name) for name in REAL for each in (LOG2, W4A8)))


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    if subject in REAL:
        return _on_a_real_model(subject, progress, sizes or real_sizes(subject))
    sizes = sizes or Sizes()
    natural = Subject("swiglu", calibration=sizes.calibration, held_out=sizes.held_out, split="train")
    experiments: list[Experiment] = [
        (LOG2, partial(attention_weights, natural)),
        (W4A8, partial(everything, natural, sizes)),
        (PRUNED, partial(pruned, natural, sizes)),
        (SPEED, partial(time_to_first_token, sizes)),
    ]
    return conduct("agile-quant", experiments, sizes, subject, progress)


def real_sizes(subject: str) -> Sizes:
    """The sizes of a run on a real model."""
    return LARGEST_MODEL if subject == "gemma3" else REAL_SIZES


def _on_a_real_model(name: str, progress: bool, sizes: Sizes) -> Outcome:
    rows: dict[str, Any] = {"calibration": sizes.calibration, "held_out": sizes.held_out, "split": "train"}
    twin = Subject(name, model=off_grid_twin(Subject(name, **rows).model), **rows)
    experiments: list[Experiment] = [
        (LOG2.on(name), partial(attention_weights, twin)),
        (W4A8.on(name), partial(everything, twin, sizes)),
    ]
    return conduct("agile-quant", experiments, sizes, name, progress)


# -- quantization ------------------------------------------------------------------------------------------------------


def rounded(act_scale: Any = "channel", zero: Any = "beyond") -> list[Any]:
    """The recipe: weights, and activations of all sites."""
    return [Gptq(bits=4, scale_dtype="float32"), AgileQuant(act_scale=act_scale, zero=zero)]


def attention_weights(subject: Subject) -> Measurement:
    """Attention weights alone: the release's powers of two, those with a code for 0, and even steps."""
    exact, only = subject.perplexity(), {"bits": None, "attention_bits": None}
    found = {
        "powers of two": subject.perplexity(AgileQuant(zero="beyond", **only)),
        "with a code for 0": subject.perplexity(AgileQuant(zero="last", **only)),
        "even steps": subject.perplexity(AgileQuant(softmax="uniform", **only)),
    }
    gaps = {name: value - exact for name, value in found.items()}
    share = gaps["powers of two"] / gaps["even steps"] if gaps["even steps"] > 0 else nan
    shown = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    here = f"perplexity {exact:.2f}; {shown}; the gap of powers of two is {share:.2f} x that of even steps"
    return Measurement(here, share <= 0.7)


def everything(subject: Subject, sizes: Sizes) -> Measurement:
    """All sites, the weights alone beside it, TRIP, and attention weights left as they are."""
    exact = subject.perplexity()
    weights = rounded()[:1]
    arms: dict[str, tuple[list[Any], tuple[int, ...]]] = {
        "all sites": (rounded(), sizes.seeds),
        "TRIP": (rounded("trip"), sizes.seeds[:1]),
        "without attention weights": ([*weights, AgileQuant(softmax="none")], sizes.seeds[:1]),
        "weights alone": (weights, sizes.seeds[:1]),
    }
    if subject.name in REAL:  # GPTQ takes minutes there
        arms = {name: arms[name] for name in ("all sites", "weights alone")}
    found = {name: [subject.perplexity(recipe, seed) for seed in seeds] for name, (recipe, seeds) in arms.items()}
    ratio = mean(found["all sites"]) / exact
    shown = ", ".join(f"{name} {spread(values)}" for name, values in found.items())
    return Measurement(f"perplexity {exact:.2f}; {shown}; {ratio:.3f} x", ratio <= 1.10)


# -- pruning -----------------------------------------------------------------------------------------------------------


def schedule(blocks: int, sparsity: float) -> PruneSchedule:
    """Behind the blocks from the second third on, without the last: the first ones read everything."""
    return PruneSchedule.of_sparsity(range(blocks // 3, blocks - 1), blocks, sparsity)


def pruned(natural: Subject, sizes: Sizes) -> Measurement:
    """All scores at all sparsities, per calibration seed."""
    tokenizer, shown, held = zoo.tokenizer("swiglu"), [], dict.fromkeys(JUDGED, 0)
    over_all: list[bool] = []
    for seed in sizes.seeds:
        model: Any = copy.deepcopy(natural.model)
        apply(model, rounded(), natural.calibration(seed), undo="off", progress=False)
        text = load_data(None, model, tokenizer, sequences=sizes.prompts, length=LENGTH, batch_size=4, split="test")
        blocks = model.config.num_hidden_layers
        before = TokenPruner(model).losses(text)
        parts = []
        for sparsity in SPARSITIES:
            found = {score: _pruned(model, text, before, blocks, sparsity, score) for score in (START, COLUMN, RANDOM)}
            start, random = found[START], found[RANDOM]
            if sparsity in JUDGED:
                held[sparsity] += start.kept < min(start.before, random.kept)
                over_all.append(start.all < start.before)
            arms = ", ".join(
                f"{score} {exp(each.kept):.2f} kept ({exp(each.kept_before):.2f} before), {exp(each.all):.2f} all"
                for score, each in found.items()
            )
            parts.append(f"{sparsity:.0%}: {arms}")
        still = _pruned(model, text, before, blocks, 0.05, START, "keep")
        parts.append(f"5% with positions kept: {exp(still.kept):.2f} kept, {exp(still.all):.2f} all")
        shown.append(f"seed {seed}, perplexity {exp(float(before.nats.mean())):.2f}; {'; '.join(parts)}")
    counts = ", ".join(f"{number} of {len(sizes.seeds)} seeds at {sparsity:.0%}" for sparsity, number in held.items())
    more = f"over all tokens it improves in {sum(over_all)} of {len(over_all)} cases"
    if not any(over_all):
        more += ": what is gained over kept tokens comes from leaving out hard ones"
    here = f"{'. '.join(shown)}. As claimed in {counts}; {more}"
    return Measurement(here, max(held.values()) >= 2 / 3 * len(sizes.seeds))


def _pruned(
    model: Any, text: Any, before: PositionLosses, blocks: int, sparsity: float, score: Any, positions: Any = "renumber"
) -> PrunedQuality:
    pruner = TokenPruner(model, schedule(blocks, sparsity), score=score, positions=positions)
    return PrunedQuality.of(before, pruner.losses(text))


def time_to_first_token(sizes: Sizes) -> Measurement:
    """A prompt with and without pruning, in turns: with scaled dot-product attention, and with eager one beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": sizes.width, "intermediate_size": 3 * sizes.width, "num_attention_heads": 8}
    config = LlamaConfig(
        vocab_size=2048, num_hidden_layers=8, num_key_value_heads=8, max_position_embeddings=sizes.tokens, **shape
    )
    model = LlamaForCausalLM(config).eval()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    ids, half = torch.randint(2048, (sizes.tokens,)).tolist(), PruneSchedule({3: 0.5})
    pruners = {
        "without": TokenPruner(model),
        "pruned": TokenPruner(model, half),
        "without, eager": TokenPruner(eager),
        "pruned, eager": TokenPruner(eager, half),
    }
    seconds: dict[str, list[float]] = {name: [] for name in pruners}
    for _ in range(REPEATS + 1):
        for name, pruner in pruners.items():
            seconds[name].append(_seconds(partial(pruner, ids)))
            pruner.reset()
    medians = {name: median(times[1:]) for name, times in seconds.items()}  # the first warms up
    ratio = medians["without"] / medians["pruned"]
    shown = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in medians.items())
    beside = medians["without, eager"] / medians["pruned, eager"]
    return Measurement(f"{shown}; {ratio:.2f} x, with eager attention {beside:.2f} x", ratio >= 1.2)


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
