"""Element-wise activation functions by name: one small module that a checkpoint can hold, and the names of others'.

`Activation("relu")` computes what torch or transformers computes under that name. Nothing here has parameters; methods
with learned functions bring modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations as theirs

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}

# What a transformers config calls them, where it has a name: `hidden_act` and its kin.
CONFIG_NAMES = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "hardswish": "hardswish",
    "identity": "linear",
    "leaky_relu": "leaky_relu",
    "mish": "mish",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "tanh": "tanh",
}

# Classes of torch and transformers that compute one function of the table, at the settings that `name_of` checks.
_CLASSES: dict[type[nn.Module], str] = {
    nn.ELU: "elu",
    nn.Hardswish: "hardswish",
    nn.Identity: "identity",
    nn.LeakyReLU: "leaky_relu",
    nn.Mish: "mish",
    nn.ReLU: "relu",
    nn.SELU: "selu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Softplus: "softplus",
    nn.Tanh: "tanh",
    theirs.AccurateGELUActivation: "gelu_tanh",
    theirs.FastGELUActivation: "gelu_tanh",
    theirs.GELUActivation: "gelu",
    theirs.GELUTanh: "gelu_tanh",
    theirs.LinearActivation: "identity",
    theirs.MishActivation: "mish",
    theirs.NewGELUActivation: "gelu_tanh",
    theirs.ReLUSquaredActivation: "relu2",
    theirs.SiLUActivation: "silu",
}
_SETTINGS: dict[str, dict[str, float]] = {
    "elu": {"alpha": 1.0},
    "leaky_relu": {"negative_slope": 0.01},
    "softplus": {"beta": 1, "threshold": 20},
}

_OTHERS = (
    nn.CELU,
    nn.GLU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.LogSigmoid,
    nn.PReLU,
    nn.RReLU,
    nn.ReLU6,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Threshold,
)


class Activation(nn.Module):
    """The element-wise function `name` of the table FUNCTIONS. Raises ValueError for a name that is not in it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in FUNCTIONS:
            raise ValueError(f"activation: {name!r} was given, allowed are {', '.join(FUNCTIONS)}.")
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape."""
        return FUNCTIONS[self.name](x)

    def spec(self) -> dict[str, Any]:
        return {"name": self.name}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Activation:
        return cls(spec["name"])

    def extra_repr(self) -> str:
        return self.name


def name_of(module: nn.Module) -> str | None:
    """The name in the table of what a module computes; None for other functions and other settings.

    The tanh approximations of GELU are one name, though they round differently.
    """
    if isinstance(module, Activation):
        return module.name
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    name = _CLASSES.get(type(module))
    wanted = _SETTINGS.get(name or "", {})
    return name if all(getattr(module, key) == value for key, value in wanted.items()) else None


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function of torch, transformers or the table (nn.Identity is none)."""
    if type(module) is nn.Identity:
        return False
    known = isinstance(module, (Activation, nn.GELU, *_OTHERS)) or type(module) in _CLASSES
    return known or type(module).__module__ == theirs.__name__
