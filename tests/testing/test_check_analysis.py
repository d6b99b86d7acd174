"""Every analysis passes, alone and in two processes; each kind of broken one is caught by the right property."""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analyses import ANALYSES, WITHOUT_A_MODEL, public_classes
from plotly.graph_objects import Figure, Scatter
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from actkit.core.edit.edits import set_module
from actkit.core.ground import registry
from actkit.core.ground.errors import RecipeError
from actkit.core.ground.results import Result
from actkit.core.recipe.analysis import parse_analysis, settings_of
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import AbsMax
from actkit.search.profile import profile
from actkit.search.results import Optimization
from actkit.sparsity.lazy_neuron.neuron_activity import neuron_activity
from actkit.testing import Check, check_analysis, tiny_batches, tiny_model
from actkit.testing.analyses import CHECKS, RESULT_CHECKS, check_result
from actkit.testing.checks import State

WORKER = Path(__file__).with_name("two_processes.py")


def outcomes(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.outcome for check in checks}


@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_pass(name: str) -> None:
    made = ANALYSES[name]
    checks = check_analysis(made.run, made.model(), made.batches(), several=made.several)
    assert [check.name for check in checks] == list(CHECKS)
    assert {check.name for check in checks if check.outcome != "holds"} == {"several processes find the same"}


@pytest.mark.parametrize("name", WITHOUT_A_MODEL)
def test_results_without_a_model_pass(name: str) -> None:
    found = outcomes(check_result(WITHOUT_A_MODEL[name]()))
    assert found == dict.fromkeys(RESULT_CHECKS, "holds")


def test_every_analysis_is_in_the_table() -> None:
    """Whatever draws a figure is a Result, and stands in one of the tables; `table()` always gives a Table."""
    drawn = {cls.__name__ for cls in public_classes() if hasattr(cls, "figure") and cls is not Result}
    assert drawn == {made.result for made in ANALYSES.values()} | {
        type(make()).__name__ for make in WITHOUT_A_MODEL.values()
    }, "add the new analysis to tests/testing/analyses.py"
    for cls in public_classes():
        if inspect.isfunction(table := vars(cls).get("table")) and len(inspect.signature(table).parameters) == 1:
            assert table.__annotations__["return"] == "Table", f"{cls.__name__}.table() gives something else"


def test_every_registered_analysis_is_in_the_table() -> None:
    assert {name for name in registry.analysis_names() if name not in ANALYSES} == set()


@pytest.mark.parametrize("name", registry.analysis_names())
def test_settings_are_refused_by_name(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"analysis: {name}: colour: no such setting"):
        parse_analysis(f"{name}:colour=red")
    assert parse_analysis(name).settings == {}


def test_an_analysis_runs_by_its_name_as_the_function_does() -> None:
    made = ANALYSES["neuron_activity"]
    by_name = parse_analysis({"neuron_activity": {"threshold": 0.1}})
    found = by_name(made.model(), made.batches(), progress=False)
    assert found.to_dict() == neuron_activity(made.model(), made.batches(), threshold=0.1, progress=False).to_dict()
    assert parse_analysis(by_name) is by_name
    assert set(settings_of("profile", profile).model_fields) == {"sites"}  # no functions, no data
    with pytest.raises(RecipeError, match=r"threshold: 'high' was given"):
        parse_analysis("neuron_activity:threshold=high")
    with pytest.raises(RecipeError, match=r"'neuron_activty' is not known. Did you mean neuron_activity"):
        parse_analysis("neuron_activty")


