"""Tensors of a folder put into a model that was built for them: every name, shape, kind and tie must agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import get_module
from actkit.core.ground.errors import CheckpointError
from actkit.core.layers.linear import OLD_STORAGE, ActLinear


def fill(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], folder: Path) -> None:
    """Give a model its tensors.

    Args:
        model: of the right structure.
        tensors: by name.
        tied: further name -> name, of those that share one.
        folder: named in errors.

    Raises:
        CheckpointError: they do not fit the model.
    """
    tensors, tied = fitting(model, tensors, tied, folder)
    for name, tensor in tensors.items():
        assign(model, name, tensor)
    tie(model, tied)


def fitting(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], folder: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and ties by the names that models have today, all of which the model has.

    Args:
        model: of the right structure.
        tensors: by name; only their shapes and dtypes are read.
        tied: as in `fill`.
        folder: named in errors.

    Raises:
        CheckpointError: they do not fit the model.
    """
    expected = model.state_dict(keep_vars=True)
    present = _PresentNames(model)
    tensors = {present[name]: tensor for name, tensor in tensors.items()}
    tied = {present[alias]: present[name] for alias, name in tied.items()}
    given = set(tensors) | set(tied)
    problems = [f"missing {name}" for name in sorted(set(expected) - given)]
    problems += [f"unexpected {name}" for name in sorted(given - set(expected))]
    for name, tensor in tensors.items():
        if name in expected and expected[name].shape != tensor.shape:
            problems.append(
                f"{name} is {tuple(tensor.shape)} in the file and {tuple(expected[name].shape)} in the model"
            )
        elif name in expected and not _same_kind(tensor.dtype, expected[name].dtype):
            problems.append(f"{name} is {tensor.dtype} in the file and {expected[name].dtype} in the model")
    problems += [
        f"{alias} is tied to {name}, which is not in the file" for alias, name in tied.items() if name not in tensors
    ]
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit the model: {'; '.join(problems[:10])}.")
    return tensors, tied


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer of that name."""
    parent, _, leaf = name.rpartition(".")
    module = get_module(model, parent)
    old = module._parameters.get(leaf)
    if old is not None:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


def tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Let several names of a model stand for one tensor each: further name -> name."""
    for alias, name in tied.items():
        parent, _, leaf = alias.rpartition(".")
        source, _, source_leaf = name.rpartition(".")
        setattr(get_module(model, parent), leaf, getattr(get_module(model, source), source_leaf))


class _PresentNames:
    """Names of saved tensors as models have them today; those in folders of earlier versions of actkit may differ."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {path for path, module in model.named_modules() if isinstance(module, ActLinear)}

    def __getitem__(self, name: str) -> str:
        layer, old, leaf = name.rpartition(f".{OLD_STORAGE}.")
        return f"{layer}.storage.{leaf}" if old and layer in self.layers else name


def _same_kind(given: torch.dtype, expected: torch.dtype) -> bool:
    """Floats may be stored in another width; codes and indices may not."""
    return given == expected or (given.is_floating_point and expected.is_floating_point)
