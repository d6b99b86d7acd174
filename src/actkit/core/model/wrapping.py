"""Modules that wrap another one: a block, an attention or an MLP with something before, behind or around it.

    class Steered(nn.Module):
        wraps = "inner"                     # the attribute that holds what it wraps

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

A model's parts are found inside such a module as they were without it. What a part reads is read inside of the wrapper;
what it gives, and what enters and leaves a block, outside of it: that is what the rest of the model goes on with.
"""

from __future__ import annotations

from torch import nn

from actkit.core.ground.errors import CoverageError

WRAPS = "wraps"


def outside(model: nn.Module, path: str) -> str:
    """Return the path at which a module stands if the modules above it are wrapped.

    Args:
        model: any module.
        path: as it would be without wrappers, such as 'model.layers.0.mlp'. A wrapper that stands at this place is not
            entered.

    Raises:
        CoverageError: a class says that it wraps a module that it does not have.
    """
    module: nn.Module | None = model
    found = ""
    for name in path.split(".") if path else ():
        if module is not None:
            module, found = _entered(module, found)
        module = None if module is None else module._modules.get(name)
        found = f"{found}.{name}".removeprefix(".")
    return found


def inside(model: nn.Module, path: str) -> str:
    """Return the path of what stands at a place: as `outside`, and the wrappers at this place are entered too.

    Args:
        model: any module.
        path: as it would be without wrappers.

    Raises:
        CoverageError: a class says that it wraps a module that it does not have.
    """
    found = outside(model, path)
    try:
        module = model.get_submodule(found)
    except AttributeError:
        return found
    return _entered(module, found)[1]


def is_wrapped(model: nn.Module, path: str) -> bool:
    """Say whether the module at a path is what the one above it wraps.

    Args:
        model: any module.
        path: of one of its modules.
    """
    above, _, name = path.rpartition(".")
    return bool(name) and getattr(type(model.get_submodule(above)), WRAPS, None) == name


def _entered(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The innermost module of wrappers, and its path."""
    name = getattr(type(module), WRAPS, None)
    while name is not None:
        inner = module._modules.get(name)
        if inner is None:
            raise CoverageError(
                f"{path or 'model'}: a {type(module).__name__} says wraps = {name!r}, and holds no such module; "
                f"correct the class attribute, or set the module before the model is read."
            )
        module, path = inner, f"{path}.{name}".removeprefix(".")
        name = getattr(type(module), WRAPS, None)
    return module, path
