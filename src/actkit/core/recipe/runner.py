"""The recipe runner: checks, plans, then walks the model block by block and applies the edits of each transform.

Inside a block the transforms run in recipe order: observe, edit, and the next one observes the edited block. Coverage,
memory and time are known before work starts (`core/recipe/plan.py`). Of several processes (`core/ground/processes.py`)
each runs its share of the batches; statistics are merged before a transform sees them, so that all make the same edits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from actkit.core.edit import changes
from actkit.core.edit.edits import (
    Configure,
    Edit,
    Insert,
    Note,
    Replace,
    ReplaceTied,
    Resize,
    Restore,
    Set,
    Shared,
    Skip,
    Undo,
    apply_edit,
    describe,
    get_module,
    get_tensor,
    parts_of,
    place_of,
    set_module,
    settled,
    shared_parameters,
)
from actkit.core.edit.resizing import resized
from actkit.core.forward.batch import check_batch, reads_beyond, sequence_of
from actkit.core.forward.hooks import evaluating, refuse_compiled_or_sharded
from actkit.core.ground import offload, processes
from actkit.core.ground.errors import DataError, EditError, NonFiniteError
from actkit.core.ground.fingerprint import fingerprint, model_fingerprint
from actkit.core.ground.memory import release_behind
from actkit.core.ground.modules import is_within
from actkit.core.ground.progress import track
from actkit.core.layers.foreign_layers import refuse_adapters, refuse_quantized
from actkit.core.model.anatomy import Anatomy, Block, Site, anatomy, has_row, unread
from actkit.core.model.experts import ExpertList
from actkit.core.recipe.blockwise import Walk
from actkit.core.recipe.exactness import Probe
from actkit.core.recipe.plan import Plan, make_plan, turns
from actkit.core.recipe.recipe import Recipe, transforms_of
from actkit.core.recipe.recording import Recorder
from actkit.core.recipe.seen import Seen, Trial, check_shares
from actkit.core.recipe.steps import Steps
from actkit.core.recipe.transform import Transform
from actkit.core.store.checkpoint import load
from actkit.core.store.pretrained import record, restore
from actkit.core.watch.calls import Call
from actkit.core.watch.capture import opened_experts

UNDO_MODES = ("source", "memory", "off")
PART = 2**20  # values that are looked at in one go


@dataclass
class Report:
    """What a run did.

    Attributes:
        recipe: in its YAML form.
        plan: what was known before work started.
        changed: (path, method) rows.
        skipped: (path, method, reason) rows.
        notes: what else was said.
        values: (path, method, values) rows of the notes that came with numbers.
        seconds: what the run took.
        stages: of a recipe with stages, what each did: {"apply": its report} or {"train": what `Trained.to_dict` says}.
    """

    recipe: dict[str, Any]
    plan: Plan
    changed: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    values: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0
    stages: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it; `values` and `stages` only if there are some."""
        return {name: value for name, value in asdict(self).items() if name not in ("values", "stages") or value}


@dataclass
class Applied:
    """A changed model.

    Attributes:
        model: the same object as was given, or a copy.
        edits: that made it, in their JSON form.
        report: what the run did.
    """

    model: nn.Module
    edits: list[dict[str, Any]]
    report: Report
    _undo: Callable[[], None] | None = None

    def undo(self) -> nn.Module:
        """Take all edits back, bit for bit.

        Raises:
            EditError: undo was switched off, or is done already.
        """
        if self._undo is None:
            raise EditError(
                "undo: nothing is left to undo with (undo='off', or undone already); load the original model."
            )
        self._undo()
        self._undo = None
        return self.model


