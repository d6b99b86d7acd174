"""What every transform must satisfy, one small function per property.

    from actkit.testing import check_transform

    def test_my_method():
        checks = check_transform(MyMethod(strength=0.5), model, batches)

A property that fails raises AssertionError, which names it. A property that does not apply to this transform or this
model is listed with the reason. The model is never changed: each check works on a copy. "Equal" means bit for bit;
if a rewrite or a compiler may round differently, the check says so and bounds the difference.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.edit.edits import settled
from actkit.core.forward.batch import arguments, first_tensor
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import ActkitError, DataError, NonFiniteError, RecipeError, UnsupportedModelError
from actkit.core.ground.modules import is_pretrained, is_within, tied_names
from actkit.core.layers.keeps_dtype import kept_parameters
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import Applied, apply
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.store import checkpoint
from actkit.testing.checks import (
    COMPILED,
    Check,
    NotApplicable,
    State,
    assert_no_hook_left,
    close,
    equal,
    hooks_of,
    in_dtype,
    outputs,
    run_checks,
    works,
)


class Process(Protocol):
    """Another process that loads a saved folder and runs it, such as `actkit.core.measure.fresh.FreshProcess`."""

    def load(self, folder: Any) -> Any:
        """Load a saved folder there."""

    def outputs(self, batch: Any) -> Tensor:
        """Run the model that was loaded last on a batch."""


@dataclass(frozen=True)
class Case:
    """What all checks share; most is as in `check_transform`.

    Attributes:
        transform: what is checked.
        original: the model, as it was given.
        batches: calibration batches.
        conflicting: transforms that it must refuse to follow.
        fresh: a process that loads saved folders.
        compile_backend: for torch.compile; None for no check.
        export: check torch.export.
        repeatable: it may follow itself.
    """

    transform: Transform
    original: nn.Module
    batches: Sequence[Any]
    conflicting: tuple[Transform, ...] = ()
    fresh: Process | None = None
    compile_backend: str | None = None
    export: bool = False
    repeatable: bool = False

    def model(self) -> nn.Module:
        """A copy of the original model, to be changed."""
        return copy.deepcopy(self.original)

    def apply(self, model: nn.Module, recipe: Any = None, batches: Any = None, undo: str = "memory") -> Applied:
        """Apply the transform (or another recipe) to `model` in place."""
        recipe = self.transform if recipe is None else recipe
        batches = self.batches if batches is None else batches
        return apply(model, recipe, batches, undo=undo, min_coverage=0.0, progress=False)

    @cached_property
    def changed(self) -> nn.Module:
        """A model that the transform was applied to; not to be changed."""
        return self.apply(self.model()).model

    @cached_property
    def expected(self) -> list[Tensor]:
        """The outputs of the changed model."""
        return outputs(self.changed, self.batches)

    @cached_property
    def before(self) -> list[Tensor]:
        """The outputs of the original model."""
        return outputs(self.original, self.batches)

    def refused(self, error: type[Exception], do: Callable[[nn.Module], Any], what: str, names: str = "") -> None:
        """Assert that `do` raises `error`, with `names` in its text, and leaves the model as it was."""
        model = self.model()
        kept = State.of(model)
        try:
            do(model)
        except error as raised:
            assert names in str(raised), f"{what}: the error does not name {names!r}: {raised}"
        except Exception as raised:
            raise AssertionError(f"{what}: {type(raised).__name__}, not {error.__name__}: {raised}") from raised
        else:
            raise AssertionError(f"{what}: accepted, {error.__name__} was expected")
        kept.compare(model, what)


def check_transform(
    transform: Transform,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    conflicting: Iterable[Transform] = (),
    fresh: Process | None = None,
    compile_backend: str | None = None,
    export: bool = False,
    repeatable: bool = False,
) -> list[Check]:
    """Check everything that a transform promises, on one model.

    Args:
        transform: at a setting that changes something.
        model: small, in float32, in evaluation mode, with the attention implementation that its class takes by itself
            (another one is not saved).
        batches: calibration batches, which also serve as inputs; the best have padding.
        conflicting: transforms that it must refuse to follow.
        fresh: a process that loads saved folders.
        compile_backend: check torch.compile too ('aot_eager' is fast, 'inductor' the real thing).
        export: check torch.export too, with any number of rows and tokens if the original model can.
        repeatable: it may follow itself.

    Returns:
        What was checked, and what did not apply and why.

    Raises:
        AssertionError: it begins with the name of the first property that fails.
    """
    case = Case(transform, model, list(batches), tuple(conflicting), fresh, compile_backend, export, repeatable)
    start = State.of(model)
    after = partial(_still, start, model)
    return run_checks(CHECKS, case, after)


def _still(start: State, model: nn.Module, name: str) -> None:
    start.compare(model, f"{name}: a copy was changed, and the original with it")


# -- the properties ----------------------------------------------------------------------------------------------------


def identity_changes_nothing(case: Case) -> None:
    """`identity()` makes no edit; run in full, past the runner's short cut, it keeps the outputs to rounding."""
    identity = type(case.transform).identity()
    if identity is None:
        raise NotApplicable("it has no setting that changes nothing")
    model = case.model()
    kept = State.of(model)
    edits = case.apply(model, identity).edits
    assert not edits, f"it made {len(edits)} edits"
    kept.compare(model, "at the identity setting")
    close(outputs(case.apply(case.model(), _forced(identity)).model, case.batches), case.before, "run in full")


