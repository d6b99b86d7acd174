"""The course of the learning rate, as recipes and the command line name it.

    schedule: cosine                                              falls to 0; or linear, or constant
    schedule: wsdc:stable=0.6,decay=0.2,min_ratio=0.1             warm-up, stable, decay, constant
    schedule: {wsdc: {stable: 0.6, decay: 0.2, shape: 1-sqrt}}    the same in YAML and Python

All begin with the training's warm-up. WSDC is that of `sparsity/plm`: the peak for `stable` of the steps, then a fall
to `min_ratio` of it within `decay` of the steps, and that for what remains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

from actkit.core.ground.errors import RecipeError
from actkit.core.ground.yaml_files import parse_call, shorten

Shape = Literal["linear", "cosine", "1-sqrt"]
FALLS = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "1-sqrt": lambda share: 1 - math.sqrt(share),
}


@dataclass(frozen=True)
class Wsdc:
    """Behind the warm-up: stable, decay, constant.

    Attributes:
        stable: share of the steps at the peak.
        decay: share of the steps in which the rate falls.
        min_ratio: to which share of the peak, where it stays.
        shape: how it falls, 'linear', 'cosine' or '1-sqrt'.

    Raises:
        ValueError: a setting is out of bounds.
    """

    stable: float = 0.6
    decay: float = 0.2
    min_ratio: float = 0.1
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        for name in ("stable", "decay", "min_ratio"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name}: {shorten(repr(value))} was given, allowed is a share, 0 to 1.")
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape: {self.shape!r} was given, allowed are {', '.join(get_args(Shape))}.")

    def ratio(self, since: float) -> float:
        """Return the share of the peak.

        Args:
            since: share of the steps that went by since the warm-up.
        """
        if since < self.stable:
            return 1.0
        fallen = (since - self.stable) / self.decay if since < self.stable + self.decay else 1.0
        return self.min_ratio + (1 - self.min_ratio) * FALLS[self.shape](fallen)


@dataclass(frozen=True)
class ScheduleSettings:
    """A course by its name.

    Attributes:
        name: 'cosine', 'linear', 'constant' or 'wsdc'.
        options: of 'wsdc', as in `Wsdc`.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("cosine", "linear", "constant", "wsdc")

    name: str = "cosine"
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
        given = parse_call(source, "schedule") if isinstance(source, str) else source
        if not isinstance(given, Mapping) or len(given) != 1:
            raise RecipeError(
                f"schedule: {shorten(repr(source))} was given; give a name, 'wsdc:stable=0.6,decay=0.2' or "
                f"{{wsdc: {{stable: 0.6}}}}."
            )
        name, options = next(iter(given.items()))
        options = options or {}
        if name not in cls.NAMES:
            raise RecipeError(f"schedule: {shorten(repr(name))} was given, allowed is {', '.join(cls.NAMES)}.")
        known = tuple(Wsdc.__dataclass_fields__) if name == "wsdc" else ()
        for option in options:
            if option not in known:
                allowed = f"allowed are {', '.join(known)}" if known else "it has none"
                raise RecipeError(f"schedule: {name}: {option!r} is no option of it; {allowed}.")
        if name == "wsdc":
            try:
                Wsdc(**options)
            except ValueError as error:
                raise RecipeError(f"schedule: wsdc: {error}") from error
        return cls(str(name), dict(options))

    def dump(self) -> str | dict[str, Any]:
        """What `parse` reads, as JSON and YAML hold it."""
        return {self.name: dict(self.options)} if self.options else self.name

    def ratio(self, step: int, steps: int, warmup: float) -> float:
        """Return the share of the peak in a step, counted from 0.

        Args:
            step: which one.
            steps: of the training.
            warmup: share of the steps in which the rate rises.
        """
        rising = round(warmup * steps)
        if step < rising:
            return (step + 1) / rising
        if self.name == "constant":
            return 1.0
        if self.name == "wsdc":
            return Wsdc(**self.options).ratio((step - rising) / steps)
        return FALLS[self.name]((step - rising) / (steps - rising))
