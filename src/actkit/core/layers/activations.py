"""Activation functions by name: one small module that a checkpoint can hold, and the names of others'; thresholds.

`Activation("relu")` computes what torch or transformers computes under that name. Nothing here has parameters; methods
with learned functions bring modules of their own, which say by a class attribute `elementwise` that they are activation
functions: True where each output depends on its own input alone, False where one mixes channels or positions; and by
`gives_zeros = True` that many outputs are exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations as theirs

from actkit.core.layers.keeps_dtype import KeepsDtype

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

    elementwise: ClassVar[bool] = True

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in FUNCTIONS:
            raise ValueError(f"activation: {name!r} was given, allowed are {', '.join(FUNCTIONS)}.")
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape."""
        return FUNCTIONS[self.name](x)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"name": self.name}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Activation:
        """The function that `spec` named."""
        return cls(spec["name"])

    def extra_repr(self) -> str:
        return self.name


class Thresholded(KeepsDtype):
    """An activation whose small outputs are 0: f(x) where |f(x)| >= threshold, else 0; NaN is kept, so that it is seen.

    base: the activation f. threshold: float32 scalar, a buffer that keeps its dtype. What is kept is not shifted; the
    gradient is that of f where kept, 0 elsewhere. Over SiLU or GELU this is CATS (2024, arXiv:2404.08763), over ReLU it
    is FATReLU (Kurtz et al. 2020; ProSparse, arXiv:2402.13516).
    Raises ValueError for a threshold below 0 or not finite.
    """

    elementwise: ClassVar[bool] = True
    gives_zeros: ClassVar[bool] = True
    threshold: Tensor

    def __init__(self, base: nn.Module, threshold: float = 0.0) -> None:
        super().__init__()
        if not 0 <= threshold < float("inf"):
            raise ValueError(f"threshold: {threshold} was given; it is a magnitude, give 0 or more, finite.")
        self.base = base
        self.register_buffer("threshold", torch.tensor(float(threshold), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape."""
        y = self.base(x)
        return torch.where(
            y.detach().float().abs() < self.threshold, torch.zeros((), dtype=y.dtype, device=y.device), y
        )

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> Thresholded:
        """Around the activation that stands at its place; the threshold comes from the weights file."""
        return cls(original)

    def extra_repr(self) -> str:
        return f"threshold={float(self.threshold):.4g}"


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


def gives_zeros(module: nn.Module) -> bool:
    """Whether many outputs of an activation are exactly 0 for any input, so that what they multiply need not be read:
    ReLU and its square, and modules that say so by `gives_zeros`."""
    return getattr(module, "gives_zeros", False) or name_of(module) in ("relu", "relu2")


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function of torch or transformers, or says so by `elementwise` (nn.Identity is
    none)."""
    if type(module) is nn.Identity:
        return False
    known = hasattr(type(module), "elementwise") or isinstance(module, (nn.GELU, *_OTHERS)) or type(module) in _CLASSES
    return known or type(module).__module__ == theirs.__name__
