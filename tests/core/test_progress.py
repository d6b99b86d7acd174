"""The time that a bar says is left."""

from __future__ import annotations

import io
import time

import pytest
import rich.console

from actkit.core.ground import progress


@pytest.mark.parametrize(
    ("elapsed", "done", "total", "at", "left"),
    [
        (40.0, 0, 22, 0.0, None),  # nothing to go by yet
        (40.0, 3, None, 40.0, None),
        (60.0, 1, 22, 60.0, 21 * 60.0),
        (90.0, 1, 22, 60.0, 20.5 * 60.0),  # half of the second item
        (500.0, 1, 3, 60.0, 0.0),  # later than thought
        (44.0, 22, 22, 44.0, 0.0),
    ],
)
def test_remaining_time_is_that_of_the_mean_item(
    elapsed: float, done: int, total: int | None, at: float, left: float | None
) -> None:
    assert progress.remaining(elapsed, done, total, at) == left


def test_a_bar_shows_what_is_left_after_one_long_item(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **_: console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(progress, "DELAY", 0.0)
    for _ in progress.track(range(3), "Changing block by block"):
        time.sleep(0.4)
    text = screen.getvalue()
    assert "Changing block by block" in text
    assert "-:--:-- left" in text and "0:00:01 left" in text


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for _ in progress.track(range(4), "Walking"):
        for _ in progress.track(range(2), "Inside"):  # quiet: one at a time
            now += 10.0
    assert capsys.readouterr().err.splitlines() == ["Walking: 2 of 4, 40 s", "Walking: 4 of 4, 80 s"]
    for _ in progress.track(iter("ab"), "Short"):
        now += 0.9
    progress.step("quiet", enabled=False)
    list(progress.track(range(3), "Off", enabled=False))
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        for _ in progress.track(range(2), "Broken"):
            now += 50.0
            raise ZeroDivisionError
    progress.step("rtn: done")
    for _ in progress.track(iter("ab"), "After it"):
        now += 1.5
    assert capsys.readouterr().err.splitlines() == ["rtn: done", "After it: 2, 3 s"]
