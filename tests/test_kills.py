"""A few of the kills of scripts/kill_test.py, which does 300; in a process of its own, as it forks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_kills_during_saves_a_search_and_harvests():
    script = Path(__file__).parents[1] / "scripts" / "kill_test.py"
    command = [sys.executable, str(script), "--saves", "15", "--searches", "5", "--harvests", "10"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "15 kills during save" in ended.stdout and "5 kills during search" in ended.stdout
    assert "10 kills during harvest" in ended.stdout
