"""What can be asked of any module or of a path in a model, whatever the model is."""

from __future__ import annotations

from torch import nn


def is_pretrained(model: nn.Module) -> bool:
    """Whether it is a model of transformers, which has a config and a format of its own."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def is_within(name: str, path: str) -> bool:
    """Whether a parameter or module of that name is the module at `path` or lies inside it; '' is the whole model."""
    return path == "" or name == path or name.startswith(path + ".")
