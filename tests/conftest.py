"""For all tests."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from actkit.core.measure.fresh import FreshProcess

LIMIT = 20.0  # seconds that a test may take without the mark `slow`

# Triton's kernels run in its interpreter, on the CPU. It must know before anything imports it.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts background jobs with Ctrl-C ignored, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate() -> None:
    """What a Trainer of another file set for the whole process would refuse trainings with other settings."""
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shared_worker() -> Iterator[FreshProcess]:
    """One worker process for all tests that need a fresh one: starting it is what takes time."""
    from actkit.core.measure.fresh import FreshProcess

    with FreshProcess() as process:
        yield process


@pytest.fixture
def worker(shared_worker: FreshProcess) -> FreshProcess:
    assert not shared_worker.closed, "an earlier test lost the shared worker"
    return shared_worker


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium (the extra dev) is missing")
    chromium, driver_file = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver_file is None:
        pytest.skip("chromium and chromedriver are missing (Debian's chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_file))
    yield driver
    driver.quit()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test is slow for a reason, and the mark says which: `@pytest.mark.slow(reason="...")`."""
    for item in items:
        for mark in item.iter_markers("slow"):
            if not mark.kwargs.get("reason"):
                raise pytest.UsageError(f"{item.nodeid}: the mark slow needs a reason, slow(reason='...')")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests that took too long without saying why. They do not fail: the machine may have been busy."""
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    late = [each for each in reports if each.when == "call" and each.duration > LIMIT and "slow" not in each.keywords]
    if late:
        terminalreporter.section(f"over {LIMIT:g} s without the mark slow: make it faster, or mark it with the reason")
        for each in sorted(late, key=lambda each: -each.duration):
            terminalreporter.line(f"{each.duration:6.1f} s  {each.nodeid}")
