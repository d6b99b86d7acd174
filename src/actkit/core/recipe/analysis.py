"""Analyses by name: functions of a model and batches whose settings are checked before anything runs.

    measure = parse_analysis("neuron_activity:threshold=0.1")
    print(measure(model, batches).table())

They stand in the entry-point group `actkit.analyses`, ours and those of plug-ins. What a function takes beside the
model and the batches is a setting if it can be written down (numbers, texts, lists of these); functions and data are
for callers in Python. A function that needs data of its own kind says how they are read: `@reads(reader)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import nn

from actkit.core.ground import registry
from actkit.core.ground.errors import RecipeError
from actkit.core.ground.results import Result
from actkit.core.ground.yaml_files import explain, parse_call, shorten
from actkit.core.model.sites import Site

PLAIN = (int, float, str, bool, NoneType, Site, ...)
GIVEN = ("progress", "anatomy", "max_memory")  # said by whoever runs it


Reader = Callable[..., Any]  # (source, model, tokenizer, **how much is read) -> batches


def reads(reader: Reader) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Say how the data of an analysis are read, if not as those of the other verbs.

    Args:
        reader: called with what the user gave (None for nothing), the model, its tokenizer, and the options of
            `load_data` by name; it gives batches.
    """

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        function.reader = reader  # type: ignore[attr-defined]
        return function

    return named


@dataclass(frozen=True)
class Analysis:
    """A registered analysis with its settings.

    Attributes:
        name: that is registered.
        function: of a model and batches.
        settings: that were given, as the function takes them.
    """

    name: str
    function: Callable[..., Any]
    settings: Mapping[str, Any]

    @property
    def reader(self) -> Reader | None:
        """What reads its data; None if these are read as those of the other verbs."""
        return getattr(self.function, "reader", None)

    def __call__(self, model: nn.Module, batches: Any, *, progress: bool = True) -> Result:
        """Run it.

        Args:
            model: that is analysed.
            batches: dicts of the model's keywords, or tensors.
            progress: show a bar, if it has one.

        Returns:
            What it finds.

        Raises:
            ActkitError: what the analysis raises.
        """
        shown = {"progress": progress} if "progress" in inspect.signature(self.function).parameters else {}
        return self.function(model, batches, **self.settings, **shown)


def parse_analysis(source: Any) -> Analysis:
    """Find an analysis and check its settings.

    Args:
        source: an `Analysis`, 'name', 'name:setting=value,setting=value' or {name: settings}.

    Returns:
        The analysis.

    Raises:
        RecipeError: it names an unknown analysis or setting, or a value that is out of bounds.
    """
    if isinstance(source, Analysis):
        return source
    entry = parse_call(source, "analysis") if isinstance(source, str) else source
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RecipeError(
            f"analysis: {shorten(repr(source))} was given; give its name, 'name:setting=value' or {{name: settings}}."
        )
    name, given = next(iter(entry.items()))
    function = registry.analysis_function(str(name))
    settings = settings_of(str(name), function)
    if not isinstance(given or {}, Mapping):
        raise RecipeError(f"analysis: {name}: the settings are {shorten(repr(given))}; give names and values.")
    try:
        checked = settings(**(given or {}))
    except ValidationError as error:
        raise RecipeError(f"analysis: {name}: {explain(error, settings)}") from error
    return Analysis(str(name), function, {key: getattr(checked, key) for key in checked.model_fields_set})


@cache
def settings_of(name: str, function: Callable[..., Any]) -> type[BaseModel]:
    """The settings that a function of a model and batches takes, with their defaults.

    Args:
        name: of the analysis, for errors.
        function: whose annotations say what each may be.

    Raises:
        RecipeError: its annotations cannot be read, or it takes no model and batches.
    """
    try:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    except (NameError, TypeError, ValueError) as error:
        raise RecipeError(f"analysis: {name} is no analysis: {error}. {registry.MEND}") from error
    if len(parameters) < 2 or any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters):
        raise RecipeError(
            f"analysis: {name} is no analysis: a function of a model, batches and named settings is. {registry.MEND}"
        )
    fields = {
        each.name: (each.annotation, ... if each.default is each.empty else each.default)
        for each in parameters[2:]
        if each.name not in GIVEN and _can_be_written(each.annotation)
    }
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)  # type: ignore[call-overload, no-any-return]


def _can_be_written(annotation: Any) -> bool:
    """Whether all values of a type are plain: no functions, no data, not anything at all."""
    if get_origin(annotation) is Literal:
        return True
    parts = get_args(annotation)
    if not parts:
        return annotation in PLAIN
    return get_origin(annotation) is not Callable and all(_can_be_written(part) for part in parts)