def same_result_twice(case: Case) -> None:
    """Two runs on equal models give equal edits, tensors and outputs."""
    again = case.apply(case.model())
    earlier = changes_of(case.original)  # a model that was changed before has edits of its own
    assert settled(earlier + again.edits) == changes_of(case.changed), "the edits differ"
    State.of(case.changed).compare(again.model, "the second run", modules=False)
    equal(outputs(again.model, case.batches), case.expected, "the outputs of the second run")


def exact_means_exact(case: Case) -> None:
    """A transform that is tagged 'exact' keeps the outputs to rounding."""
    if case.transform.tags.changes_function != "exact":
        raise NotApplicable("it is tagged 'approximate'")
    close(case.expected, case.before, "the outputs")


def save_and_load(case: Case) -> None:
    """A saved model loads in this process with equal tensors, dtypes, ties and outputs."""
    with tempfile.TemporaryDirectory() as parent:
        loaded = checkpoint.load(_saved(case, parent), base=_base(case))
    State.of(case.changed).compare(loaded, "the loaded model", modules=False)
    equal(outputs(loaded, case.batches), case.expected, "the outputs of the loaded model")


def load_in_fresh_process(case: Case) -> None:
    """A saved model gives equal outputs in a process that never saw the original."""
    if case.fresh is None:
        raise NotApplicable("no process was given (fresh=)")
    if not is_pretrained(case.original):
        raise NotApplicable("another process cannot build a model that is not of transformers")
    with tempfile.TemporaryDirectory() as parent:
        case.fresh.load(_saved(case, parent))
        found = [case.fresh.outputs(batch) for batch in case.batches]
    equal(found, [output.float() for output in case.expected], "the outputs in the other process")


def dtype_is_kept(case: Case) -> None:
    """In float32 and in bfloat16, parameters and outputs keep the model's dtype; coefficients that say so, float32."""
    for dtype in (torch.float32, torch.bfloat16):
        batches = [in_dtype(batch, dtype) for batch in case.batches]
        model = case.apply(case.model().to(dtype), batches=batches).model
        kept = set(kept_parameters(model))
        for name, parameter in model.named_parameters():
            allowed = torch.float32 if name in kept else dtype
            wrong = parameter.is_floating_point() and parameter.dtype != allowed
            assert not wrong, f"{name} is {parameter.dtype} in a {dtype} model"
        for output in outputs(model, batches):
            assert output.dtype == dtype, f"the output is {output.dtype} in a {dtype} model"
            assert torch.isfinite(output).all(), f"the output holds NaN or Inf in a {dtype} model"


