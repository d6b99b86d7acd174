"""Compiling ahead: what decodes the models is compiled in a process of its own while the search still measures quality.

On a machine with nothing compiled yet, kernels take half a minute of one core, and only at the end, when speeds are
timed. So each kind of model that is to be timed is decoded for two tokens there as soon as it is saved, which leaves
its kernels in the compile cache. If the cache holds something already, nothing is started.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from torch import Tensor

from actkit.core.ground.errors import ActkitError
from actkit.core.measure.fresh import FreshProcess

# It takes the time that the search leaves: two threads of a product wait for each other, and on two cores, one of them
# shared with a compiler, the profile of `swiglu` took 84 s instead of 10.
NICE = 10


class CompileAhead:
    """A process that decodes with saved models, one after another.

    Args:
        ids: int64 [1, prompt].
        capacity: tokens that the models are timed with.
        **options: as in `FreshProcess.load`.
    """

    def __init__(self, ids: Tensor, capacity: int, **options: Any) -> None:
        self._ids, self._capacity, self._options = ids, capacity, options
        self._folders: SimpleQueue[Path | None] = SimpleQueue()
        self._kinds: set[str] = set()
        self._process = FreshProcess()
        pid = self._process.pid
        with suppress(AttributeError, OSError):  # not on Windows
            os.setpriority(os.PRIO_PROCESS, pid, NICE)
        with suppress(OSError):  # Linux shares the cores out by sessions first, and the worker has one of its own
            Path(f"/proc/{pid}/autogroup").write_text(str(NICE))
        self._thread = Thread(target=self._run, name="compile ahead", daemon=True)
        self._thread.start()

    def add(self, kind: str, folder: Path) -> None:
        """Decode with a saved model, if it is the first one of its kind."""
        if kind not in self._kinds:
            self._kinds.add(kind)
            self._folders.put(folder)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._folders.put(None)
        self._process.close()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (folder := self._folders.get()) is not None and not self._process.closed:
            with suppress(ActkitError, OSError, ValueError):  # what fails here is reported when the model is timed
                self._process.load(folder, to_decode=True, **self._options)
                self._process.pack(self._capacity)
                self._process.time_decode(self._ids, 2)
