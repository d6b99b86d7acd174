"""What every analysis must satisfy: `check_analysis`, one small function per property.

    from actkit.testing import check_analysis

    def test_my_analysis():
        check_analysis(lambda model, batches: my_analysis(model, batches, site="mlp.hidden"), model, batches)

An analysis is a function of a model and batches whose result is a `Result` (`core/ground/results.py`).
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from actkit.core.ground import processes
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.ground.results import Result
from actkit.core.page.result_page import page_of
from actkit.testing.checks import (
    Check,
    NotApplicable,
    State,
    assert_no_hook_left,
    equal,
    hooks_of,
    modes_of,
    random_numbers,
    run_checks,
    tensors_in,
)

Analysis = Callable[[nn.Module, Sequence[Any]], Any]
UNLIKELY = 715_225_739  # a seed that nobody would set
SUMS = 1e-5  # relative: sums over batches in another order


@dataclass(frozen=True)
class AnalysisCase:
    """What all checks share.

    Attributes:
        analysis: what is checked.
        original: the model, as it was given.
        batches: what it is measured on.
        several: it finds the same in several processes.
    """

    analysis: Analysis
    original: nn.Module
    batches: Sequence[Any]
    several: bool = False

    def model(self) -> nn.Module:
        """A copy of the model; some of its modules are in training mode, as in the midst of a training."""
        copied = copy.deepcopy(self.original)
        for index, module in enumerate(copied.modules()):
            module.training = index % 3 != 1
        return copied

    def run(self, model: nn.Module | None = None) -> Any:
        """The result on a model, or on a new copy."""
        return self.analysis(self.model() if model is None else model, copy.deepcopy(self.batches))

    @cached_property
    def result(self) -> Any:
        """The result on the model as it was given."""
        return self.analysis(copy.deepcopy(self.original), copy.deepcopy(self.batches))


def check_analysis(
    analysis: Analysis, model: nn.Module, batches: Iterable[Any], *, several: bool = False
) -> list[Check]:
    """Check everything that an analysis promises, on one model.

    Args:
        analysis: called with a model and a list of batches; returns its result.
        model: small, in evaluation mode; never changed, each check works on a copy.
        batches: what it is measured on; the best have padding.
        several: it finds the same in several processes (`core.ground.processes`); checked if torchrun started several.

    Returns:
        What was checked, and what did not apply and why.

    Raises:
        AssertionError: it begins with the name of the first property that fails.
    """
    case = AnalysisCase(analysis, model, list(batches), several)
    start = State.of(model)
    return run_checks(CHECKS, case, partial(_still, start, model))


def check_result(result: Any) -> list[Check]:
    """Check what a result alone must satisfy, for one that is not measured on a model.

    Args:
        result: what an analysis returned.

    Returns:
        What was checked, and what did not apply and why.

    Raises:
        AssertionError: it begins with the name of the first property that fails.
    """
    return run_checks(RESULT_CHECKS, _Found(result))


@dataclass(frozen=True)
class _Found:
    result: Any


def _still(start: State, model: nn.Module, name: str) -> None:
    start.compare(model, f"{name}: a copy was changed, and the original with it")


# -- the properties ----------------------------------------------------------------------------------------------------


def model_is_not_changed(case: AnalysisCase) -> None:
    """Tensors, modules, config, record, requires_grad, gradients and the mode of each module stay as they were."""
    model = case.model()
    before, modes = State.of(model), modes_of(model)
    case.run(model)
    _unchanged(model, before, modes, "after the analysis")


def failure_changes_nothing(case: AnalysisCase) -> None:
    """If the model fails in the last of its passes, all of it is as it was."""
    model = case.model()
    before, modes = State.of(model), modes_of(model)
    _fail(case, model)
    _unchanged(model, before, modes, "after a pass that failed")


def no_hook_is_left(case: AnalysisCase) -> None:
    """No module has a hook that it did not have before, after a run and after one that failed."""
    model = case.model()
    case.run(model)
    assert_no_hook_left(model, hooks_of(case.original), "after the run")
    model = case.model()
    if _passes(case):
        _fail(case, model)
        assert_no_hook_left(model, hooks_of(case.original), "after a run that failed")


def nothing_global_changes(case: AnalysisCase) -> None:
    """Random generators, gradient mode, default dtype and threads are left alone."""
    with own_random_numbers(torch.device("cpu"), UNLIKELY):
        numbers, settings = random_numbers(), _settings()
        case.run()
        assert random_numbers() == numbers, "it uses the global random generators; draw from a torch.Generator"
    for name, value in _settings().items():
        assert value == settings[name], f"{name} is {value}, was {settings[name]}"


def data_are_not_changed(case: AnalysisCase) -> None:
    """The batches hold what they held."""
    batches = copy.deepcopy(case.batches)
    case.analysis(case.model(), batches)
    equal(tensors_in(batches), tensors_in(case.batches), "after the analysis the batches")


def same_result_twice(case: AnalysisCase) -> None:
    """Two runs on equal models give equal dictionaries, whatever mode their modules are in."""
    expected = case.result.to_dict()
    _alike(case.run(copy.deepcopy(case.original)).to_dict(), expected, "again", 0.0)
    _alike(case.run().to_dict(), expected, "with modules in training mode", 0.0)


def several_find_the_same(case: AnalysisCase) -> None:
    """Several processes that share the batches find what one finds, up to the order of sums."""
    if not case.several:
        raise NotApplicable("it is not said to run in several processes (several=)")
    if not (dist.is_initialized() or processes.started_by_torchrun()):
        raise NotApplicable("one process runs here; torchrun starts several")
    alone = case.result.to_dict()
    with processes.together():
        shared = case.run().to_dict()
    _alike(shared, alone, f"in {dist.get_world_size()} processes", SUMS)


def result_is_frozen(case: Any) -> None:
    """The result is a frozen dataclass."""
    kind = type(case.result)
    frozen = is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert frozen, f"a {kind.__name__} is no frozen dataclass"


def table_can_be_printed(case: Any) -> None:
    """`table()` is a `rich.table.Table` that prints in narrow and wide terminals."""
    table = _asked(case.result, "table")
    assert isinstance(table, Table), f"table() gave a {type(table).__name__}, not a rich.table.Table"
    for width in (80, 200):
        console = Console(width=width, file=StringIO())
        console.print(table)
        assert console.file.getvalue().strip(), f"nothing is printed in {width} columns"  # type: ignore[attr-defined]


def figure_can_be_drawn(case: Any) -> None:
    """`figure()` is a figure of plotly that shows something."""
    draw = _method(case.result, "figure")
    if find_spec("plotly") is None:
        raise NotApplicable("plotly is not installed (pip install 'actkit[report]')")
    from plotly.graph_objects import Figure

    figure = draw()
    assert isinstance(figure, Figure), f"figure() gave a {type(figure).__name__}, not a plotly Figure"
    assert len(figure.data), "figure() shows nothing"
    figure.to_json()


def page_can_be_written(case: Any) -> None:
    """Its page, or what its table and figure make one of, is one file below 3 MB that loads nothing."""
    if find_spec("jinja2") is None or find_spec("plotly") is None:
        raise NotApplicable("jinja2 or plotly is not installed (pip install 'actkit[report]')")
    written = page_of(case.result, "Result").html()  # which refuses what is larger
    loaded = re.findall(r"(?:src|href)\s*=|url\(|@import", re.sub(r"(?s)<(td|dd|title|script type).*?</", "", written))
    assert not loaded, f"the page loads something: {', '.join(loaded)}"


def dictionary_is_json(case: Any) -> None:
    """JSON takes `to_dict()` without NaN and Inf and with no key that is no text, and every field is in it."""
    content = _asked(case.result, "to_dict")
    try:
        again = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"to_dict(): {error}") from error
    _alike(again, content, "read back from JSON", 0.0)
    missing = [field.name for field in fields(case.result) if field.name not in content]
    assert not missing, f"to_dict() lacks {', '.join(missing)}"


RESULT_CHECKS: dict[str, Callable[[Any], None]] = {
    "the result is frozen": result_is_frozen,
    "the table can be printed": table_can_be_printed,
    "the figure can be drawn": figure_can_be_drawn,
    "the page can be written": page_can_be_written,
    "the dictionary is JSON": dictionary_is_json,
}
CHECKS: dict[str, Callable[[AnalysisCase], None]] = {
    "the model is not changed": model_is_not_changed,
    "a failed run changes nothing": failure_changes_nothing,
    "no hook is left behind": no_hook_is_left,
    "nothing global changes": nothing_global_changes,
    "the data are not changed": data_are_not_changed,
    **RESULT_CHECKS,
    "the same result twice": same_result_twice,
    "several processes find the same": several_find_the_same,
}


# -- how runs are provoked and compared --------------------------------------------------------------------------------


class _Planned(Exception):
    pass


def _passes(case: AnalysisCase) -> int:
    """How often the analysis calls the model."""
    model, calls = case.model(), [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    model.register_forward_pre_hook(count)
    case.run(model)
    return calls[0]


def _fail(case: AnalysisCase, model: nn.Module) -> None:
    """Run the analysis on a model that fails in its last pass."""
    left = [_passes(case)]
    if not left[0]:
        raise NotApplicable("it never calls the model as a whole")

    def fail(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise _Planned

    handle = model.register_forward_pre_hook(fail)
    try:
        case.run(model)
    except _Planned:
        return
    finally:
        handle.remove()
    raise AssertionError("an error inside the model was swallowed")


def _unchanged(model: nn.Module, before: State, modes: dict[str, bool], when: str) -> None:
    before.compare(model, when)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, f"{when}: {name} has a gradient"
    for path, training in modes_of(model).items():
        assert training == modes[path], (
            f"{when}: {path or 'the model'} is in {'training' if training else 'evaluation'} mode"
        )


def _settings() -> dict[str, Any]:
    return {
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_num_threads()": torch.get_num_threads(),
    }


def _method(result: Any, name: str) -> Callable[[], Any]:
    assert isinstance(result, Result), (
        f"a {type(result).__name__} is no Result: it needs table(), figure() and to_dict()"
    )
    return getattr(result, name)


def _asked(result: Any, name: str) -> Any:
    return _method(result, name)()


def _alike(found: Any, expected: Any, what: str, relative: float, at: str = "") -> None:
    """Assert that two results' dictionaries are equal, numbers up to a relative difference; tuples are lists."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys(), f"{what}: other keys at {at or 'the top'}"
        for key, value in expected.items():
            _alike(found[key], value, what, relative, f"{at}.{key}".removeprefix("."))
    elif isinstance(expected, list | tuple):
        assert isinstance(found, list | tuple) and len(found) == len(expected), f"{what}: {at} has another length"
        for index, value in enumerate(expected):
            _alike(found[index], value, what, relative, f"{at}[{index}]")
    elif isinstance(expected, float) and isinstance(found, float):
        same = math.isclose(found, expected, rel_tol=relative, abs_tol=relative * 1e-3) or found == expected
        assert same or (math.isnan(found) and math.isnan(expected)), f"{what}: {at} is {found}, was {expected}"
    else:
        assert found == expected, f"{what}: {at} is {found!r}, was {expected!r}"
