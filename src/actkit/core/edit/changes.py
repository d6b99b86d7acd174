"""What was changed on a model, kept on the model itself, and the way back to the files it came from."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor, nn

CHANGES, SOURCE = "actkit_changes", "actkit_source"


@dataclass(frozen=True)
class Changes:
    """The edits on a model, the recipe that made them, and the row of its architecture.

    Attributes:
        edits: in their JSON form.
        recipe: an entry per transform, and `{"train": settings}` per training of a recipe with stages;
            `core.recipe.recipe.transforms_of` reads the transforms back.
        architecture: the name of the row.
        base_class: the name of the model's class before it was changed; None for one that is not of transformers.
    """

    edits: list[dict[str, Any]] = field(default_factory=list)
    recipe: list[dict[str, Any]] = field(default_factory=list)
    architecture: str = ""
    base_class: str | None = None


@dataclass(frozen=True)
class SourceGrid:
    """How the weights of a quantized source were stored; they were dequantized when it was read.

    Attributes:
        format: of the files, such as 'compressed-tensors', 'gguf' or 'fp8'.
        layers: module path -> how its weight was stored, such as '4 bits, groups of 128 inputs, symmetric' or 'Q4_K'; a
            module that is not named was not quantized.
        notes: what the format's own readers compute besides and this model does not, one line each.
    """

    format: str
    layers: dict[str, str]
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SourceGrid:
        """Read what `to_dict` wrote, also after a way through JSON."""
        return cls(content["format"], dict(content["layers"]), tuple(content["notes"]))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self)

    def describe(self) -> str:
        """Say it in one line, such as 'gguf: 12 x Q4_K, 2 x Q6_K; dequantized when it was read'."""
        kinds = Counter(self.layers.values()).most_common()
        return f"{self.format}: {', '.join(f'{count} x {kind}' for kind, count in kinds)}; dequantized when it was read"


@dataclass(frozen=True)
class Source:
    """The folder that a model was loaded from, and the state of its tensors then.

    Attributes:
        name: the folder.
        tensors: name -> (address, version counter); an in-place change raises the counter, a replaced tensor has
            another
            address.
        options: what `load` was given.
        files: name -> (bytes, time of change) of the weights and settings in the folder.
        grid: how the first source of the weights was quantized, also after it was saved by actkit; None if it was not.
    """

    name: str
    tensors: dict[str, tuple[int, int]]
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    grid: SourceGrid | None = None

    @classmethod
    def of(cls, name: str, model: nn.Module, *, grid: SourceGrid | None = None, **options: Any) -> Source:
        """Return the source of a model just loaded from `name` with these options."""
        return cls(name, _fingerprint(model), options, _stamp(name), grid)

    def untouched(self, model: nn.Module) -> bool:
        """Say whether every tensor is as it was when the model was loaded."""
        return self.tensors == _fingerprint(model)

    def unchanged(self) -> bool:
        """Say whether the folder still holds the files that the model was loaded from."""
        return self.files == _stamp(self.name)

    def rebound(self, model: nn.Module) -> Source:
        """Return the same source for a model whose tensors hold the same values again, or for a copy of it."""
        return replace(self, tensors=_fingerprint(model))


def _fingerprint(model: nn.Module) -> dict[str, tuple[int, int]]:
    state = model.state_dict(keep_vars=True)
    return {name: (each.data_ptr(), each._version) for name, each in state.items() if isinstance(each, Tensor)}


def _stamp(folder: str) -> dict[str, tuple[int, int]]:
    kinds = (".safetensors", "config.json", "actkit.json")
    try:
        found = [path for path in Path(folder).iterdir() if path.name.endswith(kinds)]
        return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}
    except OSError:
        return {}


def keep(model: nn.Module, changes: Changes | None) -> None:
    """Make `changes` the record of a model; None takes the record away. The model's class stays what it is."""
    if changes is None:
        model.__dict__.pop(CHANGES, None)
    else:
        model.__dict__[CHANGES] = changes


def of(model: nn.Module) -> Changes | None:
    """Return the changes on a model, or None for one that actkit has not changed."""
    return model.__dict__.get(CHANGES)


def source(model: nn.Module) -> Source | None:
    """Return the source of a model that `actkit.load` read, or None."""
    return model.__dict__.get(SOURCE)


def source_grid(model: nn.Module) -> SourceGrid | None:
    """Return how the source of a loaded model was quantized, or None."""
    origin = source(model)
    return None if origin is None else origin.grid


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy, which can be undone from the same files as the model."""
    duplicate = copy.deepcopy(model)
    origin = source(model)
    if origin is not None and origin.untouched(model):
        duplicate.__dict__[SOURCE] = origin.rebound(duplicate)
    return duplicate


def methods_of(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the methods in a record, transforms and rules, each once."""
    return list(dict.fromkeys(_names(entries)))


def _names(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for entry in entries:
        for name, settings in entry.items():
            yield from _names(settings.get("rules", ())) if name == "train" else (name,)


def recipe_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the YAML form of the recipe that a record tells of."""
    plain = [dict(entry) for entry in entries]
    if not any("train" in entry for entry in plain):
        return {"actkit": 1, "transforms": plain}
    stages: list[dict[str, Any]] = []
    for trained, group in groupby(plain, key=lambda entry: "train" in entry):
        several = list(group)
        stages += several if trained else [{"apply": several}]
    return {"actkit": 1, "stages": stages}
