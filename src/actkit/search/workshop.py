"""Making and measuring one candidate: apply its recipe to a copy, measure quality and cost, save, prove the reload."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.checkpoint import save
from actkit.core.cost import measure_cost
from actkit.core.errors import ActkitError
from actkit.core.example import Inputs, example_of
from actkit.core.fresh import FreshProcess
from actkit.core.generation import GenerationCheck, check_generation
from actkit.core.proof import prove
from actkit.core.quality import Estimate, Task, measure_quality, task_of
from actkit.core.runner import Applied, apply
from actkit.search.candidates import Proposal
from actkit.search.measured import Candidate
from actkit.search.own_grid import own_grid_warning
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
    """Holds what all candidates share: the original, its data, and one fresh process for the reload proofs.

    folder: where candidates are saved, one folder each. base: builds the unchanged model, for one's own nn.Module.
    by_divergence: the loss of a language model is exp(KL) - 1, because its data are random tokens (see `RANDOM`).
    """

    model: nn.Module
    tokenizer: Any
    task: Task
    splits: Splits
    folder: Path
    base: Callable[[], nn.Module] | None
    max_memory: int | str | None
    seed: int
    progress: bool
    by_divergence: bool = False
    _process: FreshProcess | None = None

    def close(self) -> None:
        """End the fresh process, where there is one."""
        if self._process is not None:
            self._process.close()

    def _fresh(self) -> FreshProcess:
        """The process of the reload proofs; another one where a candidate ended it."""
        if self._process is None or self._process.closed:
            self._process = FreshProcess()
        return self._process

    def example(self) -> Any:
        """What proofs run: the first given rows if the model takes more than tokens or images, None for random ones."""
        return example_of(self.model, self.splits.search)

    def original(self) -> Candidate:
        """The original, measured and saved like the candidates."""
        folder = self.make_folder("original")
        save(self.model, folder, tokenizer=self.tokenizer)
        started = time.perf_counter()
        found = self._quality(Candidate("original"), self.model)
        return replace(self._cost(found, self.model, folder), seconds=time.perf_counter() - started)

    def measure(self, proposal: Proposal) -> Candidate:
        """One candidate, measured and saved; whatever breaks is recorded as why it failed."""
        started = time.perf_counter()
        found = Candidate(proposal.name, proposal.recipe.dump()["transforms"], proposal.why)
        folder = self.make_folder(proposal.name)
        try:
            applied = self._apply(proposal)
            report = applied.report
            found = replace(
                found,
                coverage=report.plan.coverage,
                changed=len(report.changed),
                skipped=[list(row) for row in report.skipped],
                notes=report.notes,
            )
            if not applied.edits:
                return replace(found, failed="it changes nothing on this model")
            warning = own_grid_warning(self.model, applied.model)
            if warning is not None:
                found = replace(found, notes=[*found.notes, warning])
            found = self._quality(found, applied.model)
            save(applied.model, folder, tokenizer=self.tokenizer)
            found = self._cost(found, applied.model, folder)
            proof = prove(applied.model, folder, self.example(), process=self._fresh(), base=self.base)
            found = replace(found, proof=proof)
        except Broken as error:
            shutil.rmtree(folder, ignore_errors=True)
            found = replace(found, failed=f"{type(error).__name__}: {error}")
        return replace(found, seconds=time.perf_counter() - started)

    def make_again(self, candidate: Candidate) -> Path:
        """Save a measured candidate once more, where its folder is gone; nothing is measured."""
        folder = self.make_folder(candidate.name)
        model = self.model
        if candidate.recipe:
            model = self._apply(Proposal(candidate.name, candidate.methods, "")).model
        return save(model, folder, tokenizer=self.tokenizer)

    def folder_of(self, name: str) -> Path:
        """Where a candidate is saved."""
        return self.folder / "".join(c if c.isalnum() else "-" for c in name).strip("-").replace("--", "-")

    def make_folder(self, name: str) -> Path:
        """The same, free for a new save."""
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
            min_coverage=LEAST_COVERAGE,
            max_memory=self.max_memory,
            progress=self.progress,
        )

    def _quality(self, found: Candidate, model: nn.Module) -> Candidate:
        def measured(batches: Any) -> Any:
            return measure_quality(
                model, batches, reference=self.model, task=self.task, seed=self.seed, progress=self.progress
            )

        search, test = measured(self.splits.search), measured(self.splits.test)
        search_loss, loss = search.loss, test.loss
        if self.by_divergence:
            search_loss, loss = _as_ratio(search.metrics["kl"]), _as_ratio(test.metrics["kl"])
        check = self._check(model)
        return replace(
            found,
            search_loss=search_loss,
            loss=loss,
            metrics=test.metrics,
            writes=None if check is None else check.reason,
            text=None if check is None else self._text(check),
        )

    def _cost(self, found: Candidate, model: nn.Module, folder: Path) -> Candidate:
        batches = self.splits.test[:DENSITY_BATCHES]
        return found.with_cost(measure_cost(model, batches, folder=folder, progress=False))

    def prompt(self) -> Tensor | None:
        """Token ids [1, length] from the test split that the generation check goes on from; None for other tasks."""
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


def _as_ratio(divergence: Estimate) -> Estimate:
    """exp(KL) - 1, bound by bound."""
    return Estimate(*(math.expm1(each) for each in (divergence.value, divergence.low, divergence.high)))


def task_for(model: nn.Module, splits: Splits) -> tuple[Task, str | None]:
    """How quality is measured, and a note where the data do not allow what the model is for."""
    task = task_of(model)
    parts = (splits.search, splits.test)
    if task == "classification" and not all(isinstance(b, dict) and "labels" in b for part in parts for b in part):
        note = "the data have no labels, so quality is how close the outputs are to the original's, not the accuracy"
        return "embedding", note
    return task, None
