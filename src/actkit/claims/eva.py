"""EVA's claims: its directions explain far more of held-out inputs than random ones, and LoRA learns sooner from there.

Directions: MiniLM's linear layers at rank 8, from sentences of the train split, measured on those of the test split.
The random A is drawn as peft draws it (Kaiming). The exact decomposition is that of scikit-learn's algorithm, an SVD of
all rows less their mean in float64, which shares no code with ours.

Training: a language model goes on with another domain, the reference pages of Python's topics; LoRA and EVA at rank 4
on all linear layers, with rho 1 and 2. The rate is the one of three with which plain LoRA is best on pages of the
search and calibration splits (first seed), and is the same for all arms; what is reported is measured on pages of the
test split. Seeds are of the order of the text and of LoRA's A. The model is a small one of Llama's architecture (1.1 M
parameters) that is trained on half of the library's modules first, and has seen no page; 150 steps of 256 tokens.

The same on the zoo's SwiGLU model, which has seen the pages before, with fewer steps and rows (`zoo_steps` ...); about
5 minutes of one core more (`--subject swiglu`).

On SmolLM2-135M the directions (in bf16, as it is stored), and the training (in float32) with 3 seeds and the sizes of
`REAL_SIZES`, which ends at step 40. About 25 minutes of one core (`--subject smollm2`). On Gemma 3 270M the directions
alone (`--subject gemma3`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from actkit import zoo
from actkit.claims.outcome import SMALL, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.small_models import LENGTH, language_model
from actkit.claims.subject import REAL, Subject, spread
from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import Before, evaluating, hooked
from actkit.core.ground.progress import track
from actkit.core.train.training import Trained, train
from actkit.data import Batches, Split, load_data
from actkit.data.text import Document, documents
from actkit.finetuning.adapters import AdaptedLayer, Lora
from actkit.finetuning.eva import Eva, EvaPlan
from actkit.finetuning.explained_variance import explained_variance
from actkit.finetuning.low_rank_training import train_adapter

DIRECTIONS = 8  # rank of the first two claims
LORA, EVA = Lora(rank=4), Eva(rank=4)
ARMS = ("LoRA", "EVA, rho 1", "EVA, rho 2")


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the training.
        rates: that plain LoRA is tried with.
        steps: of a training.
        early: the step at which the arms are compared; a training is measured at multiples of it, and at its end.
        rows: of a step.
        length: tokens of a row.
        held_out: rows that a training is measured on.
        pretrained: steps of 1,024 tokens in which the small model is trained first.
        zoo_steps: `steps` of the zoo's model.
        zoo_rows: its `rows`.
        zoo_held_out: its `held_out`.
        fitted: rows (sentences, or 256 tokens) that directions are found on.
        measured: rows that they are measured on.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    steps: int = 150
    early: int = 40
    rows: int = 4
    length: int = 64
    held_out: int = 96
    pretrained: int = 400
    zoo_steps: int = 80
    zoo_rows: int = 2
    zoo_held_out: int = 48
    fitted: int = 128
    measured: int = 256


REAL_SIZES = Sizes(seeds=(0, 1, 2), steps=40, rows=2, held_out=24, fitted=8, measured=8)
EXPLAINS = Statement(
    "The directions of EVA explain most of the variance of layers' inputs",
    "principal directions are optimal in the sense of explained variance (by construction)",
    "rank 8, held-out text: the mean share of variance in span(A) is at least 3 x that of random A, and within 2 % of "
    "that of an exact PCA of the same rows",
    "minilm",
)
SHARES = Statement(
    "Moving ranks to the layers that need them explains more in all",
    "ranks are redistributed to maximise explained variance (abstract)",
    "the sum over layers of the explained variance of the plan with rho 2 is at least that with rho 1, at equal budget",
    "minilm",
)
SOONER = Statement(
    "LoRA learns sooner from EVA's start than from a random one",
    "faster convergence and the best average score per domain (abstract; figures not known to us)",
    "mean validation loss at step 40 of the better EVA arm is at most LoRA's - 0.01 nats, lower in at least 4 of 5 "
    "seeds, and at the end at most LoRA's + 0.005",
    SMALL,
)
REAL_SOONER = replace(
    SOONER,
    condition="mean validation loss at step 40, the last, of the better EVA arm is at most LoRA's - 0.01 nats, lower "
    "in 3 of 3 seeds",
    subject="smollm2",
)
STATEMENTS = (
    EXPLAINS,
    SHARES,
    SOONER,
    SOONER.on("swiglu"),
    *(each.on("smollm2") for each in (EXPLAINS, SHARES)),
    REAL_SOONER,
    *(each.on("gemma3") for each in (EXPLAINS, SHARES)),
)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    name = subject if subject in REAL else "minilm"
    given = sizes or (REAL_SIZES if name in REAL else Sizes())
    experiments: list[Experiment] = []
    if subject in (None, name):
        text = Subject(name, calibration=given.fitted, split="train", held_out=given.measured)
        experiments = [(EXPLAINS.on(name), partial(explains, text)), (SHARES.on(name), partial(shares, text))]
    if subject in (None, SMALL):
        experiments.append((SOONER, lambda: sooner(pretrained(given), given, progress=progress)))
    if subject == "swiglu":
        smaller = replace(given, steps=given.zoo_steps, rows=given.zoo_rows, held_out=given.zoo_held_out)
        experiments.append((SOONER.on("swiglu"), lambda: sooner(in_float32("swiglu"), smaller, progress=progress)))
    if subject == "smollm2":
        experiments.append((REAL_SOONER, lambda: sooner(in_float32("smollm2"), given, "smollm2", progress=progress)))
    return conduct("eva", experiments, given, subject, progress)


# -- directions --------------------------------------------------------------------------------------------------------


def explains(subject: Subject) -> Measurement:
    """Compare EVA's directions with random ones and with an exact PCA, on held-out text."""
    adapter = Eva(rank=DIRECTIONS, rho=1, batches=10**6)
    plan = adapter.plan(subject.model, subject.calibration(0), progress=False)
    first = {next(iter(each.ranks)): tuple(each.ranks) for each in plan.inputs}
    exact: dict[str, Tensor] = {}
    for path, x in inputs(subject.model, first, subject.calibration(0)).items():
        exact |= dict.fromkeys(first[path], principal(x, DIRECTIONS))
    arms = {"EVA": plan.directions, "random": random(plan.directions), "exact PCA": exact}
    found = {
        name: explained_variance(subject.model, given, subject.held_out, progress=False) for name, given in arms.items()
    }
    ours, drawn, best = (found[name].explained for name in arms)
    text = (
        f"EVA {ours:.4f}, random {drawn:.4f} ({ours / drawn:.1f} x), exact PCA {best:.4f} ({ours / best - 1:+.3%}), at "
        f"most {found['EVA'].most:.4f} on this text; {len(plan.directions)} layers, {plan.inputs[0].tokens:,} tokens"
    )
    return Measurement(text, ours >= 3 * drawn and abs(ours / best - 1) <= 0.02)


