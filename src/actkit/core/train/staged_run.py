"""Runs a recipe with stages: what is applied and what is trained, in order, on one model, as one change.

With `out` the run can be killed and goes on later: beside `out`, until it is written, there is a folder

    out.stages/run.json      what the run is of: recipe, model and data
    out.stages/1.json        what stage 1 did
    out.stages/1             the model after stage 1, which `actkit.load` reads; only the last finished stage's is kept
    out.stages/2.training    the state of a training that is under way in stage 2 (`core/train/training.py`)

A stage is finished once its folder is there and no state of its training is. The result holds `stages.json`, what each
stage did; its manifest lists transforms and trainings in order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.edit.edits import get_module, set_module
from actkit.core.forward.stream import Stream
from actkit.core.ground import processes, whole_folder
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.fingerprint import fingerprint, model_fingerprint
from actkit.core.ground.offload import refuse_offloaded
from actkit.core.ground.whole_file import write_whole
from actkit.core.ground.yaml_files import shorten
from actkit.core.layers.foreign_layers import refuse_adapters
from actkit.core.layers.linear import ActLinear
from actkit.core.model.parts import attention_implementation
from actkit.core.recipe import runner
from actkit.core.recipe.plan import Plan
from actkit.core.recipe.recipe import Recipe, transforms_of
from actkit.core.recipe.runner import Applied, Report
from actkit.core.recipe.stage import Apply, Stage, Train
from actkit.core.store import checkpoint
from actkit.core.store.pretrained import record, record_training, restore
from actkit.core.train.choice import chooses
from actkit.core.train.training import train
from actkit.core.train.training_setup import RECORD as HISTORY
from actkit.core.train.training_setup import check_folder, check_parameters, sequences, state_folder

STATE, IDENTITY, RECORD = ".stages", "run.json", "stages.json"
Announce = Callable[[str], None]


def run(
    model: nn.Module,
    recipe: Any,
    data: Sequence[Any],
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    inplace: bool = True,
    undo: str | None = None,
    min_coverage: float | None = None,
    max_memory: int | str | None = None,
    progress: bool = True,
    announce: Announce | None = None,
) -> Applied:
    """Run the stages of a recipe on a model, one after the other.

    Args:
        model: in float32, as it is trained.
        recipe: with stages.
        data: for each stage what it reads: calibration batches or None, or for a training (batches, validation).
        out: folder for state and result.
        resume: go on after the last finished stage of an interrupted run, or inside its training.
        overwrite: replace what is in `out`; without `resume` also give up an interrupted run.
        inplace: change `model` itself, else a copy.
        undo: 'memory' (the default) keeps a copy of all tensors, 'off' keeps nothing.
        min_coverage: as in `core.recipe.runner.apply`, of each stage that applies.
        max_memory: the same.
        progress: show bars.
        announce: called with a line per stage, and each line of the plans.

    Returns:
        The changed model; its report has the stages in order, and notes which were finished before.

    Raises:
        ValueError: another `undo`, or parameters too coarse to be trained.
        ProcessError: under torchrun.
        CheckpointError: `out` holds something else, or an interrupted run, or one of another recipe, model or data.
        ActkitError: what `core.recipe.runner.apply` and `core.train.training.train` raise; the model is restored
            (unless undo is 'off'), and with `out` the finished stages are kept.
    """
    started = time.perf_counter()
    recipe = Recipe.of(recipe)
    if undo not in (None, "memory", "off"):
        raise ValueError(f"undo: {undo!r} was given, but a recipe with stages is undone from memory; use 'memory'.")
    processes.refuse("a recipe with stages", "run it without torchrun")
    runner.check_model(model)
    refuse_adapters(model)
    known = changes.of(model)
    recipe.check(earlier=transforms_of(known.recipe, recipe.transforms) if known else ())
    refuse_offloaded(model, "stages change all weights in place")
    if any(isinstance(stage, Train) and not chooses(stage.rules, stage.trainable) for stage in recipe.stages):
        check_parameters(model)
    if not inplace:
        model = changes.copy_of(model)
    given = [_read(model, stage, each) for stage, each in zip(recipe.stages, data, strict=True)]
    state = None
    if out is not None:
        checkpoint.check_savable(model)
        state = _State(Path(out), resume, overwrite, recipe, model, given)
    elif resume:
        raise ValueError("resume: it needs out=, the folder that the run was going to write.")
    report = Report(recipe.dump(), Plan())
    before = None if undo == "off" else _Before(model)
    stages = _Stages(model, recipe, given, state, report, progress, announce or (lambda line: None))
    try:
        stages.go(min_coverage=min_coverage, max_memory=max_memory)
        if state is not None:
            state.close(model, report.stages)
    except BaseException as error:
        if before is not None:
            before.restore()
        if isinstance(error, KeyboardInterrupt) and state is not None:
            raise KeyboardInterrupt(f"stopped in {stages.at}; go on with the same call and resume=True") from None
        raise
    after = changes.of(model)
    report.seconds = time.perf_counter() - started

    def take_back() -> None:
        runner.refuse_later_changes(model, after)
        before.restore()  # type: ignore[union-attr]

    earlier = known.edits if known else []
    edits = [edit for edit in (after.edits if after else []) if edit not in earlier]
    return Applied(model, edits, report, None if before is None else take_back)


def _read(model: nn.Module, stage: Stage, data: Any) -> tuple[Any, ...]:
    """What a stage reads, checked before any stage begins: (calibration,), or (batches, validation)."""
    if isinstance(stage, Train):
        return sequences(model, *data)
    return (runner.batches_of(stage.transforms, data),)


class _Stages:
    """The stages of a recipe under way on a model. at: the stage that runs."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        given: Sequence[tuple[Sequence[Any], ...]],
        state: _State | None,
        report: Report,
        progress: bool,
        announce: Announce,
    ) -> None:
        self.model, self.recipe, self.given, self.state = model, recipe, given, state
        self.report, self.progress, self.announce = report, progress, announce
        self.at = "stage 1"

    def go(self, **limits: Any) -> None:
        finished = self.state.finished if self.state is not None else 0
        if finished:
            self._go_on_from(finished)
        for number, (stage, given) in enumerate(zip(self.recipe.stages, self.given, strict=True), 1):
            self.at = f"stage {number} of {len(self.recipe.stages)}"
            if number <= finished:
                self._say(f"{self.at} was finished before and is not run again: {stage.label}", noted=True)
                record = self.state.record(number)  # type: ignore[union-attr]
            else:
                self._say(f"{self.at}: {stage.label}")
                if isinstance(stage, Apply):
                    record = self._apply(number, stage, given[0], limits)
                else:
                    record = self._train(number, stage, *given)
            self._report(record)

    def _go_on_from(self, number: int) -> None:
        """Bring the model to its state after a stage."""
        folder = self.state.folder(number)  # type: ignore[union-attr]
        checkpoint.load_into(self.model, folder)
        if not checkpoint.holds_record(folder):  # a plain checkpoint: trained, and what was put in was taken out again
            for stage in self.recipe.stages[:number]:
                record(self.model, [], stage.entries(), "")

    def _apply(self, number: int, stage: Apply, data: Sequence[Any], limits: Mapping[str, Any]) -> dict[str, Any]:
        applied = runner.apply(
            self.model,
            Recipe(stage.transforms),
            data,
            undo="off",
            progress=self.progress,
            announce=self.announce,
            **limits,
        )
        record = {"apply": applied.report.to_dict()}
        if self.state is not None:
            self.state.keep(number, record)
            if number < len(self.recipe.stages):  # the last one's model is written to `out` at once
                checkpoint.save(self.model, self.state.folder(number), overwrite=True)
                self.state.forget_before(number)
        return record

    def _train(self, number: int, stage: Train, batches: Sequence[Any], validation: Sequence[Any]) -> dict[str, Any]:
        folder = None if self.state is None else self.state.folder(number)
        record_training(self.model, stage.dump())  # first, so that the folder that `train` writes holds it
        trained = train(
            self.model,
            batches,
            validation=validation,
            out=folder,
            resume=folder is not None and state_folder(folder).is_dir(),
            overwrite=True,
            progress=self.progress,
            **stage.options(),
        )
        record = {
            "train": trained.to_dict()
            | {"folder": None, "data": _description(batches), "validation_data": _description(validation)}
        }
        self._say(f"trained: {_outcome(record['train'])}")
        if self.state is not None:
            self.state.keep(number, record)
            self.state.forget_before(number)
        return record

    def _report(self, record: dict[str, Any]) -> None:
        self.report.stages.append(record)
        applied = record.get("apply", {})
        self.report.changed += [(path, method) for path, method in applied.get("changed", ())]
        self.report.skipped += [(path, method, reason) for path, method, reason in applied.get("skipped", ())]
        self.report.notes += applied.get("notes", ())
        self.report.values += [(path, method, values) for path, method, values in applied.get("values", ())]
        if "train" in record:
            self.report.notes.append(f"trained: {_outcome(record['train'])}")

    def _say(self, line: str, *, noted: bool = False) -> None:
        self.announce(line)
        if noted:
            self.report.notes.append(line)


