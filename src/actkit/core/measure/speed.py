"""How fast saved models run on this machine: each in a fresh process of its own, compared round by round.

A machine drifts (heat, neighbours, clock), so the candidates take turns: in every round each is timed once, and the
order rotates from round to round.

- A ratio is formed inside a round, in which both saw the same machine, and its interval resamples rounds.
- A round of a small model repeats until it took a while, and rounds go on, up to a limit, until every ratio is known to
  10 %: on a busy machine a few steps of microseconds say nothing.
- The first round is a warm-up and is not counted. A process that compiled kernels in it is replaced by a new one, which
  reads them from the compile cache, so that no memory of the compiler is measured.
- Language models decode a fixed random prompt with a key-value cache; other models run forward passes.
- A single text goes through a decoder (`core.measure.decoding`) if one takes every candidate, else all go through
  transformers: ratios compare models, never engines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from actkit.core.forward.batch import main_input
from actkit.core.forward.example import Inputs, fit_dtype
from actkit.core.ground.errors import DataError, MemoryLimitError
from actkit.core.ground.estimate import Estimate
from actkit.core.ground.memory import format_bytes
from actkit.core.ground.progress import track
from actkit.core.measure.fresh import Base, FreshProcess

CONFIDENCE = 0.95
RESAMPLES = 2000
ROUND_SECONDS = 0.2  # of one round, in as many passes or texts as that takes
PRECISION = 0.1  # half of a ratio's interval, as a share of the ratio, from which no more rounds are needed
LONGEST, EXTRA_SECONDS = 4, 60.0  # times the rounds asked for at most, and how long more of them may take
PROCESS = 550 * 10**6  # bytes that Python, torch, transformers and Numba take in each process
COPIES = 2  # of the weights: what decodes keeps its own beside them, or a load converts the dtype
BUILDING = 2  # more copies while a decoder is built, one at a time: integer codes are unpacked for it


@dataclass(frozen=True)
class Speed:
    """How fast one candidate is.

    Attributes:
        kind: 'decode' or 'forward'.
        unit: of the rate: 'tokens/s' (following tokens, all rows together), 'sequences/s' or 'examples/s'.
        rate: median over rounds with its 95 % interval.
        first_token_seconds: the same, of 'decode' only.
        ratio: rate over the first candidate's, paired by round; None for the first itself.
        peak_bytes: of the whole process since its load ended: Python and its libraries, the model, and what decodes it,
            while it is built too. That is the decoder's packed copy of all weights and its cache, or the sparse
            kernel's copy of the layers it serves. Compiling is left out, unless no compile cache can be written.
        batch: rows.
        prompt: tokens of a prompt or sequence; 0 for examples without tokens.
        new_tokens: per row; 0 for 'forward'.
        threads: of the process.
        dtype: of the model.
        rounds: that were counted.
        packed: layers that transformers decodes through the sparse kernel.
        engine: 'decoder' or 'transformers' for 'decode', 'torch' for 'forward'; the same for all candidates of a
            measurement.
        engine_reason: why it is not the decoder, or ''.
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
    engine: str = "transformers"  # which journals from before there was a decoder do not say
    engine_reason: str = ""

    @property
    def noisy(self) -> bool:
        """Whether the ratio is not known to 10 %, after all rounds."""
        return self.ratio is not None and not _precise(self.ratio, PRECISION)

    @property
    def through(self) -> str:
        """The engine in words: 'decoder', or 'transformers (why not the decoder)'."""
        return f"{self.engine} ({self.engine_reason})" if self.engine_reason else self.engine

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        estimates = ("rate", "first_token_seconds", "ratio")
        found = {name: getattr(self, name) for name in estimates}
        rest = {name: value for name, value in self.__dict__.items() if name not in estimates}
        return {**rest, **{name: None if e is None else e.to_dict() for name, e in found.items()}}


