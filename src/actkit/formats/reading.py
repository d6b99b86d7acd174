"""The proof of an export: in a fresh process without actkit, transformers loads the folder and computes the same.

Compared are the outputs on fixed random rows, as in `core/proof.py`:

    max |in memory - read back| <= tolerance * max |in memory|

tolerance: 1e-5 where float32 stays float32; 5e-3 for GGUF in float32, whose scales are float16; 1e-2 in 16 bits. int8
activations are emulated in memory, as transformers rounds them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actkit.core.edits import Replace, temporarily
from actkit.core.errors import ExportError
from actkit.core.example import Inputs, fit_dtype
from actkit.core.hooks import evaluating, first_tensor, forward
from actkit.core.linear import ActLinear, Selection
from actkit.core.proof import EXACT, ROUNDED

ROWS = 2
HALF_SCALES = 5e-3  # of the largest output
TIMEOUT = 600.0  # seconds for all folders of one call
Case = tuple[Path, torch.dtype, Mapping[str, Tensor], str | None]


@dataclass(frozen=True)
class Reading:
    """What a fresh process without actkit read back.

    passed: whether the difference is within the tolerance. largest_difference: of all outputs, inf where shapes differ
    or something is not finite. scale: the largest |output| in memory. tolerance: in the outputs' unit. dtype: both
    sides'. reader: what loaded it. seconds: of the whole comparison.
    """

    passed: bool
    largest_difference: float
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
        return (
            f"{self.reader} without actkit {verdict}: outputs differ by up to {self.largest_difference:.3g} of "
            f"{self.scale:.3g}, tolerance {self.tolerance:.3g} ({self.dtype}, {self.seconds:.1f} s)"
        )


class RoundedTokens(Selection):
    """Inputs rounded to 8 bits, one scale per token, as transformers' reader of compressed-tensors does it."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> the values that its codes stand for: round(x / scale) * scale, scale = max|x| / 127.5."""
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        return (x / scale).clamp(-128, 127).round() * scale

    def spec(self) -> dict[str, Any]:
        return {"kind": "rounded_tokens"}


def expected_outputs(model: nn.Module, batch: Any, rounded: Sequence[str] = ()) -> Tensor:
    """The outputs of a model in memory on a batch, float32 on the CPU. rounded: paths of layers whose inputs are
    rounded to 8 bits per token."""
    with evaluating(model), _rounded(model, rounded):
        return first_tensor(forward(model, batch)).float().cpu()


@contextmanager
def _rounded(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    edits = [Replace(path, ActLinear.of(model.get_submodule(path), select=RoundedTokens())) for path in paths]
    with temporarily(model, edits):
        yield


def read_back(cases: Sequence[Case]) -> list[Tensor]:
    """The outputs of exported folders in one fresh process. Raises ExportError where a folder does not load or run."""
    found = try_reading(cases)
    for (folder, *_), outputs in zip(cases, found, strict=True):
        if isinstance(outputs, str):
            raise ExportError(f"read back: transformers without actkit fails on {folder}: {outputs}")
    return [outputs for outputs in found if isinstance(outputs, Tensor)]


def try_reading(cases: Sequence[Case]) -> list[Tensor | str]:
    """The outputs of exported folders in one fresh process, or for a folder that fails the reason.

    cases: (folder, dtype, batch of tensors by keyword, GGUF file or None) each. Raises ExportError where the process
    itself fails.
    """
    with tempfile.TemporaryDirectory(prefix="actkit-export-") as temporary:
        entries: list[dict[str, Any]] = []
        for index, (folder, dtype, batch, gguf_file) in enumerate(cases):
            base = Path(temporary) / str(index)
            save_file({name: tensor.contiguous() for name, tensor in batch.items()}, base.with_suffix(".batch"))
            entries.append(
                {
                    "folder": str(Path(folder).absolute()),
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": str(base.with_suffix(".batch")),
                    "outputs": str(base.with_suffix(".outputs")),
                    "gguf_file": gguf_file,
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


def compare(model: nn.Module, folder: Path, *, rounded: Sequence[str] = (), gguf_file: str | None = None) -> Reading:
    """Load an exported folder in a fresh process and compare its outputs with those of the model in memory."""
    started = time.perf_counter()
    dtype: Any = model.dtype
    batch = fit_dtype(Inputs.of(model).batch(ROWS), dtype)
    expected = expected_outputs(model, batch, rounded)
    (found,) = read_back([(folder, dtype, batch, gguf_file)])
    difference = float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    difference = difference if difference == difference else float("inf")
    scale = float(expected.abs().max())
    share = (EXACT if gguf_file is None else HALF_SCALES) if dtype == torch.float32 else ROUNDED
    tolerance = share * scale
    name = str(dtype).removeprefix("torch.")
    seconds = time.perf_counter() - started
    return Reading(difference <= tolerance, difference, scale, tolerance, name, _reader(), seconds)


def _reader() -> str:
    from importlib.metadata import version

    return f"transformers {version('transformers')}"
