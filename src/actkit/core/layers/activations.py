"""Activation functions as modules: one by name that a checkpoint can hold, thresholds, and what a module computes.

`Activation("relu")` computes what torch or transformers computes under that name; the names are those of the
entry-point group `actkit.functions`, each with a record (`activation_function.py`). Nothing here has parameters.
Methods with learned functions bring modules of their own, which say by a class attribute `mixes` that they are
activation functions: () if each output depends on its own input alone, else what it depends on besides ("channels",
"positions", "batch"). `record()` answers what is known of the function at its present coefficients, `gives_zeros =
True` says that many outputs are exactly 0. The older flag `elementwise = True` means `mixes = ()`. A module that holds
several functions, one for each group of channels, says by `groups` how many, and answers `record(group)` for each;
`record()` is then None unless all groups compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.core.ground import registry
from actkit.core.layers.activation_function import AXES, ActivationFunction, Axis, thresholded
from actkit.core.layers.keeps_dtype import KeepsDtype
from actkit.core.layers.known_functions import ACTIVATION_CLASSES, THEIRS, of_class

MANY = 0.25  # of the outputs for a standard normal input


def function_names() -> list[str]:
    """The names of all registered functions."""
    return registry.function_names()


def activation_function(name: str) -> ActivationFunction:
    """The record that is registered under a name.

    Args:
        name: as in `function_names()`.

    Returns:
        The record.

    Raises:
        RecipeError: an unknown name, one that two packages claim, or a broken plug-in.
    """
    return registry.function_record(name)


class Activation(nn.Module):
    """The element-wise function that is registered under a name.

    Args:
        name: as in `function_names()`.

    Raises:
        ValueError: an unknown name, or a function that mixes.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in function_names():
            raise ValueError(f"activation: {name!r} was given, allowed are {', '.join(function_names())}.")
        record = activation_function(name)
        if record.mixes:
            raise ValueError(f"activation: {name!r} mixes {', '.join(record.mixes)}; give an element-wise function.")
        self.name, self.function = name, record.function

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape."""
        return self.function(x)

    def record(self) -> ActivationFunction | None:
        """What is known of its function."""
        return activation_function(self.name)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"name": self.name}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Activation:
        """The function that `spec` named."""
        return cls(spec["name"])

    def extra_repr(self) -> str:
        return self.name

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "function"}  # which need not be picklable

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.function = activation_function(self.name).function


class Thresholded(KeepsDtype):
    """An activation whose small outputs are 0: f(x) if |f(x)| >= threshold, else 0; NaN is kept, so that it is seen.

    What is kept is not shifted; the gradient is that of f for what is kept, 0 for the rest. Over SiLU or GELU this is
    CATS (2024, arXiv:2404.08763), over ReLU it is FATReLU (Kurtz et al. 2020; ProSparse, arXiv:2402.13516).

    Args:
        base: the activation f.
        threshold: a magnitude of outputs; becomes a float32 scalar, a buffer that keeps its dtype.

    Raises:
        ValueError: a threshold below 0 or not finite.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()
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

    @property
    def groups(self) -> int:
        """Of the base: how many functions it holds."""
        return groups_of(self.base)

    def record(self, group: int | None = None) -> ActivationFunction | None:
        """What is known of it at the present threshold; None if nothing is known of the base.

        Args:
            group: of channels; None for all.
        """
        base = record_of(self.base, group)
        if base is None or base.mixes or self.threshold.is_meta:
            return None
        return thresholded(base, float(self.threshold))

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> Thresholded:
        """Around the activation that stands at its place; the threshold comes from the weights file."""
        return cls(original)

    def extra_repr(self) -> str:
        return f"threshold={float(self.threshold):.4g}"


def record_of(module: nn.Module, group: int | None = None) -> ActivationFunction | None:
    """What is known of the function that a module computes at its present settings.

    Args:
        module: any module.
        group: of channels, from 0 to `groups_of(module) - 1`; None for all.

    Returns:
        The record; None if it is no activation function, or one of which nothing is known (random, or `group` is None
        and its groups have other coefficients).

    Raises:
        ValueError: there is no such group.
    """
    groups = groups_of(module)
    if group is not None and not 0 <= group < groups:
        raise ValueError(f"group: {group} was given for a {type(module).__name__}; give 0 to {groups - 1}.")
    if not says_what_it_mixes(module):
        return of_class(module, group)
    answer = getattr(module, "record", None)
    if answer is None:
        return None
    return answer() if group is None or groups == 1 else answer(group)


def groups_of(module: nn.Module) -> int:
    """How many functions an activation holds: one for each group of contiguous channels, or one for all.

    Args:
        module: any module.
    """
    if isinstance(module, nn.PReLU):
        return module.weight.numel()
    return int(getattr(module, "groups", 1)) if says_what_it_mixes(module) else 1


def flops_of(module: nn.Module) -> int | None:
    """Operations for one output of an activation, as its record counts them; None if nobody counted.

    A module with other coefficients for each channel has no one record; it says them itself, by an attribute `flops`.

    Args:
        module: any module.
    """
    said: int | None = getattr(module, "flops", None)
    if said is not None:
        return said
    record = record_of(module, 0)  # the same for all groups
    return None if record is None else record.flops


def name_of(module: nn.Module) -> str | None:
    """The registered name of what a module computes; None for other functions and other settings.

    The tanh approximations of GELU are one name, though they round differently.

    Args:
        module: any module.
    """
    if isinstance(module, Activation):
        return module.name
    record = record_of(module)
    return record.name if record is not None and record.name in function_names() else None


def mixes_of(module: nn.Module) -> tuple[Axis, ...] | None:
    """What an output of an activation depends on besides its own input; None for a module that is not known as one."""
    kind = type(module)
    if hasattr(kind, "mixes"):
        return tuple(module.mixes)  # type: ignore[arg-type]  # of the class, or by its settings
    if hasattr(kind, "elementwise"):
        return () if kind.elementwise else AXES[:2]
    record = of_class(module, 0)
    return None if record is None else record.mixes


def gives_zeros(module: nn.Module) -> bool:
    """Whether many outputs of an activation are exactly 0, so that what they multiply need not be read.

    Of a known function that is a quarter of the outputs for a standard normal input, as of ReLU and its square; other
    modules say so by `gives_zeros`.

    Args:
        module: any module.
    """
    if getattr(module, "gives_zeros", False):
        return True
    record = record_of(module)
    return record is not None and record.share_of_zeros() >= MANY


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function of torch or transformers, or says so by `mixes`.

    nn.Identity is none, and nn.Softmax makes probabilities of scores.

    Args:
        module: any module.
    """
    if isinstance(module, nn.Identity | nn.Softmax):
        return False
    theirs = any(base.__module__ == THEIRS for base in type(module).__mro__)
    known = isinstance(module, ACTIVATION_CLASSES) or theirs
    return known or says_what_it_mixes(module)


def without_inner(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every path with its module, without those inside an activation.

    The function under a threshold that was set for it is one of these. A module that stands at several paths comes with
    each.

    Args:
        model: any module.
    """
    inside: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if path.rpartition(".")[0] in inside:
            inside.add(path)
            continue
        if is_activation(module):
            inside.add(path)
        yield path, module


def says_what_it_mixes(module: nn.Module) -> bool:
    """Whether the class of a module says by `mixes` that it is an activation function."""
    return hasattr(type(module), "mixes") or hasattr(type(module), "elementwise")
