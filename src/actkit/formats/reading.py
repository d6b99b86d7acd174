"""The proof of an export: in a fresh process without actkit, transformers loads the folder and computes the same.

Compared are the outputs on fixed random rows. What the format itself rounds is rounded in memory too, each layer as
its reader computes it (`as_read` of each format: scales in the reader's dtype or in float16, activations in 8 bits), so
that what is left is another order of summation; if anything is left, the limit is that of `core/measure/rounding.py`:

    max |as read, in memory - read back| <= limit(model)
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actkit.core.edit.edits import Replace, temporarily
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.example import fit_dtype, make_example
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import ExportError
from actkit.core.measure.proof import compared
from actkit.core.measure.rounding import Limit, limit
from actkit.core.store.quantized_source import ADAPTER

ROWS = 2
TIMEOUT = 600.0  # seconds for all folders of one call
Case = tuple[Path, torch.dtype, Mapping[str, Tensor], str | None]


@dataclass(frozen=True)
class Reading:
    """What a fresh process without actkit read back.

    Attributes:
        passed: whether the difference is within the tolerance.
        largest_difference: of all outputs, inf if shapes differ or something is not finite.
        moved: how far the format's own rounding moves the model's outputs, on both sides alike.
        scale: the largest |output| in memory.
        tolerance: in the outputs' unit; 0 if nothing differs, as it is measured only then.
        dtype: both sides'.
        reader: what loaded it.
        seconds: of the whole comparison.
    """

    passed: bool
    largest_difference: float
    moved: float
    scale: float
    tolerance: float
    dtype: str
    reader: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)

    def describe(self) -> str:
        """One line."""
        verdict = "computes the same" if self.passed else "DOES NOT COMPUTE THE SAME"
        tolerance = f", tolerance {self.tolerance:.3g}" if self.largest_difference else ""
        moved = f"; the format's own rounding moves them by up to {self.moved:.3g}" if self.moved else ""
        return (
            f"{self.reader} without actkit {verdict}: outputs differ by up to {self.largest_difference:.3g} of "
            f"{self.scale:.3g}{tolerance}{moved} ({self.dtype}, {self.seconds:.1f} s)"
        )


def expected_outputs(model: nn.Module, batch: Any, as_read: Mapping[str, nn.Module] | None = None) -> Tensor:
    """Compute the outputs of a model in memory on a batch.

    Args:
        model: the model.
        batch: its keywords.
        as_read: path -> what the reader computes in place of that layer.

    Returns:
        float32, on the CPU.
    """
    with evaluating(model), _standing(model, as_read or {}):
        return first_tensor(forward(model, batch)).float().cpu()


def _standing(model: nn.Module, layers: Mapping[str, nn.Module]) -> AbstractContextManager[Any]:
    return temporarily(model, [Replace(path, layer) for path, layer in layers.items()])


def read_back(cases: Sequence[Case]) -> list[Tensor]:
    """Compute the outputs of exported folders in one fresh process. Raises ExportError if one does not load or run."""
    found = try_reading(cases)
    for (folder, *_), outputs in zip(cases, found, strict=True):
        if isinstance(outputs, str):
            raise ExportError(f"read back: transformers without actkit fails on {folder}: {outputs}")
    return [outputs for outputs in found if isinstance(outputs, Tensor)]


def try_reading(cases: Sequence[Case]) -> list[Tensor | str]:
    """Compute the outputs of exported folders in one fresh process, or the reason why a folder fails.

    Args:
        cases: (folder, dtype, batch of tensors by keyword, GGUF file or None) each.

    Returns:
        Outputs or a reason, for each case.

    Raises:
        ExportError: the process itself fails.
    """
    with tempfile.TemporaryDirectory(prefix="actkit-export-") as temporary:
        entries: list[dict[str, Any]] = []
        for index, (folder, dtype, batch, gguf_file) in enumerate(cases):
            base, adapter = Path(temporary) / str(index), Path(folder).absolute() / ADAPTER
            save_file({name: tensor.contiguous() for name, tensor in batch.items()}, base.with_suffix(".batch"))
            entries.append(
                {
                    "folder": str(Path(folder).absolute()),
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": str(base.with_suffix(".batch")),
                    "outputs": str(base.with_suffix(".outputs")),
                    "gguf_file": gguf_file,
                    "adapter": str(adapter) if adapter.is_dir() else None,
                }
            )
        job = Path(temporary) / "job.json"
        job.write_text(json.dumps(entries), encoding="utf-8")
        command = [sys.executable, "-P", str(Path(__file__).with_name("plain_reader.py")), str(job)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"read back: more than {TIMEOUT:.0f} s; pass proof=False and check it.") from error
        if done.returncode:
            last = " ".join(done.stderr.strip().splitlines()[-3:])
            raise ExportError(f"read back: the process ended with {done.returncode}: {last}")
        more = [" ".join(line.split())[:200] for line in done.stderr.splitlines() if "Error" in line][:2]
        replies = json.loads(done.stdout.splitlines()[-1])
        return [
            "; ".join(dict.fromkeys([reply["error"], *more]))
            if "error" in reply
            else load_file(entry["outputs"])["outputs"]
            for entry, reply in zip(entries, replies, strict=True)
        ]


def compare(
    model: nn.Module,
    folder: Path,
    *,
    as_read: Mapping[str, nn.Module] | None = None,
    gguf_file: str | None = None,
) -> Reading:
    """Load an exported folder in a fresh process and compare its outputs with those of the model in memory.

    Args:
        model: in memory.
        folder: what was exported.
        as_read: path -> what the format's reader computes in place of that layer.
        gguf_file: its name in the folder, for GGUF.

    Returns:
        The difference, and the limit.
    """
    started = time.perf_counter()
    dtype: Any = model.dtype
    batch = fit_dtype(make_example(model, ROWS), dtype)
    expected = expected_outputs(model, batch, as_read)
    moved = float((expected_outputs(model, batch) - expected).abs().max()) if as_read else 0.0
    (found,) = read_back([(folder, dtype, batch, gguf_file)])
    difference, equal = compared(expected, found)
    difference = math.inf if math.isnan(difference) else difference
    allowed = Limit(0.0)
    if math.isfinite(difference) and not equal:
        with _standing(model, as_read or {}):
            allowed = limit(model, batch, expected)
    return Reading(
        difference <= allowed.value,
        difference,
        moved,
        float(expected.abs().max()),
        allowed.value,
        str(dtype).removeprefix("torch."),
        _reader(),
        time.perf_counter() - started,
    )


def _reader() -> str:
    from importlib.metadata import version

    return f"transformers {version('transformers')}"
