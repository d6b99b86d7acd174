"""A few of the kills of scripts/kill_test.py, which does 200."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "scripts" / "kill_test.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kills_during_saves(script, tmp_path):
    found = script.kill_saves(15, tmp_path)
    assert sum(found.values()) == 15


def test_kills_during_a_search(script, tmp_path):
    found = script.kill_searches(5, tmp_path)
    assert sum(found.values()) == 5
