"""Making and measuring one candidate: apply its recipe to a copy, measure quality and cost, save, prove the reload.

A candidate goes on only while it can still be recommended. On the search split it is looked at after each batch, and
ends there if even the lower bound of its loss is above the limit. Only one whose whole search split is within the limit
is measured on the test split, saved and proved. What the original gave is kept, so that it runs once; what recipes
begin with in common is computed once.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import forward
from actkit.core.forward.example import Inputs, example_of
from actkit.core.forward.hooks import Before, evaluating, hooked
from actkit.core.forward.outputs import KEEP, Outputs
from actkit.core.ground.errors import ActkitError
from actkit.core.ground.estimate import Estimate
from actkit.core.ground.memory import release_memory
from actkit.core.layers.weights import widened
from actkit.core.measure.cost import folder_bytes, measure_cost
from actkit.core.measure.fresh import FreshProcess
from actkit.core.measure.generation import GenerationCheck, check_generation
from actkit.core.measure.proof import prove
from actkit.core.measure.quality import Quality, measure_quality, task_of
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import Applied, apply
from actkit.core.recipe.steps import Steps
from actkit.core.recipe.transform import Transform
from actkit.core.store.checkpoint import save
from actkit.search.budget import OutOfTime
from actkit.search.measured import Candidate
from actkit.search.mixing.ingredients import Sample, reads_of
from actkit.search.own_grid import own_grid_warning
from actkit.search.results import Proposal
from actkit.search.splits import Splits

RANDOM = (
    "the data are random tokens, on which perplexity says nothing: the loss is exp(KL) - 1 instead, the perplexity "
    "ratio on text that the original itself would write"
)
LEAST_COVERAGE = 0.05  # a recipe may touch little of a model; what it is worth is measured anyway
PROMPT, CONTINUATION = 16, 32  # tokens of the generation check
DENSITY_BATCHES = 2

Broken = (ActkitError, ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError)


@dataclass
class Workshop:
    """What all candidates share: the original, its data, and one fresh process for the reload proofs.

    Attributes:
        model: the original.
        tokenizer: its tokenizer, or None.
        task: by which quality is measured.
        splits: the data.
        folder: in which candidates are saved, one folder each.
        base: builds the unchanged model, for one's own nn.Module.
        max_loss: largest loss that the upper bound of its interval may reach.
        max_memory: hard cap for calibration beside the model.
        seed: of everything random.
        progress: show bars.
        by_divergence: the loss of a language model is exp(KL) - 1, because its data are random tokens (see `RANDOM`).
        mixes: keep the layers of what mixes may be made of.
        samples: these, by recipe.
        interrupt: called before each batch that a candidate is measured on; what it raises ends the measurement.
    """

    model: nn.Module
    tokenizer: Any
    task: str
    splits: Splits
    folder: Path
    base: Callable[[], nn.Module] | None
    max_loss: float
    max_memory: int | str | None
    seed: int
    progress: bool
    by_divergence: bool = False
    mixes: bool = False
    samples: dict[str, Sample] = field(default_factory=dict)
    interrupt: Before | None = None
    _process: FreshProcess | None = None
    _originals: Outputs | None = None
    _steps: dict[str, Steps] = field(default_factory=dict)  # by the recipe that longer ones begin with
    _hopeless: dict[str, Candidate] = field(default_factory=dict)  # by recipe

    def close(self) -> None:
        """End the fresh process, if there is one."""
        if self._process is not None:
            self._process.close()

    def _fresh(self) -> FreshProcess:
        """The process of the reload proofs; another one if a candidate ended it."""
        if self._process is None or self._process.closed:
            self._process = FreshProcess()
        return self._process

    def example(self) -> Any:
        """Return the first given rows if the model takes more than tokens or images; None to prove random ones."""
        return example_of(self.model, self.splits.search)

    @property
    def originals(self) -> Outputs:
        """What the original gives on the search and the test split, kept."""
        if self._originals is None:
            self._originals = Outputs(self.model, keep=KEEP)
        return self._originals

    def saved_original(self) -> Path:
        """Return the folder of the original, saved if it is not yet."""
        folder = self.folder_of("original")
        return folder if folder.is_dir() else save(self.model, folder, tokenizer=self.tokenizer)

    def original(self) -> Candidate:
        """Measure and save the original like the candidates."""
        started = time.perf_counter()
        clock = _Clock()
        with clock("rest"):
            folder = self.saved_original()
        with clock("pass"):
            seconds = self._pass_seconds()
        with clock("search"):
            search = self._measured(self.originals, self.splits.search)
        with clock("test"):
            test = self._measured(self.originals, self.splits.test)
        found = Candidate("original", search_loss=self._loss(search), loss=self._loss(test), metrics=test.metrics)
        with clock("rest"):
            found = self._cost(self._writes(found, self.model), self.model, folder)
        return replace(found, seconds=time.perf_counter() - started, parts={**clock.parts, "pass": seconds})

    def share(self, proposals: Sequence[Proposal]) -> None:
        """Take note of which candidates come, so that what several begin with is kept from the first one on."""
        for proposal in proposals:
            first = proposal.recipe.transforms[:-1]
            if first and all(t.needs_data and t.tags.stream == "original" for t in first):
                self._steps.setdefault(recipe_key(Recipe(first)), Steps(len(first)))

    def steps_of(self, proposal: Proposal) -> Steps | None:
        """Return what keeps the edits of the first transforms of a recipe, or None."""
        counts = range(len(proposal.recipe.transforms), 0, -1)
        keys = (recipe_key(Recipe(proposal.recipe.transforms[:count])) for count in counts)
        return next((self._steps[key] for key in keys if key in self._steps), None)

    def to_compute(self, proposal: Proposal, held: set[int] | None = None) -> list[Transform] | None:
        """List the transforms of a recipe whose edits are not kept yet.

        Args:
            proposal: the recipe.
            held: of a list of proposals, the kept ones that those before it bring; this one's are added.

        Returns:
            The transforms; None if the recipe is not made at all.
        """
        if self._without(proposal) is not None:
            return None
        steps, transforms = self.steps_of(proposal), list(proposal.recipe.transforms)
        if steps is None:
            return transforms
        known = steps.filled or (held is not None and id(steps) in held)
        if held is not None:
            held.add(id(steps))
        return transforms[steps.count :] if known else transforms

    def _without(self, proposal: Proposal) -> Candidate | None:
        """The candidate that a recipe goes on from, if that loses too much already."""
        transforms = proposal.recipe.transforms
        keys = (recipe_key(Recipe(transforms[:count])) for count in range(1, len(transforms)))
        return next((self._hopeless[key] for key in keys if key in self._hopeless), None)

    def known(self, proposal: Proposal, candidate: Candidate) -> None:
        """Take note of a measured candidate: what begins with one that loses too much is not made."""
        loss = candidate.search_loss
        if candidate.stopped is not None and loss is not None and loss.low > self.max_loss:
            key = recipe_key(proposal.recipe)
            self._hopeless[key] = candidate
            self._steps.pop(key, None)  # nothing goes on from it

    def measure(self, proposal: Proposal) -> Candidate:
        """Measure one candidate, and save it as far as it deserves; whatever breaks is recorded as why it failed.

        Args:
            proposal: the recipe.

        Returns:
            What is known of it.

        Raises:
            OutOfTime: the minutes were over; nothing is left of it.
        """
        started = time.perf_counter()
        clock = _Clock()
        found = Candidate(proposal.name, proposal.recipe.dump()["transforms"], proposal.why)
        folder = self.make_folder(proposal.name)
        try:
            found = self._measure(found, proposal, folder, clock)
        except OutOfTime:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except Broken as error:
            shutil.rmtree(folder, ignore_errors=True)
            found = replace(found, failed=f"{type(error).__name__}: {error}")
        release_memory()  # of the copy
        found = replace(found, seconds=time.perf_counter() - started, parts=clock.parts)
        self.known(proposal, found)
        return found

    def _measure(self, found: Candidate, proposal: Proposal, folder: Path, clock: _Clock) -> Candidate:
        base = self._without(proposal)
        if base is not None:
            return replace(found, stopped=f"not made, as it goes on from {base.name}: {base.stopped}")
        with clock("make"):
            applied = self._apply(proposal)
        report, model = applied.report, applied.model
        found = replace(
            found,
            coverage=report.plan.coverage,
            changed=len(report.changed),
            skipped=[list(row) for row in report.skipped],
            notes=report.notes,
        )
        if not applied.edits:
            return replace(found, failed="it changes nothing on this model")
        if self.mixes:
            self._keep(proposal, model)
        warning = own_grid_warning(self.model, model)
        if warning is not None:
            found = replace(found, notes=[*found.notes, warning])
        with widened(model):
            with clock("search"):
                search = self._measured(model, self.splits.search, stop=self._loses)
            found = replace(found, search_loss=self._loss(search), stopped=self._stopped(search))
            if found.stopped is not None:
                return found
            with clock("test"):
                test = self._measured(model, self.splits.test)
            found = replace(found, loss=self._loss(test), metrics=test.metrics)
            with clock("rest"):
                found = self._cost(self._writes(found, model), model)
        with clock("rest"):
            save(model, folder, tokenizer=self.tokenizer)
            found = replace(found, disk_bytes=folder_bytes(folder))
            proof = prove(model, folder, self.example(), process=self._fresh(), base=self.base)
        return replace(found, proof=proof)

    def sample(self, proposal: Proposal) -> Sample | None:
        """Return what a proposal makes of each layer, made again if it is not kept; None for one that mixes cannot use.

        Args:
            proposal: the recipe.
        """
        key = recipe_key(proposal.recipe)
        if key not in self.samples:
            self._keep(proposal, self._apply(proposal).model)
        return self.samples.get(key)

    def _keep(self, proposal: Proposal, model: nn.Module) -> None:
        found = Sample.of(proposal.name, proposal.recipe, model, self.splits.test[:1])
        if found is not None:
            self.samples[recipe_key(proposal.recipe)] = found

    def probe(self, proposal: Proposal) -> Candidate:
        """Make and save a recipe to be timed only.

        Args:
            proposal: the recipe.
        """
        model = self._apply(proposal).model
        found = Candidate(proposal.name, proposal.recipe.dump()["transforms"], proposal.why)
        found = self._cost(found, model)
        save(model, self.make_folder(proposal.name), tokenizer=self.tokenizer)
        return found

    def make_again(self, candidate: Candidate) -> Path:
        """Save a measured candidate once more, if its folder is gone; nothing is measured."""
        folder = self.make_folder(candidate.name)
        model = self.model
        if candidate.recipe:
            model = self._apply(Proposal(candidate.name, candidate.methods, "")).model
        return save(model, folder, tokenizer=self.tokenizer)

    def folder_of(self, name: str) -> Path:
        """Return the folder in which a candidate is saved."""
        return self.folder / "".join(c if c.isalnum() else "-" for c in name).strip("-").replace("--", "-")

    def make_folder(self, name: str) -> Path:
        """Return the same, free for a new save."""
        folder = self.folder_of(name)
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _apply(self, proposal: Proposal) -> Applied:
        return apply(
            self.model,
            proposal.recipe,
            self.splits.calibration,
            inplace=False,
            undo="off",
            min_coverage=min((LEAST_COVERAGE, *(each.least_coverage for each in proposal.recipe))),
            max_memory=self.max_memory,
            progress=self.progress,
            steps=self.steps_of(proposal),
        )

    def _measured(self, model: Any, batches: Any, stop: Callable[[Quality], bool] | None = None) -> Quality:
        measured = model.model if isinstance(model, Outputs) else model
        hooks = {"": self.interrupt} if self.interrupt is not None and measured is not self.model else {}
        with hooked(measured, before=hooks):
            return measure_quality(
                measured,
                batches,
                reference=self.originals,
                task=self.task,
                seed=self.seed,
                progress=self.progress,
                stop=stop,
            )

    def _loss(self, quality: Quality) -> Estimate:
        loss = _as_ratio(quality.metrics["kl"]) if self.by_divergence else quality.loss
        assert loss is not None, "there is a reference"
        return loss

    def _loses(self, quality: Quality) -> bool:
        """Whether more than max_loss is lost for sure."""
        return self._loss(quality).low > self.max_loss

    def _stopped(self, search: Quality) -> str | None:
        """Why a candidate is not measured further, from its search split."""
        loss = self._loss(search)
        if loss.high <= self.max_loss:
            return None
        interval = f"{search.confidence:.1%} interval {loss.low:.2%} to {loss.high:.2%}"
        if not math.isfinite(loss.high):
            interval = "no interval: the data are one document"
        seen = f"{search.documents} documents of the search split"
        if not search.complete:
            return f"stopped after {seen}: loss {loss.value:.2%} ({interval}), the limit is {self.max_loss:.2%}"
        return (
            f"loss {loss.value:.2%} ({interval}) on the {seen}, the limit is {self.max_loss:.2%}: not measured on the "
            f"test split"
        )

    def _pass_seconds(self) -> float:
        """Of a plain forward pass over the test split, from its first batches."""
        batches = self.splits.test[:DENSITY_BATCHES]
        with evaluating(self.model):
            forward(self.model, batches[0])  # what the first pass sets up
            started = time.perf_counter()
            for batch in batches:
                forward(self.model, batch)
        return (time.perf_counter() - started) * self.splits.test.tokens / batches.tokens

    def _writes(self, found: Candidate, model: nn.Module) -> Candidate:
        check = self._check(model)
        return found if check is None else replace(found, writes=check.reason, text=self._text(check))

    def _cost(self, found: Candidate, model: nn.Module, folder: Path | None = None) -> Candidate:
        batches = self.splits.test[:DENSITY_BATCHES]
        cost = measure_cost(model, batches, folder=folder, progress=False)
        return replace(found.with_cost(cost), reads=reads_of(model, cost))

    def prompt(self) -> Tensor | None:
        """Return token ids [1, length] of the test split for the generation check; None for other tasks."""
        if self.task != "language" or not Inputs.of(self.model).causal:
            return None
        batch = self.splits.test[0]
        ids = batch["input_ids"] if isinstance(batch, dict) else batch
        context = Inputs.of(self.model).context or PROMPT + CONTINUATION
        return ids[:1, : max(1, min(PROMPT, context - CONTINUATION))]

    def _check(self, model: nn.Module) -> GenerationCheck | None:
        prompt = self.prompt()
        if prompt is None:
            return None
        context = Inputs.of(model).context or PROMPT + CONTINUATION
        return check_generation(
            model, prompt, max_new_tokens=max(1, min(CONTINUATION, context - prompt.shape[1])), reference=self.model
        )

    def _text(self, check: GenerationCheck) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode(torch.tensor(check.tokens[0]))


class _Clock:
    """Seconds by what they went into. At the end of each part its memory is handed back."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            release_memory(cycles=False)
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - started


def recipe_key(recipe: Recipe) -> str:
    """Return the same text for recipes with the same transforms and settings."""
    return transforms_key(recipe.dump()["transforms"])


def transforms_key(transforms: list[dict[str, Any]]) -> str:
    """Return the same, from the form that candidates and journals hold."""
    return hashlib.sha256(json.dumps(transforms).encode()).hexdigest()


def _as_ratio(divergence: Estimate) -> Estimate:
    """exp(KL) - 1, bound by bound."""
    return Estimate(*(math.expm1(each) for each in (divergence.value, divergence.low, divergence.high)))


def task_for(model: nn.Module, splits: Splits) -> tuple[str, str | None]:
    """Choose how quality is measured.

    Args:
        model: the original.
        splits: the data.

    Returns:
        The task, and a note if the data do not allow what the model is for.
    """
    task = task_of(model)
    parts = (splits.search, splits.test)
    labelled = all(isinstance(b, dict) and "labels" in b for part in parts for b in part)
    if task in ("classification", "regression") and not labelled:
        note = (
            "the data have no labels, so quality is how close the outputs are to the original's, not how right they are"
        )
        return "embedding", note
    return task, None
