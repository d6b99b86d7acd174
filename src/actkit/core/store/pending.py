"""A model whose weights stay in their files until they are asked for, layer by layer: for whoever packs them anew.

    model = open_pending("smaller")               norms, biases, thresholds are there; matrices and tables are not
    weights = pending_of(model)
    weights.fill(model, "model.layers.0.mlp.up_proj")    read from its file
    whole = weights.load()                        the model that `checkpoint.load` gives

`opening.py` opens it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from actkit.core.edit.edits import get_module
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.modules import is_within
from actkit.core.store.filling import assign
from actkit.core.store.tensor_source import TensorSource

PENDING = "actkit_pending"


@dataclass
class Pending:
    """What a model lacks.

    Attributes:
        folder: that it was opened from.
        source: reads it.
        stored: name of each tensor that stays out -> its name in the files.
        dtypes: the same name -> what it is cast to.
        tied: further names of these tensors -> their name.
        options: of `checkpoint.load`, for the whole model.
    """

    folder: Path
    source: TensorSource
    stored: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def names(self, path: str) -> list[str]:
        """List the tensors in and below a module that stay out, by the module's own names of them.

        Args:
            path: of the module.
        """
        return [name for name in (*self.stored, *self.tied) if is_within(name, path)]

    def fill(self, model: nn.Module, path: str, *, mapped: bool = False) -> None:
        """Read the tensors of a module from their files.

        Args:
            model: that was opened.
            path: of a layer, of what holds layers, or of the embedding.
            mapped: leave them in their files, whose pages are read when values are, and belong to the page cache.

        Raises:
            CheckpointError: a file is gone or does not hold them any more.
        """
        for name in self.names(path):
            own = self.tied.get(name, name)
            value = self._map(self.stored[own]) if mapped else self.source.read(self.stored[own])
            assign(model, name, value.to(self.dtypes[own]))

    def drop(self, model: nn.Module, path: str) -> None:
        """Give back what `fill` read: the tensors in and below a module have shapes again, and no memory.

        Args:
            model: that was opened.
            path: of the module.
        """
        for name in self.names(path):
            parent, _, leaf = name.rpartition(".")
            assign(model, name, getattr(get_module(model, parent), leaf).detach().to("meta"))

    def _map(self, name: str) -> Tensor:
        file = self.source.tensors[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{file}: not readable ({error}); copy the folder again, or save the model again."
            ) from error

    def load(self) -> nn.Module:
        """Load the whole model, as `checkpoint.load` does."""
        from actkit.core.store import checkpoint  # which imports transformers

        return checkpoint.load(self.folder, **self.options)


def pending_of(model: nn.Module) -> Pending | None:
    """Return what a model lacks; None for one that was not opened so."""
    return model.__dict__.get(PENDING)


def whole(model: nn.Module) -> nn.Module:
    """Return the model itself, or the whole one if weights of it are still in its files."""
    weights = pending_of(model)
    return model if weights is None else weights.load()
