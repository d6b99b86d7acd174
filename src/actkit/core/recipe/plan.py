"""What a recipe will touch, hold in memory and take in time: known before work starts.

Coverage counts the parameters inside blocks; stem and head are left alone by design and reported. Memory counts what
calibration holds beside the model: hidden states of each stream, masks, statistics, recorded calls. Time is one timed
forward pass of one batch, times the passes that the transforms need. Both are measured on the batch with the longest
sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import Any

from actkit.core.edit.edits import get_module, refuse_hooks
from actkit.core.forward.batch import BatchContext
from actkit.core.forward.hooks import evaluating
from actkit.core.ground import offload, processes
from actkit.core.ground.errors import CoverageError, MemoryLimitError
from actkit.core.ground.memory import format_bytes, parameter_bytes, parse_bytes
from actkit.core.ground.modules import is_within
from actkit.core.model.anatomy import Anatomy, Block, Site
from actkit.core.recipe.blockwise import Walk
from actkit.core.recipe.recording import Recorder
from actkit.core.recipe.transform import Target, Transform
from actkit.core.watch.capture import opened_experts


@dataclass(frozen=True)
class Plan:
    """What a run will touch, hold and take.

    Attributes:
        coverage: method -> share of the parameters inside blocks that it means to touch.
        untouched: (parameter, reason) rows of what no method touches.
        memory: (what, bytes) rows.
        seconds: estimate for the whole run.
    """

    coverage: dict[str, float] = field(default_factory=dict)
    untouched: list[tuple[str, str]] = field(default_factory=list)
    memory: list[tuple[str, int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        """Peak of calibration beside the model."""
        return sum(size for _, size in self.memory)

    def lines(self) -> list[str]:
        """Return the plan in words, a line each."""
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
    min_coverage: float | None = None,
    max_memory: int | str | None = None,
    recorder: Recorder | None = None,
) -> Plan:
    """Plan a run.

    Args:
        view: of the model.
        transforms: in their order.
        batches: calibration data.
        min_coverage: least share of the parameters inside blocks that each transform must touch; None for what its tags
            say.
        max_memory: cap for calibration, bytes or '2GB'.
        recorder: is given the longest batch; None for one of its own.

    Raises:
        CoverageError: a transform would touch less.
        MemoryLimitError: calibration would hold more.
        EditError: a layer has hooks, which would be lost.
    """
    if min_coverage is not None and not 0 <= min_coverage <= 1:
        raise ValueError(f"min_coverage: {min_coverage} was given; it is a share, give 0 to 1.")
    cap = None if max_memory is None else parse_bytes(max_memory)
    with opened_experts(view):  # so that a transform says which of their layers it means
        coverage, untouched = _coverage(view, transforms)
        # what is limited on purpose owes nothing, unless the caller asks for more
        declared = {type(each).__name__: 0.0 if each.only else each.least_coverage for each in transforms}
        for name, share in coverage.items():
            least = declared[name] if min_coverage is None else min_coverage
            if share < least:
                reasons = "; ".join(f"{parameter}: {reason}" for parameter, reason in untouched[:8]) or "see coverage()"
                raise CoverageError(
                    f"coverage: {name} would touch {share:.0%} of the parameters inside blocks, below min_coverage="
                    f"{least:.0%}. Left alone: {reasons}. Lower min_coverage if that is what you want."
                )
        memory, seconds = _cost(view, transforms, batches, recorder)
    plan = Plan(coverage, untouched, memory, seconds)
    if cap is not None and plan.bytes > cap:
        what, size = max(memory, key=lambda row: row[1])
        raise MemoryLimitError(
            f"max_memory: the plan needs {format_bytes(plan.bytes)} beside the model, the cap is {format_bytes(cap)}; "
            f"largest is {what} with {format_bytes(size)}. Give less calibration data, or a higher cap."
        )
    return plan


def _coverage(view: Anatomy, transforms: Sequence[Transform]) -> tuple[dict[str, float], list[tuple[str, str]]]:
    report = view.coverage()
    blocks = [view.block(block.index) for block in view.blocks]
    inside = {
        row.parameter: row.numel
        for row in report.rows
        if row.where not in ("stem", "head") and any(is_within(row.parameter, block.path) for block in blocks)
    }
    total = sum(inside.values()) or 1
    coverage: dict[str, float] = {}
    touched_by_any: set[str] = set()
    for transform in transforms:
        if not transform.tags.parts:
            continue
        touched: set[str] = set()
        meant = [block for block in map(transform.within, blocks) if block is not None]
        if transform.only and not meant:
            roles = dict.fromkeys(linear.role for block in blocks for linear in block.linears())
            raise CoverageError(
                f"{type(transform).__name__}: only: {transform.only} was given, and the model has no such layers; "
                f"its {len(blocks)} blocks have {', '.join(roles)}."
            )
        for block in meant:
            for target in transform.targets(block):
                if not isinstance(target, str) and transform.slots:  # who fills no slot replaces no layer
                    refuse_hooks(target.path, target.module)
                touched |= _parameters_of(target, block, inside)
        name = type(transform).__name__
        coverage[name] = coverage.get(name, 0.0) + sum(inside[name] for name in touched) / total
        touched_by_any |= touched
    untouched = [
        (row.parameter, row.reason or _OUTSIDE.get(row.where, row.where))
        for row in report.rows
        if row.parameter not in touched_by_any
    ]
    return coverage, untouched


def _parameters_of(target: Target, block: Block, inside: Iterable[str]) -> set[str]:
    """The names among those inside blocks that a target stands for."""
    if not isinstance(target, str):
        weights, named = {f"{target.path}.weight"}, set()
    else:
        weights = {f"{path}.weight" for path in block.around(target)}
        named = {name for name in inside if is_within(name, target)}
        if not weights and not named:
            get_module(block.root, target)  # raises if the model has no such module
    return named | {name for name in inside if _weight_of(name) in weights}


def _weight_of(parameter: str) -> str:
    """What the weight is called that a parameter stores, or is a part of; the parameter itself if it is none."""
    layer, stored, _ = parameter.rpartition(".storage.")
    return f"{layer}.weight" if stored else parameter


_OUTSIDE = {"linear": "linear layer that the recipe does not aim at", "experts": "experts that could not be opened"}


def _cost(
    view: Anatomy, transforms: Sequence[Transform], batches: Sequence[Any], recorder: Recorder | None
) -> tuple[list[tuple[str, int]], float]:
    """What the walk holds, measured on the batch with the longest sequences, and the time of its pass.

    Of several processes, for the largest share of the batches.
    """
    needy = [t for t in transforms if t.needs_data and t.tags.stream != "none"]
    if not needy or not len(batches):
        return [], 0.0
    contexts = [BatchContext.of(batch, view.model) for batch in batches]
    tokens = [context.batch_size * (context.length or 1) for context in contexts]
    longest = max(range(len(batches)), key=lambda index: contexts[index].length or 1)
    most = max(sum(tokens[first :: processes.count()]) for first in range(processes.count()))
    scale = most / tokens[longest]
    streams = _streams(needy)
    walk = Walk(view, [batches[longest]], lambda items, text: items, recorder=recorder)
    with evaluating(view.model):
        walk.start(sorted(streams))
    memory = [(what, ceil(size * scale)) for what, size in walk.bytes(streams).items() if size]
    block = view.block(0)  # it stands for all, also for what a scope leaves out of it
    with offload.onloaded(view.model, block.path):  # a statistic may be weighted by the layer's weight
        statistics = max((_statistics_bytes(t, block) for t in needy), default=0)
        worked = max((t.memory(block, _length(walk)) for t in needy), default=0)
    if offload.is_offloaded(block.module):
        memory.append(("weights of one block, brought in place", parameter_bytes(block.module)))
    if statistics:
        memory.append(("statistics of one block", statistics))
    if worked:
        memory.append(("what a method computes with", worked))
    size = next((parameter.element_size() for parameter in view.model.parameters()), 4)
    if any(t.tags.observes_in_turn for t in needy) and not walk.whole_model:
        ends = [part for part in (block.attention and block.attention.output, block.mlp and block.mlp.down) if part]
        kept = ceil(_rows(walk) * scale) * sum(end.in_features + end.out_features for end in ends) * size
        memory.append(("what the last layers of attention and MLP read and give", kept))
    if any(t.tags.records_calls for t in needy):
        widest = max((linear.in_features for linear in block.linears()), default=0)
        rows = most if walk.whole_model else ceil(_rows(walk) * scale)
        copies = size + 2 * 4  # as recorded, and two copies in float32 to compute with
        memory.append(("recorded calls of one module", rows * widest * copies))
    examples = sum(context.batch_size for context in contexts)
    passes = sum(t.passes(sum(tokens), examples) for t in needy)
    for turn in turns(transforms):  # each is a walk of its own
        own = _streams([t for t in transforms[turn.start : turn.stop] if t.needs_data])
        passes += 1 + len(own) if own else 0
    return memory, walk.seconds * scale * passes


def turns(transforms: Sequence[Transform]) -> list[range]:
    """Return which transforms are planned and applied together, as ranges of their positions.

    A new range begins with each transform that plans on what those before it left (`Tags.plans_in_turn`), and before
    and behind one whose edits of all blocks belong together (`Tags.spans_blocks`).

    Args:
        transforms: of a recipe.
    """
    tags = [transform.tags for transform in transforms]
    starts = [
        i for i, own in enumerate(tags) if i == 0 or own.plans_in_turn or own.spans_blocks or tags[i - 1].spans_blocks
    ]
    return [range(a, b) for a, b in pairwise([*starts, len(transforms)])]


def _streams(transforms: Iterable[Transform]) -> set[str]:
    """The streams that transforms calibrate on."""
    streams = (t.tags.stream for t in transforms if t.tags.stream != "none")
    return {each for stream in streams for each in (("original", "edited") if stream == "both" else (stream,))}


def _rows(walk: Walk) -> int:
    """The rows of hidden states that enter a block: tokens, or the patches of images."""
    stream = next(iter(walk.streams))
    return sum(call.hidden.numel() // call.hidden.shape[-1] for call in walk.calls(0, stream))


def _length(walk: Walk) -> int:
    """The rows of hidden states of one example of the walk."""
    calls = walk.calls(0, next(iter(walk.streams)))
    if walk.whole_model:
        return max(call.context.length or 1 for call in calls)
    return max(call.hidden[0].numel() // call.hidden.shape[-1] for call in calls)


def _statistics_bytes(transform: Transform, block: Block) -> int:
    return sum(
        statistic.memory(_channels(block, site))
        for site, value in transform.observe(block).items()
        for statistic in (value if isinstance(value, Sequence) else [value])
    )


def _channels(block: Block, site: Site) -> int:
    for inputs in block.linear_inputs():
        if inputs.site == site:
            return inputs.linears[0].in_features
    return max((linear.out_features for linear in block.linears()), default=0)