def shares(subject: Subject) -> Measurement:
    """Compare the sums of explained variance with and without moved ranks."""
    plans = {
        rho: Eva(rank=DIRECTIONS, rho=rho, batches=10**6).plan(subject.model, subject.calibration(0), progress=False)
        for rho in (1.0, 2.0)
    }
    sums = {rho: plan.explained for rho, plan in plans.items()}
    ranks = plans[2.0].ranks.values()
    held_out = {
        rho: sum(
            each.explained for each in explained_variance(subject.model, p, subject.held_out, progress=False).layers
        )
        for rho, p in plans.items()
    }
    text = (
        f"rho 2: {sums[2.0]:.3f}, rho 1: {sums[1.0]:.3f} (on held-out text {held_out[2.0]:.3f} and "
        f"{held_out[1.0]:.3f}); ranks of {min(ranks)} to {max(ranks)}, {sum(not rank for rank in ranks)} layers without"
    )
    return Measurement(text, sums[2.0] >= sums[1.0])


def inputs(model: nn.Module, paths: Iterable[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """What layers read at real tokens: [rows, in] each."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    mask: Tensor | None = None

    def keep(path: str) -> Before:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[path].append(args[0].detach().flatten(0, -2) if mask is None else args[0].detach()[mask])

        return hook

    with torch.no_grad(), evaluating(model), hooked(model, before={path: keep(path) for path in found}):
        for batch in batches:
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            forward(model, batch)
    return {path: torch.cat(rows) for path, rows in found.items()}


def principal(x: Tensor, rank: int) -> Tensor:
    """The first principal directions of rows, by an SVD."""
    x = x.double()
    return torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:rank]


def random(directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """As many random ones, drawn as peft begins."""
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for path, given in directions.items():
            found[path] = nn.init.kaiming_uniform_(torch.empty(given.shape), a=math.sqrt(5))
    return found


# -- training ----------------------------------------------------------------------------------------------------------


def sooner(model: nn.Module, sizes: Sizes, tokenizer: str = "swiglu", *, progress: bool = False) -> Measurement:
    """Train all arms with all seeds, at the rate that is best for LoRA."""
    read_by = partial(topics, model, sizes=sizes, tokenizer=tokenizer)
    texts = {seed: read_by(("train",), number=sizes.rows * sizes.steps, seed=seed) for seed in sizes.seeds}
    first, choosing, test = texts[sizes.seeds[0]], read_by(("search", "calibration")), read_by(("test",))
    tried: dict[float, float | None] = {}
    for rate in track(sizes.rates, "Training LoRA at each rate", enabled=progress):
        run = tune(model, LORA.layers(model, first), first, sizes, sizes.seeds[0], rate, choosing)
        tried[rate] = run.history[-1].validation
    rate = min(tried, key=lambda each: tried[each] or math.inf)
    early: dict[str, list[float]] = {name: [] for name in ARMS}
    late: dict[str, list[float]] = {name: [] for name in ARMS}
    counts = {}
    for seed, pages in track(texts.items(), "Training from each start", enabled=progress):
        for name, layers in track(starts(model, pages, progress).items(), f"Seed {seed}", enabled=progress):
            run = tune(model, layers, pages, sizes, seed, rate, test)
            losses = {step.step: step.validation for step in run.history}
            early[name].append(losses[sizes.early] or math.nan)
            late[name].append(losses[sizes.steps] or math.nan)
            counts[name], start = run.trainable, losses[0]
    better = min(ARMS[1:], key=lambda name: mean(early[name]))
    gap, gap_late = (mean(found[better]) - mean(found["LoRA"]) for found in (early, late))
    lower = sum(ours < theirs for ours, theirs in zip(early[better], early["LoRA"], strict=True))
    arms = "; ".join(
        f"{name} {spread(early[name], '.4f')}, at the end {spread(late[name], '.4f')} ({counts[name]:,} parameters)"
        for name in ARMS
    )
    text = (
        f"step {sizes.early}: {better} {gap:+.4f} nats against LoRA, lower in {lower} of {len(sizes.seeds)} seeds, at "
        f"the end {gap_late:+.4f}; before {start:.4f}; {arms}; rate {rate:g} of "
        f"{', '.join(f'{each:g}' for each in sizes.rates)}"
    )
    needed = math.ceil(0.8 * len(sizes.seeds))
    return Measurement(text, gap <= -0.01 and lower >= needed and gap_late <= 0.005)


def starts(model: nn.Module, text: Batches, progress: bool) -> dict[str, dict[str, AdaptedLayer]]:
    """How each arm begins; with rho 1 EVA takes the first directions of the same plan, as many for every layer."""
    plan = EVA.plan(model, text, progress=progress)
    even = EvaPlan(tuple(replace(each, ranks=dict.fromkeys(each.ranks, EVA.rank)) for each in plan.inputs))
    layers = (LORA.layers(model, text), even.layers(EVA.scale), plan.layers(EVA.scale))
    return dict(zip(ARMS, layers, strict=True))


def in_float32(name: str) -> nn.Module:
    """A model of the zoo, to be trained."""
    return zoo.load(name, dtype=torch.float32)


def pretrained(sizes: Sizes) -> nn.Module:
    """A small language model that has read half of the library's modules, and no reference page."""
    model = language_model()
    halves = [each for each in documents("train") if half(each.name)]
    rows, length = 16, LENGTH // 2
    batches = read(model, halves, length, rows)
    held_out = read(model, [each for each in documents("search") if half(each.name)], length, rows)[:8]
    train(
        model,
        batches,
        validation=held_out,
        steps=sizes.pretrained,
        learning_rate=3e-3,
        evaluate_every=sizes.pretrained,
        keep="last",
        progress=False,
    )
    return model.eval()


def half(name: str) -> bool:
    """Whether a document belongs to the half of the modules that the small model learns from."""
    module = name.partition(".")[0]
    return module != "topics" and hashlib.sha256(module.encode()).digest()[0] % 2 == 0


def tune(
    model: nn.Module,
    layers: dict[str, AdaptedLayer],
    text: Batches,
    sizes: Sizes,
    seed: int,
    rate: float,
    held_out: Batches,
) -> Trained:
    """Train one arm on a copy of the model."""
    return train_adapter(
        copy.deepcopy(model),
        text,
        validation=held_out,
        layers=layers,
        steps=sizes.steps,
        learning_rate=rate,
        seed=seed,
        evaluate_every=sizes.early,
        keep="last",
        progress=False,
    )


def topics(
    model: nn.Module,
    splits: tuple[Split, ...],
    sizes: Sizes,
    number: int | None = None,
    seed: int = 0,
    tokenizer: str = "swiglu",
) -> Batches:
    """Rows of the reference pages; None for as many as a training is measured on, and all if there are fewer."""
    pages = [each for split in splits for each in documents(split) if each.name.startswith("topics.")]
    return read(model, pages, sizes.length, sizes.rows, seed, tokenizer)[: (number or sizes.held_out) // sizes.rows]


def read(
    model: nn.Module, given: Iterable[Document], length: int, rows: int, seed: int = 0, tokenizer: str = "swiglu"
) -> Batches:
    """Documents as batches of rows, in the order of a seed."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": each.text}) + "\n" for each in given), encoding="utf-8")
        return load_data(path, model, zoo.tokenizer(tokenizer), length=length, batch_size=rows, seed=seed)