def _description(batches: Sequence[Any]) -> str:
    return getattr(batches, "description", None) or f"{len(batches)} batches"


def _outcome(trained: Mapping[str, Any]) -> str:
    """A line such as '300 steps, validation loss 4.51 -> 3.98 (kept: last)'."""
    first = next((step["validation"] for step in trained["history"] if step["validation"] is not None), None)
    began = "" if first is None else f"{first:.4g} -> "
    return f"{trained['steps']} steps, validation loss {began}{trained['validation']:.4g} (kept: {trained['kept']})"


# -- what is kept on disk ----------------------------------------------------------------------------------------------


def state_of(out: Path) -> Path:
    """The folder of a run's state while it writes to `out`."""
    return out.with_name(out.name + STATE)


class _State:
    """The folder of an unfinished run. finished: the number of the last finished stage, 0 if there is none."""

    def __init__(
        self,
        out: Path,
        resume: bool,
        overwrite: bool,
        recipe: Recipe,
        model: nn.Module,
        given: Sequence[tuple[Sequence[Any], ...]],
    ) -> None:
        self.out, self.overwrite = out, overwrite
        self.place = state_of(out)
        check_folder(out, resume, overwrite, state=self.place, record=RECORD, what="run")
        identity = {
            "recipe": recipe.dump(),
            "model": model_fingerprint(model),
            "data": [fingerprint([_identity(part) for part in parts]) for parts in given],
        }
        if resume and (self.place / IDENTITY).is_file():
            self._check(identity)
        else:
            whole_folder.discard(self.place)
            self.place.mkdir(parents=True)
            write_whole(self.place / IDENTITY, json.dumps(identity, indent=1))
        self.finished = max((n for n in range(1, len(recipe.stages) + 1) if self._is_finished(n)), default=0)

    def folder(self, number: int) -> Path:
        """The folder of the model after a stage."""
        return self.place / str(number)

    def record(self, number: int) -> dict[str, Any]:
        """What a finished stage did."""
        path = self.place / f"{number}.json"
        if path.is_file():
            return _read_json(path)
        return {"train": _read_json(self.folder(number) / HISTORY)}  # killed before the record was written

    def keep(self, number: int, record: dict[str, Any]) -> None:
        """Write what a stage did."""
        write_whole(self.place / f"{number}.json", json.dumps(record, indent=1))

    def forget_before(self, number: int) -> None:
        """Remove the models after the stages before one that is finished."""
        for earlier in range(1, number):
            whole_folder.discard(self.folder(earlier))

    def close(self, model: nn.Module, records: list[dict[str, Any]]) -> None:
        """Write the result, and remove the state."""
        checkpoint.save(model, self.out, overwrite=self.overwrite)
        write_whole(self.out / RECORD, json.dumps(records, indent=1))
        whole_folder.discard(self.place)

    def _is_finished(self, number: int) -> bool:
        folder = self.folder(number)
        whole_folder.recover(folder)
        whole_folder.recover(state_folder(folder))
        return folder.is_dir() and not state_folder(folder).is_dir()

    def _check(self, identity: dict[str, Any]) -> None:
        """Raise CheckpointError if the interrupted run is another one."""
        began = _read_json(self.place / IDENTITY)
        for key, now in json.loads(json.dumps(identity)).items():
            if began.get(key) == now:
                continue
            difference = _difference(began.get(key), now)
            raise CheckpointError(
                f"resume: the {key} is another than the run in {self.place} began with{difference}; "
                f"give the same, or start anew with overwrite=True and without resume (--overwrite)."
            )