@pytest.mark.slow(reason="two processes, which import everything, run all analyses")
def test_two_processes_find_the_same(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in group.items()}}
        environment["PYTHONPATH"] = os.pathsep.join([str(WORKER.parent), *sys.path])
        command = [sys.executable, str(WORKER), str(tmp_path / f"{rank}.json")]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        said = [process.communicate(timeout=240)[0].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        several = {name for name, made in ANALYSES.items() if made.several}
        assert found == {**dict.fromkeys(several, "holds"), "forgets the others": "is caught"}


def test_a_page_of_the_search_prints_as_its_parts() -> None:
    """The table of a search is one page of several parts, so that each result gives one kind of thing."""
    assert Optimization.table.__annotations__["return"] == "Table"
    parts = [Text("headline"), "", Table("a", "b"), Text("a line that is longer than the terminal is wide " * 3)]
    page = Table.grid()
    for part in parts:
        page.add_row(part)
    shown = []
    for what in ([page], parts):
        console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        for each in what:
            console.print(each)
        shown.append([line.rstrip() for line in console.export_text().splitlines()])
    assert shown[0] == shown[1]


# -- broken analyses ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Largest:
    """A sound result: the largest hidden value of each block."""

    values: dict[str, float]

    def table(self) -> Any:
        table = Table("site", "largest")
        for site, value in self.values.items():
            table.add_row(site, f"{value:.3g}")
        return table

    def figure(self) -> Any:
        return Figure(Scatter(y=list(self.values.values())))

    def to_dict(self) -> dict[Any, Any]:
        return {"values": self.values}


def largest(model: nn.Module, batches: Any, result: Any = Largest) -> Any:
    """A sound analysis."""
    seen = record(model, {"mlp.hidden": AbsMax()}, batches, progress=False)
    return result({str(site): float(statistic.value.max()) for site, statistic in seen.items()})


def changes_a_weight(model: Any, batches: Any) -> Any:
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    return largest(model, batches)


def leaves_a_gradient(model: Any, batches: Any) -> Any:
    model(**batches[0]).logits.sum().backward()
    return largest(model, batches)


def leaves_evaluation_mode(model: Any, batches: Any) -> Any:
    model.eval()
    return largest(model, batches)


def freezes(model: Any, batches: Any) -> Any:
    model.requires_grad_(False)
    return largest(model, batches)


def forgets_to_restore(model: Any, batches: Any) -> Any:
    old = model.model.layers[0].mlp.act_fn
    set_module(model, "model.layers.0.mlp.act_fn", nn.ReLU())
    found = largest(model, batches)
    set_module(model, "model.layers.0.mlp.act_fn", old)
    return found


def swallows(model: Any, batches: Any) -> Any:
    try:
        return largest(model, batches)
    except Exception:
        return Largest({})


def leaves_a_hook(model: Any, batches: Any) -> Any:
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return largest(model, batches)


def leaves_a_hook_after_errors(model: Any, batches: Any) -> Any:
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    found = largest(model, batches)
    handle.remove()
    return found


def seeds(model: Any, batches: Any) -> Any:
    torch.manual_seed(0)
    return largest(model, batches)


def seeds_numpy(model: Any, batches: Any) -> Any:
    np.random.seed(0)
    random.seed(0)
    return largest(model, batches)


def takes_threads(model: Any, batches: Any) -> Any:
    torch.set_num_threads(torch.get_num_threads() + 1)
    return largest(model, batches)


def cuts_batches(model: Any, batches: Any) -> Any:
    batches[0]["input_ids"] = (batches[0]["input_ids"] + 1) % 40
    return largest(model, batches)


def draws(model: Any, batches: Any) -> Any:
    found = largest(model, batches)
    return Largest({site: value + next(DRAWN) for site, value in found.values.items()})


DRAWN = iter(range(1000))


def goes_by_the_mode(model: Any, batches: Any) -> Any:
    found = largest(model, batches)
    return Largest({site: value + float(model.training) for site, value in found.values.items()})


def giving(kind: type) -> Any:
    return lambda model, batches: largest(model, batches, kind)


@dataclass
class Thawed:
    values: dict[str, float]
    table, figure, to_dict = Largest.table, Largest.figure, Largest.to_dict


class NoTable:
    def __init__(self, values: Any) -> None:
        self.values = values


@dataclass(frozen=True)
class Words(Largest):
    def table(self) -> Any:
        return "text"


@dataclass(frozen=True)
class NoFigure:
    values: dict[str, float]
    table, to_dict = Largest.table, Largest.to_dict


@dataclass(frozen=True)
class Empty(Largest):
    def figure(self) -> Any:
        return Figure()


@dataclass(frozen=True)
class Numbers(Largest):
    def figure(self) -> Any:
        return list(self.values.values())


@dataclass(frozen=True)
class NotANumber(Largest):
    def to_dict(self) -> Any:
        return {"values": self.values, "spread": math.nan}


@dataclass(frozen=True)
class Tensors(Largest):
    def to_dict(self) -> Any:
        return {"values": torch.tensor(list(self.values.values()))}


@dataclass(frozen=True)
class Sites(Largest):
    def to_dict(self) -> Any:
        return {"values": dict(enumerate(self.values.values()))}


@dataclass(frozen=True)
class Partial(Largest):
    def to_dict(self) -> Any:
        return {"largest": max(self.values.values())}


BROKEN = [
    (
        changes_a_weight,
        r"the model is not changed: after the analysis: model\.layers\.1\.mlp\.down_proj\.weight has other",
    ),
    (leaves_a_gradient, "the model is not changed: after the analysis: .* has a gradient"),
    (leaves_evaluation_mode, "the model is not changed: after the analysis: the model is in evaluation mode"),
    (freezes, "the model is not changed: after the analysis: requires_grad differs"),
    (
        forgets_to_restore,
        r"a failed run changes nothing: after a pass that failed: another module stands at 'model",
    ),
    (swallows, "a failed run changes nothing: an error inside the model was swallowed"),
    (leaves_a_hook, r"no hook is left behind: after the run: model\.layers\.0\._forward_hooks"),
    (leaves_a_hook_after_errors, r"no hook is left behind: after a run that failed: model\.layers\.0\._forward_hooks"),
    (seeds, "nothing global changes: it uses the global random generators"),
    (seeds_numpy, "nothing global changes: it uses the global random generators"),
    (takes_threads, r"nothing global changes: torch.get_num_threads\(\) is"),
    (cuts_batches, "the data are not changed: after the analysis the batches differ"),
    (giving(Thawed), "the result is frozen: a Thawed is no frozen dataclass"),
    (giving(NoTable), "the result is frozen: a NoTable is no frozen dataclass"),
    (giving(Words), r"the table can be printed: table\(\) gave a str, not a rich.table.Table"),
    (giving(NoFigure), "the table can be printed: a NoFigure is no Result: it needs"),
    (giving(Empty), r"the figure can be drawn: figure\(\) shows nothing"),
    (giving(Numbers), r"the figure can be drawn: figure\(\) gave a list, not a plotly Figure"),
    (giving(NotANumber), r"the dictionary is JSON: to_dict\(\): Out of range float values"),
    (giving(Tensors), r"the dictionary is JSON: to_dict\(\): Object of type Tensor is not JSON serializable"),
    (giving(Sites), "the dictionary is JSON: read back from JSON: other keys at values"),
    (giving(Partial), r"the dictionary is JSON: to_dict\(\) lacks values"),
    (draws, r"the same result twice: again: values\.blocks\.0\.mlp\.hidden is"),
    (goes_by_the_mode, r"the same result twice: with modules in training mode: values\.blocks\.0"),
]


@pytest.mark.parametrize(("broken", "text"), BROKEN, ids=[text.split(":")[0] for _, text in BROKEN])
def test_broken_analyses_are_caught(broken: Any, text: str) -> None:
    model, threads = tiny_model("llama"), torch.get_num_threads()
    before = State.of(model)
    try:
        with pytest.raises(AssertionError, match=f"^({text})"):
            check_analysis(broken, model, tiny_batches("llama"))
    finally:
        torch.set_num_threads(threads)
    before.compare(model, "the model that was checked")


def test_a_sound_one_passes_and_says_what_was_not_asked() -> None:
    checks = check_analysis(largest, tiny_model("llama"), tiny_batches("llama"))
    reasons = {check.name: check.reason for check in checks if check.outcome != "holds"}
    assert reasons == {
        "several processes find the same": "it is not said to run in several processes (several=)",
    }
