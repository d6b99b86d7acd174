"""What can be asked of any module or of a path in a model, whatever the model is."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_pretrained(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Say whether it is a model of transformers, which has a config and a format of its own."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def is_within(name: str, path: str) -> bool:
    """Say whether a parameter or module of that name is the one at `path` or lies inside it; '' is the whole model."""
    return path == "" or name == path or name.startswith(path + ".")


def names_of_parameters(model: nn.Module) -> list[list[str]]:
    """List the names of each parameter; tied ones have several, in order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def tied_names(model: nn.Module) -> dict[str, str]:
    """Give for each parameter name that is tied another name of the same parameter: its first, or of that the last."""
    several = [names for names in names_of_parameters(model) if len(names) > 1]
    return {name: names[0] if name != names[0] else names[-1] for names in several for name in names}


def memory_of(name: str, tensor: Tensor) -> Hashable:
    """Identify the values of a saved tensor: equal for two names of the same; its own name if it has no memory."""
    if tensor.is_meta or not tensor.numel():
        return name
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def tied_copy(module: nn.Module) -> nn.Module:
    """Copy a module that shares its parameters with the original; hooks and buffers are its own."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
