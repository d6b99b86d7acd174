"""The one progress bar: it appears on stderr once something takes longer than two seconds, and goes when it is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from threading import Lock, Timer
from typing import Any, TypeVar

Item = TypeVar("Item")

DELAY = 2.0  # seconds before a bar is shown
_shown = Lock()  # one bar at a time: what runs inside a shown one stays quiet


def track(iterable: Iterable[Item], description: str, total: int | None = None, enabled: bool = True) -> Iterator[Item]:
    """Yield the items of `iterable` while a bar counts them.

    total: how many there are, where `len(iterable)` does not say. Nothing is shown where stderr is no terminal, and by
    the first of several processes only.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from actkit.core import processes  # needs torch, which the embedded texts do without

    console = Console(stderr=True)
    if not (enabled and console.is_terminal and processes.is_first()):
        yield from iterable
        return
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
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


def remaining(elapsed: float, done: int, total: int | None, at: float) -> float | None:
    """Seconds that are left, each further item taking the mean of those that are done; None while that is unknown.

    elapsed: seconds since the start. at: of it, when the last item was done.
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
