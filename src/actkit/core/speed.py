"""How fast saved models run on this machine: each in a fresh process of its own, compared round by round.

A machine drifts (heat, neighbours, clock), so the candidates take turns: in every round each is timed once, and the
order rotates from round to round. A ratio is formed inside a round, where both saw the same machine, and its interval
resamples rounds. The first round is a warm-up and is not counted. Language models decode a fixed random prompt with a
key-value cache; other models run forward passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from actkit.core.errors import DataError, MemoryLimitError
from actkit.core.example import Inputs, fit_dtype
from actkit.core.fresh import Base, FreshProcess
from actkit.core.memory import format_bytes
from actkit.core.progress import track
from actkit.core.quality import Estimate

CONFIDENCE = 0.95
RESAMPLES = 2000
FORWARD_SECONDS = 0.2  # of one round, in as many passes as that takes
PROCESS = 450 * 10**6  # bytes that Python, torch and transformers take in each process
COPIES = 2  # of the weights: the sparse kernel keeps its own beside them, or a load converts the dtype


@dataclass(frozen=True)
class Speed:
    """How fast one candidate is.

    kind: 'decode' or 'forward'. unit: of rate: 'tokens/s' (following tokens, all rows together), 'sequences/s' or
    'examples/s'. rate, first_token_seconds (decode only): median over rounds with its 95 % interval. ratio: rate over
    the first candidate's, paired by round; None for the first itself. peak_bytes: of the whole process since its load
    ended. batch: rows. prompt: tokens of a prompt or sequence, 0 for examples without tokens. new_tokens: per row, 0
    for 'forward'. packed: layers that decode through the sparse kernel.
    """

    kind: Literal["decode", "forward"]
    unit: str
    rate: Estimate
    first_token_seconds: Estimate | None
    ratio: Estimate | None
    peak_bytes: int
    batch: int
    prompt: int
    new_tokens: int
    threads: int
    dtype: str
    rounds: int
    packed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        estimates = ("rate", "first_token_seconds", "ratio")
        found = {name: getattr(self, name) for name in estimates}
        rest = {name: value for name, value in self.__dict__.items() if name not in estimates}
        return {**rest, **{name: None if e is None else e.to_dict() for name, e in found.items()}}


def measure_speed(
    folders: Mapping[str, str | Path],
    *,
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    dtype: torch.dtype | str | None = None,
    base: Base | None = None,
    trust_remote_code: bool = False,
    max_memory: int | None = None,
    progress: bool = True,
) -> dict[str, Speed]:
    """Time saved models against the first of them.

    folders: name -> folder. batch: rows. prompt: tokens of the prompt, or of the sequences of a model that does not
    decode. new_tokens: decoded per row, 2 or more. rounds: counted ones. threads: of each process, torch's number here
    where None. dtype: as stored where None. base: as in `FreshProcess.load`. max_memory: bytes that all processes may
    take together; what is free now where None.
    Raises MemoryLimitError before anything starts where they do not fit, ValueError for settings out of bounds or
    candidates of different kinds, FreshProcessError where a folder does not load or run.
    """
    _check(folders, batch=batch, prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    _check_memory(folders, dtype, max_memory)
    with ExitStack() as stack:
        processes = {name: stack.enter_context(FreshProcess(threads=threads)) for name in folders}
        runners: dict[str, _Runner] = {}
        for name, process in track(processes.items(), "Loading the candidates", len(processes), progress):
            loaded = process.load(folders[name], dtype, base=base, trust_remote_code=trust_remote_code)
            runners[name] = _Runner(process, loaded, batch, prompt, new_tokens)
        _check_kinds(runners)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
        for index in track(range(-1, rounds), "Measuring the speed", rounds + 1, progress):
            for name in _rotated(list(folders), index):
                measured = runners[name].run()
                if index >= 0:
                    times[name].append(measured)
        memory = {name: runner.process.memory()["peak_bytes"] for name, runner in runners.items()}
    first = np.array([row["rate"] for row in times[next(iter(folders))]])
    return {
        name: runner.result(times[name], None if index == 0 else first, memory[name])
        for index, (name, runner) in enumerate(runners.items())
    }


class _Runner:
    """One candidate in its process, with the input that is timed."""

    def __init__(self, process: FreshProcess, loaded: dict[str, Any], batch: int, prompt: int, new_tokens: int) -> None:
        self.process, self.loaded, self.rows = process, loaded, batch
        takes = Inputs.from_dict(loaded["inputs"])
        self.kind: Literal["decode", "forward"] = "decode" if takes.causal else "forward"
        self.new_tokens = new_tokens if takes.causal else 0
        self.prompt = prompt if takes.vocabulary is not None else 0
        if takes.causal and takes.context is not None and prompt + new_tokens > takes.context:
            raise ValueError(
                f"prompt, new_tokens: {prompt} + {new_tokens} tokens were asked for, the model's context is "
                f"{takes.context}; lower one of them."
            )
        self.inputs = fit_dtype(takes.batch(batch, prompt), getattr(torch, loaded["dtype"]))
        self.packed = process.pack() if takes.causal and batch <= 2 else 0  # with more rows the kernel is not used

    def run(self) -> dict[str, float]:
        """One round: rate, and first_token_seconds for a decoder."""
        if self.kind == "forward":
            return {"rate": self.rows / self.process.time_forward(self.inputs, FORWARD_SECONDS)}
        ids = self.inputs["input_ids"] if isinstance(self.inputs, Mapping) else self.inputs
        timed = self.process.time_decode(ids, self.new_tokens)
        return {"rate": timed["tokens_per_second"], "first": timed["first_token_seconds"]}

    def result(self, times: list[dict[str, float]], first: np.ndarray | None, peak: int) -> Speed:
        """first: the first candidate's rates, round by round."""
        rates = np.array([row["rate"] for row in times])
        forward = "sequences/s" if self.prompt else "examples/s"
        return Speed(
            self.kind,
            "tokens/s" if self.kind == "decode" else forward,
            median(rates),
            median(np.array([row["first"] for row in times])) if self.kind == "decode" else None,
            None if first is None else median(rates / first),
            peak,
            self.rows,
            self.prompt,
            self.new_tokens,
            self.loaded["threads"],
            self.loaded["dtype"],
            len(times),
            self.packed,
        )


