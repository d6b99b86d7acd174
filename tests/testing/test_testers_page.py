"""docs/testers.md lists the properties that each tester asks for, in their order, and the plug-in example runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import actkit.testing
from actkit.testing import analyses, functions, layers, own_models, rules, runtimes, transforms

ROOT = Path(__file__).parents[2]
TESTERS = {
    "check_transform": transforms,
    "check_layer": layers,
    "check_function": functions,
    "check_analysis": analyses,
    "check_rule": rules,
    "check_runtime": runtimes,
    "check_model": own_models,
}


@pytest.mark.parametrize("name", TESTERS)
def test_the_page_lists_the_properties(name: str) -> None:
    page = (ROOT / "docs" / "testers.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", section, re.MULTILINE)[1:] == list(TESTERS[name].CHECKS)


def test_all_testers_are_public() -> None:
    assert set(TESTERS) == {name for name in actkit.testing.__all__ if name.startswith("check_")}
