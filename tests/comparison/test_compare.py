"""A comparison from names to page: what it measures, that it goes on where it was stopped, what it refuses."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import actkit
from actkit.cli.main import app
from actkit.comparison import compare
from actkit.comparison.compare import compare_functions
from actkit.comparison.results import Comparison
from actkit.comparison.tasks import DigitsMlp, Training
from actkit.core.ground.errors import NonFiniteError
from actkit.search.journal import JournalError

SMALL: dict[str, Any] = {"on": "digits-mlp", "steps": 6, "seeds": 2, "width": 48, "progress": False}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("compared") / "out"
    return compare_functions("silu,relu,gr_kan", out=out, **SMALL), out


def test_a_row_for_each_arm(done: tuple[Comparison, Path]) -> None:
    result, _ = done
    assert [row.name for row in result.rows] == ["silu", "relu", "gr_kan"]
    base = result.baseline
    assert base.word == "baseline" and base.difference is None
    assert base.parameters[""] == 48 * 75 + 10
    for row in result.rows[1:]:
        assert abs(row.parameters[""] - base.parameters[""]) <= 0.01 * base.parameters[""]
        assert row.difference is not None
        paired = [one - other for one, other in zip(row.scores, base.scores, strict=True)]
        assert row.difference.value == pytest.approx(sum(paired) / len(paired))
        assert row.word in ("better", "worse", "no difference seen")
    assert all(row.rate in result.settings["rates"] and row.milliseconds > 0 for row in result.rows)
    forward = 2 * (64 * 48 + 48 * 10)
    assert base.flops == forward + forward + 2 * 48 * 10  # backward: both weights, and the inputs of the second layer
    assert result.row("relu").saved_bytes < base.saved_bytes  # a ReLU keeps its output alone


def test_what_is_written_and_shown(done: tuple[Comparison, Path]) -> None:
    result, out = done
    assert sorted(each.name for each in out.iterdir()) == ["index.html", "journal.jsonl", "results.json"]
    written = json.loads((out / "results.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    page = (out / "index.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    for row in result.rows:
        assert row.name in page
    console = Console(width=80, record=True, file=io.StringIO())
    sizes = {"wine": 7823, "digits": 34510}  # of a task with parts
    rows = tuple(replace(row, parameters=sizes, saved_bytes=123_456.0) for row in result.rows)
    console.print(replace(result, rows=rows).table())
    shown = console.export_text()
    assert "silu" in shown and "baseline" in shown and "…" not in shown
    assert shown.count("123 KB") == 3  # nothing is cut off at the right


def measured(result: Comparison) -> list[Any]:
    return [(row.name, row.rate, row.scores, row.word, row.difference, row.steps) for row in result.rows]


def test_a_stopped_comparison_ends_as_an_uninterrupted_one(
    done: tuple[Comparison, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = DigitsMlp.trained, []

    def trained(self: Any, *given: Any) -> Training:
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(self, *given)

    monkeypatch.setattr(DigitsMlp, "trained", trained)
    with pytest.raises(KeyboardInterrupt):
        compare_functions("silu,relu,gr_kan", out=tmp_path / "out", **SMALL)
    found = compare_functions("silu,relu,gr_kan", out=tmp_path / "out", resume=True, **SMALL)
    assert measured(found) == measured(done[0])
    assert len(calls) == 1 + 3 * 3 * 2  # none was trained twice, but that in which it was stopped
    count = len(calls)
    again = compare_functions("silu,relu,gr_kan", out=tmp_path / "out", resume=True, **SMALL)
    assert len(calls) == count and again.rows == found.rows
    assert again.training_seconds == found.training_seconds
    with pytest.raises(JournalError, match=r"of another comparison: settings\.steps was 6 and is 7"):
        compare_functions("silu,relu,gr_kan", out=tmp_path / "out", resume=True, **{**SMALL, "steps": 7})


def test_equal_time_gives_slower_arms_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compare.measure_steps

    def measured_steps(models: Any, *given: Any, **more: Any) -> Any:
        found = plain(models, *given, rounds=1, **more)
        times = {"silu": 2.0, "relu": 1.0, "gr_kan": 5.0}
        return {name: compare.StepCost(times[name], 9.0, each.flops, each.saved_bytes) for name, each in found.items()}

    monkeypatch.setattr(compare, "measure_steps", measured_steps)
    result = compare_functions("silu,relu,gr_kan", equal="time", **SMALL)
    assert [row.steps for row in result.rows] == [6, 12, 2]
    assert all(row.seconds == pytest.approx(0.012, rel=0.2) for row in result.rows)
    assert any("equal time" in note for note in result.notes)


def test_a_training_that_fails_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DigitsMlp.trained

    def trained(self: Any, model: Any, part: str, rate: float, *more: Any) -> Training:
        if any(type(each).__name__ == "GroupRational" for each in model.modules()):
            raise NonFiniteError("training: the loss of step 3 is nan; lower learning_rate")
        if rate > 5e-3:
            return Training(float("inf"), 10.0, 1)  # a rate too high is not chosen
        return plain(self, model, part, rate, *more)

    monkeypatch.setattr(DigitsMlp, "trained", trained)
    result = compare_functions("silu,gr_kan", out=tmp_path / "out", **SMALL)
    row = result.row("gr_kan")
    assert row.word == "failed" and row.mean is None and row.rate is None and "at all three rates" in str(row.failed)
    assert result.baseline.rate != 1e-2
    assert "step 3 is nan" in (tmp_path / "out" / "index.html").read_text()


def test_layers_that_choose_are_pruned_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare_functions("silu,s_kan", on="digits-mlp", steps=4, seeds=2, width=390, progress=False)
    row = result.row("s_kan")
    assert row.kept is not None and row.kept[1] < row.parameters[""]
    assert any("pruned" in note for note in result.notes)


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(text: str, names: str = "silu,relu", **settings: Any) -> None:
        with pytest.raises(ValueError, match=text):
            compare_functions(names, **{**SMALL, **settings})

    refused("seeds: 1 was given", seeds=1)
    refused("the same", "silu,relu,silu")
    refused("Did you mean digits-", on="digits")
    refused("max is pooling, which digits-mlp does not compare.*max fits digits-cnn", "silu,max")
    refused("max is pooling, which text does not compare", "silu,max", on="text")
    refused(
        "width: .* cannot have the .* parameters of silu within 1%.*nearest is the width .*fits all arms",
        "silu,bspline_kan",
    )
    refused("rates", rates=(1e-3, 1e-3, 1e-2))
    refused("steps: 0", steps=0)
    refused("equal: 'flops'", equal="flops")
    refused("seed: -1", seed=-1)
    refused("no folder with a journal", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused("exists already", out=tmp_path / "mine")
    refused("no comparison left it", out=tmp_path / "mine", overwrite=True)


def test_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["compare-functions", "relu,tanh", "--on", "digits-mlp", "--out", str(out), "--steps", "4", "--seeds", "2"]
    given = [*words, "--width", "16", "--json"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0 and (out / "index.html").exists()
    assert json.loads(result.stdout)["rows"][1]["name"] == "tanh"
    assert actkit.compare_functions is compare_functions
