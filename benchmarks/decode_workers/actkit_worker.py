"""actkit's decoder with bf16, int8 or int4 weights, dense and with thresholded inputs.

Integer weights have one symmetric scale per input and group of 128 outputs, in every matrix, the output layer too. The
weights are random, and thresholds are TEAL's for random tokens, so the masks of the inputs are as good as random; the
output layer is dense. The layers of all sparsities are one packed model: only the thresholds change.

    {"do": "yardstick", "sparsity": 0.5}  ->  {"ok": {"seconds": ..., "gigabytes_per_second": ..., "way": ...}}

reads the rows that a token reads, of masks as dense as the last round's, and does nothing with them (`pure_read`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}  # the decoder's own threads spin where they meet
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import pure_read

del sys.path[0]  # where kernels.py lies, which transformers would take for the package of that name

import numpy as np
import torch
from protocol import SHAPES, prompt_ids, serve
from torch import nn

from actkit.core.edits import set_module
from actkit.core.fresh import _release_memory
from actkit.core.linear import ActLinear, IntegerWeight, Threshold
from actkit.core.machine import versions
from actkit.core.quantizer import QuantizationGrid
from actkit.core.runner import apply
from actkit.kernels import decode_step as steps
from actkit.runtime.decoder import Decoder
from actkit.sparsity.teal import Teal
from actkit.testing.random_llama import random_llama

BITS = {"bf16": 16, "int8": 8, "int4": 4}
SPARSITIES = (0.5, 0.25, 0.7)
CAPACITY = 512
KEPT = 3  # ways to read that are timed in every round


class Actkit:
    """Variants: bf16, int8, int4. A round takes `sparsity`, 0 or one of SPARSITIES."""

    def load(self, *, shape: str, variant: str, threads: int, folder: str) -> dict[str, Any]:
        if variant not in BITS:
            raise ValueError(f"variant: {variant!r} was given; give {', '.join(BITS)}.")
        torch.set_num_threads(threads)
        model = random_llama(SHAPES[shape])
        self.vocabulary = SHAPES[shape]["vocab_size"]
        self.thresholds = {sparsity: _thresholds(model, sparsity, self.vocabulary) for sparsity in SPARSITIES}
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                set_module(model, path, _changed(module, BITS[variant], path in self.thresholds[0.5]))
        self.decoder = Decoder(model, capacity=CAPACITY, threads=threads, decode_only=True)
        _release_memory()
        self.layers = {path: layer for path, layer in model.named_modules() if path in self.thresholds[0.5]}
        self.selects = {path: layer.select for path, layer in self.layers.items()}
        self.ways: dict[float, tuple[float, list[tuple[str, Callable[[], None]]]]] = {}
        self.seen: dict[float, tuple[float, float]] = {}  # sparsity -> density, bytes per token
        for sparsity in (0.0, *SPARSITIES):
            self.round(prompt=8, tokens=2, sparsity=sparsity)  # compiles
        about = "masks random; groups of 128 outputs, symmetric; " if variant != "bf16" else "masks random; "
        return {
            "about": f"{about}activations {self.decoder.activations if variant != 'bf16' else 'float32'}",
            "bytes_per_token": self.seen[0.0][1],
            "versions": versions(),
        }

    def round(self, *, prompt: int, tokens: int, sparsity: float = 0.0) -> dict[str, Any]:
        self._select(sparsity)
        decoder = self.decoder
        decoder.reset()
        start = time.perf_counter()
        token = int(decoder(prompt_ids(prompt, self.vocabulary)).argmax())
        first, seconds = time.perf_counter() - start, []
        for _ in range(tokens):
            start = time.perf_counter()
            token = int(decoder([token]).argmax())
            seconds.append(time.perf_counter() - start)
        self.seen[sparsity] = decoder.density or 1.0, decoder.bytes_per_token or 0.0
        density, read = self.seen[sparsity]
        return {"first_token_seconds": first, "token_seconds": seconds, "density": density, "bytes_per_token": read}

    def yardstick(self, *, sparsity: float = 0.0, repeats: int = 5) -> dict[str, Any]:
        if sparsity not in self.ways:
            self.ways[sparsity] = self._ways(sparsity)
        best: dict[str, Any] = {"seconds": float("inf")}
        nbytes, ways = self.ways[sparsity]
        for name, read in ways:
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                read()
                seconds.append(time.perf_counter() - start)
            middle = sorted(seconds)[repeats // 2]
            if middle < best["seconds"]:
                best = {"seconds": middle, "way": name, "gigabytes_per_second": nbytes / middle / 1e9}
        return best

    def _select(self, sparsity: float) -> None:
        for path, layer in self.layers.items():
            select = self.selects[path] if sparsity else None
            layer.select = select
            if select is not None:
                select.threshold.fill_(self.thresholds[sparsity][path])
        self.decoder.follow_selections()

    def _ways(self, sparsity: float) -> tuple[float, list[tuple[str, Callable[[], None]]]]:
        """Bytes of the rows that a token reads, drawn at random with the density that was measured, and the fastest
        ways to read them."""
        plan, generator = self.decoder._plan, np.random.default_rng(0)
        pieces, listed, at = [], [], 0
        self._select(sparsity)
        for layer in range(plan.layers.shape[1]):
            for stage in range(steps.UP + 1):
                for thread, (first, number) in enumerate(plan.layers[:, layer, 2 * stage : 2 * stage + 2]):
                    for row in plan.products[first : first + number]:
                        inputs, stride = int(row[steps.INPUTS]), int(row[steps.STRIDE])
                        dense = row[steps.SELECT] == steps.DENSE
                        count = inputs if dense else round(inputs * self.seen[sparsity][0])
                        listed.append(np.sort(generator.permutation(inputs)[:count]).astype(np.int32))
                        for tile in range(int(row[steps.TILES])):
                            begin = int(row[steps.ADDRESS]) + tile * inputs * stride
                            pieces.append([begin, stride, stride, at, count, thread])
                        at += count
        table = np.array(pieces, np.int64)
        nbytes = float((table[:, pure_read.BYTES] * table[:, pure_read.COUNT]).sum())
        timed = []
        for name, read in pure_read.ways(table, np.concatenate(listed), self.decoder.threads):
            read()
            start = time.perf_counter()
            read()
            read()
            timed.append((time.perf_counter() - start, name, read))
        return nbytes, [(name, read) for _, name, read in sorted(timed, key=lambda found: found[0])[:KEPT]]


def _thresholds(model: nn.Module, sparsity: float, vocabulary: int) -> dict[str, float]:
    """TEAL's thresholds by path for one sequence of random tokens."""
    ids = torch.tensor([prompt_ids(64, vocabulary)])
    applied = apply(model, Teal(sparsity=sparsity), [{"input_ids": ids}], undo="memory", progress=False)
    found = {
        path: float(module.select.threshold)  # type: ignore[union-attr, arg-type]
        for path, module in model.named_modules()
        if isinstance(module, ActLinear)
    }
    applied.undo()
    return found


def _changed(linear: nn.Linear, bits: int, selects: bool) -> ActLinear:
    weight = None
    if bits < 16:
        weight = IntegerWeight.quantize(linear.weight, QuantizationGrid(bits, 128, "output", symmetric=True))
    return ActLinear.of(linear, weight=weight, select=Threshold(0.0) if selects else None)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    serve(Actkit())