def measure_speed(
    folders: Mapping[str, str | Path],
    *,
    batch: int = 1,
    prompt: int = 128,
    max_new_tokens: int = 32,
    rounds: int = 5,
    precision: float | None = PRECISION,
    threads: int | None = None,
    dtype: torch.dtype | str | None = None,
    base: Base | None = None,
    trust_remote_code: bool = False,
    example: Any = None,
    max_memory: int | None = None,
    progress: bool = True,
) -> dict[str, Speed]:
    """Time saved models against the first of them.

    Args:
        folders: name -> folder.
        batch: rows.
        prompt: tokens of the prompt, or of the sequences of a model that does not decode.
        max_new_tokens: decoded per row, 2 or more.
        rounds: that are counted; up to 4 times as many within a minute, as `precision` says.
        precision: go on if the interval of a ratio is wider than this to either side, as a share of the ratio; None to
            stop after `rounds`.
        threads: of each process; None for torch's number here.
        dtype: of the loaded models; None for the stored one.
        base: as in `FreshProcess.load`, for one's own nn.Module.
        trust_remote_code: run code that a folder brings.
        example: one batch, timed as it is if the models do not decode and take more than tokens or images.
        max_memory: bytes that all processes may take together; None for what is free now.
        progress: show a bar.

    Returns:
        The speeds, by name.

    Raises:
        MemoryLimitError: they do not fit, before anything starts.
        ValueError: a setting is out of bounds, or candidates are of different kinds.
        DataError: a folder does not exist.
        FreshProcessError: a folder does not load or run.
    """
    _check(folders, batch=batch, prompt=prompt, max_new_tokens=max_new_tokens, rounds=rounds)
    if precision is not None and not precision > 0:
        raise ValueError(f"precision: {precision} was given; give a share above 0, such as 0.1, or None.")
    _check_memory(folders, dtype, max_memory, builds=batch == 1)
    options = {"dtype": dtype, "base": base, "trust_remote_code": trust_remote_code}
    with ExitStack() as stack:
        runners: dict[str, _Runner] = {}
        for name, folder in track(folders.items(), "Loading the candidates", len(folders), progress):
            runners[name] = _Runner(Path(folder), threads, options, batch, prompt, max_new_tokens, example)
            stack.enter_context(closing(runners[name])).start()
        _check_kinds(runners)
        _share_engine(runners)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
        for index in track(_rounds(rounds, times, precision), "Measuring the speed", rounds + 1, progress):
            for name in _rotated(list(folders), index):
                if index < 0:
                    runners[name].warm_up()
                else:
                    times[name].append(runners[name].run())
        memory = {name: runner.process.memory()["peak_bytes"] for name, runner in runners.items()}
    first = _rates(next(iter(times.values())))
    return {
        name: runner.result(times[name], None if index == 0 else first, memory[name])
        for index, (name, runner) in enumerate(runners.items())
    }


def _rounds(count: int, times: Mapping[str, list[dict[str, float]]], precision: float | None) -> Iterator[int]:
    """Indices of the rounds: -1 to warm up, `count` of them, and more if `times`, filled meanwhile, say too little."""
    yield from range(-1, count)
    if precision is None or count == 1:  # one round has no interval, and was asked for
        return
    ends = time.monotonic() + EXTRA_SECONDS
    for index in range(count, LONGEST * count):
        first, *others = (_rates(rows) for rows in times.values())
        if time.monotonic() > ends or all(_precise(median(rates / first), precision) for rates in others):
            return
        yield index


def _rates(rows: Sequence[Mapping[str, float]]) -> np.ndarray:
    return np.array([row["rate"] for row in rows])


def _precise(ratio: Estimate, precision: float) -> bool:
    half = precision * ratio.value
    return ratio.value - half <= ratio.low and ratio.high <= ratio.value + half