def ties_are_kept(case: Case) -> None:
    """Parameters that were one tensor under two names still are, or what replaced them shares its memory."""
    tied = tied_names(case.original)
    if not tied:
        raise NotApplicable("the model ties no parameters")
    after = tied_names(case.changed)
    memory = {name: tensor.data_ptr() for name, tensor in case.changed.state_dict().items()}
    for name, partner in tied.items():
        if name in memory:
            assert after.get(name) == partner, f"{name} is no longer tied to {partner}"
            continue
        one, other = (
            {address for key, address in memory.items() if key.startswith(each.rpartition(".")[0] + ".")}
            for each in (name, partner)
        )
        assert one & other, f"what stands for {name} no longer shares its memory with what stands for {partner}"


def undo_is_exact(case: Case) -> None:
    """`undo()` brings back every tensor, module, setting and output, from memory."""
    model = case.model()
    kept = State.of(model)
    case.apply(model).undo()
    kept.compare(model, "after undo")
    equal(outputs(model, case.batches), case.before, "the outputs after undo")


def undo_from_source_is_exact(case: Case) -> None:
    """The same, with the tensors read from the folder that the model was loaded from."""
    if not is_pretrained(case.original) or changes.of(case.original) is not None:
        raise NotApplicable("only an unchanged transformers model can be read again from its folder")
    with tempfile.TemporaryDirectory() as parent:
        model = checkpoint.load(checkpoint.save(case.model(), Path(parent) / "source"))
        kept = State.of(model)
        case.apply(model, undo="source").undo()
    kept.compare(model, "after undo", modules=False)


def no_hook_is_left(case: Case) -> None:
    """No module has a hook that it did not have before, after a run and after one that failed."""
    failed = case.model()
    _fail_midway(case, failed)
    for model, when in ((case.changed, "after the run"), (failed, "after a run that failed")):
        assert_no_hook_left(model, hooks_of(case.original), when)


def failure_restores(case: Case) -> None:
    """If something fails after its edits were made, the model is as it was."""
    model = case.model()
    kept = State.of(model)
    _fail_midway(case, model)
    kept.compare(model, "after a run that failed")


def refuses_conflicts(case: Case) -> None:
    """It refuses to follow itself and the conflicting ones, in one recipe and one after the other; nothing changes."""
    itself = () if case.repeatable else (case.transform,)
    if not (itself or case.conflicting):
        raise NotApplicable("it may follow itself, and no other was given (conflicting=)")
    for earlier in (*itself, *case.conflicting):
        name, pair = type(earlier).__name__, [earlier, case.transform]
        case.refused(RecipeError, partial(case.apply, recipe=pair), f"after {name}", name)
        model = case.apply(case.model(), earlier).model
        kept = State.of(model)
        try:
            case.apply(model)
        except RecipeError:
            kept.compare(model, f"refused on a model with {name}")
        else:
            raise AssertionError(f"accepted on a model with {name}")


def needs_its_data(case: Case) -> None:
    """Without batches a transform that needs data raises DataError; one that does not, runs."""
    if not case.transform.needs_data:
        _without_data(case, None)
        return
    for given in (None, ()):
        case.refused(DataError, partial(_run, transform=case.transform, data=given), f"data={given}", "data")


def bad_weights_are_refused(case: Case) -> None:
    """NaN in a weight and a model on the meta device are refused, with the parameter's name."""
    name, _ = next((name, p) for name, p in case.original.named_parameters() if p.is_floating_point())
    broken = case.model()
    with torch.no_grad():
        broken.get_parameter(name).view(-1)[0] = float("nan")
    unnamed = Case(case.transform, broken, case.batches)
    unnamed.refused(NonFiniteError, unnamed.apply, "a NaN weight", name)
    try:
        case.apply(case.model().to("meta"))
    except UnsupportedModelError as error:
        assert "meta" in str(error), f"a model on the meta device: the error does not say so: {error}"
    else:
        raise AssertionError("a model on the meta device was accepted")


