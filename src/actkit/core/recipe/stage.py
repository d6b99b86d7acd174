"""Stages of a recipe: what is applied and what is trained, one after the other, on one model.

    actkit: 1
    stages:
      - apply: [{swap: {where: silu, new: relu}}]
      - train: {rules: [prosparse], steps: 300}
      - apply: [{fatrelu: {threshold: 0.01}}]

In Python a recipe is the same list, `Recipe([Swap(where="silu", new="relu"), Train(steps=300), FatRelu()])`. It is run
by `core/train/staged_run.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from actkit.core.ground.errors import RecipeError
from actkit.core.ground.yaml_files import explain, shorten
from actkit.core.recipe.optimizer import OptimizerSettings, ScoreSettings
from actkit.core.recipe.rule import TrainingRule, dump_rules, parse_rules
from actkit.core.recipe.schedule import ScheduleSettings
from actkit.core.recipe.transform import Transform

Precision = Literal["no", "bf16", "fp16"]
Keep = Literal["best", "last"]


@dataclass(frozen=True, init=False)
class Apply:
    """A stage that applies transforms, in one walk over the model."""

    transforms: tuple[Transform, ...]

    def __init__(self, *transforms: Transform) -> None:
        object.__setattr__(self, "transforms", transforms)

    @property
    def label(self) -> str:
        """A short text for reports."""
        return "apply " + " + ".join(transform.label for transform in self.transforms)

    def entries(self) -> list[dict[str, Any]]:
        """What a model's record says of it: a mapping per transform, every setting written."""
        return [{transform.name: transform.model_dump(mode="json")} for transform in self.transforms]


