"""What a recipe will touch, hold in memory and take in time: known before work starts.

Coverage counts the parameters inside blocks; stem and head are left alone by design and reported. Memory counts what
calibration holds beside the model: hidden states of each stream, statistics, recorded calls. Time is one timed
forward pass of the first batch, times the passes that the transforms need.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from actkit.core.anatomy import Anatomy
from actkit.core.errors import CoverageError, MemoryLimitError
from actkit.core.hooks import BatchContext, evaluating, forward
from actkit.core.memory import format_bytes, parse_bytes
from actkit.core.transform import Transform


@dataclass(frozen=True)
class Plan:
    """coverage: method -> share of the parameters inside blocks it means to touch. untouched: (parameter, reason)
    rows of what no method touches. memory: (what, bytes) rows. seconds: estimate for the whole run."""

    coverage: dict[str, float] = field(default_factory=dict)
    untouched: list[tuple[str, str]] = field(default_factory=list)
    memory: list[tuple[str, int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        """Peak of calibration beside the model."""
        return sum(size for _, size in self.memory)

    def lines(self) -> list[str]:
        """The plan in words, a line each."""
        lines = [f"{name} touches {share:.0%} of the parameters inside blocks" for name, share in self.coverage.items()]
        reasons: dict[str, int] = {}
        for _, reason in self.untouched:
            reasons[reason] = reasons.get(reason, 0) + 1
        lines += [f"left alone: {count} parameter{'s' * (count > 1)} ({reason})" for reason, count in reasons.items()]
        if self.memory:
            parts = ", ".join(f"{what} {format_bytes(size)}" for what, size in self.memory)
            lines.append(f"memory beside the model: {format_bytes(self.bytes)} ({parts})")
        if self.seconds:
            lines.append(f"time: about {self.seconds:.0f} s")
        return lines


def make_plan(
    view: Anatomy,
    transforms: Sequence[Transform],
    batches: Sequence[Any],
    *,
    min_coverage: float = 0.5,
    max_memory: int | str | None = None,
) -> Plan:
    """Plan a run. Raises CoverageError below `min_coverage` and MemoryLimitError above `max_memory`."""
    if not 0 <= min_coverage <= 1:
        raise ValueError(f"min_coverage: {min_coverage} was given; it is a share, give 0 to 1.")
    coverage, untouched = _coverage(view, transforms)
    for name, share in coverage.items():
        if share < min_coverage:
            reasons = "; ".join(f"{parameter}: {reason}" for parameter, reason in untouched[:8]) or "see coverage()"
            raise CoverageError(
                f"coverage: {name} would touch {share:.0%} of the parameters inside blocks, below min_coverage="
                f"{min_coverage:.0%}. Left alone: {reasons}. Lower min_coverage if that is what you want."
            )
    memory, seconds = _cost(view, transforms, batches)
    plan = Plan(coverage, untouched, memory, seconds)
    if max_memory is not None and plan.bytes > parse_bytes(max_memory):
        what, size = max(memory, key=lambda row: row[1])
        raise MemoryLimitError(
            f"max_memory: the plan needs {format_bytes(plan.bytes)} beside the model, the cap is "
            f"{format_bytes(parse_bytes(max_memory))}. Largest is {what} with {format_bytes(size)}: give fewer or "
            f"shorter calibration sequences, or a higher cap."
        )
    return plan


def _coverage(view: Anatomy, transforms: Sequence[Transform]) -> tuple[dict[str, float], list[tuple[str, str]]]:
    report = view.coverage()
    inside = {
        row.parameter: row.numel
        for row in report.rows
        if row.where in ("linear", "experts", "norm", "bias", "uncovered")
    }
    total = sum(inside.values()) or 1
    experts = sum(row.numel for row in report.rows if row.where == "experts")
    coverage: dict[str, float] = {}
    touched_by_any: set[str] = set()
    for transform in transforms:
        if not transform.tags.parts:
            continue
        touched: set[str] = set()
        for block in view.blocks:
            for linear in transform.targets(block):
                touched |= {f"{linear.path}.{name}" for name, _ in linear.module.named_parameters()}
        share = sum(size for name, size in inside.items() if name in touched)
        coverage[type(transform).__name__] = (share + experts) / total
        touched_by_any |= touched
    untouched = [
        (row.parameter, row.reason or row.where)
        for row in report.rows
        if row.parameter not in touched_by_any and row.where != "experts"
    ]
    return coverage, untouched


def _cost(
    view: Anatomy, transforms: Sequence[Transform], batches: Sequence[Any]
) -> tuple[list[tuple[str, int]], float]:
    needy = [t for t in transforms if t.tags.needs_data]
    if not needy or not len(batches):
        return [], 0.0
    tokens = sum(BatchContext.of(batch).batch_size * (BatchContext.of(batch).length or 1) for batch in batches)
    block = view.blocks[0]
    linears = block.linears()
    size = next((parameter.element_size() for parameter in view.model.parameters()), 4)
    hidden = linears[0].in_features if linears else 0
    widest = max((linear.in_features for linear in linears), default=0)
    streams = {t.tags.stream for t in needy}
    count = 2 if "both" in streams else len(streams)
    memory: list[tuple[str, int]] = []
    if not (len(view.blocks) == 1 and block.path == ""):
        memory.append(
            (f"hidden states ({count} stream{'s' * (count > 1)}, old and new)", 2 * count * tokens * hidden * size)
        )
    statistics = max(
        (sum(s.memory(_channels(view, block, site)) for site, s in t.observe(block).items()) for t in needy), default=0
    )
    if statistics:
        memory.append(("statistics of one block", statistics))
    if any(t.tags.records_calls for t in needy):
        memory.append(("recorded calls of one module", tokens * widest * size))
    with evaluating(view.model):
        started = time.perf_counter()
        forward(view.model, batches[0])
        one = time.perf_counter() - started
    passes = 1 + count + sum(t.tags.passes for t in needy)
    return memory, one * len(batches) * passes


def _channels(view: Anatomy, block: Any, site: Any) -> int:
    for inputs in block.linear_inputs():
        if inputs.site == site:
            return inputs.linears[0].in_features
    return max((linear.out_features for linear in block.linears()), default=0)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, ties counted once."""
    seen: dict[int, int] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        seen[tensor.data_ptr()] = tensor.nbytes
    return sum(seen.values())