def apply(
    model: nn.Module,
    recipe: Any,
    data: Iterable[Any] | None = None,
    *,
    inplace: bool = True,
    undo: str | None = None,
    min_coverage: float | None = None,
    max_memory: int | str | None = None,
    progress: bool = True,
    announce: Callable[[str], None] | None = None,
    steps: Steps | None = None,
) -> Applied:
    """Apply a recipe to a model. If something fails midway, the model is restored (unless undo is 'off').

    Several processes (`core.ground.processes.together`) are given the same model and all batches; each runs its share,
    and
    all end with the same edits.

    Args:
        model: neither compiled nor sharded.
        recipe: what `Recipe.of` reads, without stages.
        data: calibration batches (dicts of the model's keywords, or tensors).
        inplace: change `model` itself, else a copy.
        undo: 'source' reads what was changed from the folder that the model came from (the default if `actkit.load`
            loaded
            it and nothing was changed since), 'memory' keeps the old tensors, 'off' keeps nothing.
        min_coverage: least share of the parameters inside blocks that each transform must touch; None for what each
            declares.
        max_memory: hard cap for calibration, bytes or '2GB'.
        progress: show bars.
        announce: called with each line of the plan (coverage, memory, time) before work starts.
        steps: takes from it the edits that it holds of the first transforms, and keeps theirs in it
            (`core/recipe/steps.py` says when that is right).

    Returns:
        The model, its edits, the report, and the way back.

    Raises:
        RecipeError: the recipe is not understood, or its order is ruled out.
        DataError: data are missing, or the model cannot be called with them.
        CoverageError: a transform would touch too little, or the model cannot be read.
        EditError: an edit does not fit, or what claims to keep the function moves a block's output.
        MemoryLimitError: calibration would hold more than `max_memory`.
        NonFiniteError: a tensor or an activation holds NaN or Inf.
        UnsupportedModelError: the model is compiled, sharded or changed by another package.
    """
    started = time.perf_counter()
    recipe = Recipe.of(recipe).unstaged("core.recipe.runner.apply")
    if undo is not None and undo not in UNDO_MODES:
        raise ValueError(f"undo: {undo!r} was given, allowed are {', '.join(UNDO_MODES)}.")
    check_model(model)
    refuse_adapters(model)
    known = changes.of(model)
    recipe.check(earlier=transforms_of(known.recipe, recipe.transforms) if known else ())
    transforms = [each for each in recipe if each.model_copy(update={"only": None}) != type(each).identity()]
    _refuse_training(model, transforms)
    batches = batches_of(transforms, data)
    for batch in batches:
        check_batch(model, batch, beyond_context=reads_beyond(batches))
    if processes.several():
        for transform in transforms:
            if transform.tags.records_calls:
                check_shares(type(transform).__name__, transform.tags)
        processes.agree(
            recipe=repr(recipe.dump()),
            model=model_fingerprint(model),
            data=fingerprint(list(batches)),
        )
    if not inplace:
        offload.refuse_offloaded(model, "inplace=False would copy all its weights into memory")
        model = changes.copy_of(model)
    parts = has_row(model) or any(transform.tags.parts for transform in transforms)
    view = anatomy(model, batches[0] if batches else None) if parts else unread(model)
    limits: dict[str, Any] = {"min_coverage": min_coverage, "max_memory": max_memory}
    # what the plan has seen of how blocks are called holds for the first walk, if experts stand as they did there
    reused = not processes.several() and all(block.experts is None for block in view.blocks)
    recorder = Recorder(view) if reused else None
    plan = make_plan(view, transforms, batches, recorder=recorder, **limits)
    if announce is not None:
        for line in plan.lines():
            announce(line)
    report = Report(recipe.dump(), plan)
    report.notes += [
        f"{type(t).__name__} is at its identity setting: nothing to change" for t in recipe if t not in transforms
    ]
    if 0 < len(batches) < processes.count():
        idle = processes.count() - len(batches)
        report.notes.append(
            f"{len(batches)} batches for {processes.count()} processes: {idle} had nothing to run; give smaller batches"
        )
    mode = _undo_mode(model, undo, report)
    if steps is not None:
        steps.check(transforms)
    run = _Run(view, transforms, batches, mode, report, progress, steps, recorder)
    before = changes.of(model)
    try:
        with evaluating(model):
            for turn in turns(transforms):
                run.plan_transforms(turn)
                run.probe(turn)
                run.walk(turn)
                run.change_ends(turn)
                run.judge(turn)
        run.finish()
    except BaseException:
        run.give_up()
        raise
    after = changes.of(model)
    report.seconds = time.perf_counter() - started

    def take_back() -> None:
        refuse_later_changes(model, after)
        run.rollback()
        restore(model, before)

    return Applied(model, run.described, report, None if mode == "off" else take_back)


def refuse_later_changes(model: nn.Module, record: changes.Changes | None) -> None:
    """Refuse to undo a change that is not the last one.

    Args:
        model: that was changed.
        record: what the change left on it.

    Raises:
        EditError: the model's record is another one by now.
    """
    if changes.of(model) is not record:
        raise EditError(
            "undo: the model was changed again since; undo the later change first, or load the original model."
        )


