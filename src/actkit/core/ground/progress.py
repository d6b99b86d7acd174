"""The one progress bar: it appears on stderr once something takes longer than two seconds, and goes when it is done.

If stderr is no terminal, what took so long gets a line there when it is done, and one every half minute until then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from threading import Lock, Timer
from typing import Any, TypeVar

Item = TypeVar("Item")

DELAY = 2.0  # seconds before a bar is shown
EVERY = 30.0  # seconds between two lines on the same work
_shown = Lock()  # one bar at a time: what runs inside a shown one stays quiet


def track(iterable: Iterable[Item], description: str, total: int | None = None, enabled: bool = True) -> Iterator[Item]:
    """Yield the items of `iterable` while a bar counts them; only the first of several processes shows one.

    Args:
        iterable: whose items are counted.
        description: beside the bar.
        total: how many there are, if `len(iterable)` does not say.
        enabled: False shows nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from actkit.core.ground import processes  # needs torch, which the embedded texts do without

    console = Console(stderr=True)
    if not (enabled and processes.is_first()):
        yield from iterable
        return
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not console.is_terminal:
        yield from _lines(iterable, description, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _left_column())
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(description, total=total, at=0.0)
    showing = False

    def show() -> None:
        nonlocal showing
        if _shown.acquire(blocking=False):
            showing = True
            progress.start()

    timer = Timer(DELAY, show)  # a thread, so that the bar also appears during a long first item
    timer.daemon = True
    timer.start()
    try:
        for item in iterable:
            yield item
            progress.update(task, advance=1, at=progress.tasks[0].elapsed)
    finally:
        timer.cancel()
        timer.join()  # it may just be starting the bar
        if showing:
            progress.stop()
            _shown.release()


def _lines(iterable: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    """Yield the items; of what takes longer than DELAY, a line on stderr every EVERY seconds and one at the end."""
    outer = _shown.acquire(blocking=False)  # what runs inside is quiet
    started = told = time.monotonic()
    done = 0
    of = "" if total is None else f" of {total}"
    try:
        for item in iterable:
            yield item
            done += 1
            now = time.monotonic()
            if outer and now - told >= EVERY and done != total:
                told = now
                say(f"{description}: {done}{of}, {now - started:.0f} s")
        if outer and time.monotonic() - started >= DELAY:
            say(f"{description}: {done}{of}, {time.monotonic() - started:.0f} s")
    finally:
        if outer:
            _shown.release()


def say(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def step(text: str, enabled: bool = True) -> None:
    """A line on a finished step, if stderr is no terminal; there the bar tells."""
    if enabled and not sys.stderr.isatty():
        say(text)


def remaining(elapsed: float, done: int, total: int | None, at: float) -> float | None:
    """Estimate the seconds that are left, each further item taking the mean of those that are done.

    Args:
        elapsed: seconds since the start.
        done: items.
        total: items.
        at: of `elapsed`, when the last item was done.

    Returns:
        Seconds; None while that is unknown.
    """
    if not done or total is None:
        return None
    return max(0.0, at / done * (total - done) - (elapsed - at))


def _left_column() -> Any:
    """The remaining time, from the first item on; rich's own column looks back 30 s, and a block may take longer."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Left(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            total = None if task.total is None else int(task.total)
            left = remaining(task.elapsed or 0.0, int(task.completed), total, task.fields["at"])
            if left is None:
                return Text("-:--:-- left", style="progress.remaining")
            return Text(f"{timedelta(seconds=round(left))} left", style="progress.remaining")

    return Left()
