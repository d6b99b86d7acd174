"""What the proofs of errors share; those of a family stand beside its tests, in `errors_of_FAMILY.py`.

Where the real cause is rare or slow (a full disk, a dead process, a hub without a network), a proof makes it up by a
patch.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import batches, build
from transformers import T5Config, T5ForConditionalGeneration

from actkit.core.ground import processes, registry
from actkit.core.model.anatomy import Site
from actkit.core.recipe import stage
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.store import checkpoint, checksums
from actkit.core.train import staged_run, training
from actkit.core.watch.statistics import Moments
from actkit.functions.swap import Swap

STACK = {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8}}]}


IDS = torch.ones(2, 4, dtype=torch.long)


HOST = {"input_ids": IDS}


PROOFS: list[Callable[[Place], Any]] = []


@dataclass(frozen=True)
class Place:
    """Where a proof works. path: a folder of its own. patch: undone after it. kept: saved models to copy."""

    path: Path
    patch: pytest.MonkeyPatch
    kept: Path

    @classmethod
    def make(cls, path: Path) -> Place:
        kept = path / "kept"
        checkpoint.save(changed(), kept / "changed")
        checkpoint.save(build("llama", num_hidden_layers=1), kept / "plain")
        checkpoint.save(apply(build("mlp"), "teal", batches("mlp"), progress=False).model, kept / "own")
        return cls(path, pytest.MonkeyPatch(), kept)

    def fresh(self, number: int, patch: pytest.MonkeyPatch) -> Place:
        path = self.path / str(number)
        path.mkdir()
        return Place(path, patch, self.kept)

    def copy(self, kind: str = "changed", *, sums: bool = False) -> Path:
        """A saved model that may be broken: 'changed', 'plain' or 'own'; without digests, or with."""
        folder = shutil.copytree(self.kept / kind, self.path / kind)
        if not sums:
            (folder / checksums.NAME).unlink()
        return folder

    def manifest(self, change: Callable[[dict[str, Any]], Any]) -> Path:
        """A changed model with another actkit.json."""
        folder = self.copy()
        content = json.loads((folder / checkpoint.MANIFEST).read_text())
        change(content)
        (folder / checkpoint.MANIFEST).write_text(json.dumps(content))
        return folder

    def own_model(self, described: Any) -> Path:
        """A model of one's own whose actkit.json says that it is another one."""
        folder = self.copy("own")
        content = json.loads((folder / checkpoint.MANIFEST).read_text())
        (folder / checkpoint.MANIFEST).write_text(json.dumps({**content, "model": described}))
        return folder

    def file(self, content: str | bytes, name: str = "recipe.yaml") -> Path:
        path = self.path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


def changed() -> Any:
    return apply(build("llama", num_hidden_layers=1), STACK, None, progress=False).model


def run(recipe: Any, data: Any = "given", kind: str = "llama", **settings: Any) -> Any:
    given = batches(kind) if isinstance(data, str) and data == "given" else data
    return apply(build(kind), recipe, given, progress=False, **settings)


def raising(error: Exception) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


def proof(function: Callable[[Place], Any]) -> None:
    PROOFS.append(function)


def missing(module: str, p: Place) -> None:
    """As if a package were not installed."""
    p.patch.setitem(sys.modules, module, None)


def points(p: Place, group: str, *given: tuple[str, str]) -> None:
    """As if packages had registered these."""
    real, own = registry._entries, {}
    for name, value in given:
        own[name] = (*own.get(name, ()), EntryPoint(name, value, group))
    p.patch.setattr(registry, "_entries", lambda asked: own | real(asked) if asked == group else real(asked))


class Lazy(Transform):
    """Observes without a tag, or asks for calls."""

    tags: ClassVar[Tags] = Tags(parts=False)
    how: str = "observe"

    @property
    def name(self) -> str:
        return "lazy"

    def observe(self, block: Any) -> Any:
        return {Site("block.input", block.index): Moments()} if self.how == "observe" else {}

    def edit(self, block: Any, seen: Seen) -> Any:
        if self.how == "calls":
            seen.calls(block.path)
        elif self.how == "block_calls":
            return seen.block_calls
        elif self.how == "targets":
            return seen.targets
        elif self.how == "trial":
            return seen.trial([])
        elif self.how == "site":
            return seen[Site("block.input", block.index)]
        return []


class Words:
    """A tokenizer of one character per token."""

    eos_token_id = pad_token_id = sep_token_id = bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(c) % 40 for c in text]}

    def decode(self, ids: Any, **_: Any) -> str:
        return "x" * len(ids)


def train(p: Place, data: Any = None, validation: Any = None, model: Any = None, **settings: Any) -> Any:
    data = batches("llama") if data is None else data
    validation = batches("llama", padding=False) if validation is None else validation
    model = build("llama") if model is None else model
    return training.train(model, data, validation=validation, progress=False, **{"steps": 1, **settings})


def stages(p: Place, model: Any = None, steps: int = 1, **settings: Any) -> Any:
    data = batches("llama"), batches("llama", padding=False)
    recipe = Recipe([stage.Train(steps=steps), Swap(where="silu", new="relu")])
    model = build("llama", num_hidden_layers=1) if model is None else model
    return staged_run.run(model, recipe, [data, None], out=p.path / "out", progress=False, **settings)


def _t5() -> Any:
    return T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9))


PADDED = {**HOST, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])}


NAN = float("nan")


def broken(value: float = NAN, kind: str = "llama") -> Any:
    model = build(kind)
    with torch.no_grad():
        next(iter(reversed(list(model.parameters())))).view(-1)[0] = value
    return model


def overflowing() -> Any:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.fill_(3e38)
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    return model


Skipping = type("Skipping", (type(build("llama")),), {})


def offloaded() -> Any:
    return cpu_offload(build("llama"), execution_device="cpu")


def beside(p: Place, label: str = "", text: bytes = b"", *, failed: bool = False, gone: bool = False) -> None:
    """As if this were the first of two processes. label, text, failed: what the other one says; gone: it does not."""
    header = json.dumps({"failed": failed, "label": label, "size": len(text)}).encode().ljust(processes.HEADER)

    def gather(found: Any, own: torch.Tensor, group: Any) -> None:
        if gone:
            raise RuntimeError("Connection closed by peer")
        found[0].copy_(own)
        found[1].copy_(processes._bytes(header))

    def broadcast(buffer: torch.Tensor, source: int, group: Any) -> None:
        if source == 1:
            buffer.copy_(processes._bytes(text))

    p.patch.setattr(processes, "_group", processes._Group(0, 2, None, False))
    p.patch.setattr(processes.dist, "all_gather", gather)
    p.patch.setattr(processes.dist, "broadcast", broadcast)
