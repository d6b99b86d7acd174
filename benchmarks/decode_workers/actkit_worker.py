"""actkit's decoder with bf16, int8 or int4 weights, dense and with thresholded inputs.

Integer weights have one symmetric scale per input and group of 128 outputs, in every matrix, the output layer too; of
the variants for prompts, which are dense, a scale and a zero per group of 64 inputs, but in the output layer. The
weights are random, and thresholds are TEAL's for random tokens, settled so that a decoding step reads the share that
the row is named by; so the masks of the inputs are as good as random. The output layer is dense. The layers of all
sparsities are one packed model: only the thresholds change. A real model is a folder that actkit saved, taken as it is.

    {"do": "yardstick", "sparsity": 0.5}  ->  {"ok": {"seconds": ..., "gigabytes_per_second": ..., "way": ...}}

reads the rows that a token reads, of masks as dense as the last round's, and does nothing with them (`pure_read`).

    {"do": "users"}  ->  {"ok": {"saved": {"resident_bytes": ...}, "packed": {...}}}

says what a process holds that decodes from the model's folder, and from a packed one, and nothing else (`resident.py`);
this worker itself has made the model, and keeps what that took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}  # the decoder's own threads spin where they meet
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import pure_read

del sys.path[0]  # where kernels.py lies, which transformers would take for the package of that name

import torch
from likelihood import loss
from protocol import SHAPES, prompt_ids, serve
from torch import nn

import actkit
from actkit.core.model.anatomy import anatomy
from actkit.core.watch.capture import record
from actkit.core.edit.edits import set_module
from actkit.core.store.opening import open_pending
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.layers.weights import IntegerWeight
from actkit.core.ground.machine import versions
from actkit.core.ground.memory import release_memory
from actkit.core.grids.integers import IntegerGrid
from actkit.core.watch.statistics import Quantiles
from actkit.runtime.decoder import Decoder
from actkit.runtime.packing import export_packed
from actkit.testing.random_llama import random_llama

BITS = {"bf16": 16, "int8": 8, "int4": 4}
SPARSITIES = (0.5, 0.25, 0.7)
CAPACITY = 512
PROMPT = 128  # as in the rounds that are measured


class Actkit:
    """Variants: bf16, int8, int4, also with -prompts; folder for a real model.

    A round takes `sparsity`, 0 or one of SPARSITIES.
    """

    def load(
        self,
        *,
        variant: str,
        threads: int,
        folder: str,
        shape: str = "",
        source: str = "",
        text: Sequence[int] = (),
        capacity: int = CAPACITY,
        cache: str | None = None,
    ) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.source, self.text, self.capacity = source, text, capacity
        self.seen: dict[float, tuple[float, float]] = {}  # sparsity -> density, bytes per token
        if source:
            return self._load(source, cache)
        kind, _, prompts = variant.partition("-")
        if kind not in BITS or prompts not in ("", "prompts"):
            raise ValueError(f"variant: {variant!r} was given; give {', '.join(BITS)}, also with -prompts.")
        model = random_llama(SHAPES[shape])
        self.vocabulary = SHAPES[shape]["vocab_size"]
        if prompts:
            return self._for_prompts(model, BITS[kind])
        quantiles = _quantiles(model, self.vocabulary)
        self.quantiles = {path: found.quantile for path, found in quantiles.items()}
        self.thresholds: dict[float, dict[str, float]] = {}
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                set_module(model, path, _changed(module, BITS[variant], path in self.quantiles))
        self.saved = Path(folder) / f"actkit-{shape}-{variant}"
        if not self.saved.exists():
            actkit.save(model, self.saved)
        self.decoder = Decoder(model, capacity=capacity, threads=threads, decode_only=True)
        release_memory()
        self.layers = {path: layer for path, layer in model.named_modules() if path in self.quantiles}
        self.selects = {path: layer.select for path, layer in self.layers.items()}
        self.yardsticks: dict[float, pure_read.Yardstick] = {}
        self.round(prompt=8, tokens=2)  # compiles
        for sparsity in SPARSITIES:
            self._settle(sparsity)
        about = "masks random; groups of 128 outputs, symmetric; " if variant != "bf16" else "masks random; "
        return {
            "about": f"{about}activations {self.decoder.activations if variant != 'bf16' else 'float32'}",
            "bytes_per_token": self.seen[0.0][1],
            "versions": versions(),
        }

    def _for_prompts(self, model: nn.Module, bits: int) -> dict[str, Any]:
        """A random model as a recipe leaves it, without selections."""
        if bits < 16:
            actkit.apply(model, {"actkit": 1, "transforms": [{"rtn": {"bits": bits, "group_size": 64}}]})
        self.decoder = Decoder(model, capacity=self.capacity, decode_only=True)
        release_memory()
        self.layers, self.selects = {}, {}
        self.round(prompt=128, tokens=2)  # compiles
        about = f"groups of 64 inputs, activations {'int8' if self.decoder.activations != 'float32' else 'float32'}"
        return {"about": "bf16" if bits == 16 else about, "versions": versions()}

    def _load(self, source: str, cache: str | None) -> dict[str, Any]:
        """A saved model, as it selects: nothing is settled. cache: of keys and values, as `Decoder` takes it."""
        model = actkit.load(source)
        self.vocabulary = model.config.vocab_size
        self.decoder = Decoder(model, capacity=self.capacity, cache=cache, decode_only=True)
        del model
        release_memory()
        self.layers, self.selects = {}, {}
        for prompt in (8, 128):  # step by step, and through dense products
            self.round(prompt=prompt, tokens=2)
        about = f"activations {self.decoder.activations}, a prompt of up to {self.decoder.few} step by step"
        return {"about": about, "versions": versions()}

    @torch.no_grad()
    def losses(self, *, rows: Sequence[Sequence[int]], scored: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Also `decoded`, the first row's loss token by token through the decoder; the others are of the model's
        forward pass, where every token selects too."""
        self.decoder.reset()
        stepped = torch.stack([self.decoder([token]) for token in rows[0]])
        decoded = loss(stepped.numpy(), rows[0], scored[0])
        model, found = actkit.load(self.source), []
        for ids, places in zip(rows, scored, strict=True):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            found.append(loss(logits.float().numpy(), ids, places))
        return {"losses": found, "decoded": decoded}

    def round(self, *, prompt: int, tokens: int, sparsity: float = 0.0) -> dict[str, Any]:
        self._select(sparsity)
        decoder = self.decoder
        decoder.reset()
        start = time.perf_counter()
        token = int(decoder(prompt_ids(prompt, self.vocabulary, self.text)).argmax())
        first, seconds = time.perf_counter() - start, []
        for _ in range(tokens):
            start = time.perf_counter()
            token = int(decoder([token]).argmax())
            seconds.append(time.perf_counter() - start)
        self.seen[sparsity] = decoder.density or 1.0, decoder.bytes_per_token or 0.0
        density, read = self.seen[sparsity]
        return {"first_token_seconds": first, "token_seconds": seconds, "density": density, "bytes_per_token": read}

    def yardstick(self, *, sparsity: float = 0.0, repeats: int = 5) -> dict[str, Any]:
        if sparsity not in self.yardsticks:
            self.round(prompt=8, tokens=2, sparsity=sparsity)
            self.yardsticks[sparsity] = pure_read.Yardstick(self.decoder)
        return self.yardsticks[sparsity].measure(repeats)

    def users(self) -> dict[str, Any]:
        """Random weights only."""
        threads, found = self.decoder.threads, {}
        packed = self.saved.with_name(f"{self.saved.name}-packed-{threads}")
        if not packed.exists():
            export_packed(open_pending(self.saved), packed, threads=threads, proof=False)
            release_memory()
        for name, kept in (("saved", self.saved), ("packed", packed)):
            command = [sys.executable, str(Path(__file__).with_name("resident.py")), str(kept), str(threads)]
            said = subprocess.run([*command, str(self.capacity)], capture_output=True, text=True, check=True).stdout
            found[name] = json.loads(said)
        return found

    def _settle(self, sparsity: float) -> None:
        """Find thresholds at which a step drops that share of the inputs."""
        share = sparsity
        for _ in range(4):
            self.thresholds[sparsity] = {path: quantile(share) for path, quantile in self.quantiles.items()}
            self.round(prompt=PROMPT, tokens=8, sparsity=sparsity)
            share = min(max(share + sparsity - (1 - self.seen[sparsity][0]), 0.0), 1.0)

    def _select(self, sparsity: float) -> None:
        for path, layer in self.layers.items():
            select = self.selects[path] if sparsity else None
            layer.select = select
            if select is not None:
                select.threshold.fill_(self.thresholds[sparsity][path])
        self.decoder.follow_selections()


def _quantiles(model: nn.Module, vocabulary: int) -> dict[str, Quantiles]:
    """Of the inputs of the blocks' linear layers, by path, for one sequence of random tokens."""
    view = anatomy(model)
    inputs = [(each.site, [linear.path for linear in each.linears]) for b in view.blocks for each in b.linear_inputs()]
    ids = torch.tensor([prompt_ids(64, vocabulary)])
    seen = record(model, {site: Quantiles() for site, _ in inputs}, [{"input_ids": ids}], progress=False)
    return {path: seen[site] for site, paths in inputs for path in paths}


def _changed(linear: nn.Linear, bits: int, selects: bool) -> ActLinear:
    weight = None
    if bits < 16:
        weight = IntegerWeight.quantize(linear.weight, IntegerGrid(bits, 128, "output", symmetric=True))
    return ActLinear.of(linear, weight=weight, select=Threshold(0.0) if selects else None)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    serve(Actkit())
