"""What a search estimates, what its minutes leave out, and what it does not measure to the end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny_models
from made_up import candidate

from actkit.core.ground.errors import ActkitError
from actkit.core.recipe.recipe import Recipe
from actkit.search import budget as module
from actkit.search import search as searching
from actkit.search.budget import Budget
from actkit.search.candidates import given
from actkit.search.search import optimize

SPLITS = SimpleNamespace(calibration=SimpleNamespace(tokens=50, rows=5), test=SimpleNamespace(tokens=100))
OPTIONS = {"data": "random", "speed": False, "threads": 1, "progress": False}


def transforms(names: str) -> list:
    return list(Recipe.of(names))


def test_an_estimate_adds_up_what_was_seen():
    budget = Budget(SPLITS)
    budget.original(candidate("original", parts={"pass": 10.0, "search": 5.0, "test": 10.0, "rest": 1.0}))
    first = budget.estimate(transforms("rtn"))
    assert first == pytest.approx(module.HEADS * 15 + module.FRESH + 2)  # it needs no data
    needy = transforms("teal")
    passes = 3 + needy[0].passes(50, 5)  # the plan's and the walk's, one stream, and its own
    assert budget.estimate(needy) == pytest.approx(first + 10 * 50 / 100 * passes)
    budget.seen(candidate("a", parts={"make": 1.0, "search": 4.0, "test": 8.0, "rest": 3.0}))
    assert budget.estimate(transforms("rtn")) == 15.0
    budget.seen(candidate("b", parts={"make": 1.0, "search": 0.5}))  # stopped: it tells nothing of the whole
    assert budget.estimate(transforms("rtn")) == 15.0 and budget.measured == 2
    assert budget.estimate(None) == 0.0


def test_minutes_leave_out_what_does_not_fit(monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    budget = Budget(SPLITS, minutes=2.0, started=now)
    assert budget.over(120.0, "it") is None
    now = 190.0
    assert budget.left == 30.0 and budget.over(30.0, "it") is None
    assert budget.over(31.0, "teal") == "teal needs about 31 s, and of 2 minutes 30 s are left"
    assert Budget(SPLITS).over(1e9, "it") is None
    for wrong in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"minutes: .* was given; give more than 0"):
            module.check_minutes(wrong)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    tiny_models.build("llama", **sizes).save_pretrained(folder)
    return str(folder)


AWQ = {"awq": {"bits": 4, "group_size": 32}}
LIST = [[AWQ], [AWQ, {"wina": {"sparsity": 0.25}}], [{"rtn": {"bits": 8, "group_size": 32}}]]


NAMES = [each.name for each in given(Recipe.parse({"actkit": 1, "transforms": each}) for each in LIST)]


def recipes() -> list[Recipe]:
    return [Recipe.parse({"actkit": 1, "transforms": each}) for each in LIST]


@pytest.mark.slow(reason="whole searches, which save and measure each candidate")
def test_what_loses_too_much_is_stopped_and_nothing_is_built_on_it(llama, tmp_path, monkeypatch):
    passes: list[int] = []
    measured = searching.Workshop._measured

    def counted(self, model, batches, stop=None):
        passes.append(batches is self.splits.test)
        return measured(self, model, batches, stop)

    monkeypatch.setattr(searching.Workshop, "_measured", counted)
    out = tmp_path / "out"
    found = optimize(llama, out=out, recipes=recipes(), max_loss=1e-3, **OPTIONS)
    awq, stacked, rtn = found.candidates
    assert awq.failed is None and awq.stopped.startswith(("stopped after", "loss "))
    assert awq.search_loss.low > 1e-3 and awq.loss is awq.disk_bytes is awq.proof is None
    assert (
        stacked.stopped.startswith(f"not made, as it goes on from {awq.name}: {awq.stopped}")
        and "make" not in stacked.parts
    )
    assert found.verdict.of(awq.name).against == (awq.stopped,)
    tests = 1 + (rtn.loss is not None)
    assert sum(passes) == tests and len(passes) == 3 + tests  # search: original, awq, rtn
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["header", "original", *["candidate"] * 3]
    assert all(line["max_loss"] == 1e-3 and line["estimated_seconds"] >= 0 for line in lines[2:])
    page = (out / "index.html").read_text()
    assert "and not measured further" in page

    monkeypatch.undo()
    found = optimize(llama, out=out, recipes=recipes(), max_loss=1e9, resume=True, **OPTIONS)  # a limit for all of them
    assert all(each.stopped is None and each.loss is not None and each.passes > 0 for each in found.candidates)


@pytest.mark.slow(reason="whole searches, which save and measure each candidate")
def test_a_search_without_time_says_so_and_goes_on_later(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(ActkitError, match=r"minutes: 0\.0001 were over before one candidate was measured \(.*rtn"):
        optimize(llama, out=out, recipes=recipes()[2:], minutes=1e-4, **OPTIONS)
    with pytest.raises(ValueError, match="minutes: 0 was given"):
        optimize(llama, out=out, minutes=0, resume=True, **OPTIONS)
    found = optimize(llama, out=out, recipes=recipes()[2:], minutes=60, resume=True, max_loss=1.0, **OPTIONS)
    assert [each.name for each in found.candidates] == [NAMES[2]] and found.settings["minutes"] == 60
    original = json.loads((out / "journal.jsonl").read_text().splitlines()[1])
    assert original["measured"]["parts"]["pass"] > 0

    monkeypatch.setattr(Budget, "over", lambda self, seconds, what: None if what == NAMES[2] else f"{what} is too long")
    monkeypatch.setattr(searching.Workshop, "measure", lambda *_: pytest.fail("there is no time"))
    found = optimize(llama, out=out, recipes=recipes()[1:], minutes=60, resume=True, max_loss=1.0, **OPTIONS)
    assert [each.name for each in found.candidates] == [NAMES[2]]
    assert (NAMES[1], f"minutes=60: {NAMES[1]} is too long") in {(e.what, e.reason) for e in found.left_out}


@pytest.mark.slow(reason="whole searches, which save and measure each candidate")
def test_a_candidate_ends_when_the_minutes_do(llama, tmp_path, monkeypatch):
    out, passes = tmp_path / "out", []
    real = searching.Workshop._measured

    def measured(shop, model, batches, stop=None):
        if model is not shop.originals:
            passes.append(batches)
            monkeypatch.setattr(Budget, "left", property(lambda self: 0.0 if len(passes) == 3 else 60.0))
        return real(shop, model, batches, stop)

    monkeypatch.setattr(searching.Workshop, "_measured", measured)
    options = {"recipes": recipes()[1:], "max_loss": 1e9, **OPTIONS}
    found = optimize(llama, out=out, minutes=1, **options)
    first, second = NAMES[1], NAMES[2]
    assert [each.name for each in found.candidates] == [first] and len(passes) == 3  # its two, and one begun
    assert (second, "minutes=1: they were over before it was measured") in {(e.what, e.reason) for e in found.left_out}

    monkeypatch.undo()
    found = optimize(llama, out=out, resume=True, **options)
    assert [each.name for each in found.candidates] == [first, second]


@pytest.mark.slow(reason="whole searches, which save and measure each candidate")
def test_lines_tell_how_far_it_is(llama, tmp_path, capfd):
    optimize(llama, out=tmp_path / "out", recipes=recipes()[2:], max_loss=1.0, **{**OPTIONS, "progress": True})
    said = capfd.readouterr().err
    assert "1 candidate, about" in said
    assert f"{NAMES[2]}: loss" in said and "s were estimated)" in said


def test_loss_of_a_stopped_candidate_in_the_table():
    from actkit.search.figures import _candidate_cells

    stopped = candidate(loss=0.34, half=0.05, stopped="stopped after 20 documents")
    cells = _candidate_cells(stopped, SimpleNamespace(original=candidate("original")))
    assert cells[0].startswith("34%") and cells[1:] == ["-", "-", "-"]