@dataclass
class _Opened:
    """Experts that stand as a list while their block is changed.

    Attributes:
        block: the path of the block.
        stock: the module with the 3-D parameters.
        experts: the list that stands in its place.
        entry: which of the described edits opened them.
        changed: whether an edit changed something inside.
    """

    block: str
    stock: nn.Module
    experts: ExpertList
    entry: int
    changed: bool = False


class _Run:
    """One pass of a list of transforms over a model."""

    def __init__(
        self,
        view: Anatomy,
        transforms: list[Transform],
        batches: list[Any],
        mode: str,
        report: Report,
        progress: bool,
        steps: Steps | None,
        recorder: Recorder | None,
    ) -> None:
        self._recorder = recorder
        self.view, self.model, self.transforms, self.batches = view, view.model, list(transforms), batches
        self.mode, self.report, self.progress, self.steps = mode, report, progress, steps or Steps(0)
        self.described: list[dict[str, Any]] = []
        self.undos: list[Undo] = []
        self._training = {path: module.training for path, module in view.model.named_modules()}
        self._frozen: set[str] = set()  # parameters of replaced modules that did not require gradients
        self._shared: Shared = {}
        origin = changes.source(view.model)
        self._origin = origin if origin is not None and origin.untouched(view.model) else None
        self._opened: _Opened | None = None
        self._probe: Probe | None = None  # of the turn, if a transform in it claims to keep the function

    def plan_transforms(self, turn: range) -> None:
        self.model.eval()  # what the turns before put into it too
        trial = Trial(self.view, self.batches)
        for position in turn:
            transform = self.transforms[position]
            # opened, so that the layers of experts can be tried too; one that goes by modules sees them as they are
            with opened_experts(self.view) if transform.tags.parts else nullcontext():
                self.transforms[position] = transform.plan(trial, self.batches)

    def probe(self, turn: range) -> None:
        """Call the model on a probe batch, if a transform of the turn claims to keep what it computes."""
        exact = any(_is_exact(transform) for transform in self.transforms[turn.start : turn.stop])
        self._probe = Probe(self.view, self.batches) if exact else None

    def judge(self, turn: range) -> None:
        """Compare what the model gives with what it gave, if all transforms of a turn keep that; report what moved."""
        if self._probe is None:
            return
        transforms = self.transforms[turn.start : turn.stop]
        exact = [type(transform).__name__ for transform in transforms if _is_exact(transform)]
        if len(exact) == len(transforms):
            self._probe.compare_whole(exact)
        for text, values in self._probe.notes(exact):
            self.report.notes.append(text)
            if values:
                self.report.values.append(("model", " and ".join(exact), values))

    def walk(self, turn: range) -> None:
        needed = {t.tags.stream for t in self.transforms[turn.start : turn.stop] if t.needs_data}
        streams = [s for s in ("original", "edited") if s in needed or "both" in needed]
        share = [index for index in range(len(self.batches)) if processes.mine(index)] if processes.several() else None
        recorder, self._recorder = self._recorder, None  # the walks behind this one go through another model
        walk = Walk(self.view, self.batches, self._track, share, recorder) if streams else None
        if walk is not None:
            walk.start(streams)
            if not walk.chained:
                self.report.notes.append(
                    "a block's output is not the next block's input in this model: the inputs of each block were taken "
                    "from passes over the whole prefix (slower, same result)"
                )
        for index in self._track(range(len(self.view.blocks)), "Changing block by block"):
            weights = any(transform.tags.parts for transform in self.transforms[turn.start : turn.stop])
            with offload.onloaded(self.model, self.view.blocks[index].path, weights=weights):
                following = self._change_block(index, turn, walk, streams)
            self.view.refresh(index)  # the old weights are freed, if no undo keeps them
            for stream, calls in following.items():
                walk.move(stream, calls)  # type: ignore[union-attr]
            # between what stays, freed weights and copies lie in pieces that the allocator would keep
            release_behind(get_module(self.model, self.view.blocks[index].path))

    def change_ends(self, turn: range) -> None:
        """Apply what the transforms of a turn make of what stands before and behind the blocks."""
        ends = len(self.view.blocks)  # they are kept like those of one more block
        for position in turn:
            transform = self.transforms[position]
            edits: Iterable[Edit | Skip | Note] | None = self.steps.take(position, ends)
            if edits is None:
                edits = self.steps.keep(position, ends, transform.edit_ends(self.view))
            self._apply_all(transform, edits, {})

    def _change_block(
        self, index: int, turn: range, walk: Walk | None, streams: Sequence[str]
    ) -> dict[str, list[Call]]:
        """Run the transforms of a turn on a block; returns the calls of the next one, by stream."""
        following, targets = {}, None
        if walk is not None and "original" in streams:
            if any(transform.tags.needs_targets for transform in self.transforms[turn.start : turn.stop]):
                targets = walk.outputs(index, "original")
            following["original"] = walk.following(index, "original", targets)
        self._open_experts(self.view.block(index))
        originals: dict[str, nn.Module] = {}
        for position in turn:
            transform = self.transforms[position]
            edits: Iterable[Edit | Skip | Note] | None = self.steps.take(position, index)
            if edits is None:
                edits = self.steps.keep(position, index, self._edits(transform, index, walk, originals, targets))
            alone = self._probe if _is_exact(transform) and not transform.tags.spans_blocks else None
            path = self.view.blocks[index].path
            before = alone.outputs(path) if alone is not None and path else None
            made = len(self.described)
            self._apply_all(transform, edits, originals)
            if alone is not None and len(self.described) > made:
                alone.compare(type(transform).__name__, path, before)
        self._close_experts()
        if walk is not None and "edited" in streams:
            following["edited"] = walk.following(index, "edited")
        return following

    def _edits(
        self,
        transform: Transform,
        index: int,
        walk: Walk | None,
        originals: dict[str, nn.Module],
        targets: Sequence[torch.Tensor] | None = None,
    ) -> Iterator[Edit | Skip | Note]:
        """Observe a block, then what the transform makes of it."""
        whole = self.view.block(index, originals)
        block = transform.within(whole)
        if block is None:
            return
        stream = transform.tags.observed_stream
        wanted = dict(transform.observe(block))
        if wanted and walk is None:
            raise DataError(f"{type(transform).__name__}: it observes activations; declare Tags(needs_data=True).")
        statistics: Mapping[Site, Any] = {}
        if wanted and walk is not None:
            statistics = walk.observe(index, stream, wanted)
        if transform.tags.parts:
            name = type(transform).__name__
            self.report.skipped += [(path, name, reason) for path, reason in whole.unread()]
        walked = walk if transform.needs_data else None
        seen = Seen(type(transform).__name__, transform.tags, walked, block, statistics, targets)
        yield from transform.edit(block, seen)

    def _apply_all(
        self, transform: Transform, edits: Iterable[Edit | Skip | Note], originals: dict[str, nn.Module]
    ) -> None:
        self._shared = shared_parameters(self.model)
        for edit in edits:
            if isinstance(edit, Skip):
                self.report.skipped.append((edit.path, type(transform).__name__, edit.reason))
                continue
            if isinstance(edit, Note):
                self.report.notes.append(f"{edit.path}: {edit.text}")
                if edit.values:
                    self.report.values.append((edit.path, type(transform).__name__, dict(edit.values)))
                continue
            for path in _places(edit) if isinstance(edit, Replace | ReplaceTied | Restore) else ():
                originals.setdefault(path, get_module(self.model, path))
            self._apply_edit(edit)
            if isinstance(edit, Resize) and edit.path in originals:  # what it computed of what is left
                originals[edit.path] = resized(edit.path, originals[edit.path], edit.outputs, edit.inputs)
            self.report.changed += [(where, type(transform).__name__) for where in _places(edit)]

    def _apply_edit(self, edit: Edit) -> None:
        if isinstance(edit, Restore) and not self._put_in(edit.path):
            edit = Replace(edit.path, edit.otherwise)
        replaced = parts_of(edit) if isinstance(edit, Replace | ReplaceTied) else ()
        descriptions = [describe(each, self.model) for each in replaced or (edit,)]
        if self._opened is not None and not isinstance(edit, Configure):
            for path in _places(edit):
                self._opened.changed |= _is_inside(self.model, path, self._opened.experts)
        for path in _places(edit) if isinstance(edit, Replace | ReplaceTied | Restore | Resize) else ():
            old = get_module(self.model, path)
            self._frozen |= {f"{path}.{name}" for name, p in old.named_parameters() if not p.requires_grad}
        undo = apply_edit(self.model, edit, remember=self.mode == "memory", shared=self._shared)
        if undo is not None:
            self.undos.append(undo)
        self.described += descriptions

    def _put_in(self, path: str) -> bool:
        """Whether a recorded edit put in what stands at a path."""
        known = changes.of(self.model)
        return any(edit.get("replace") == path for edit in settled([*(known.edits if known else ()), *self.described]))

    def _open_experts(self, block: Block) -> None:
        """Experts in 3-D parameters become an ExpertList, so that their layers can be seen and replaced."""
        experts = block.experts
        self._opened = None
        wanted = any(transform.tags.parts for transform in self.transforms)
        if wanted and experts is not None and not isinstance(experts.module, ExpertList):
            self._shared = shared_parameters(self.model)
            opened = ExpertList.of(experts.module, experts.row, own_rows=True)
            self._apply_edit(Replace(experts.path, opened))
            self._opened = _Opened(block.path, experts.module, opened, len(self.described) - 1)

    def _close_experts(self) -> None:
        """Nothing inside was replaced: the 3-D parameters stand again, also if a wrapper moved them meanwhile."""
        opened, self._opened = self._opened, None
        if opened is None or opened.changed:
            return
        inside = get_module(self.model, opened.block).named_modules(prefix=opened.block)
        path = next((path for path, module in inside if module is opened.experts), None)
        if path is not None:
            set_module(self.model, path, opened.stock)
            del self.described[opened.entry]

    def finish(self) -> None:
        """New modules get the mode of those whose place they took, and the model its record of the changes."""
        self._keep_modes()
        if self.transforms:  # at identity settings alone the model stays a plain one
            record(self.model, self.described, Recipe(self.transforms).dump()["transforms"], self.view.architecture)

    def give_up(self) -> None:
        """Restore the model after a failure; with undo off, record what was done, so that saving is right."""
        if self.mode == "off":
            self._close_experts()
            self.finish()
        else:
            self.rollback()

    def rollback(self) -> None:
        """Restore the model: from memory, or from its source."""
        if self.mode == "memory":
            for undo in reversed(self.undos):
                undo()
        elif self.mode == "source" and self.described:
            assert self._origin is not None
            _restore_from_source(self.model, self.described, self._origin)
            for name, parameter in self.model.named_parameters():
                if name in self._frozen:
                    parameter.requires_grad_(False)
            self._keep_modes()
        if self._origin is not None:  # the tensors hold what the files hold again
            self.model.__dict__[changes.SOURCE] = self._origin.rebound(self.model)

    def _keep_modes(self) -> None:
        modules = dict(self.model.named_modules())
        places = {place_of(entry) for entry in self.described if "insert" not in entry}
        for path in places & modules.keys():
            modules[path].train(self._training.get(path, self.model.training))

    def _track(self, items: Any, description: str) -> Iterable[Any]:
        return track(items, description, enabled=self.progress)


