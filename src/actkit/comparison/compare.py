"""compare_functions: functions, MLPs, pooling or attention on one task, with equal parameters, tuning and data.

    names -> widths with the baseline's parameters -> steps measured in turns -> each arm at three rates with each seed
    -> the rate with the best mean of validation losses -> paired differences -> table, results.json, page

Every finished training is in OUT/journal.jsonl before the next one begins, so that a comparison that was stopped in any
way goes on with `resume`. Everything that a training draws follows from its seed, so the end is that of an
uninterrupted run; only the steps' times are measured once and kept.
"""

from __future__ import annotations

import difflib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

from actkit.comparison.arms import Arm, parse
from actkit.comparison.judging import Difference, judge
from actkit.comparison.results import Comparison, Row, Word
from actkit.comparison.steps import StepCost, measure_steps
from actkit.comparison.tasks import TASKS, Task, Training
from actkit.comparison.widths import NEAR, Count, fits, nearest, width_for_all
from actkit.core.ground import processes
from actkit.core.ground.errors import NonFiniteError, RecipeError
from actkit.core.ground.machine import machine, versions
from actkit.core.ground.progress import step, track
from actkit.core.ground.whole_file import write_whole
from actkit.core.ground.yaml_files import shorten
from actkit.core.page.templating import check_pages
from actkit.search.journal import JOURNAL, Journal, check_out

RESULTS, PAGE = "results.json", "index.html"
LEFT = (JOURNAL, RESULTS, PAGE)
Equal = Literal["steps", "time"]
ABOUT_FLOPS = (
    "FLOPs are those of matrix products and convolutions, forward and backward, for each row or token; those of "
    "functions stand apart, forward alone, as their records count them (exp or tanh is one)"
)
ABOUT_TIME = "with equal time an arm makes as many steps as fit into the baseline's seconds, by the measured steps"
ABOUT_POOL = "a layer that chooses is matched by all that it trains; behind the training it is pruned"


