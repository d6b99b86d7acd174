"""Brings experts into memory on threads, ahead of the layer that needs them (EdgeMoE, 2023, arXiv:2308.14352).

    fetcher.begin(layer, chosen)     the router has chosen: what is missing is read first, wrong guesses are dropped
    fetcher.preload(chances, most)   guesses for the next layer, read behind that
    expert = fetcher.get(key)        waits until it is there; it stays until `release(key)`

A preload that turns out to be wrong is broken off, even while it is read. Room is made before a read begins, so that no
more than the budget is held at any moment, reads in progress included. Experts in use never go. Those that the running
layer still needs go only for the one that it waits for, when nothing else is left: a prompt whose tokens choose more
experts than fit is worked through expert by expert.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from threading import Event
from typing import Any

from actkit.core.store.expert_store import Unwanted
from actkit.sparsity.edgemoe.expert_cache import ExpertCache, Key


@dataclass
class FetchStatistics:
    """What became of the experts that routers chose, and what was read.

    Attributes:
        hits: were in memory.
        late: were being read, or waited to be, as a preload.
        misses: had to be asked for.
        reads: experts that were read.
        bytes_read: of them, preloads that were not used included.
        preloads: reads that were preloads.
        wasted: preloads that went unused.
        broken_off: of these, reads that were not finished.
        evictions: experts that went.
        stall_seconds: in which the model waited.
        most_bytes: the most that was held at a time.
    """

    hits: int = 0
    late: int = 0
    misses: int = 0
    reads: int = 0
    bytes_read: int = 0
    preloads: int = 0
    wasted: int = 0
    broken_off: int = 0
    evictions: int = 0
    stall_seconds: float = 0.0
    most_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the chosen experts that were in memory when they were chosen; 0 before any was."""
        chosen = self.hits + self.late + self.misses
        return self.hits / chosen if chosen else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {**asdict(self), "hit_rate": self.hit_rate}


class ExpertFetcher:
    """Reads experts on threads into a cache.

    Args:
        read: gives an expert; called on the threads, outside of all locks, with an event that is set if it is unwanted,
            upon which it may raise `Unwanted`.
        sizes: bytes of each.
        cache: decides what stays; it belongs to the fetcher from then on.
        workers: threads.
    """

    def __init__(
        self, read: Callable[[Key, Event], Any], sizes: Mapping[Key, int], cache: ExpertCache, workers: int = 1
    ) -> None:
        self._read, self._sizes, self._cache = read, sizes, cache
        self.statistics = FetchStatistics()
        self._changed = threading.Condition()
        self._ready: dict[Key, Any] = {}
        self._reading: dict[Key, Event] = {}  # with what says that it is unwanted
        self._demanded: list[Key] = []
        self._preloads: list[Key] = []
        self._unused: set[Key] = set()  # preloaded, and not used since
        self._needed: set[Key] = set()  # of the running layer, still to be used
        self._in_use: set[Key] = set()
        self._awaited: Key | None = None
        self._failed: BaseException | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"actkit experts {i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def held(self) -> int:
        """Bytes of all experts in memory, those that are being read included."""
        return self._cache.used

    def begin(self, layer: int, chosen: Collection[Key]) -> None:
        """Say what the router of a layer chose.

        Args:
            layer: which of those that have experts.
            chosen: what will be used, by rising index.
        """
        with self._changed:
            self._cache.begin(layer, chosen)
            self._needed = set(chosen)
            missing = [key for key in chosen if key not in self._ready]
            late = [key for key in missing if key in self._reading or key in self._preloads]
            self.statistics.hits += len(chosen) - len(missing)
            self.statistics.late += len(late)
            self.statistics.misses += len(missing) - len(late)
            for key in self._reading.keys() & self._unused - self._needed:
                if key[0] == layer:
                    self._reading[key].set()
            self._unused -= {key for key in chosen if key in self._ready}
            self._demanded = [key for key in missing if key not in self._reading]
            self._preloads = []  # they were for this layer
            self._changed.notify_all()

    def preload(self, chances: Mapping[Key, float], most: int, least: float = 0.0) -> None:
        """Ask for experts that the next layer may choose.

        Args:
            chances: how probable each is; those that are in memory are passed over.
            most: how many are read.
            least: probability of one that is read.
        """
        with self._changed:
            self._cache.expect(chances)
            here = (*self._ready, *self._reading, *self._demanded)
            likely = sorted((key for key in chances if chances[key] >= least), key=lambda key: -chances[key])
            self._preloads = [key for key in likely if key not in here][:most]
            self._changed.notify_all()

    def get(self, key: Key) -> Any:
        """Wait for an expert, which then stays until `release`.

        Args:
            key: of it.

        Raises:
            Exception: whatever reading one raised.
            ValueError: the fetcher was closed.
        """
        with self._changed:
            self._awaited = key
            self._in_use.add(key)
            try:
                self._wait_for(key)
            except BaseException:
                self._in_use.discard(key)
                raise
            finally:
                self._awaited = None
            self._unused.discard(key)
            return self._ready[key]

    def _wait_for(self, key: Key) -> None:
        started = time.perf_counter()
        while key not in self._ready:
            if self._failed is not None:
                failed, self._failed = self._failed, None
                raise failed
            if self._closed:
                raise ValueError("fetcher: it was closed; make another one.")
            if key not in self._reading and key not in self._demanded:
                self._demanded.insert(0, key)  # it went for another expert of this layer
            self._changed.notify_all()
            self._changed.wait()
            now = time.perf_counter()
            self.statistics.stall_seconds += now - started
            started = now

    def release(self, key: Key) -> None:
        """Let an expert go if room is wanted."""
        with self._changed:
            self._in_use.discard(key)
            self._needed.discard(key)
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads and let all experts go; more than once is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._ready.clear()

    # -- on the threads

    def _work(self) -> None:
        while True:
            with self._changed:
                while (key := self._next()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
            found: Any = None
            failed: BaseException | None = None
            try:
                found = self._read(key, self._reading[key])
            except BaseException as error:  # it is raised where the expert is waited for
                failed = error
            with self._changed:
                del self._reading[key]
                if failed is None and not self._closed:
                    self._ready[key] = found
                else:
                    self._let_go(key, failed)
                found = failed = None
                self._changed.notify_all()

    def _let_go(self, key: Key, failed: BaseException | None) -> None:
        """Count a read as one that gave nothing."""
        self._cache.remove(key)
        if isinstance(failed, Unwanted):
            self.statistics.broken_off += 1
            self.statistics.wasted += 1
            self.statistics.bytes_read -= self._sizes[key] - failed.done
        elif failed is not None and key in self._needed:
            self._failed = failed
        self._unused.discard(key)

    def _next(self) -> Key | None:
        """What to read next, for which room was made; None if there is nothing, or nothing may go for it."""
        if self._closed:
            return None
        while self._demanded or self._preloads:
            demanded = bool(self._demanded)
            key = (self._demanded if demanded else self._preloads)[0]
            kept = self._in_use | self._needed | self._reading.keys()
            gone = self._cache.evict_for(self._sizes[key], kept)
            if gone is None and key == self._awaited:
                gone = self._cache.evict_for(self._sizes[key], self._in_use | self._reading.keys())
            if gone is None and demanded:
                return None  # until something is released
            (self._demanded if demanded else self._preloads).pop(0)
            if gone is None:
                continue
            for other in gone:
                del self._ready[other]
            self._count(key, gone, demanded)
            return key
        return None

    def _count(self, key: Key, gone: Collection[Key], demanded: bool) -> None:
        size, found = self._sizes[key], self.statistics
        self._cache.add(key, size)
        self._reading[key] = Event()
        found.reads += 1
        found.bytes_read += size
        found.evictions += len(gone)
        found.wasted += len(self._unused & set(gone))
        found.most_bytes = max(found.most_bytes, self._cache.used)
        self._unused -= set(gone)
        if not demanded:
            found.preloads += 1
            self._unused.add(key)