def _is_exact(transform: Transform) -> bool:
    return transform.tags.changes_function == "exact"


def _refuse_training(model: nn.Module, transforms: Sequence[Transform]) -> None:
    """Raise EditError if a transform needs the model in evaluation mode and it is not."""
    folding = next((transform for transform in transforms if transform.tags.evaluated), None)
    training = next((path for path, module in model.named_modules() if module.training), None)
    if folding is not None and training is not None:
        raise EditError(
            f"{type(folding).__name__}: {training or 'the model'} is in training mode, in which it computes something "
            f"else than what is folded; call model.eval() first."
        )


def _places(edit: Edit) -> list[str]:
    """The paths, the parameter or the setting that an edit changes."""
    if isinstance(edit, Replace | ReplaceTied):
        return [part.path for part in parts_of(edit)]
    if isinstance(edit, Insert | Resize | Restore):
        return [edit.path]
    return [edit.parameter if isinstance(edit, Set) else edit.key]


def _is_inside(model: nn.Module, path: str, outer: nn.Module) -> bool:
    """Whether what stands at a path lies inside a module of the model."""
    module: nn.Module | None = model
    for name in path.split("."):
        if module is outer:
            return True
        module = None if module is None else module._modules.get(name)
    return False


def apply_edits(model: nn.Module, edits: Iterable[Edit], architecture: Callable[[], str]) -> None:
    """Apply and record edits that no transform makes: of a rule that has ended, of a function that builds a model.

    Args:
        model: changed in place; a new module gets the mode of the one whose place it takes.
        edits: each is applied as it is yielded.
        architecture: says what the model is called, if nothing was recorded on it yet; asked after the edits.

    Raises:
        EditError: an edit does not fit; the ones before it are undone.
    """
    described: list[dict[str, Any]] = []
    undos: list[Undo] = []
    shared = shared_parameters(model)
    try:
        for edit in edits:
            replaced = parts_of(edit) if isinstance(edit, Replace | ReplaceTied) else ()
            described += [describe(each, model) for each in replaced or (edit,)]
            for part in replaced:
                part.module.train(get_module(model, part.path).training)
            undo = apply_edit(model, edit, shared=shared)
            if undo is not None:
                undos.append(undo)
    except BaseException:
        for undo in reversed(undos):
            undo()
        raise
    if described:
        known = changes.of(model)
        name = known.architecture if known else ""
        record(model, described, [], name or architecture())