def compare_functions(
    names: str | Sequence[str],
    *,
    on: str,
    out: str | Path | None = None,
    equal: Equal = "steps",
    seeds: int = 5,
    steps: int | None = None,
    width: int | None = None,
    rates: tuple[float, float, float] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Compare functions, MLPs, pooling or attention on one task.

    Each arm changes one thing in the task's model, at the width that gives it the baseline's parameters within 1 %.
    What a training raises is recorded with its arm. Errors come before the first training.

    Args:
        names: with commas between, or a list; the first one is the baseline.
        on: the task, one of `TASKS`.
        out: the folder to write; None for none, and then nothing can be resumed.
        equal: 'steps', or 'time': each arm trains for the baseline's seconds.
        seeds: how many, of weights, data and order; 2 or more.
        steps: of the baseline's trainings; None for the task's own.
        width: of the baseline; None for the task's own.
        rates: three, tried for each arm; None for the task's own.
        resume: go on with the journal in `out`.
        overwrite: replace what an earlier comparison left in `out`.
        seed: the first one.
        progress: show bars.

    Returns:
        A row for each arm.

    Raises:
        ProcessError: it is called in one of several processes.
        ValueError: a setting is out of bounds, a name is there twice, arms do not fit the task, parameters cannot be
            matched, or `out` exists.
        RecipeError: an unknown name or task.
        JournalError: resuming is not possible.
        ImportError: jinja2 (the extra `report`) is missing.
    """
    started = time.perf_counter()
    processes.refuse("compare_functions", "it measures time with the machine to itself: run it without torchrun")
    arms, task = parse(names), _task(on)
    _check_settings(equal, seeds, steps, width, rates, seed, resume and out is None)
    _check_kinds(arms, task)
    if out is not None:
        check_pages()
        out = Path(out)
        check_out(out, resume=resume, overwrite=overwrite, what="comparison")
    plan = _widths(arms, task, task.width if width is None else width)
    settings: dict[str, Any] = {
        "names": [arm.name for arm in arms],
        "task": task.name,
        "equal": equal,
        "seeds": list(range(seed, seed + seeds)),
        "steps": task.steps if steps is None else steps,
        "rows": task.rows,
        "rates": list(task.rates if rates is None else rates),
        "widths": {arm.name: dict(plan[arm][0]) for arm in arms},
        "threads": torch.get_num_threads(),
    }
    header = {
        "settings": settings,
        "versions": versions(),
        "machine": {key: machine()[key] for key in ("processor", "cores")},
    }
    book = _Book(None)
    if out is not None:
        if overwrite and not resume:
            for name in LEFT[::-1]:
                (out / name).unlink(missing_ok=True)
        again = resume and (out / JOURNAL).exists()
        path = out / JOURNAL
        book = _Book(Journal.resume(path, header, "comparison") if again else Journal.start(path, header))
    run = _Run(task, arms, plan, settings, book, progress)
    rows = run.rows()
    notes = [ABOUT_FLOPS, *([ABOUT_TIME] if equal == "time" else []), *([ABOUT_POOL] if run.pruned else [])]
    if run.at_the_ends:
        notes.append(f"the best rate is the lowest or the highest that was tried for {', '.join(run.at_the_ends)}")
    result = Comparison(
        task.name,
        task.score,
        task.unit,
        task.better,
        rows,
        settings,
        machine(),
        versions(),
        (*notes, *book.notes),
        book.seconds,
        time.perf_counter() - started,
    )
    if out is not None:
        from actkit.comparison.page import render

        write_whole(out / RESULTS, json.dumps(result.to_dict(), indent=1, allow_nan=False))
        write_whole(out / PAGE, render(result))
    return result


class _Book:
    """What was measured, in a journal or in memory alone.

    Args:
        journal: None for none.
    """

    def __init__(self, journal: Journal | None) -> None:
        self.journal = journal
        self.notes = () if journal is None else tuple(journal.notes)
        self._entries: dict[str, dict[str, Any]] = {}
        for entry in () if journal is None else journal.entries:
            self._entries[entry["key"]] = entry

    @property
    def seconds(self) -> float:
        """Of all trainings."""
        return sum(entry.get("seconds", 0.0) for entry in self._entries.values())

    def get(self, key: str, kind: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what is known under a key, or measure it and write it down."""
        if key not in self._entries:
            content = measure()
            if self.journal is not None:
                self.journal.add(kind, key=key, **content)
            self._entries[key] = json.loads(json.dumps(content))
        return self._entries[key]


@dataclass(frozen=True)
class _Trained:
    """A training of an arm, all parts of the task together. failed: why it has no scores."""

    validation: float
    score: float
    kept: tuple[int, ...]
    failed: str | None = None


class _Run:
    """One comparison: the steps' costs, the trainings, the rows."""

    def __init__(
        self,
        task: Task,
        arms: Sequence[Arm],
        plan: Mapping[Arm, tuple[dict[str, int], dict[str, int]]],
        settings: Mapping[str, Any],
        book: _Book,
        progress: bool,
    ) -> None:
        self.task, self.arms, self.plan, self.settings = task, arms, plan, settings
        self.book, self.progress = book, progress
        self.costs: dict[str, StepCost] = {}
        self.pruned = False
        self.at_the_ends: tuple[str, ...] = ()  # arms whose best rate is the lowest or the highest

    def rows(self) -> tuple[Row, ...]:
        measured = self.book.get("steps", "steps", self._costs)
        self.costs = {name: StepCost(**each) for name, each in measured["costs"].items()}
        seeds = self.settings["seeds"]
        found: dict[tuple[Arm, float], list[_Trained]] = {}
        for arm, rate, each in self._track(list(product(self.arms, self.settings["rates"], seeds)), "Training"):
            found.setdefault((arm, rate), []).append(self.trained(arm, each, rate))
        rates: dict[Arm, float] = {}
        for arm in self.arms:
            tried = {rate: mean(each.validation for each in found[arm, rate]) for rate in self.settings["rates"]}
            best = min(tried, key=lambda rate: tried[rate])
            if math.isfinite(tried[best]):
                rates[arm] = best
        ends = (min(self.settings["rates"]), max(self.settings["rates"]))
        self.at_the_ends = tuple(arm.name for arm in self.arms if rates.get(arm) in ends)
        trainings = {arm: found[arm, rates[arm]] if arm in rates else [] for arm in self.arms}
        return self._judged(rates, trainings)

    def _track(self, todo: list[Any], what: str) -> Any:
        return track(todo, what, len(todo), self.progress)

    def _costs(self) -> dict[str, Any]:
        """A step of each arm, in turns, in each part."""
        costs: dict[str, list[StepCost]] = {arm.name: [] for arm in self.arms}
        for part in self._track(list(self.task.parts), "Measuring steps"):
            loss, rows = self.task.step(part)
            models = {arm.name: self.task.fresh(arm, self.plan[arm][0][part], part, 0) for arm in self.arms}
            for name, cost in measure_steps(models, loss, rows, min(self.settings["rates"])).items():
                costs[name].append(cost)
        return {"costs": {name: StepCost.mean_of(each).to_dict() for name, each in costs.items()}}

    def steps(self, arm: Arm) -> int:
        """Of a training of an arm."""
        steps = int(self.settings["steps"])
        if self.settings["equal"] == "steps":
            return steps
        base, own = self.costs[self.arms[0].name].milliseconds, self.costs[arm.name].milliseconds
        return max(1, round(steps * base / own))

    def trained(self, arm: Arm, seed: int, rate: float) -> _Trained:
        """Train an arm in all parts, if the journal does not have it."""
        found = [
            self.book.get(
                f"{arm.name} {seed} {rate:g} {part}".strip(), "training", partial(self._train, arm, seed, rate, part)
            )
            for part in self.task.parts
        ]
        failed = next((each["failed"] for each in found if each["failed"] is not None), None)
        if failed is not None:
            return _Trained(math.inf, math.nan, (), failed)
        return _Trained(
            mean(each["validation"] for each in found),
            mean(each["score"] for each in found),
            tuple(each["parameters"] for each in found),
        )

    def _train(self, arm: Arm, seed: int, rate: float, part: str) -> dict[str, Any]:
        model = self.task.fresh(arm, self.plan[arm][0][part], part, seed)
        started = time.perf_counter()
        failed: str | None = None
        try:
            found = self.task.trained(model, part, rate, seed, self.steps(arm))
        except NonFiniteError as error:
            found, failed = Training(math.nan, math.nan, 0), str(error)
        else:
            if not (math.isfinite(found.validation) and math.isfinite(found.score)):
                failed = f"a loss is not finite at rate {rate:g}"
        seconds = time.perf_counter() - started
        step(
            f"{arm.name}, seed {seed}, rate {rate:g}{part and f', {part}'}: {failed or f'{found.score:.4g}'}",
            self.progress,
        )
        entry = {"arm": arm.name, "seed": seed, "rate": rate, "part": part, "seconds": seconds, "failed": failed}
        if failed is not None:
            return {**entry, "validation": None, "score": None, "parameters": None}
        return {**entry, "validation": found.validation, "score": found.score, "parameters": found.parameters}

    def _judged(self, rates: Mapping[Arm, float], trainings: Mapping[Arm, list[_Trained]]) -> tuple[Row, ...]:
        whole = {arm: found for arm, found in trainings.items() if found and all(each.failed is None for each in found)}
        baseline = self.arms[0]
        differences = {
            arm.name: [one.score - other.score for one, other in zip(found, whole[baseline], strict=True)]
            for arm, found in whole.items()
            if baseline in whole and arm != baseline
        }
        judged = judge(differences)
        return tuple(self._row(arm, rates.get(arm), trainings[arm], judged.get(arm.name)) for arm in self.arms)

    def _row(self, arm: Arm, rate: float | None, found: list[_Trained], difference: Difference | None) -> Row:
        failed = next((each.failed for each in found if each.failed is not None), None)
        if rate is None:
            every = (self.trained(arm, *pair) for pair in product(self.settings["seeds"], self.settings["rates"]))
            failed = f"at all three rates: {next(each.failed for each in every if each.failed is not None)}"
        scores = () if failed is not None else tuple(each.score for each in found)
        widths, parameters = self.plan[arm]
        kept = [number for each in found for number in each.kept]
        pruned = sum(kept) < sum(parameters.values()) * len(found) if kept and not failed else False
        self.pruned |= pruned
        cost = self.costs[arm.name]
        return Row(
            name=arm.name,
            kind=arm.kind,
            widths=widths,
            parameters=parameters,
            kept=(min(kept), max(kept)) if pruned else None,
            rate=rate,
            scores=scores,
            mean=mean(scores) if scores else None,
            difference=difference,
            word=self._word(arm, failed, difference),
            milliseconds=cost.milliseconds,
            slowest=cost.slowest,
            flops=cost.flops,
            saved_bytes=cost.saved_bytes,
            function_flops=cost.function_flops,
            steps=self.steps(arm),
            failed=failed,
        )

    def _word(self, arm: Arm, failed: str | None, difference: Difference | None) -> Word:
        if failed is not None:
            return "failed"
        if arm == self.arms[0]:
            return "baseline"
        if difference is None:
            return "not compared"
        if not difference.differs:
            return "no difference seen"
        return "better" if (difference.value > 0) == (self.task.better == "higher") else "worse"


# -- before it starts --------------------------------------------------------------------------------------------------


def _task(name: str) -> Task:
    if name in TASKS:
        return TASKS[name]()
    near = difflib.get_close_matches(name, TASKS, n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise RecipeError(f"on: the task {shorten(name)!r} is not known.{hint} Known are {', '.join(TASKS)}.")


def _check_settings(
    equal: str,
    seeds: int,
    steps: int | None,
    width: int | None,
    rates: Sequence[float] | None,
    seed: int,
    nothing_to_resume: bool,
) -> None:
    if equal not in ("steps", "time"):
        raise ValueError(f"equal: {equal!r} was given, allowed are 'steps' and 'time'.")
    if seeds < 2:
        raise ValueError(
            f"seeds: {seeds} was given; give 2 or more, as one seed says nothing of the next (5 are usual)."
        )
    for name, given in (("steps", steps), ("width", width)):
        if given is not None and given < 1:
            raise ValueError(f"{name}: {given} was given; give 1 or more, or None for the task's own.")
    if rates is not None and not (len(set(rates)) == len(rates) == 3 and all(0 < rate < math.inf for rate in rates)):
        raise ValueError(f"rates: {list(rates)} were given; give three different ones above 0.")
    if seed < 0:
        raise ValueError(f"seed: {seed} was given; give 0 or more.")
    if nothing_to_resume:
        raise ValueError("resume: there is no folder with a journal to go on with; give out=, or leave resume out.")


def _check_kinds(arms: Sequence[Arm], task: Task) -> None:
    for arm in arms:
        if arm.kind not in task.kinds:
            others = [name for name, each in TASKS.items() if arm.kind in each.kinds]
            plural = {"function": "functions", "mlp": "MLPs", "pooling": "pooling", "attention": "attention"}
            raise ValueError(
                f"names: {arm.name} is {plural[arm.kind]}, which {task.name} does not compare; it takes "
                f"{', '.join(plural[kind] for kind in task.kinds)}. {arm.name} fits {', '.join(others)}."
            )


def _widths(arms: Sequence[Arm], task: Task, width: int) -> dict[Arm, tuple[dict[str, int], dict[str, int]]]:
    """Widths and parameters of each arm, by part. Raises ValueError if some cannot be matched."""
    plan: dict[Arm, tuple[dict[str, int], dict[str, int]]] = {arm: ({}, {}) for arm in arms}
    counts: dict[tuple[Arm, str], Count] = {
        (arm, part): cache(partial(_count, task, arm, part)) for arm, part in product(arms, task.parts)
    }
    for part in task.parts:
        wanted = counts[arms[0], part](width)
        if wanted is None:
            raise ValueError(
                f"width: {arms[0].name} cannot have the width {width}; give another one by width (--width)."
            )
        for arm in arms:
            found = (width, wanted) if arm == arms[0] else nearest(counts[arm, part], wanted)
            plan[arm][0][part], plan[arm][1][part] = found
            if not fits(found[1], wanted):
                others = [counts[other, part] for other in arms[1:]]
                better = width_for_all(counts[arms[0], part], others, width + 1)
                advice = "leave it out" if better is None else f"give width={better} (--width), which fits all arms"
                raise ValueError(
                    f"width: {arm.name} cannot have the {wanted:,} parameters of {arms[0].name} within {NEAR:.0%}"
                    f"{part and f' in {part}'}; nearest is the width {found[0]} with {found[1]:,} "
                    f"({found[1] / wanted - 1:+.1%}); {advice}."
                )
    return plan


def _count(task: Task, arm: Arm, part: str, width: int) -> int | None:
    return task.parameters(arm, width, part)