class _Runner:
    """One candidate in a process of its own, with the input that is timed."""

    process: FreshProcess

    def __init__(
        self,
        folder: Path,
        threads: int | None,
        options: dict[str, Any],
        batch: int,
        prompt: int,
        new_tokens: int,
        example: Any = None,
    ) -> None:
        self.example = example
        self.folder, self.asked_threads, self.options = folder, threads, options
        self.rows, self.asked_prompt, self.asked_new = batch, prompt, new_tokens
        self.without = "" if batch == 1 else f"{batch} rows at a time, and a decoder takes one"

    def start(self) -> None:
        """Load the candidate in a new process and get it ready to decode."""
        self.close()
        self.process = FreshProcess(threads=self.asked_threads)
        self.loaded = self.process.load(self.folder, to_decode=not self.without, **self.options)
        takes, prompt, new_tokens = Inputs.from_dict(self.loaded["inputs"]), self.asked_prompt, self.asked_new
        if takes.causal and takes.context is not None and prompt + new_tokens > takes.context:
            raise ValueError(
                f"prompt, max_new_tokens: {prompt} + {new_tokens} tokens were asked for, the model's context is "
                f"{takes.context}; lower one of them."
            )
        self.kind: Literal["decode", "forward"] = "decode" if takes.causal else "forward"
        self.new_tokens = new_tokens if takes.causal else 0
        self.prompt = prompt if takes.vocabulary is not None else 0
        if self.example is None or takes.causal or takes.covers(self.example):
            batch = takes.batch(self.rows, prompt)
        else:
            batch, self.prompt = self.example, 0
            self.rows = len(main_input(batch))
        self.inputs = fit_dtype(batch, getattr(torch, self.loaded["dtype"]))
        self.engine = {"engine": "torch", "reason": "", "threads": self.loaded["threads"], "packed": 0}
        if takes.causal:
            self.engine |= {"engine": "transformers", "reason": self.without}
            if self.rows <= 2:  # with more rows no kernel is used
                found = self.process.pack(None if self.without else prompt + new_tokens)
                self.engine = found | {"reason": self.without or found["reason"]}

    @property
    def decodes(self) -> bool:
        """Whether a decoder was made."""
        return self.engine["engine"] == "decoder"

    def close(self) -> None:
        """End the process, if there is one."""
        if hasattr(self, "process"):
            self.process.close()

    def run(self, at_least: float = ROUND_SECONDS) -> dict[str, float]:
        """One round: rate, first_token_seconds for a decoder, and whether kernels were compiled in it."""
        if self.kind == "forward":
            return {"rate": self.rows / self.process.time_forward(self.inputs, at_least), "compiled": False}
        ids = self.inputs["input_ids"] if isinstance(self.inputs, Mapping) else self.inputs
        first: list[float] = []
        following: list[float] = []
        compiled = False
        while not first or (not compiled and sum(first) + sum(following) < at_least):
            timed = self.process.time_decode(ids, self.new_tokens)
            first.append(timed["first_token_seconds"])
            following.append(self.rows * (self.new_tokens - 1) / timed["tokens_per_second"])
            compiled = timed["compiled"]
        tokens = len(following) * self.rows * (self.new_tokens - 1)
        return {"rate": tokens / sum(following), "first": sum(first) / len(first), "compiled": compiled}

    def warm_up(self) -> None:
        """A round that is not counted; once more in a new process if kernels were compiled in it."""
        if self.run(0.0)["compiled"]:
            self.start()
            self.run(0.0)

    def result(self, times: list[dict[str, float]], first: np.ndarray | None, peak: int) -> Speed:
        """first: the first candidate's rates, round by round."""
        rates = _rates(times)
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
            self.engine["threads"],
            self.loaded["dtype"],
            len(times),
            self.engine["packed"],
            self.engine["engine"],
            self.engine["reason"],
        )


def median(values: np.ndarray, seed: int = 0) -> Estimate:
    """Take the median of measured rounds, with its 95 % bootstrap interval; one round alone says nothing about others.

    Args:
        values: [rounds].
        seed: of the bootstrap.

    Returns:
        The median.
    """
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
        least = 2 if name == "max_new_tokens" else 1
        if value < least:
            raise ValueError(f"{name}: {value} was given; give {least} or more.")
    for name, folder in folders.items():
        if not Path(folder).is_dir():
            raise DataError(f"folders: {name!r} is {str(folder)!r}, which is no folder; save the model first.")


def _check_memory(
    folders: Mapping[str, str | Path], dtype: torch.dtype | str | None, max_memory: int | None, builds: bool
) -> None:
    """All candidates stay loaded, because a load between two rounds would disturb the others. builds: decoders."""
    weights = {name: weight_file_bytes(folder, dtype) for name, folder in folders.items()}
    needed = {name: COPIES * size + PROCESS for name, size in weights.items()}
    free = _available() if max_memory is None else max_memory
    total = sum(needed.values()) + (BUILDING * max(weights.values()) if builds else 0)
    if total > free:
        largest = max(needed, key=lambda name: needed[name])
        raise MemoryLimitError(
            f"folders: {len(folders)} processes side by side need about {format_bytes(total)}, {format_bytes(free)} "
            f"are free. Largest is {largest!r} with {format_bytes(needed[largest])}: measure fewer at a time, "
            f"each call with the original first."
        )


def weight_file_bytes(folder: str | Path, dtype: torch.dtype | str | None = None) -> int:
    """Return the bytes of a folder's weights in memory.

    Args:
        folder: of a saved model.
        dtype: of the float tensors; None for the stored one.

    Returns:
        Bytes, as stored, or with float tensors in `dtype` if that is larger.
    """
    from safetensors import safe_open

    from actkit.core.store.checkpoint import parse_dtype

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


def _share_engine(runners: Mapping[str, _Runner]) -> None:
    """If a decoder does not take one candidate, all start again without: no process keeps memory of it."""
    refused = {name: runner.engine["reason"] for name, runner in runners.items() if not runner.decodes}
    if not refused or len(refused) == len(runners):
        return
    name, reason = next(iter(refused.items()))
    for other, runner in runners.items():
        runner.without = refused.get(other, f"the decoder does not take {name!r}: {reason}")
        runner.start()
