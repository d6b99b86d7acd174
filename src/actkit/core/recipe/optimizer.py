"""What a training is driven by, as recipes and the command line name it: the optimizer, and the score of the best step.

    optimizer: adamw                                   a class of torch.optim, in small letters
    optimizer: sgd:momentum=0.9,nesterov=true          with its options
    optimizer: {sgd: {momentum: 0.9}}                  the same in YAML and Python
    score: accuracy:better=higher                      a metric of the model's task

What builds them is `core/train/optimizers.py` and `core/train/score.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import torch

from actkit.core.ground.errors import RecipeError
from actkit.core.ground.yaml_files import parse_call, shorten

# Those whose step needs no closure and whose gradients may be dense.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): found
    for name, found in vars(torch.optim).items()
    if isinstance(found, type)
    and issubclass(found, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
}
ELSEWHERE = {"lr": "learning_rate=", "weight_decay": "weight_decay="}  # options that a training has an argument for
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer of torch by its name.

    Attributes:
        name: of a class of torch.optim, in small letters.
        options: its keywords but for lr and weight_decay, which are those of the training.
    """

    name: str = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, source: Any) -> Self:
        """Read the settings from 'name', 'name:option=value' or {name: options}.

        Args:
            source: one of these, or settings.

        Raises:
            RecipeError: the name or an option is unknown, or the source is something else.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, str):
            source = parse_call(source, "optimizer")
        if not isinstance(source, Mapping) or len(source) != 1:
            raise RecipeError(
                f"optimizer: {shorten(repr(source))} was given; give a name, 'name:option=value' or "
                f"{{name: {{option: value}}}}."
            )
        name, options = next(iter(source.items()))
        if name not in OPTIMIZERS:
            raise RecipeError(
                f"optimizer: {shorten(repr(name))} is not known; allowed are {', '.join(sorted(OPTIMIZERS))}, or in "
                f"Python a function that makes one of parameter groups."
            )
        allowed = set(inspect.signature(OPTIMIZERS[name]).parameters) - {"params", *ELSEWHERE}
        for option in options or {}:
            if option in ELSEWHERE:
                raise RecipeError(f"optimizer: {name}: {option} is a setting of the training; give {ELSEWHERE[option]}")
            if option not in allowed:
                known = ", ".join(sorted(allowed))
                raise RecipeError(f"optimizer: {name}: {option!r} is no option of it; allowed are {known}.")
        return cls(name, {option: _plain(value) for option, value in (options or {}).items()})

    def dump(self) -> str | dict[str, Any]:
        """What `parse` reads, as JSON and YAML hold it."""
        return {self.name: dict(self.options)} if self.options else self.name


@dataclass(frozen=True)
class ScoreSettings:
    """A metric by its name, such as 'accuracy' or 'perplexity', that says which step is the best.

    Attributes:
        name: a metric of the model's task, as `actkit.evaluate` shows it.
        better: whether a lower or a higher one is better.
    """

    name: str
    better: Better

    @classmethod
    def parse(cls, source: Any) -> Self:
        """Read the settings from 'accuracy:better=higher' or {'accuracy': {'better': 'higher'}}.

        Args:
            source: one of these, or settings.

        Raises:
            RecipeError: there is no direction, or the source is something else.
        """
        if isinstance(source, cls):
            return source
        given = parse_call(source, "score") if isinstance(source, str) else source
        name, options = next(iter(given.items()), ("", {})) if isinstance(given, Mapping) else ("", {})
        better = options.get("better") if isinstance(options, Mapping) and set(options) == {"better"} else None
        if not name or better not in get_args(Better):
            raise RecipeError(
                f"score: {shorten(repr(source))} was given; write a metric and which is better, such as "
                f"'accuracy:better=higher' or 'perplexity:better=lower'."
            )
        return cls(str(name), better)  # type: ignore[arg-type]

    def dump(self) -> dict[str, Any]:
        """What `parse` reads, as JSON and YAML hold it."""
        return {self.name: {"better": self.better}}


def _plain(value: Any) -> Any:
    """A value as JSON keeps it. YAML takes 1e-4, without a point, for a text."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
