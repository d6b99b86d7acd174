"""What `tests/conftest.py` asks of slow tests: the mark with a reason; who took too long without it is named."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CONFTEST = runpy.run_path(str(Path(__file__).with_name("conftest.py")))


class Screen:
    """What pytest prints its summary with."""

    def __init__(self, **stats: list[Any]) -> None:
        self.stats, self.lines = stats, []

    def section(self, title: str) -> None:
        self.lines.append(title)

    def line(self, text: str) -> None:
        self.lines.append(text.strip())


def report(name: str, duration: float, *marks: str, when: str = "call") -> Any:
    return SimpleNamespace(nodeid=name, duration=duration, keywords=dict.fromkeys(marks, 1), when=when)


def test_late_tests_without_the_mark_are_named() -> None:
    late = [report("marked", 50, "slow"), report("late", 21), report("later", 30), report("quick", 1)]
    screen = Screen(passed=[*late, report("set up", 40, when="setup")], failed=[report("failed", 22)])
    CONFTEST["pytest_terminal_summary"](screen)
    assert screen.lines[0].startswith("over 20 s without the mark slow")
    assert screen.lines[1:] == ["30.0 s  later", "22.0 s  failed", "21.0 s  late"]
    quiet = Screen(passed=[report("quick", 1)])
    CONFTEST["pytest_terminal_summary"](quiet)
    assert quiet.lines == []


def test_the_mark_needs_a_reason() -> None:
    def marked(*marks: Any) -> Any:
        return SimpleNamespace(nodeid="a test", iter_markers=lambda name: [m.mark for m in marks if m.name == name])

    check = CONFTEST["pytest_collection_modifyitems"]
    check([marked(), marked(pytest.mark.gpu), marked(pytest.mark.slow(reason="it trains for a minute"))])
    for mark in (pytest.mark.slow, pytest.mark.slow(reason="")):
        with pytest.raises(pytest.UsageError, match="a test: the mark slow needs a reason"):
            check([marked(mark)])
