"""What the best step of a training is judged by, if not by its validation loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.optimizer import Better, ScoreSettings


@dataclass(frozen=True)
class Score:
    """A number by which one step is better than another.

    Attributes:
        measure: of (model in evaluation mode without gradients, validation batches).
        better: whether a lower or a higher number is better.
        name: for the record of a training.
    """

    measure: Callable[[nn.Module, Sequence[Any]], float]
    better: Better
    name: str = ""

    def __post_init__(self) -> None:
        if self.better not in get_args(Better):
            raise ValueError(f"score: better={self.better!r} was given, allowed are {', '.join(get_args(Better))}.")

    @classmethod
    def of(cls, given: Score | ScoreSettings | str | Mapping[str, Any]) -> Score:
        """A score from a metric's name and direction, or itself.

        Args:
            given: 'accuracy:better=higher', {'accuracy': {'better': 'higher'}}, or a score.

        Raises:
            RecipeError: what `ScoreSettings.parse` raises, for a bare function too.
        """
        if isinstance(given, cls):
            return given
        settings = ScoreSettings.parse(given)

        def measure(model: nn.Module, batches: Sequence[Any]) -> float:
            metrics = measure_quality(model, batches, progress=False, resamples=1).metrics
            if settings.name not in metrics:
                raise ValueError(
                    f"score: {settings.name!r} is no metric of this model; allowed are {', '.join(metrics)}, or a "
                    f"Score with a function of your own."
                )
            return metrics[settings.name].value

        return cls(measure, settings.better, settings.name)

    def describe(self) -> dict[str, Any]:
        """What must be the same when a training is resumed, as JSON keeps it."""
        name = self.name or f"{self.measure.__module__}.{getattr(self.measure, '__qualname__', '')}"
        return {name: {"better": self.better}}
