"""Candidates with made-up numbers, for the tests of what is decided from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from actkit.core.ground.estimate import Estimate
from actkit.core.measure.proof import Proof
from actkit.core.measure.speed import Speed
from actkit.search.measured import Candidate

SIZE = 1000


def around(value: float, half: float = 0.0) -> Estimate:
    return Estimate(value, value - half, value + half)


def a_speed(ratio: Estimate | None, peak: int = 100) -> Speed:
    rate = around(50.0 if ratio is None else 50 * ratio.value, 1.0)
    return Speed("decode", "tokens/s", rate, around(0.1), ratio, peak, 1, 16, 8, 2, "float32", 5, 0, "decoder")


def a_proof(passed: bool = True) -> Proof:
    return Proof("folder", passed, 0.0, 1.0, 0.01, 10, 1.0, "equal" if passed else "not equal", passed, "float32", 2)


def candidate(
    name: str = "tried",
    loss: float = 0.001,
    half: float = 0.001,
    *,
    ratio: tuple[float, float] | None = (0.95, 1.05),
    disk: float = 1.0,
    memory: float = 1.0,
    read: float = 1.0,
    **more: Any,
) -> Candidate:
    speed = None if ratio is None else a_speed(Estimate(sum(ratio) / 2, *ratio), int(100 * memory))
    found = Candidate(
        name,
        recipe=[{"rtn": {"bits": 8, "group_size": -1}}],
        search_loss=around(loss, half),
        loss=around(loss, half),
        metrics={"perplexity": around(20.0, 1.0)},
        disk_bytes=int(SIZE * disk),
        weight_bytes=int(SIZE * disk),
        bytes_per_token=SIZE * read,
        dense_bytes_per_token=float(SIZE),
        speed=speed,
        peak_share=None if speed is None else memory,
        proof=a_proof(),
    )
    return replace(found, **more)


def the_original(weight_bytes: int = SIZE) -> Candidate:
    found = candidate("original", 0.0, 0.0, ratio=None, recipe=[], proof=None)
    return replace(found, weight_bytes=weight_bytes, speed=a_speed(None), peak_share=1.0)