def stays_within_its_scope(case: Case) -> None:
    """Limited to the last block, it changes no other; a scope that it cannot keep is refused."""
    *others, last = anatomy(case.original, case.batches[0]).blocks
    settings = {**case.transform.model_dump(), "only": {"block": last.index}}
    reason = type(case.transform).cannot_be_limited(whole_blocks=True)
    if reason is not None:
        try:
            type(case.transform)(**settings)
        except ValidationError:
            raise NotApplicable(f"it {reason}") from None
        raise AssertionError(f"it {reason}, and takes a scope")
    if not last.index:
        raise NotApplicable("the model has one block")
    applied = case.apply(case.model(), type(case.transform)(**settings))
    outside = [path for path, _ in applied.report.changed if any(is_within(path, each.path) for each in others)]
    assert not outside, f"limited to {last.path}, it changed {outside[0]}"


def settings_are_strict(case: Case) -> None:
    """A recipe comes back from YAML as it was; settings are frozen, unknown ones refused by name."""
    with tempfile.TemporaryDirectory() as parent:
        loaded = Recipe.load(Recipe([case.transform]).save(Path(parent) / "recipe.yaml"))
    assert loaded.transforms == (case.transform,), f"{loaded.transforms} came back from YAML"
    unknown = {"actkit": 1, "transforms": [{case.transform.name: {"no_such_setting": 1}}]}
    try:
        Recipe.parse(unknown)
    except RecipeError as error:
        assert "no_such_setting" in str(error), f"the error does not name the unknown setting: {error}"
    else:
        raise AssertionError("an unknown setting was accepted")
    for name in type(case.transform).model_fields:
        try:
            setattr(case.transform, name, getattr(case.transform, name))
        except (ValidationError, TypeError):
            continue
        raise AssertionError(f"{name} can be changed; declare the model frozen")


def compiles(case: Case) -> None:
    """The changed model runs under torch.compile(fullgraph=True), on a batch and on a single token."""
    if case.compile_backend is None:
        raise NotApplicable("it was not requested (compile_backend=)")
    if not case.transform.tags.compiles:
        raise NotApplicable("its tags say that it does not compile")

    batches = [case.batches[0], _smallest(case.batches[0])]

    def run(model: nn.Module) -> list[Tensor]:
        torch.compiler.reset()
        # Each shape by itself: to compile for any shape takes four times as long. `exports` asks for that.
        compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, backend=case.compile_backend)  # type: ignore[arg-type]
        return outputs(compiled, batches)

    try:
        found = run(case.changed)
    except Exception:
        _original_too(case, run, "torch.compile")
        raise
    close(found, outputs(case.changed, batches), "the compiled model", COMPILED)


def exports(case: Case) -> None:
    """The changed model can be exported by torch.export, and the program computes the same on every batch.

    Rows and tokens are dynamic if the original model can be exported so.

    Args:
        case: what is checked.
    """
    if not case.export:
        raise NotApplicable("it was not requested (export=)")
    if not case.transform.tags.exports:
        raise NotApplicable("its tags say that it does not export")

    def run(model: nn.Module, dynamic: bool) -> list[Tensor]:
        batches = case.batches if dynamic else case.batches[:1]
        calls = [arguments(model, batch) for batch in batches]
        with evaluating(model):
            program = _exported(model, case.batches[0], dynamic)
            return [first_tensor(program(*args, **kwargs)) for args, kwargs in calls]

    try:
        found = run(case.changed, dynamic=True)
    except Exception:
        if works(partial(run, case.original, dynamic=True)):
            raise
        try:
            found = run(case.changed, dynamic=False)
        except Exception:
            _original_too(case, partial(run, dynamic=False), "torch.export")
            raise
    close(found, case.expected[: len(found)], "the exported program", COMPILED)