def median(values: np.ndarray, seed: int = 0) -> Estimate:
    """The median of measured rounds [n] and its 95 % bootstrap interval; one round alone says nothing about others."""
    value = float(np.median(values))
    if len(values) < 2:
        return Estimate(value, -np.inf, np.inf)
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(values[draws], axis=1), (tail, 1 - tail))
    return Estimate(value, float(low), float(high))


def _rotated(names: list[str], index: int) -> list[str]:
    """The names in this round's order: each comes first in its turn."""
    start = index % len(names)
    return names[start:] + names[:start]


# -- before it starts --------------------------------------------------------------------------------------------------


def _check(folders: Mapping[str, str | Path], **settings: int) -> None:
    if not folders:
        raise ValueError("folders: none were given; give at least one, as in {'original': folder}.")
    for name, value in settings.items():
        least = 2 if name == "new_tokens" else 1
        if value < least:
            raise ValueError(f"{name}: {value} was given; give {least} or more.")
    for name, folder in folders.items():
        if not Path(folder).is_dir():
            raise DataError(f"folders: {name!r} is {str(folder)!r}, where there is no folder; save the model first.")


def _check_memory(folders: Mapping[str, str | Path], dtype: torch.dtype | str | None, max_memory: int | None) -> None:
    """All candidates stay loaded, because a load between two rounds would disturb the others."""
    needed = {name: COPIES * weight_file_bytes(folder, dtype) + PROCESS for name, folder in folders.items()}
    free = _available() if max_memory is None else max_memory
    total = sum(needed.values())
    if total > free:
        largest = max(needed, key=lambda name: needed[name])
        raise MemoryLimitError(
            f"folders: {len(folders)} processes side by side need about {format_bytes(total)}, {format_bytes(free)} "
            f"are free. Largest is {largest!r} with {format_bytes(needed[largest])}: measure fewer at a time, "
            f"each call with the original first."
        )


def weight_file_bytes(folder: str | Path, dtype: torch.dtype | str | None = None) -> int:
    """Bytes of a folder's weights in memory: as stored, or with float tensors in `dtype` where that is larger."""
    from safetensors import safe_open

    from actkit.core.checkpoint import parse_dtype

    target = parse_dtype(dtype)
    total = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                size = _WIDTHS.get(part.get_dtype(), 4)
                if target is not None and part.get_dtype() in ("F64", "F32", "F16", "BF16"):
                    size = max(size, target.itemsize)
                total += size * int(np.prod(part.get_shape(), dtype=np.int64))
    return total


_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def _available() -> int:
    """Bytes that this machine, or the container around us, still gives."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = (group / "memory.stat").read_text(encoding="ascii").split()
    except OSError:
        return free
    # What files left in the cache counts as used too, but is given back when needed.
    return free if limit == "max" else min(free, max(0, int(limit) - int(used[used.index("anon") + 1])))


def _check_kinds(runners: Mapping[str, _Runner]) -> None:
    kinds = {name: runner.kind for name, runner in runners.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"folders: {kinds} cannot be compared; give models that all decode, or none that does.")
