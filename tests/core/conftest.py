"""One worker process for all tests of this folder that need a fresh one: starting it is what takes time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actkit.core.measure.fresh import FreshProcess


@pytest.fixture(scope="session")
def shared_worker() -> Iterator[FreshProcess]:
    with FreshProcess() as process:
        yield process


@pytest.fixture
def worker(shared_worker: FreshProcess) -> FreshProcess:
    assert not shared_worker.closed, "an earlier test lost the shared worker"
    return shared_worker
