"""What `make test` runs of methods x architectures; `make test-all` runs the full product (the mark `exhaustive`).

An architecture is tested with three methods that ask for different things of it, a method with three architectures that
differ most. Whatever is special about a pair has a test of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

METHODS = ("awq", "wina", "rtn")  # moves scales between layers; selects the inputs that layers share; rounds weights
ARCHITECTURES = ("llama", "mixtral", "vit")  # a gated decoder, experts, an encoder of images without a gate


def architectures(kinds: Sequence[str]) -> list[Any]:
    """The architectures that a method is tested on: three in `make test`, those of ARCHITECTURES first."""
    first = sorted(kinds, key=lambda kind: kind not in ARCHITECTURES)[:3]
    return [pytest.param(kind, marks=_mark(kind in first)) for kind in kinds]


def product(methods: Iterable[str], cases: Sequence[str], often: Sequence[str] = METHODS) -> list[Any]:
    """Each method with each architecture: in `make test` what is representative in one of the two.

    Args:
        methods: names.
        cases: names of architectures, or of one at other settings.
        often: the methods that meet every case in `make test`.
    """
    return [
        pytest.param(method, case, marks=_mark(method in often or case in ARCHITECTURES))
        for method in methods
        for case in cases
    ]


def _mark(often: bool) -> list[Any]:
    return [] if often else [pytest.mark.exhaustive]
