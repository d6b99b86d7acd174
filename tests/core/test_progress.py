"""The time that a bar says is left."""

from __future__ import annotations

import io
import time

import pytest
import rich.console

from actkit.core import progress


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
