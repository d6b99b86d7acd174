"""Two real processes (gloo) give what one gives: statistics, edits, quality; and an error in one ends both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("two_processes.py")
CHECKS = [line[4:].partition("(")[0] for line in WORKER.read_text().splitlines() if line.startswith("def check_")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each check, in both processes."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in group.items()}}
        environment["PYTHONPATH"] = os.pathsep.join([str(WORKER.parent), *sys.path])
        command = [sys.executable, str(WORKER), str(folder), str(rank)]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        said = [process.communicate(timeout=240)[0].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(outcomes, check):
    for rank, found in enumerate(outcomes):
        assert found[check] == "holds", f"process {rank}: {found[check]}"
