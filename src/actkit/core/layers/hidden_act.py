"""Activation functions of ours by the name that a transformers config gives them (`hidden_act` and its kin).

transformers looks such a name up in its table `ACT2FN`. A name of ours is entered there when it is first needed: when a
swap writes it into a config, and when actkit loads a folder whose config has it. Whoever builds a model from a config,
or reads a folder with transformers alone, calls `enter` first; without it transformers says KeyError, and
computes nothing else in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from actkit.core.ground import registry
from actkit.core.layers.activations import Activation, activation_function, function_names

CONFIG_KEYS = ("hidden_act", "hidden_activation", "activation_function")


def enter(name: str) -> None:
    """Let transformers know a function, or a module that learns one, by its registered name; again is no harm.

    Args:
        name: of the entry-point group `actkit.functions`, or of `actkit.modules` if its class says what it `mixes`.

    Raises:
        RecipeError: an unknown name, one that two packages claim, or a broken plug-in.
        ValueError: it is no activation function, or needs settings, which a config has no place for.
    """
    from transformers.activations import ACT2FN

    if name in ACT2FN:
        return
    if name in function_names():
        Activation(name)  # raises what is wrong with it
        ACT2FN[name] = (Activation, {"name": name})
        return
    cls = registry.module_class(name)
    if default_spec(cls) is None:
        raise ValueError(
            f"hidden_act: {name!r} is a {cls.__name__}, which is no activation function or is not made without "
            f"settings; build the model with another function and put it in with actkit.swap."
        )
    ACT2FN[name] = cls


def enter_those_of(settings: Mapping[str, Any]) -> None:
    """Enter the names of ours that a config has; one that nobody knows is left to transformers to refuse.

    Args:
        settings: of the config, as a dict; those of its parts are read too.
    """
    for name in _names(settings):
        if name in function_names() or name in registry.module_names():
            enter(name)


def own_names(settings: Mapping[str, Any]) -> dict[str, type[nn.Module] | None]:
    """The names in a config that are not of transformers itself, with the class that each builds, None if nobody does.

    Args:
        settings: as in `enter_those_of`.
    """
    from transformers.activations import ACT2CLS, ACT2FN

    own = (name for name in _names(settings) if name not in ACT2CLS)
    return {name: type(ACT2FN[name]) if name in ACT2FN else None for name in own}


def config_name(new: str | Mapping[str, Any]) -> str | None:
    """What a config calls a function or a module; None if it has settings that a name does not say.

    Args:
        new: a registered name, or {"module": registered name, "spec": its JSON arguments}.
    """
    if isinstance(new, str) and new in function_names():
        record = activation_function(new)
        return record.config_name or (None if record.mixes else new)
    name, spec = (new, None) if isinstance(new, str) else (new["module"], new["spec"])
    usual = default_spec(registry.module_class(name))
    return name if usual is not None and spec in (None, usual) else None


def default_spec(cls: Any) -> dict[str, Any] | None:
    """The JSON arguments of an activation function that is made without settings; None if it cannot be."""
    if not (hasattr(cls, "mixes") or hasattr(cls, "elementwise")):
        return None
    try:
        made: Any = cls()
    except (TypeError, ValueError):
        return None
    return made.spec() if isinstance(made, nn.Module) else None  # type: ignore[operator]


def _names(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _names(value)
        elif key in CONFIG_KEYS and isinstance(value, str):
            yield value