def _restore_from_source(model: nn.Module, described: list[dict[str, Any]], origin: changes.Source) -> None:
    """Take what the edits touched from a fresh load of the model's source.

    Raises EditError if the files are no longer those that the model was loaded from.
    """
    if not origin.unchanged():
        raise EditError(
            f"undo: {origin.name} was changed since the model was loaded from it, so it cannot be undone from there; "
            f"load the original model, or apply with undo='memory'."
        )
    fresh = load(origin.name, **origin.options)
    restored: set[str] = set()

    def covered(name: str) -> bool:
        return any(is_within(name, path) for path in restored)

    # Modules first, outer ones before inner ones: a tensor that was set may have been replaced since, and then comes
    # back with its module.
    inserted = {entry["insert"] for entry in described if "insert" in entry}
    places = {path for entry in described if "insert" not in entry and (path := place_of(entry)) is not None}
    for path in sorted(places, key=len):
        if not covered(path) and not any(is_within(path, other) for other in inserted):
            set_module(model, path, get_module(fresh, path))
            restored.add(path)
    for entry in described:
        if "insert" in entry and not covered(entry["insert"]):
            parent, _, name = entry["insert"].rpartition(".")
            delattr(get_module(model, parent), name)
    for entry in described:
        if "set" in entry and not covered(entry["set"]):
            with torch.no_grad():
                get_tensor(model, entry["set"]).copy_(get_tensor(fresh, entry["set"]))
        elif "configure" in entry:
            apply_edit(model, _configured(fresh, entry["configure"]), remember=False)