CHECKS: dict[str, Callable[[Case], None]] = {
    "the identity setting changes nothing": identity_changes_nothing,
    "the same result twice": same_result_twice,
    "exact means exact": exact_means_exact,
    "save and load": save_and_load,
    "load in a fresh process": load_in_fresh_process,
    "the dtype is kept": dtype_is_kept,
    "ties are kept": ties_are_kept,
    "undo is exact": undo_is_exact,
    "undo from the source is exact": undo_from_source_is_exact,
    "no hook is left behind": no_hook_is_left,
    "a failed run changes nothing": failure_restores,
    "what it conflicts with is refused": refuses_conflicts,
    "missing data are refused": needs_its_data,
    "broken weights are refused": bad_weights_are_refused,
    "it stays within its scope": stays_within_its_scope,
    "settings are strict": settings_are_strict,
    "it compiles": compiles,
    "it exports": exports,
}


def changes_of(model: nn.Module) -> list[dict[str, Any]]:
    """The edits on a model in their JSON form."""
    known = changes.of(model)
    return [] if known is None else known.edits


# -- how runs are provoked ---------------------------------------------------------------------------------------------


class _Failing(Transform):
    """Raises in the last block, after the edits of the others were made."""

    tags: ClassVar[Tags] = Tags(parts=False)
    last: int

    @property
    def name(self) -> str:
        return "failing"

    def edit(self, block: Any, seen: Any) -> Iterable[Any]:
        if block.index == self.last:
            raise _Planned
        return []


class _Planned(Exception):
    pass


def _fail_midway(case: Case, model: nn.Module) -> None:
    last = len(anatomy(model, case.batches[0]).blocks) - 1
    try:
        case.apply(model, [case.transform, _Failing(last=last)])
    except _Planned:
        return
    raise AssertionError("an error inside a later transform was swallowed")


def _forced(identity: Transform) -> Transform:
    """The same settings in a class without an identity, so that the runner does not skip it."""
    name = identity.name
    body = {"__module__": __name__, "identity": classmethod(lambda cls: None), "name": property(lambda self: name)}
    cls = type(type(identity).__name__, (type(identity),), body)
    return cls(**identity.model_dump())


def _run(model: nn.Module, transform: Transform, data: Any) -> Applied:
    return apply(model, transform, data, undo="memory", min_coverage=0.0, progress=False)


def _without_data(case: Case, data: Any) -> None:
    if hasattr(case.original, "config"):
        _run(case.model(), case.transform, data)
        return
    try:
        _run(case.model(), case.transform, data)
    except ActkitError as error:  # such a model is read off one forward pass, so one batch is needed after all
        assert "example" in str(error), f"without data: {error}"


def _saved(case: Case, parent: str) -> Path:
    return checkpoint.save(case.changed, Path(parent) / "changed")


def _base(case: Case) -> Callable[[], nn.Module] | None:
    return None if is_pretrained(case.original) else case.model


def _exported(model: nn.Module, batch: Any, dynamic: bool) -> nn.Module:
    """The exported program of a call on `batch`; dynamic: the number of rows, and of tokens, may be another."""
    args, kwargs = arguments(model, batch)

    def free(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        tokens = value.dim() == 2 and not value.is_floating_point()
        return dict.fromkeys(range(2 if tokens else 1), torch.export.Dim.DYNAMIC)

    shapes: Any = {key: free(value) for key, value in kwargs.items()} if kwargs else tuple(map(free, args))
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes if dynamic else None, strict=False)
    return program.module()


def _original_too(case: Case, run: Callable[[nn.Module], Any], what: str) -> None:
    """Raise NotApplicable if the original model fails as the changed one did."""
    if not works(partial(run, case.original)):
        raise NotApplicable(f"{what} does not take the original model either")


def _smallest(batch: Any) -> Any:
    """The first token of the first row, as decoding begins; of images and vectors the first row."""
    if isinstance(batch, dict):
        return {key: value[:1, :1] if value.dim() == 2 else value[:1] for key, value in batch.items()}
    return batch[:1] if isinstance(batch, Tensor) else tuple(value[:1] for value in batch)
