"""The one progress bar: it appears on stderr once something takes longer than two seconds, and goes when it is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from threading import Lock, Timer
from typing import TypeVar

from actkit.core import processes

Item = TypeVar("Item")

DELAY = 2.0  # seconds before a bar is shown
_shown = Lock()  # one bar at a time: what runs inside a shown one stays quiet


def track(iterable: Iterable[Item], description: str, total: int | None = None, enabled: bool = True) -> Iterator[Item]:
    """Yield the items of `iterable` while a bar counts them.

    total: how many there are, where `len(iterable)` does not say. Nothing is shown where stderr is no terminal, and by
    the first of several processes only.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (enabled and console.is_terminal and processes.is_first()):
        yield from iterable
        return
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(description, total=total)
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
            progress.advance(task)
    finally:
        timer.cancel()
        timer.join()  # it may just be starting the bar
        if showing:
            progress.stop()
            _shown.release()