def _identity(batches: Sequence[Any] | Stream) -> list[Any]:
    return batches.take(2) if isinstance(batches, Stream) else list(batches)


def _difference(began: Any, now: Any) -> str:
    """Which stage of two recipes differs first; nothing for what is no recipe."""
    if not (isinstance(began, dict) and isinstance(now, dict)):
        return ""
    befores, nows = (recipe.get("stages", ()) for recipe in (began, now))
    for number in range(1, max(len(befores), len(nows)) + 1):
        before, after = (str(each[number - 1]) if number <= len(each) else "none" for each in (befores, nows))
        if before != after:
            return f" (stage {number} is {shorten(after, 400)}, and was {shorten(before, 400)})"
    return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: its saved state is not readable ({error}); start the run anew.") from error
    return content


# -- the way back ------------------------------------------------------------------------------------------------------


class _Before:
    """A model as it was: its modules, a copy of its tensors, its settings and its record."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.record, self.origin = model, changes.of(model), changes.source(model)
        self.untouched = self.origin is not None and self.origin.untouched(model)
        self.places = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
        self.slots: list[tuple[dict[str, Any], str, Tensor]] = [
            (slots, name, tensor)
            for module in model.modules()
            for slots in (module._parameters, module._buffers)
            for name, tensor in slots.items()
            if tensor is not None
        ]
        self.values = {id(tensor): tensor.detach().to("cpu", copy=True) for _, _, tensor in self.slots}
        config = getattr(model, "config", None)
        self.settings = None if config is None else dict(vars(config))
        self.attention = attention_implementation(model)

    @torch.no_grad()
    def restore(self) -> None:
        for path in sorted(self.places, key=len):  # outer modules first: the others then stand in them
            if get_module(self.model, path) is not self.places[path]:
                set_module(self.model, path, self.places[path])
        for slots, name, tensor in self.slots:
            slots[name] = tensor
            tensor.copy_(self.values[id(tensor)])
        for module in self.model.modules():
            if isinstance(module, ActLinear):
                module.unpack()  # a kernel's copy of the later weights
        if self.settings is not None:
            if attention_implementation(self.model) != self.attention:
                self.model.set_attn_implementation(self.attention)  # type: ignore[operator]
            now = vars(self.model.config)
            now.clear()
            now.update(self.settings)
        restore(self.model, self.record)
        if self.untouched:
            self.model.__dict__[changes.SOURCE] = self.origin.rebound(self.model)  # type: ignore[union-attr]
