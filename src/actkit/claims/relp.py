"""RelP's claims: its effects agree with exact patching where attribution patching does not, at attribution's price.

Small models: GPT-2s of 6 layers (1.2 M parameters) learn which of two names is left over. 12 templates of 12 tokens
with words of their own and 40 names: two names, and the second or the first of them again near the end; the answer is
the other one. A training ends when it answers 95 % of pairs of names that it has not seen. Base: 64 held-out sentences
with the other name repeated; patch: the same with the answer that is asked for. Every (block, position) of residual
stream, attention and MLP is patched exactly. Seconds are of one thread, the shortest of three tries.

MiniLM: the cosine between the mean outputs of a sentence and of another one; patch: one of its words exchanged for a
word of another sentence. Blocks' outputs and MLPs, at all real positions.

SmolLM2-135M (float32): 16 sentences of one template that asks for the name that is left over, and the same with the
names' roles exchanged. Effects of the difference of logits. The claim is invalid, and fails, if the model prefers the
wrong name in more than 30 % of the sentences.

Attention's outputs are reported and not judged, as the paper sees no gain there. About 6 minutes of one core, and half
an hour for SmolLM2.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from actkit import zoo
from actkit.claims.outcome import SMALL, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.forward.batch import first_tensor, forward
from actkit.data import load_data
from actkit.interpretation.relp.effects import patch_effects
from actkit.interpretation.relp.metrics import LogitDifference, Metric
from actkit.interpretation.relp.results import Method, PatchEffects

ANSWERED = 0.95  # of held-out pairs of names, when a training ends
KINDS = {"block.output": "residual", "mlp.output": "MLP", "attention.output": "attention"}
TEMPLATE = "When {a} and {b} went to the store, {c} gave a drink to"
NAMES = (
    *("Mary", "John", "Tom", "James", "Anna", "Paul", "Mark", "Sarah", "Peter", "David", "Jack", "Alice", "Emma"),
    *("Kate", "Bob", "Mike", "Lisa", "Adam", "Laura", "Henry"),
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        seeds: of the small models.
        pairs: sentences that effects are means over.
        steps: of a training, at most.
        steps_integrated: of integrated gradients.
        sentences: of MiniLM.
        real_pairs: sentences of SmolLM2.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    pairs: int = 64
    steps: int = 4000
    steps_integrated: int = 10
    sentences: int = 32
    real_pairs: int = 16


REAL_SIZES = Sizes(seeds=(0,))
AGREES = Statement(
    "RelP ranks MLPs as exact patching does, where attribution patching does not",
    "GPT-2 small: Pearson's correlation with exact patching, MLPs 0.992 for 0.195, residual 0.968 for 0.753",
    "MLP outputs: mean correlation at least 0.80 and at least 0.05 above attribution's; residual stream: at most 0.02 "
    "below attribution's",
    SMALL,
)
CHEAP = Statement(
    "It costs what attribution patching costs",
    "two forward passes and one backward pass",
    "seconds at most 1.5 x attribution's and at most 1/10 of exact patching's",
    SMALL,
)
ENCODER = Statement(
    "It is no worse in an encoder with norms behind its parts",
    "not in the paper",
    "the mean correlation over blocks' outputs and MLPs is at least attribution's - 0.05",
    "minilm",
)
REAL = Statement(
    "RelP ranks the MLPs of a real model as exact patching does",
    "GPT-2 medium to large, Pythia, Qwen2, Gemma 2: the same (abstract)",
    "MLP outputs: correlation at least 0.05 above attribution's; residual stream: at most 0.02 below; the model "
    "prefers the right name in at least 70 % of the sentences",
    "smollm2",
)
STATEMENTS = (AGREES, CHEAP, ENCODER, REAL)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    given = sizes or (REAL_SIZES if subject == "smollm2" else Sizes())
    experiments: list[Experiment] = []
    if subject in (None, SMALL):
        small = Small(given)
        experiments += [(AGREES, small.agrees), (CHEAP, small.cheap)]
    if subject in (None, "minilm"):
        experiments.append((ENCODER, partial(encoder, given)))
    if subject == "smollm2":
        experiments.append((REAL, partial(real, given)))
    return conduct("relp", experiments, given, subject, progress)


# -- small models ------------------------------------------------------------------------------------------------------


class Grammar:
    """Sentences of 12 tokens that name two people, then one of them again; what follows is the other one.

    Args:
        seed: of the templates and of the pairs of names that are held out.
    """

    LENGTH, NAMES, WORDS = 12, 40, 60

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.size = self.NAMES + self.WORDS
        words = range(self.NAMES, self.size)
        self.templates = []
        for _ in range(12):
            first, second, third = sorted(draw.sample(range(1, self.LENGTH - 1), 3))
            self.templates.append(([draw.choice(words) for _ in range(self.LENGTH)], (first, second, third)))
        pairs = [(a, b) for a in range(self.NAMES) for b in range(self.NAMES) if a != b]
        draw.shuffle(pairs)
        self.held_out, self.seen = pairs[:200], pairs[200:]

    def sentences(self, pairs: list[tuple[int, int]], draw: random.Random, repeats: list[int]) -> Tensor:
        """A sentence for each pair, [rows, 12]; repeats: which of the two is named again."""
        rows = []
        for pair, repeated in zip(pairs, repeats, strict=True):
            words, places = draw.choice(self.templates)
            row = list(words)
            row[places[0]], row[places[1]], row[places[2]] = *pair, pair[repeated]
            rows.append(row)
        return torch.tensor(rows)


class Small:
    """The small models, each with its effects by every method."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._runs: list[dict[str, Any]] | None = None

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Effects, seconds and accuracy, by seed."""
        if self._runs is None:
            self._runs = [self._run(seed) for seed in self.sizes.seeds]
        return self._runs

    def _run(self, seed: int) -> dict[str, Any]:
        grammar = Grammar(seed)
        model, steps, accuracy = learned(grammar, seed, self.sizes.steps)
        pairs, draw = grammar.held_out[: self.sizes.pairs], random.Random(seed + 1)
        sides = [draw.randrange(2) for _ in pairs]
        templates = draw.getrandbits(32)
        patch, base = (
            grammar.sentences(pairs, random.Random(templates), [side if right else 1 - side for side in sides])
            for right in (True, False)
        )
        names = torch.tensor(pairs)
        rows = torch.arange(len(pairs))
        metric = LogitDifference(names[rows, 1 - torch.tensor(sides)], names[rows, torch.tensor(sides)])
        effects, seconds = {}, {}
        for method in ("exact", "relp", "attribution", "integrated"):
            effects[method], seconds[method] = timed(
                model, {"input_ids": base}, {"input_ids": patch}, metric, method, self.sizes.steps_integrated
            )
        return {"effects": effects, "seconds": seconds, "accuracy": accuracy, "steps": steps}

    def agrees(self) -> Measurement:
        """Correlations with exact patching."""
        found = [correlations(run["effects"]) for run in self.runs]
        mlp, residual = (
            {method: mean(each[method][name] for each in found) for method in found[0]}
            for name in ("mlp.output", "block.output")
        )
        passed = (
            mlp["relp"] >= 0.8
            and mlp["relp"] >= mlp["attribution"] + 0.05
            and residual["relp"] >= residual["attribution"] - 0.02
        )
        accuracy = mean(run["accuracy"] for run in self.runs)
        steps = [run["steps"] for run in self.runs]
        text = (
            f"{described(found)}; {accuracy:.1%} of held-out pairs answered after {min(steps)} to {max(steps)} steps; "
            f"without the first position MLPs {spread([each['relp']['mlp.output, from 1'] for each in found], '.3f')}"
        )
        return Measurement(text, passed)

    def cheap(self) -> Measurement:
        """Seconds of all methods."""
        seconds = {method: [run["seconds"][method] for run in self.runs] for method in self.runs[0]["seconds"]}
        ratios = [mean(seconds["relp"]) / mean(seconds[other]) for other in ("attribution", "exact")]
        each = ", ".join(f"{method} {mean(values):.3f}" for method, values in seconds.items())
        text = f"seconds: {each}; {ratios[0]:.2f} x attribution's, 1/{1 / ratios[1]:.0f} of exact patching's"
        return Measurement(text, ratios[0] <= 1.5 and ratios[1] <= 0.1)


def learned(grammar: Grammar, seed: int, steps: int) -> tuple[nn.Module, int, float]:
    """A model that answers, the steps that it took, and its accuracy on held-out pairs of names."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    size: dict[str, Any] = {"n_embd": 128, "n_layer": 6, "n_head": 4, "n_positions": 16, "vocab_size": grammar.size}
    model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    draw, accuracy, step = random.Random(seed), 0.0, 0
    while step < steps and accuracy < ANSWERED:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 50)
        pairs = draw.choices(grammar.seen, k=64)
        sides = [draw.randrange(2) for _ in pairs]
        answers = torch.tensor([pair[1 - side] for pair, side in zip(pairs, sides, strict=True)])
        logits = model(input_ids=grammar.sentences(pairs, draw, sides)).logits[:, -1]
        nn.functional.cross_entropy(logits, answers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            sides = [draw.randrange(2) for _ in grammar.held_out]
            with torch.no_grad():
                logits = model(input_ids=grammar.sentences(grammar.held_out, draw, sides)).logits[:, -1]
            answers = torch.tensor([pair[1 - side] for pair, side in zip(grammar.held_out, sides, strict=True)])
            accuracy = float((logits.argmax(-1) == answers).float().mean())
    return model.eval(), step, accuracy


# -- effects -----------------------------------------------------------------------------------------------------------


def timed(
    model: nn.Module,
    base: Mapping[str, Tensor],
    patch: Mapping[str, Tensor],
    metric: Metric,
    method: Method,
    steps: int = 10,
    sites: tuple[str, ...] = tuple(KINDS),
) -> tuple[PatchEffects, float]:
    """The effects by one method, and the shortest of three times; exact patching and integrated gradients run once."""
    tries = []
    for _ in range(3 if method in ("relp", "attribution") else 1):
        started = time.perf_counter()
        found = patch_effects(model, base, patch, metric, sites=sites, method=method, steps=steps, progress=False)
        tries.append(time.perf_counter() - started)
    return found, min(tries)


def correlations(effects: Mapping[str, PatchEffects]) -> dict[str, dict[str, float]]:
    """Of each method with exact patching, by site; MLPs also without the first position."""
    exact = effects["exact"]
    return {
        method: {name: found.correlate(exact, name) for name in exact.values}
        | {"mlp.output, from 1": found.correlate(exact, "mlp.output", skip=1)}
        for method, found in effects.items()
        if method != "exact"
    }


def described(found: list[dict[str, dict[str, float]]]) -> str:
    """Correlations of all runs in a sentence."""
    parts = []
    for name, kind in KINDS.items():
        if name not in found[0]["relp"]:
            continue
        values = ", ".join(f"{method} {spread([each[method][name] for each in found], '.3f')}" for method in found[0])
        parts.append(f"{kind}: {values}")
    return "; ".join(parts)


# -- MiniLM ------------------------------------------------------------------------------------------------------------


def encoder(sizes: Sizes) -> Measurement:
    """Exchange one word of each sentence, and see what that does to its cosine with another sentence."""
    model, tokenizer = zoo.load("minilm"), zoo.tokenizer("minilm")
    rows = load_data(
        None, model, tokenizer, sequences=4 * sizes.sentences, batch_size=4 * sizes.sentences, split="test", length=24
    )[0]
    whole = [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if token.isalpha()]
    words = sorted(set(rows["input_ids"].flatten().tolist()) & set(whole))
    places = [[place for place, token in enumerate(row) if token in words] for row in rows["input_ids"].tolist()]
    chosen = [row for row, found in enumerate(places) if len(found) > 3][: sizes.sentences]
    base = {key: rows[key][chosen] for key in ("input_ids", "attention_mask")}
    draw = random.Random(0)
    ids = base["input_ids"].clone()
    for row, own in zip(ids, chosen, strict=True):
        place = draw.choice(places[own])
        row[place] = draw.choice([word for word in words if word != int(row[place])])
    mask = base["attention_mask"][:, :, None].float()

    def embedded(states: Tensor) -> Tensor:
        return (states * mask).sum(1) / mask.sum(1)

    with torch.no_grad():
        others = embedded(first_tensor(forward(model, base))).roll(1, 0)

    def metric(states: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(embedded(states), others).mean()

    methods: tuple[Method, ...] = ("exact", "relp", "attribution", "integrated")
    sites = ("block.output", "mlp.output")
    effects: dict[str, PatchEffects] = {
        method: timed(model, base, {**base, "input_ids": ids}, metric, method, sizes.steps_integrated, sites)[0]
        for method in methods
    }
    found = correlations(effects)
    means = {method: mean(found[method][name] for name in sites) for method in found}
    return Measurement(described([found]), means["relp"] >= means["attribution"] - 0.05)


# -- SmolLM2 -----------------------------------------------------------------------------------------------------------


def real(sizes: Sizes) -> Measurement:
    """The names of one template, their roles exchanged."""
    model, tokenizer = zoo.load("smollm2", dtype=torch.float32), zoo.tokenizer("smollm2")
    one: Callable[[str], int | None] = lambda name: single(tokenizer, f" {name}")  # noqa: E731
    names = [name for name in NAMES if one(name) is not None]
    draw = random.Random(0)
    pairs = [draw.sample(names, 2) for _ in range(sizes.real_pairs)]
    patch, base = (
        torch.tensor([tokenizer.encode(TEMPLATE.format(a=a, b=b, c=(b, a)[other])) for a, b in pairs])
        for other in (0, 1)
    )
    metric = LogitDifference(
        torch.tensor([one(a) for a, _ in pairs]),
        torch.tensor([one(b) for _, b in pairs]),
    )
    with torch.no_grad():
        preferred = float((metric.of_rows(model(input_ids=patch).logits) > 0).float().mean())
    methods: tuple[Method, ...] = ("exact", "relp", "attribution")
    given = {"input_ids": base}, {"input_ids": patch}
    runs = {method: timed(model, *given, metric, method) for method in methods}
    found = correlations({str(method): effects for method, (effects, _) in runs.items()})
    seconds = ", ".join(f"{method} {took:.1f} s" for method, (_, took) in runs.items())
    relp, plain = found["relp"], found["attribution"]
    passed = (
        preferred >= 0.7
        and relp["mlp.output"] >= plain["mlp.output"] + 0.05
        and relp["block.output"] >= plain["block.output"] - 0.02
    )
    text = (
        f"{described([found])}; MLPs without the first position {relp['mlp.output, from 1']:.3f} and "
        f"{plain['mlp.output, from 1']:.3f}; the right name is preferred in {preferred:.0%} of "
        f"{len(pairs)} sentences of {base.shape[1]} tokens; {seconds}"
    )
    return Measurement(text, passed)


def single(tokenizer: Any, text: str) -> int | None:
    """The id of a text that is one token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None
