"""Threads that fetch: what is read, in which order, within which bytes; errors, and the end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from actkit.core.store.expert_store import Unwanted
from actkit.sparsity.edgemoe.expert_cache import ExpertCache, Key
from actkit.sparsity.edgemoe.expert_fetcher import ExpertFetcher


@contextmanager
def fetcher(budget: int, read: Any = None, workers: int = 1) -> Iterator[tuple[ExpertFetcher, list[Key]]]:
    """One over 3 layers of 4 experts, and the list of what it read."""
    order: list[Key] = []

    def reads(key: Key, unwanted: threading.Event) -> Any:
        order.append(key)
        return key if read is None else read(key, unwanted)

    every = {(layer, e): 1 for layer in range(3) for e in range(4)}
    made = ExpertFetcher(reads, every, ExpertCache(budget, "lru", layers=3), workers)
    try:
        yield made, order
    finally:
        made.close()


def guesses(keys: list[Key]) -> dict[Key, float]:
    """The first is the most probable."""
    return {key: 1 / (i + 1) for i, key in enumerate(keys)}


def settle(made: ExpertFetcher, reads: int) -> None:
    """Wait until so many reads are done."""
    end = time.monotonic() + 5
    while len(made._ready) + made.statistics.evictions < reads:
        assert time.monotonic() < end, "the reads did not come"
        time.sleep(0.001)


def use(made: ExpertFetcher, layer: int, *experts: int) -> None:
    made.begin(layer, [(layer, e) for e in experts])
    for e in experts:
        assert made.get((layer, e)) == (layer, e)
        made.release((layer, e))


def test_hits_misses_and_preloads_are_counted() -> None:
    with fetcher(6) as (made, order):
        use(made, 0, 1, 2)
        made.preload(guesses([(1, 0), (1, 3)]), 4)
        settle(made, 4)
        use(made, 1, 0, 1)
        found = made.statistics
        assert (found.hits, found.misses, found.late, found.reads, found.preloads) == (1, 3, 0, 5, 2)
        assert order == [(0, 1), (0, 2), (1, 0), (1, 3), (1, 1)] and made.held == 5 == found.most_bytes
        use(made, 2, 0, 1)  # 7 do not fit: the least recently used goes
        assert found.evictions == 1 and found.most_bytes == 6 and found.hit_rate == pytest.approx(1 / 6)
        assert found.to_dict()["bytes_read"] == 7


def test_what_is_demanded_is_read_before_preloads_and_wrong_ones_are_dropped() -> None:
    gate, begun = threading.Event(), threading.Event()

    def slow(key: Key, unwanted: threading.Event) -> Key:
        begun.set()
        gate.wait(5)
        return key

    with fetcher(6, slow) as (made, order):
        made.preload(guesses([(1, 0), (1, 1), (1, 2)]), 4)
        assert begun.wait(5)  # the first preload is being read
        made.begin(1, [(1, 0), (1, 3)])  # the others were wrong
        made.preload(guesses([(2, 2)]), 4)
        gate.set()
        for e in (0, 3):
            made.get((1, e))
            made.release((1, e))
        settle(made, 3)
        assert order == [(1, 0), (1, 3), (2, 2)]
        assert (made.statistics.late, made.statistics.misses) == (1, 1)


def test_a_wrong_preload_is_broken_off_while_it_is_read() -> None:
    begun = threading.Event()

    def slow(key: Key, unwanted: threading.Event) -> Key:
        if key == (1, 0):
            begun.set()
            assert unwanted.wait(5)
            raise Unwanted(0)
        return key

    with fetcher(2, slow) as (made, order):
        made.preload(guesses([(1, 0)]), 1)
        assert begun.wait(5)
        use(made, 1, 2, 3)  # both fit only when the other one has gone
        found = made.statistics
        assert (found.broken_off, found.wasted, found.preloads) == (1, 1, 1)
        assert order == [(1, 0), (1, 2), (1, 3)] and made.held == 2 == found.bytes_read


@pytest.mark.parametrize("workers", [1, 3])
def test_a_prompt_whose_experts_do_not_fit_is_worked_through(workers: int) -> None:
    with fetcher(2, workers=workers) as (made, _):
        for _ in range(5):
            for layer in range(3):
                use(made, layer, 0, 1, 2, 3)
        assert made.statistics.most_bytes <= 2


def test_random_work_stays_within_the_budget() -> None:
    rng = random.Random(0)

    def read(key: Key, unwanted: threading.Event) -> Key:
        time.sleep(rng.random() / 5000)
        return key

    with fetcher(5, read, workers=2) as (made, _):
        for step in range(300):
            layer = step % 3
            chosen = sorted(rng.sample(range(4), 2))
            made.begin(layer, [(layer, e) for e in chosen])
            made.preload(guesses([((layer + 1) % 3, e) for e in rng.sample(range(4), 2)]), 4)
            for e in chosen:
                assert made.get((layer, e)) == (layer, e)
                made.release((layer, e))
            assert made.held <= 5
        found = made.statistics
        assert found.hits + found.late + found.misses == 600 and found.most_bytes <= 5
        assert found.wasted <= found.preloads and found.reads == found.bytes_read


def test_an_error_comes_where_the_expert_is_needed_and_it_goes_on() -> None:
    broken = {(0, 1), (1, 1)}

    def read(key: Key, unwanted: threading.Event) -> Key:
        if key in broken:
            raise OSError(f"no {key}")
        return key

    with fetcher(6, read) as (made, _):
        made.preload(guesses([(1, 1), (1, 2)]), 4)  # nobody waits for it: it is not raised yet
        settle(made, 1)
        with pytest.raises(OSError, match=r"no \(0, 1\)"):
            use(made, 0, 1)
        use(made, 1, 2)
        with pytest.raises(OSError, match=r"no \(1, 1\)"):
            use(made, 1, 1)
        broken.clear()
        use(made, 1, 1)
        assert made.held == 2


def test_it_ends() -> None:
    before = threading.active_count()
    with fetcher(2) as (made, _):
        use(made, 0, 0)
        assert threading.active_count() == before + 1
    made.close()
    assert threading.active_count() == before
    made.begin(0, [(0, 1)])
    with pytest.raises(ValueError, match="it was closed"):
        made.get((0, 1))
