"""Everything that is measured of one model, in one result: quality, cost, speed, memory and whether it still writes.

Quality, cost and the generation check are measured on the model in memory; bytes on disk, speed and peak memory on the
folder it was saved to, in fresh processes. The result says with what: machine, versions, threads, dtype, data, seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground import processes
from actkit.core.ground.errors import DataError
from actkit.core.ground.estimate import Estimate
from actkit.core.ground.machine import machine, versions
from actkit.core.ground.memory import format_bytes
from actkit.core.layers.foreign_layers import refuse_quantized
from actkit.core.measure.generation import GenerationCheck, check_generation
from actkit.core.measure.quality import Quality, measure_quality, task_of
from actkit.core.measure.task_scores import TaskScore, scores_table

if TYPE_CHECKING:
    from rich.table import Table

    from actkit.core.measure.cost import Cost
    from actkit.core.measure.fresh import Base, FreshProcess
    from actkit.core.measure.speed import Speed

ORIGINAL, CHANGED = "original", "changed"
PROMPTS, PROMPT, CONTINUATION = 4, 32, 32  # of the generation check: texts, and tokens of each


@dataclass(frozen=True)
class Memory:
    """What a fresh process took, Python and its libraries included.

    Attributes:
        peak_bytes: the largest resident set since the model was loaded.
        resident_bytes: afterwards; None if the peak comes from the measurement of speed.
        load_peak_bytes: the largest while it was loaded, or None.
        doing: what it ran.
    """

    peak_bytes: int
    resident_bytes: int | None
    load_peak_bytes: int | None
    doing: str


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        model: its class.
        quality: of the model, and against the reference if one was given.
        cost: of the model.
        original_cost: of the reference; None if none was given.
        speed: of the saved model; None if it was not asked for.
        original_speed: of the saved reference; None if none was given.
        memory: of a fresh process; None if it was not asked for.
        generation: None if the model writes no text.
        machine: that it was measured on.
        versions: of the packages, by name.
        threads: of the measurements in memory; a speed has its own.
        dtype: of the measurements in memory; a speed has its own.
        data: one line.
        fingerprint: SHA-256 of the data's tensors; None for plain batches.
        seed: of the resampling.
        seconds: of the whole evaluation.
        tasks: a row per task and metric, if any were run.
    """

    model: str
    quality: Quality
    cost: Cost
    original_cost: Cost | None
    speed: Speed | None
    original_speed: Speed | None
    memory: Memory | None
    generation: GenerationCheck | None
    machine: dict[str, Any]
    versions: dict[str, str]
    threads: int
    dtype: str
    data: str
    fingerprint: str | None
    seed: int
    seconds: float
    tasks: tuple[TaskScore, ...] = ()

    def card_fields(self) -> dict[str, Any]:
        """Return what a model card says of it, as fields of `core.store.card.Card`."""
        quality, info = self.quality, self.machine
        loss = [] if quality.loss is None else [("loss against the original", quality.loss.text(".2%"))]
        return {
            "metrics": quality.metrics,
            "data": quality.data,
            "rows": loss,
            "machine": f"{info['processor']}, {info['cores']} cores, {info['capability']}, {self.dtype}",
            "versions": self.versions,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it; None for what was not measured."""
        found: dict[str, Any] = dict(vars(self))
        for name in ("quality", "cost", "original_cost", "speed", "original_speed", "generation"):
            if found[name] is not None:
                found[name] = found[name].to_dict()
        found["memory"] = None if self.memory is None else asdict(self.memory)
        found["tasks"] = [each.to_dict() for each in self.tasks]
        return found

    def table(self) -> Table:
        """Show quality, then cost and speed beside the original's, then how it was measured."""
        from rich.table import Table
        from rich.text import Text

        page = Table.grid()
        page.add_row(Text(f"{self.model}, {self.dtype}", style="bold"))
        page.add_row("")
        page.add_row(self.quality.table())
        if self.tasks:
            page.add_row(scores_table(self.tasks))
        page.add_row(self._costs())
        if self.generation is not None:
            page.add_row(_writes(self.generation))
        page.add_row(Text(self._conditions(), style="dim"))
        return page

    def _costs(self) -> Table:
        from rich import box

        from actkit.core.ground.tables import PlainTable

        table = PlainTable(title="Cost", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("", overflow="fold")
        compares = self.original_cost is not None or self.original_speed is not None
        for name in ("value", "original", "of the original") if compares else ("value",):
            table.add_column(name, justify="right", no_wrap=True)
        for label, value, original, share in self._rows():
            table.add_row(label, value, *((original, share) if compares else ()))
        return table

    def _rows(self) -> Iterable[tuple[str, str, str, str]]:
        """label, value, the original's value, and the share."""
        cost, old = self.cost, self.original_cost
        per = "token or example" if self.quality.task == "classification" else "token"
        sizes: list[tuple[str, float | None, float | None]] = [
            ("weights in memory", cost.weight_bytes, None if old is None else old.weight_bytes),
            (f"weights read per {per}", cost.bytes_per_token, None if old is None else old.bytes_per_token),
            ("on disk", cost.disk_bytes, None if old is None else old.disk_bytes),
        ]
        if self.memory is not None:
            other = self.original_speed if self.memory.resident_bytes is None else None
            label = f"peak of the process, {self.memory.doing}"
            sizes.append((label, self.memory.peak_bytes, None if other is None else other.peak_bytes))
        for label, size, original in sizes:
            if size is not None:
                share = f"{size / original:.1%}" if original else ""
                yield label, format_bytes(size), "" if original is None else format_bytes(original), share
        if cost.density is not None:
            spread = ""
            if cost.density_p05 is not None and cost.density_p95 is not None:
                spread = f" ({cost.density_p05:.1%} to {cost.density_p95:.1%} in 90 % of the tokens)"
            yield f"inputs read by layers that choose some{spread}", f"{cost.density:.1%}", "", ""
        if self.speed is not None:
            yield from self._speeds(self.speed)

    def _speeds(self, speed: Speed) -> Iterable[tuple[str, str, str, str]]:
        old = self.original_speed
        ratio = "" if speed.ratio is None else f"{_range(speed.ratio, '.2f')} x"
        label = f"{speed.unit}, {_shape(speed)}"
        yield label, _range(speed.rate), "" if old is None else _range(old.rate), ratio
        if speed.first_token_seconds is not None:
            first, before = speed.first_token_seconds, None if old is None else old.first_token_seconds
            share = "" if before is None else f"{first.value / before.value:.1%}"
            yield "ms to the first token", _range(_thousand(first)), _range(_thousand(before)) if before else "", share

    def _conditions(self) -> str:
        info = self.machine
        parts = [
            f"{info['processor']}, {info['cores']} cores, {format_bytes(info['memory_bytes'])}, {info['capability']}",
            *([info["gpu"]] if info["gpu"] else []),
            _threads(self.threads),
            *([] if self.speed is None else [f"speed through {self.speed.through}"]),
            f"torch {self.versions['torch']}, transformers {self.versions['transformers']}",
            f"seed {self.seed}",
            f"{self.seconds:.1f} s",
        ]
        return "; ".join(parts)


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    folder: str | Path | None = None,
    reference_folder: str | Path | None = None,
    process: FreshProcess | None = None,
    speed: bool = False,
    task: str | None = None,
    generation: bool = True,
    batch: int = 1,
    prompt: int = 128,
    max_new_tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    dtype: torch.dtype | str | None = None,
    base: Base | None = None,
    trust_remote_code: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure a model, and how it compares with its original.

    Several processes (`core.ground.processes.together`) share the batches of quality and density; all get the whole
    result.

    Args:
        model: what is measured.
        batches: as in `measure_quality`; they also give the density of selections and the prompts of the generation
            check.
        reference: the original, as in `measure_quality`.
        folder: where the model is saved, for its bytes on disk; `process` and `speed` need it.
        reference_folder: where the original is saved, for its bytes on disk, and timed in turns with `folder`.
        process: measures memory: it loads the folder, runs the first batch, and stays open.
        speed: time the folders by `measure_speed`; without `process` the peak memory is that of the timed process.
        task: as in `measure_quality`.
        generation: check that a language model still writes.
        batch: rows that are timed at a time.
        prompt: tokens of the prompt that is timed.
        max_new_tokens: per row, of what is timed.
        rounds: of the timing.
        threads: of the timed processes.
        dtype: in which the folders are loaded.
        base: as in `FreshProcess.load`, for one's own nn.Module.
        trust_remote_code: run code that a folder brings.
        resamples: as in `measure_quality`.
        seed: as in `measure_quality`.
        progress: show bars.

    Returns:
        Everything that was measured, and with what.

    Raises:
        ValueError: a process or a speed is asked for without a folder, or in several processes.
        ActkitError: what `measure_quality`, `measure_cost`, `check_generation`, `measure_speed` and the process raise.
    """
    from actkit.core.forward.example import main_dtype
    from actkit.core.measure.cost import measure_cost

    started = time.perf_counter()
    if folder is None and (speed or process is not None):
        name = "speed: True" if speed else "process: one"
        raise ValueError(f"{name} was given without folder=; save the model and pass the folder it was saved to.")
    if processes.several() and (speed or process is not None):
        raise ValueError(
            f"speed, process: time and memory are measured with the machine to itself, and {processes.count()} "
            f"processes share it here; measure them in one, without torchrun."
        )
    batches = sequence_of(batches)  # each measurement reads them again
    for each in (model, reference):
        if each is not None:
            refuse_quantized(each)
    task = task or task_of(model)
    quality = measure_quality(
        model, batches, reference=reference, task=task, resamples=resamples, seed=seed, progress=progress
    )
    cost = measure_cost(model, batches, folder=folder, progress=progress)
    original_cost = None
    if reference is not None:
        original_cost = measure_cost(reference, batches, folder=reference_folder, progress=progress)
    check = _generation(model, reference, batches) if generation and task == "language" else None

    options: dict[str, Any] = {"dtype": dtype, "base": base, "trust_remote_code": trust_remote_code}
    memory = None if process is None or folder is None else _memory(process, folder, batches[0], options)
    measured: Mapping[str, Speed] = {}
    if speed and folder is not None:
        from actkit.core.measure.speed import measure_speed

        folders = {CHANGED: Path(folder)}
        if reference_folder is not None:  # the first one is what the others are compared with
            folders = {ORIGINAL: Path(reference_folder), **folders}
        measured = measure_speed(
            folders,
            batch=batch,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            threads=threads,
            example=batches[0],
            progress=progress,
            **options,
        )
        if memory is None:
            memory = Memory(measured[CHANGED].peak_bytes, None, None, f"timed with {_shape(measured[CHANGED])}")
    return Evaluation(
        model=type(model).__name__,
        quality=quality,
        cost=cost,
        original_cost=original_cost,
        speed=measured.get(CHANGED),
        original_speed=measured.get(ORIGINAL),
        memory=memory,
        generation=check,
        machine=machine(),
        versions=versions(),
        threads=torch.get_num_threads(),
        dtype=str(main_dtype(model)).removeprefix("torch."),
        data=quality.data,
        fingerprint=getattr(batches, "fingerprint", None),
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def _memory(process: FreshProcess, folder: str | Path, batch: Any, options: Mapping[str, Any]) -> Memory:
    loaded = process.load(folder, **options)
    process.time_forward(batch)  # not `outputs`: sending logits back would take more memory than the model
    found = process.memory()
    return Memory(found["peak_bytes"], found["resident_bytes"], loaded["load_peak_bytes"], "one pass over a batch")


# -- the generation check ----------------------------------------------------------------------------------------------


def _generation(model: nn.Module, reference: nn.Module | None, batches: Sequence[Any]) -> GenerationCheck | None:
    """The check on the beginnings of the first rows; None for what does not generate (a plain module)."""
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        return None
    prompts, new_tokens = _prompts(model, batches)
    return check_generation(model, prompts, max_new_tokens=new_tokens, reference=reference)


def _prompts(model: nn.Module, batches: Sequence[Any]) -> tuple[Tensor, int]:
    """int64 [prompts, length] of real tokens, and how many new tokens the context leaves room for."""
    from actkit.core.forward.example import Inputs

    context = Inputs.of(model).context or PROMPT + CONTINUATION
    new_tokens = min(CONTINUATION, context // 2)
    rows: list[Tensor] = []
    for each in batches:
        ids = each["input_ids"] if isinstance(each, Mapping) else each[0] if isinstance(each, tuple) else each
        mask = each.get("attention_mask") if isinstance(each, Mapping) else None
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask.bool()
        rows += [row[kept] for row, kept in zip(ids, real) if kept.any()]
        if len(rows) >= PROMPTS:
            break
    if not rows:
        raise DataError("batches: they hold no token that is not masked; give other data.")
    rows = rows[:PROMPTS]
    length = min(PROMPT, context - new_tokens, *(len(row) for row in rows))
    return torch.stack([row[:length] for row in rows]), new_tokens


# -- words -------------------------------------------------------------------------------------------------------------


def _writes(check: GenerationCheck) -> str:
    if not check.passed:
        return f"Does not write: {check.reason}\n"
    length = len(check.tokens[0])
    like = ""
    if check.agreeing_prefix is not None:
        like = f"; its first {check.agreeing_prefix:.3g} of {length} tokens are the original's, on average"
    return f"Writes: {len(check.tokens)} greedy texts of {length} tokens{like}\n"


def _range(estimate: Estimate, form: str = ".3g") -> str:
    """'12 (11 to 13)', without the interval if it is not known."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def _thousand(estimate: Estimate) -> Estimate:
    return Estimate(1000 * estimate.value, 1000 * estimate.low, 1000 * estimate.high)


def _shape(speed: Speed) -> str:
    """'1 x 128 + 32 tokens, 2 threads': what was run."""
    rows = f"{speed.batch} x {speed.prompt}" if speed.prompt else f"{speed.batch} at a time"
    new = f" + {speed.new_tokens}" if speed.new_tokens else ""
    words = " tokens" if speed.prompt else ""
    return f"{rows}{new}{words}, {_threads(speed.threads)}"


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"
