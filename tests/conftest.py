"""For all tests."""

import signal
import sys

import pytest

# A shell starts background jobs with Ctrl-C ignored, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    """What a Trainer of another file set for the whole process would refuse trainings with other settings."""
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