def _configured(model: nn.Module, key: str) -> Edit:
    return Configure(key, getattr(model.config, "_attn_implementation" if key == "attn_implementation" else key))


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be read or changed.

    Args:
        model: any object.

    Raises:
        TypeError: it is no module.
        UnsupportedModelError: it is compiled, sharded, quantized by another package, or on the meta device.
        NonFiniteError: a tensor, which is named, holds NaN or Inf.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: {type(model).__name__} was given; give a torch.nn.Module, or load one with actkit.load."
        )
    refuse_compiled_or_sharded(model)
    refuse_quantized(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor = offload.value_of(model, name, tensor)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise NonFiniteError(f"model: {name} holds NaN or Inf; mend the weights first.")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are; part by part, as a large table would be copied."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(PART))


def batches_of(transforms: Sequence[Transform], data: Iterable[Any] | None) -> Any:
    """Return the batches as a sequence.

    Args:
        transforms: of the recipe.
        data: what was given: batches, or one.

    Raises:
        DataError: a transform needs some and there are none, or a text was given.
    """
    if isinstance(data, str | bytes):
        raise DataError("data: a text was given; pass batches, or give the text to actkit.apply, which makes them.")
    batches = [] if data is None else sequence_of(data, "data")
    needy = next((t for t in transforms if t.needs_data), None)
    if needy is not None and not len(batches):
        given = "none was given" if data is None else "0 batches were given"
        raise DataError(
            f"data: {type(needy).__name__} calibrates on data and {given}; pass batches, or text through actkit.apply."
        )
    return batches


def _undo_mode(model: nn.Module, undo: str | None, report: Report) -> str:
    origin = changes.source(model)
    reason = None
    if origin is None:
        reason = "it was not loaded by actkit.load from a folder of its own"
    elif (known := changes.of(model)) is not None and known.edits:
        reason = "actkit changed it already"
    elif not origin.untouched(model):
        reason = "its tensors were changed since it was loaded"
    elif not origin.unchanged():
        reason = f"the files in {origin.name} were changed since it was loaded"
    if undo == "source" and reason is not None:
        raise ValueError(f"undo: 'source' was given, but {reason}; use 'memory'.")
    if undo is None:
        undo = "source" if reason is None else "memory"
        if origin is not None and reason is not None:
            report.notes.append(f"undo keeps the old tensors in memory, not in the model's folder: {reason}")
    return undo
