"""Being told when a kernel is compiled: for a decoder that takes a minute, and 300 MB stay with the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def compiling(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` the first time that Numba compiles inside; what comes from the compile cache is not compiled."""
    from numba.core import event

    told = False

    class Listener(event.Listener):
        def on_start(self, event: object) -> None:
            nonlocal told
            if not told:
                told = True
                tell()

        def on_end(self, event: object) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield
