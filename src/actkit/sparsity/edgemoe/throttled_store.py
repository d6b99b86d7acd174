"""A store that reads no faster than a given disk, for measurements that the page cache cannot flatter."""

from __future__ import annotations

import threading
import time
from threading import Event

import torch

from actkit.core.layers.weights import WeightStorage
from actkit.core.store.expert_store import ExpertStore, Unwanted


class ThrottledStore:
    """Reads like the store that it wraps, one expert at a time, and returns no sooner than a slower disk would.

    Args:
        store: that is read.
        bandwidth: bytes per second.
        latency: seconds before a read.

    Raises:
        ValueError: a bandwidth that is not positive, or a negative latency.
    """

    def __init__(self, store: ExpertStore, bandwidth: float, latency: float = 0.0) -> None:
        if not bandwidth > 0 or latency < 0:
            raise ValueError(
                f"bandwidth, latency: {bandwidth} and {latency} were given; give bytes per second above 0, and 0 "
                f"seconds or more."
            )
        self.store, self.bandwidth, self.latency = store, bandwidth, latency
        self._one_reader = threading.Lock()

    def load(
        self, layer: int, expert: int, dtype: torch.dtype, unwanted: Event | None = None
    ) -> dict[str, WeightStorage]:
        """Read an expert, and wait until the disk would have it; arguments and errors as of `ExpertStore.load`."""
        with self._one_reader:
            begun = time.perf_counter()
            found = self.store.load(layer, expert, dtype, unwanted)
            size = self.store.record(layer, expert).nbytes
            seconds = self.latency + size / self.bandwidth
            wait(begun, seconds, size, unwanted)
            return found


def wait(begun: float, seconds: float, size: int, unwanted: Event | None) -> None:
    """Wait as long as a read takes.

    Args:
        begun: when it began, by `time.perf_counter`.
        seconds: that it takes from then on.
        size: bytes that are read.
        unwanted: if it is set meanwhile, the read is broken off.

    Raises:
        Unwanted: it was broken off.
    """
    left = begun + seconds - time.perf_counter()
    if left <= 0:
        return
    if unwanted is None:
        time.sleep(left)
    elif unwanted.wait(left):
        raise Unwanted(round(size * min(1.0, (time.perf_counter() - begun) / seconds)))
