"""What your own model must satisfy, so that methods work on it: `check_model`, one small function per property.

    from actkit.testing import check_model

    def test_my_model():
        check_model(MyModel, [{"pixel_values": torch.rand(4, 1, 8, 8), "labels": torch.arange(4)}])

Your own model is an `nn.Module` that no library describes: actkit traces it, and a changed one is loaded by its
registered name and its spec (entry-point group `actkit.models`), or around what `make` builds (`base=`).
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import (
    arguments,
    check_batch,
    first_rows,
    first_tensor,
    forward,
    has_rows,
    main_input,
    mask_of,
)
from actkit.core.forward.example import make_example
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground import registry
from actkit.core.ground.errors import DataError
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.measure.quality import measure_quality, task_of
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.runner import Applied, apply
from actkit.core.store import checkpoint
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import AbsMax
from actkit.quantization.rtn import RoundToNearest
from actkit.testing.checks import (
    COMPILED,
    Check,
    NotApplicable,
    State,
    close,
    equal,
    in_dtype,
    outputs,
    random_numbers,
    run_checks,
    storages_of,
    tensors_in,
)
from actkit.testing.transforms import Process

CPU = torch.device("cpu")
CHANGE = RoundToNearest(bits=4, group_size=-1)  # a change that any linear layer takes


@dataclass(frozen=True)
class ModelCase:
    """What all checks share; most is as in `check_model`.

    Attributes:
        make: builds the model.
        batches: what it is called with.
        fresh: a process that loads saved folders.
        compile_backend: for torch.compile; None for no check.
        export: check torch.export.
    """

    make: Callable[[], nn.Module]
    batches: Sequence[Any]
    fresh: Process | None = None
    compile_backend: str | None = None
    export: bool = False

    def model(self) -> nn.Module:
        """A new model in evaluation mode; random values are those of every other one."""
        with own_random_numbers(CPU, 0):
            return self.make().eval()

    def changed(self) -> Applied:
        """A new model whose linear layers were rounded to 4 bits. Raises NotApplicable if it has none."""
        applied = apply(self.model(), CHANGE, self.batches, undo="memory", min_coverage=0.0, progress=False)
        if not applied.edits:
            raise NotApplicable("it has no linear layer that methods change")
        return applied

    def registered(self) -> Any:
        """A new model whose class is registered. Raises NotApplicable if it is not."""
        model = self.model()
        if registry.model_name(type(model)) is None:
            raise NotApplicable("its class is not registered under actkit.models: pass base= to load it")
        return model

    @cached_property
    def expected(self) -> list[Tensor]:
        """The outputs of a new model."""
        return outputs(self.model(), self.batches)


def check_model(
    make: Callable[[], nn.Module],
    batches: Iterable[Any],
    *,
    fresh: Process | None = None,
    compile_backend: str | None = None,
    export: bool = False,
) -> list[Check]:
    """Check everything that your own model promises.

    Args:
        make: builds the unchanged model in float32, without arguments; it must be importable if `fresh` is given.
        batches: tensors, tuples of arguments or dicts of keywords; a classifier is measured if they have "labels".
        fresh: a process that loads saved folders, such as `actkit.core.measure.fresh.FreshProcess()`.
        compile_backend: check torch.compile too ('aot_eager' is fast, 'inductor' the real thing).
        export: check torch.export too.

    Returns:
        What was checked, and what did not apply and why.

    Raises:
        AssertionError: it begins with the name of the first property that fails.
    """
    return run_checks(CHECKS, ModelCase(make, list(batches), fresh, compile_backend, export))


# -- the properties ----------------------------------------------------------------------------------------------------


def built_alike(case: ModelCase) -> None:
    """Two models have the same tensors by name, shape and dtype, and share no memory."""
    first, second = case.model(), case.make()
    assert type(first) is type(second), f"a {type(first).__name__} once, a {type(second).__name__} then"
    one, other = (_kinds(model) for model in (first, second))
    differ = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    assert not differ, f"other tensors in the second: {', '.join(differ[:4])}"
    shared = storages_of(first).keys() & storages_of(second).keys()
    assert not shared, f"both share {storages_of(first)[min(shared)]}"


def same_result_twice(case: ModelCase) -> None:
    """A call in evaluation mode gives the same in any order; model, batches and random numbers stay as they were."""
    model, batches = case.model(), copy.deepcopy(case.batches)
    before, numbers = State.of(model), random_numbers()
    first = outputs(model, batches)
    assert random_numbers() == numbers, "a call in evaluation mode draws random numbers"
    before.compare(model, "after a call in evaluation mode")
    equal(tensors_in(batches), tensors_in(case.batches), "after a call the batches")
    equal(outputs(model, batches[::-1])[::-1], first, "the outputs in another order")
    for output in first:
        assert bool(torch.isfinite(output).all()), "the output holds NaN or Inf"


def rows_do_not_mix(case: ModelCase) -> None:
    """The first row of a batch alone gives what it gives among others, to rounding; else no document is measured."""
    model = case.model()
    for batch, expected in zip(case.batches, case.expected, strict=True):
        if not has_rows(batch, model):
            raise NotApplicable("a batch is one whole, such as a graph: not every tensor has one entry per example")
        rows = len(main_input(batch, model))
        assert len(expected) == rows, f"{len(expected)} outputs for {rows} rows"
        (alone,) = outputs(model, [first_rows(batch, 1, model)])
        same = close if expected.is_floating_point() else equal
        same([alone], [expected[:1]], "the output of a row alone")


def dtype_is_kept(case: ModelCase) -> None:
    """In float32 and bfloat16 the output has the dtype of the model."""
    if not case.expected[0].is_floating_point():
        raise NotApplicable("its outputs are no floats")
    for dtype in (torch.float32, torch.bfloat16):
        model = case.model().to(dtype)
        for output in outputs(model, [in_dtype(batch, dtype) for batch in case.batches]):
            assert output.dtype == dtype, f"the output is {output.dtype} in a {dtype} model"
            assert bool(torch.isfinite(output).all()), f"the output holds NaN or Inf in a {dtype} model"


def gradients_reach_all(case: ModelCase) -> None:
    """In training mode each trainable parameter gets a gradient that is finite."""
    model = case.model().train()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NotApplicable("it has no trainable parameter")
    with own_random_numbers(CPU, 0):
        sum(first_tensor(forward(model, batch)).square().sum() for batch in case.batches).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} gets no gradient; drop it, or freeze it"
            assert bool(torch.isfinite(parameter.grad).all()), f"the gradient of {name} holds NaN or Inf"


def anatomy_reads_it(case: ModelCase) -> None:
    """The tracer finds its layers: each parameter has its place, or the reason why it has none."""
    model = case.model()
    view = anatomy(model, case.batches[0])
    coverage = view.coverage()
    parameters = {name for name, _ in model.named_parameters()}
    listed = [row.parameter for row in coverage.rows]
    assert len(set(listed)) == len(listed) and set(listed) == parameters, "coverage lists other parameters than it has"
    assert all(row.reason for row in coverage.uncovered()), "a parameter is left alone without a reason"
    found = {linear.path for block in view.blocks for linear in view.block(block.index).linears()}
    uncovered = {row.parameter: row.reason for row in coverage.uncovered()}
    for path, module in model.named_modules():
        if type(module) is nn.Linear and path not in found:
            raise AssertionError(f"{path} is a linear layer that is not found: {uncovered.get(f'{path}.weight')}")
    if not found:
        raise NotApplicable("it has no linear layer that methods change")
    assert view.sites(), "it has no sites"


def sites_hold_what_layers_read(case: ModelCase) -> None:
    """What is recorded at the input of each linear layer is what a hook on it sees."""
    model = case.model()
    view = anatomy(model, case.batches[0])
    paths = [linear.path for block in view.blocks for linear in view.block(block.index).linears()]
    if not paths:
        raise NotApplicable("it has no linear layer that methods change")
    seen: dict[str, Tensor] = {}

    def look(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            largest = (args[0] if args else kwargs["input"]).detach().abs().flatten(0, -2).amax(0)
            seen[path] = torch.maximum(seen[path], largest) if path in seen else largest

        return note

    with hooked(model, before={path: look(path) for path in paths}):
        outputs(model, case.batches)
    sites = {path: Site("layer.input", path=path) for path in paths}
    found = record(model, dict.fromkeys(sites.values(), AbsMax()), case.batches, anatomy=view, progress=False)
    padded = any(mask is not None and not bool(mask.all()) for mask in (mask_of(b, CPU) for b in case.batches))
    for path, site in sites.items():
        largest = found[site].value.to(seen[path].dtype)
        assert largest.shape == seen[path].shape, f"{site} has {len(largest)} channels, the layer {len(seen[path])}"
        same = bool((largest <= seen[path]).all()) if padded else torch.equal(largest, seen[path])
        assert same, f"at {site} other values are recorded than the layer reads"


def changed_and_put_back(case: ModelCase) -> None:
    """A method changes its linear layers, and undo brings every tensor, module and output back."""
    applied = case.changed()
    model: Any = applied.model
    found = outputs(model, case.batches)
    assert any(not torch.equal(a, b) for a, b in zip(found, case.expected, strict=True)), "the outputs are as before"
    applied.undo()
    State.of(case.model()).compare(model, "after undo", modules=False)
    equal(outputs(model, case.batches), case.expected, "the outputs after undo")


def saved_and_loaded(case: ModelCase) -> None:
    """A changed model loads from its folder with `base=make`, with equal tensors and outputs."""
    changed = case.changed().model
    with tempfile.TemporaryDirectory() as parent:
        loaded = checkpoint.load(checkpoint.save(changed, Path(parent) / "changed"), base=case.make)
    State.of(changed).compare(loaded, "the loaded model", modules=False)
    equal(outputs(loaded, case.batches), outputs(changed, case.batches), "the outputs of the loaded model")


def rebuilt_from_spec(case: ModelCase) -> None:
    """JSON gives back what `spec()` gave, and `from_spec` makes the same tensors by name, shape and dtype."""
    model = case.registered()
    spec = model.spec()
    back = json.loads(json.dumps(spec))
    assert back == spec, f"spec() gives {spec!r}, JSON gives back {back!r}"
    again = type(model).from_spec(back)
    assert type(again) is type(model), f"from_spec gives a {type(again).__name__}"
    one, other = _kinds(model), _kinds(again)
    differ = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    assert not differ, f"from_spec gives other tensors: {', '.join(differ[:4])}"
    assert again.spec() == spec, f"the model from the spec has another one: {again.spec()!r}"


def loaded_by_name(case: ModelCase) -> None:
    """The model, and a changed one if methods change it, load from their folders without `base=`."""
    models = [case.registered()]
    with suppress(NotApplicable):
        models.append(case.changed().model)
    for model in models:
        with tempfile.TemporaryDirectory() as parent:
            loaded = checkpoint.load(checkpoint.save(model, Path(parent) / "saved"))
        State.of(model).compare(loaded, "the loaded model", modules=False)
        equal(outputs(loaded, case.batches), outputs(model, case.batches), "the outputs of the loaded model")


def loaded_in_fresh_process(case: ModelCase) -> None:
    """A changed model gives equal outputs in a process that builds it by the import name of `make`."""
    if case.fresh is None:
        raise NotApplicable("no process was given (fresh=)")
    changed, fresh = case.changed().model, case.fresh
    load_there: Any = fresh.load
    with tempfile.TemporaryDirectory() as parent:
        load_there(checkpoint.save(changed, Path(parent) / "changed"), base=case.make)
        found = [fresh.outputs(batch) for batch in map(_inputs, case.batches)]
    expected = [output.float() for output in outputs(changed, case.batches)]
    equal(found, expected, "the outputs in the other process")


def random_inputs_fit(case: ModelCase) -> None:
    """It can be called with the inputs that actkit makes up for it from `input_shape` or its first layer."""
    model = case.model()
    try:
        batch = make_example(model)
    except DataError:
        raise NotApplicable("it does not say what it takes; set input_shape or give it example(rows, seed)") from None
    equal(tensors_in(batch), tensors_in(make_example(model)), "two examples of one seed")
    check_batch(model, batch)
    (output,) = outputs(model, [batch])
    assert bool(torch.isfinite(output).all()), "the output of random inputs holds NaN or Inf"


def quality_is_measured(case: ModelCase) -> None:
    """Against a copy of itself it loses nothing, and all figures are finite."""
    model = case.model()
    task = task_of(model)
    if task == "classification" and not all(isinstance(batch, dict) and "labels" in batch for batch in case.batches):
        raise NotApplicable("it is a classifier, and the batches have no labels")
    found = measure_quality(model, case.batches, reference=copy.deepcopy(model), task=task, resamples=2, progress=False)
    for name, estimate in found.metrics.items():
        assert torch.isfinite(torch.tensor(estimate.value)), f"{name} is {estimate.value}"
    assert found.loss is not None and abs(found.loss.value) < 1e-9, f"against itself it loses {found.loss}"


def compiles(case: ModelCase) -> None:
    """It runs under torch.compile(fullgraph=True)."""
    if case.compile_backend is None:
        raise NotApplicable("it was not requested (compile_backend=)")
    torch.compiler.reset()
    compiled: Any = torch.compile(case.model(), fullgraph=True, dynamic=False, backend=case.compile_backend)  # type: ignore[arg-type]
    close(outputs(compiled, case.batches), case.expected, "the output of the compiled model", COMPILED)


def exports(case: ModelCase) -> None:
    """torch.export makes a program of it that computes the same."""
    if not case.export:
        raise NotApplicable("it was not requested (export=)")
    model = case.model()
    args, kwargs = arguments(model, case.batches[0])
    with evaluating(model):
        program = torch.export.export(model, args, kwargs, strict=False).module()
        found = first_tensor(program(*args, **kwargs))
    close([found], case.expected[:1], "the output of the exported program", COMPILED)


CHECKS: dict[str, Callable[[ModelCase], None]] = {
    "it is built alike each time": built_alike,
    "the same result twice": same_result_twice,
    "rows do not mix": rows_do_not_mix,
    "the dtype is kept": dtype_is_kept,
    "gradients reach all parameters": gradients_reach_all,
    "the anatomy reads it": anatomy_reads_it,
    "sites hold what layers read": sites_hold_what_layers_read,
    "it is changed and put back": changed_and_put_back,
    "it is rebuilt from its spec": rebuilt_from_spec,
    "a changed one is saved and loaded": saved_and_loaded,
    "it is loaded by its name": loaded_by_name,
    "it is loaded in a fresh process": loaded_in_fresh_process,
    "random inputs fit": random_inputs_fit,
    "its quality is measured": quality_is_measured,
    "it compiles": compiles,
    "it exports": exports,
}


def _kinds(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


def _inputs(batch: Any) -> Any:
    """The batch without labels, as another process is given it."""
    return {key: value for key, value in batch.items() if key != "labels"} if isinstance(batch, dict) else batch