class Train(BaseModel):
    """A stage that trains the model; the settings are those of `core.train.training.train`.

    Attributes:
        rules: training rules, what `parse_rules` takes.
        steps: optimizer steps; or epochs, passes over the data.
        optimizer: what `OptimizerSettings.parse` reads.
        learning_rates: other peaks for some parameters, by patterns of their names.
        trainable: patterns of the names of the parameters that train.
        schedule: of the learning rate, what `ScheduleSettings.parse` reads.
        score: of the best step, what `ScoreSettings.parse` reads.
        data: what to train on, by name: a file, a folder or 'random'. None is the data that the recipe is applied with:
            the train split of the embedded data, of a file or of a folder.
        validation: what is measured and not trained on, by name; None is the search split of the same data.
        sequences: rows to train on, None for all.
        length: tokens of a row.
        batch_size: rows of a batch.
        seed: of the order of the batches and everything random. It, `length` and `batch_size` are by default those that
            the recipe is applied with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[TrainingRule, ...] = ()
    steps: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    learning_rates: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    optimizer: Any = "adamw"
    trainable: tuple[str, ...] | None = None
    data: str | None = None
    validation: str | None = None
    sequences: int | None = Field(None, ge=1)
    length: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    warmup: float = Field(0.05, ge=0, lt=1)
    schedule: Any = "cosine"
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    max_grad_norm: float | None = Field(1.0, gt=0)
    mixed_precision: Precision = "no"
    evaluate_every: int | None = Field(None, ge=1)
    keep: Keep | None = None
    score: Any = None
    seed: int | None = Field(None, ge=0)

    @field_validator("rules", mode="before")
    @classmethod
    def _parsed(cls, rules: Any) -> Any:
        return parse_rules(rules)

    @field_validator("optimizer")
    @classmethod
    def _named(cls, optimizer: Any) -> Any:
        return OptimizerSettings.parse(optimizer).dump()

    @field_validator("schedule")
    @classmethod
    def _known(cls, schedule: Any) -> Any:
        return ScheduleSettings.parse(schedule).dump()

    @field_validator("score")
    @classmethod
    def _directed(cls, score: Any) -> Any:
        return None if score is None else ScoreSettings.parse(score).dump()

    @field_validator("trainable", mode="before")
    @classmethod
    def _several(cls, trainable: Any) -> Any:
        return (trainable,) if isinstance(trainable, str) else trainable

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _none(cls, precision: Any) -> Any:
        return "no" if precision is False else precision  # what YAML makes of a bare `no`

    @field_validator("data", "validation", mode="before")
    @classmethod
    def _by_name(cls, data: Any) -> Any:
        if not isinstance(data, str | Path | None):
            raise ValueError(
                "a stage names its data, so that the recipe can be written down; give a file, a folder or 'random', or "
                "pass batches beside the recipe: actkit.apply(model, recipe, training=batches, validation=held_out)"
            )
        return None if data is None else str(data)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps and epochs are {self.steps} and {self.epochs}; give one of the two, a whole number from 1 on"
            )
        return self

    @classmethod
    def parse(cls, settings: Any, number: int) -> Self:
        """Read a stage from its YAML form.

        Args:
            settings: its settings by name.
            number: which stage it is, for the error.

        Raises:
            RecipeError: it names the stage and the setting that is wrong.
        """
        if not isinstance(settings, Mapping):
            raise RecipeError(
                f"recipe: stage {number} (train): the settings are {shorten(repr(settings))}; give a mapping such as "
                f"{{steps: 300}}."
            )
        try:
            rules = parse_rules(settings.get("rules"))
        except RecipeError as error:
            raise RecipeError(f"recipe: stage {number} (train): {error}") from error
        try:
            return cls(**{**{str(key): value for key, value in settings.items()}, "rules": rules})
        except ValidationError as error:
            raise RecipeError(f"recipe: stage {number} (train): {explain(error, cls)}") from error

    @property
    def label(self) -> str:
        """A short text for reports."""
        given = {name: value for name, value in self.model_dump(exclude_defaults=True).items() if name != "rules"}
        under = f" under {' + '.join(rule.label for rule in self.rules)}" if self.rules else ""
        return f"train {', '.join(f'{name}={value}' for name, value in given.items())}{under}"

    def dump(self) -> dict[str, Any]:
        """The settings as YAML holds them, every one written but those that are None."""
        settings = self.model_dump(mode="json", exclude={"rules"}, exclude_none=True)
        # None is a value of its own here: gradients are never scaled down
        norm = {} if self.max_grad_norm is not None else {"max_grad_norm": None}
        return {"rules": dump_rules(self.rules), **settings, **norm}

    def entries(self) -> list[dict[str, Any]]:
        """What a model's record says of it."""
        return [{"train": self.dump()}]

    def under(self, length: int | None = None, batch_size: int | None = None, seed: int = 0, **others: Any) -> Self:
        """Itself with what it leaves open as the recipe is applied with it, so that its record says all."""
        given = {"length": length, "batch_size": batch_size, "seed": seed}
        return self.model_copy(update={name: value for name, value in given.items() if getattr(self, name) is None})

    def reading(self) -> dict[str, Any]:
        """How its data are read: the keywords of `load_data` that it sets."""
        given = {name: getattr(self, name) for name in ("sequences", "length", "batch_size", "seed")}
        return {name: value for name, value in given.items() if value is not None}

    def options(self) -> dict[str, Any]:
        """The keywords of `core.train.training.train` that it sets."""
        names = set(type(self).model_fields) - {"rules", "data", "validation", "sequences", "length", "batch_size"}
        return {**{name: getattr(self, name) for name in names}, "rules": self.rules, "seed": self.seed or 0}


Stage = Apply | Train


def grouped(items: Iterable[Transform | Stage]) -> tuple[Stage, ...]:
    """Stages from transforms and stages in order: transforms that follow each other are one stage."""
    found: list[Stage] = []
    for is_stage, group in groupby(items, key=lambda item: isinstance(item, Apply | Train)):
        several: list[Any] = list(group)
        found += several if is_stage else [Apply(*several)]
    return tuple(found)
