"""Names from the entry-point groups, which third parties add to.

`actkit.methods`; `actkit.modules` (saved modules) with `actkit.weights`, `actkit.selections` and `actkit.inputs` (what
a changed layer holds); `actkit.grids` (what values are rounded to); `actkit.functions` (activation functions),
`actkit.attentions` (attention functions), `actkit.models` (your own), `actkit.tasks`, `actkit.adapters` (what is
trained beside frozen layers), `actkit.analyses` and `actkit.decoders`.

Our own names and those of third parties are read the same way, lazily: listing names imports nothing, and a plug-in
that does not import, is something else than it should be, or claims the name of another is an error that names it and
its package, once its name is used; all other names work.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel
from torch import nn

from actkit.core.ground.errors import RecipeError
from actkit.core.ground.yaml_files import shorten

METHODS, MODULES, DECODERS = "actkit.methods", "actkit.modules", "actkit.decoders"
WEIGHTS, SELECTIONS, INPUTS, TASKS = "actkit.weights", "actkit.selections", "actkit.inputs", "actkit.tasks"
FUNCTIONS, MODELS, GRIDS = "actkit.functions", "actkit.models", "actkit.grids"
ATTENTIONS, ADAPTERS, ANALYSES = "actkit.attentions", "actkit.adapters", "actkit.analyses"
MEND = "Update or uninstall that package (pip uninstall NAME), or report it to its author."


Entries = tuple[EntryPoint, ...]  # what stands behind a name: one entry, several if packages disagree


@cache
def _entries(group: str) -> dict[str, Entries]:
    found: dict[str, Entries] = {}
    for entry in entry_points(group=group):
        known = found.get(entry.name, ())
        if entry.value not in [other.value for other in known]:
            found[entry.name] = (*known, entry)
    return dict(sorted(found.items()))


@cache
def _load(group: str, name: str) -> Any:
    entries = _entries(group)
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise RecipeError(
            f"{group.split('.')[1]}: {shorten(name)!r} is not known.{hint} Known are {', '.join(entries) or 'none'}. "
            f"One of a plug-in is known if the plug-in's package is installed."
        )
    if len(entries[name]) > 1:
        claims = " and by ".join(sorted(map(_origin, entries[name])))
        raise RecipeError(
            f"{group}: {name!r} is claimed by {claims}; uninstall one of the packages (pip uninstall NAME), or ask its "
            f"author for another name. All other names work."
        )
    entry = entries[name][0]
    try:
        return entry.load()
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise RecipeError(
            f"{group}: {name!r} ({_origin(entry)}) does not import: {kind}{error}. {MEND} All other names work."
        ) from error


def _class(group: str, name: str, wanted: str, fits: Callable[[type], bool]) -> Any:
    """The class behind a name. Raises RecipeError if it is something else than is `wanted`."""
    found = _load(group, name)
    if not (isinstance(found, type) and fits(found)):
        kind = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise RecipeError(f"{group}: {name!r} ({_origin(_entries(group)[name][0])}) is {kind}, not {wanted}. {MEND}")
    return found


def _origin(entry: EntryPoint) -> str:
    """Such as 'its_package.module:Class, of the package NAME VERSION'."""
    return f"{entry.value}, of the package {f'{entry.dist.name} {entry.dist.version}' if entry.dist else 'unknown'}"


def origin_of_method(name: str) -> str:
    """Where a method comes from: 'its_package.module:Class, of the package NAME VERSION'."""
    return _origin(_entries(METHODS)[name][0])


def method_names() -> list[str]:
    """The names of all installed methods; imports none of them."""
    return list(_entries(METHODS))


def method_class(name: str) -> Any:
    """Return the class of the method (a transform or a rule) registered as `name`.

    Args:
        name: that is registered.

    Raises:
        RecipeError: an unknown name, one that two packages claim, or a broken plug-in.
    """
    return _class(METHODS, name, "a Transform or TrainingRule", lambda found: issubclass(found, BaseModel))


def method_name(cls: type) -> str:
    """The registered name of a Transform class."""
    return _name_of(METHODS, cls)


def module_names() -> list[str]:
    """The names of all registered modules; imports none of them."""
    return list(_entries(MODULES))


def module_class(name: str) -> Any:
    """Return the module class registered as `name`.

    Args:
        name: that is registered.

    Raises:
        RecipeError: as in `method_class`.
    """
    return _module_class(MODULES, name)


def _module_class(group: str, name: str) -> Any:
    """The class of a module that a file names and describes."""

    def fits(found: type) -> bool:
        return issubclass(found, nn.Module) and hasattr(found, "spec") and hasattr(found, "from_spec")

    return _class(group, name, "a torch.nn.Module with spec() and from_spec()", fits)


def module_name(cls: type) -> str:
    """The registered name of a module class."""
    return _name_of(MODULES, cls)


def weight_class(kind: str) -> Any:
    """Return the class that stores weights as `kind`, a `core.layers.weights.WeightStorage`.

    Args:
        kind: that is registered.

    Raises:
        RecipeError: as in `method_class`.
    """
    return _module_class(WEIGHTS, kind)


def selection_class(kind: str) -> Any:
    """Return the class that selects inputs as `kind`, a `core.layers.selections.Selection`.

    Args:
        kind: that is registered.

    Raises:
        RecipeError: as in `method_class`.
    """
    return _module_class(SELECTIONS, kind)


def inputs_class(kind: str) -> Any:
    """Return the class that rounds inputs as `kind`, a `core.layers.rounded_inputs.RoundedInputs`.

    Args:
        kind: that is registered.

    Raises:
        RecipeError: as in `method_class`.
    """
    return _module_class(INPUTS, kind)


def grid_class(kind: str) -> Any:
    """Return the class of grids of this kind, a `core.grids.grid.Grid`.

    Args:
        kind: that is registered.

    Raises:
        RecipeError: as in `method_class`.
    """
    return _class(GRIDS, kind, "a Grid", lambda found: hasattr(found, "from_range") and hasattr(found, "decode"))


def function_names() -> list[str]:
    """The names of all registered activation functions; imports none of them."""
    return list(_entries(FUNCTIONS))


def function_record(name: str) -> Any:
    """The record of the activation function `name`, a `core.layers.activation_function.ActivationFunction`.

    Args:
        name: that is registered.

    Raises:
        RecipeError: an unknown name, one that two packages claim, or a plug-in that is broken or names it otherwise.
    """
    found = _load(FUNCTIONS, name)
    if not (hasattr(found, "function") and getattr(found, "name", None) == name):
        raise RecipeError(
            f"{FUNCTIONS}: {name!r} ({_origin(_entries(FUNCTIONS)[name][0])}) is a {type(found).__name__}, not an "
            f"ActivationFunction of that name. {MEND}"
        )
    return found


def attention_names() -> list[str]:
    """The names of all registered attention functions; imports none of them."""
    return list(_entries(ATTENTIONS))


def attention_class(name: str) -> Any:
    """Return the class of the attention function `name`, a `core.layers.attention_function.AttentionFunction`.

    Args:
        name: that is registered.

    Raises:
        RecipeError: as in `method_class`.
    """
    wanted = "an AttentionFunction, a frozen dataclass with attend()"
    return _class(ATTENTIONS, name, wanted, lambda found: is_dataclass(found) and hasattr(found, "attend"))


def attention_name(cls: type) -> str:
    """The registered name of a class of attention functions."""
    return _name_of(ATTENTIONS, cls)


def model_names() -> list[str]:
    """The names of all registered models; imports none of them."""
    return list(_entries(MODELS))


def model_class(name: str) -> Any:
    """The class of the model registered as `name`.

    Args:
        name: that is registered.

    Raises:
        RecipeError: an unknown name, one that two packages claim, or a broken plug-in.
    """
    return _module_class(MODELS, name)


def model_name(cls: type) -> str | None:
    """The registered name of a model class; None if it has none."""
    return _find_name(MODELS, cls)


def model_name_of_class(name: str) -> str | None:
    """The registered name of the model whose class is called `name`; None if there is none, or more than one."""
    found = [each for each, claims in _entries(MODELS).items() if claims[0].attr.rpartition(".")[2] == name]
    return found[0] if len(found) == 1 else None


def task_names() -> list[str]:
    """The names of all installed tasks; imports none of them."""
    return list(_entries(TASKS))


def task_class(name: str) -> Any:
    """Return the class of the task `name`, a `core.measure.tasks.task.Task`.

    Args:
        name: that is registered.

    Raises:
        RecipeError: as in `method_class`.
    """
    wanted = "a Task with fits(), sums() and estimates()"
    return _class(
        TASKS, name, wanted, lambda found: all(hasattr(found, each) for each in ("fits", "sums", "estimates"))
    )


def adapter_class(name: str) -> Any:
    """Return the class of the adapters `name`, a `finetuning.adapters.Adapter`.

    Args:
        name: that is registered.

    Raises:
        RecipeError: as in `method_class`.
    """
    return _class(
        ADAPTERS,
        name,
        "an Adapter with layers()",
        lambda found: issubclass(found, BaseModel) and hasattr(found, "layers"),
    )


def analysis_names() -> list[str]:
    """The names of all installed analyses; imports none of them."""
    return list(_entries(ANALYSES))


def analysis_function(name: str) -> Callable[..., Any]:
    """Return the analysis registered as `name`, a function of a model and batches.

    Args:
        name: that is registered.

    Raises:
        RecipeError: an unknown name, one that two packages claim, or a broken plug-in.
    """
    found = _load(ANALYSES, name)
    if isinstance(found, type) or not callable(found):
        raise RecipeError(
            f"{ANALYSES}: {name!r} ({_origin(_entries(ANALYSES)[name][0])}) is a {type(found).__name__}, not a "
            f"function of a model and batches. {MEND}"
        )
    return found


def decoder_names() -> list[str]:
    """The names of all installed decoders; imports none of them."""
    return list(_entries(DECODERS))


def decoder_class(name: str) -> Any:
    """The class registered as the decoder `name`; `core.measure.decoding.Decoder` says what it offers.

    Args:
        name: that is registered.

    Raises:
        RecipeError: no decoder has this name.
    """
    return _load(DECODERS, name)


def _name_of(group: str, cls: type) -> str:
    name = _find_name(group, cls)
    if name is None:
        target = f"{cls.__module__}:{cls.__qualname__}"
        raise RecipeError(
            f'{cls.__name__} is not registered: add `name = "{target}"` to the entry-point group {group} of its '
            f"package, so that recipes and checkpoints can name it."
        )
    return name


def _find_name(group: str, cls: type) -> str | None:
    target = f"{cls.__module__}:{cls.__qualname__}"
    entries = _entries(group)
    for name, claims in entries.items():
        if target in [entry.value for entry in claims]:
            return name
    package = cls.__module__.partition(".")[0]
    for name, claims in entries.items():  # the package may name the class where it is imported, not where it is written
        if claims[0].module.partition(".")[0] == package and claims[0].attr == cls.__qualname__ and _is(claims[0], cls):
            return name
    return None


def _is(entry: EntryPoint, cls: type) -> bool:
    return getattr(sys.modules.get(entry.module), entry.attr, None) is cls
