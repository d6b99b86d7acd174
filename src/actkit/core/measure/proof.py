"""The reload proof: a saved folder, loaded in a fresh process, gives the outputs of the model in memory.

Both run the same fixed rows in the same dtype with the same number of threads. If the code path is the same too, the
outputs agree bit for bit. Otherwise they need not: another attention implementation, a rotary table that `model.to` has
rounded, or a matrix product that takes another path because the weights lie elsewhere in memory. So if they differ, a
tolerance is checked: what rounding to its dtype does on this very model (`core/measure/rounding.py`),

    max |memory - reloaded| <= limit(model)

and what was found is recorded, with whether it is bit for bit. NaN fails on either side.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit import changes
from actkit.core.forward.batch import BatchContext, first_tensor, forward
from actkit.core.forward.example import fit_dtype, main_dtype, make_example, unsaved_dtypes
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.offload import device_of
from actkit.core.measure.fresh import Base, FreshProcess
from actkit.core.measure.rounding import Limit, limit
from actkit.core.model.parts import attention_implementation

ROWS = 2


@dataclass(frozen=True)
class Proof:
    """What a reload gave.

    Attributes:
        folder: that was loaded.
        passed: it gives what the model in memory gives.
        largest_difference: of all outputs; NaN or inf if one side is not finite or the shapes differ.
        scale: the largest |output| in memory.
        tolerance: the largest difference that passes, in the outputs' unit; 0 if nothing differs, as it is measured
            only if something does.
        tokens: real tokens compared, or examples.
        seconds: of the whole proof.
        reason: why it passed or failed, in words.
        bit_equal: no output differs in any bit of its value.
        dtype: of both sides.
        threads: of both sides.
    """

    folder: str
    passed: bool
    largest_difference: float
    scale: float
    tolerance: float
    tokens: int
    seconds: float
    reason: str
    bit_equal: bool
    dtype: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it; None for a number that is not finite."""
        values = asdict(self)
        finite = {key: not isinstance(value, float) or math.isfinite(value) for key, value in values.items()}
        return {key: value if finite[key] else None for key, value in values.items()}

    def describe(self) -> str:
        """Say it in one line."""
        verdict = "reloads" if self.passed else "DOES NOT RELOAD"
        how = f"{self.tokens} tokens or images, {self.dtype}, {self.seconds:.1f} s"
        return f"{self.folder} {verdict}: {self.reason} ({how})"


def prove(
    model: nn.Module,
    folder: str | Path,
    batch: Any = None,
    *,
    process: FreshProcess | None = None,
    base: Base | None = None,
    trust_remote_code: bool | None = None,
) -> Proof:
    """Compare a model in memory with the folder it was saved to, loaded in a fresh process.

    Args:
        model: in memory.
        folder: that it was saved to.
        batch: what both are run on; None for fixed random rows (2, of min(64, context) tokens).
        process: to load the folder in, and to leave open; None for one of its own.
        base: as in `FreshProcess.load`, for one's own nn.Module.
        trust_remote_code: run code that the folder brings; None to do so if the model was loaded so.

    Returns:
        Whether it passed, and how far the outputs lie apart.

    Raises:
        FreshProcessError: the folder does not load or run there.
        DataError: the model does not say what it takes.
    """
    started = time.perf_counter()
    dtype, threads = main_dtype(model), torch.get_num_threads()
    if batch is None:
        batch = fit_dtype(make_example(model, ROWS), dtype)
    with evaluating(model):
        expected = first_tensor(forward(model, batch)).float().cpu()
    origin = changes.source(model)
    if trust_remote_code is None:
        trust_remote_code = origin is not None and bool(origin.options.get("trust_remote_code"))
    with ExitStack() as stack:
        if process is None:
            process = stack.enter_context(FreshProcess(threads=threads))
        elif process.threads != threads:
            stack.callback(process.use_threads, process.threads)
            process.use_threads(threads)
        name = str(dtype).removeprefix("torch.")
        options: dict[str, Any] = {
            "base": base,
            "trust_remote_code": trust_remote_code,
            "device": str(device_of(model)),
        }
        loaded = process.load(folder, **options)
        if loaded["dtype"] != name:
            loaded = process.load(folder, dtype, **options)
        found = process.outputs(batch)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    difference, equal = compared(expected, found)
    allowed = limit(model, batch, expected) if math.isfinite(difference) and not equal else Limit(0.0)
    return Proof(
        str(folder),
        difference <= allowed.value,
        difference,
        scale,
        allowed.value,
        BatchContext.of(batch, model).tokens,
        time.perf_counter() - started,
        _reason(expected, found, difference, allowed, equal, _other_path(model, loaded)),
        equal,
        name,
        threads,
    )


def compared(expected: Tensor, found: Tensor) -> tuple[float, bool]:
    """Return the largest difference, and whether all values are equal.

    Infinities of one sign are equal, NaN never is.

    Args:
        expected: outputs of any shape.
        found: outputs to compare with them; other shapes differ by inf.

    Returns:
        The difference, and whether all are equal.
    """
    if expected.shape != found.shape:
        return float("inf"), False
    if not expected.numel():
        return 0.0, True
    same = expected == found
    difference = torch.where(same, 0.0, (expected.double() - found.double()).abs())
    return float(difference.max()), bool(same.all())  # max() keeps NaN


def _reason(
    expected: Tensor,
    found: Tensor,
    difference: float,
    allowed: Limit,
    equal: bool,
    other_path: str,
) -> str:
    if expected.shape != found.shape:
        return f"outputs are {list(expected.shape)} in memory and {list(found.shape)} reloaded"
    nan = [side for side, tensor in (("in memory", expected), ("reloaded", found)) if tensor.isnan().any()]
    if nan:
        return f"the outputs hold NaN {' and '.join(nan)}"
    if equal:
        return "the outputs are equal bit for bit"
    differ = f"the outputs differ by up to {difference:.3g}"
    if difference > allowed.value:
        return f"{differ}, more than the tolerance {allowed.describe()}; the folder does not hold this model"
    return f"{differ}, within the tolerance {allowed.describe()}: {other_path}"


def _other_path(model: nn.Module, loaded: dict[str, Any]) -> str:
    """Why the two sides may compute differently."""
    mine, theirs = attention_implementation(model), loaded["attention"]
    if mine != theirs:
        return f"attention is computed by {mine!r} in memory and by {theirs!r} reloaded"
    reloaded = loaded["unsaved"]
    for name, dtype in unsaved_dtypes(model).items():
        if reloaded.get(name, dtype) != dtype:
            return f"{name}, which is not saved, is {dtype} in memory and {reloaded[name]} reloaded"
    return "sums are rounded in another order there"
