"""The recipe: how methods are listed, checked, stacked and staged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from actkit.core.ground import registry
from actkit.core.ground.errors import ActkitError, RecipeError
from actkit.core.ground.whole_file import write_whole
from actkit.core.ground.yaml_files import explain, read_yaml, shorten
from actkit.core.recipe.stage import Apply, Stage, Train, grouped
from actkit.core.recipe.transform import Transform

RECIPE_VERSION = 1


class Recipe:
    """An ordered list of transforms with their settings; YAML on disk.

    actkit: 1
    transforms:
      - awq: {bits: 4, group_size: 64}
      - wina: {sparsity: 0.5}

    With training in between it is a list of stages (`core/recipe/stage.py`), each of which works on what those before
    it left:

    actkit: 1
    stages:
      - apply: [{swap: {where: silu, new: relu}}]
      - train: {rules: [prosparse], steps: 300}
      - apply: [{fatrelu: {threshold: 0.01}}]

    Args:
        items: transforms, and stages (`Apply`, `Train`) among them; transforms that follow each other are one stage.
    """

    def __init__(self, items: Iterable[Transform | Stage]) -> None:
        self.stages = grouped(items)
        applied = [stage for stage in self.stages if isinstance(stage, Apply)]
        self.transforms = tuple(transform for stage in applied for transform in stage.transforms)

    @classmethod
    def of(cls, source: Recipe | Transform | Stage | Iterable[Any] | Mapping[str, Any] | str | Path) -> Recipe:
        """Read a recipe.

        Args:
            source: a recipe, one transform or stage, a list, a mapping in the YAML form, a YAML file, or 'awq,wina'.

        Raises:
            RecipeError: it names an unknown method or setting, or a value out of bounds.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Transform | Apply | Train):
            return cls([source])
        if isinstance(source, Mapping):
            return cls.parse(source)
        if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml"))):
            return cls.load(source)
        if isinstance(source, str):
            if ":" in source:
                raise RecipeError(
                    f"recipe: {source!r} holds settings, and names like 'awq,wina' have none; write them into a YAML "
                    f"file, such as `- cfsp: {{uniform: true}}` under `transforms:`."
                )
            return cls.parse({"actkit": RECIPE_VERSION, "transforms": [name.strip() for name in source.split(",")]})
        if not isinstance(source, Iterable):
            raise RecipeError(
                f"recipe: a {type(source).__name__} was given; give transforms, names as 'awq,wina', or a YAML file."
            )
        items = list(source)
        for item in items:
            if not isinstance(item, Transform | Apply | Train):
                raise RecipeError(
                    f"recipe: {type(item).__name__} was given in the list, allowed are transforms and stages; a "
                    f"training rule goes into a stage: Train(rules=[...], steps=...)."
                )
        return cls(items)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file.

        Args:
            path: of the file.

        Raises:
            RecipeError: it is missing or malformed, or holds tags or anchors.
        """
        return cls.parse(read_yaml(Path(path), "recipe"))

    @classmethod
    def parse(cls, content: Any) -> Recipe:
        """A recipe from the content of its YAML form."""
        kinds = [key for key in ("transforms", "stages") if isinstance(content, Mapping) and key in content]
        if len(kinds) != 1 or not isinstance(content[kinds[0]], list):
            raise RecipeError(
                "recipe: expected the keys `actkit: 1` and `transforms:` with a list of methods, or `stages:` with a "
                "list of `apply:` and `train:`."
            )
        extra = set(content) - {"actkit", *kinds}
        if extra:
            raise RecipeError(
                f"recipe: unknown key {shorten(', '.join(sorted(map(str, extra))))}; allowed are actkit and {kinds[0]}."
            )
        if content.get("actkit") != RECIPE_VERSION:
            raise RecipeError(
                f"recipe: version {shorten(repr(content.get('actkit')))} was given, this actkit reads `actkit: "
                f"{RECIPE_VERSION}`."
            )
        if kinds == ["transforms"]:
            return cls([_transform(entry) for entry in content["transforms"]])
        return cls([_stage(number, entry) for number, entry in enumerate(content["stages"], 1)])

    @property
    def staged(self) -> bool:
        """Whether it is more than one list of transforms: it trains, or applies several times."""
        return len(self.stages) > 1 or any(isinstance(stage, Train) for stage in self.stages)

    def unstaged(self, what: str) -> Recipe:
        """Return the recipe itself, for whoever runs one list of transforms only.

        Args:
            what: who that is, for the error.

        Raises:
            RecipeError: it has stages.
        """
        if self.staged:
            kinds = ", ".join("train" if isinstance(stage, Train) else "apply" for stage in self.stages)
            raise RecipeError(
                f"recipe: it has stages ({kinds}), and {what} takes one list of transforms; run it with actkit.apply "
                f"(actkit apply MODEL --recipe FILE --out FOLDER)."
            )
        return self

    def entries(self) -> list[dict[str, Any]]:
        """What a model's record says of it: an entry per transform and per training, every setting written."""
        return [entry for stage in self.stages for entry in stage.entries()]

    def dump(self) -> dict[str, Any]:
        """The content of the YAML form; every setting is written, defaults too."""
        if not self.staged:
            return {"actkit": RECIPE_VERSION, "transforms": self.entries()}
        stages = [
            stage.entries()[0] if isinstance(stage, Train) else {"apply": stage.entries()} for stage in self.stages
        ]
        return {"actkit": RECIPE_VERSION, "stages": stages}

    def save(self, path: str | Path) -> Path:
        """Write the YAML form."""
        path = Path(path)
        write_whole(path, yaml.safe_dump(self.dump(), sort_keys=False))
        return path

    def check(self, earlier: Sequence[Transform] = ()) -> None:
        """Refuse an order that methods rule out.

        Args:
            earlier: transforms that are already on the model.

        Raises:
            RecipeError: a transform may not follow one before it, in the recipe or on the model.
        """
        if not self.stages or (not self.staged and not self.transforms):
            raise RecipeError("recipe: it lists no transform; give at least one.")
        for number, stage in enumerate(self.stages, 1):
            if isinstance(stage, Apply) and not stage.transforms:
                raise RecipeError(
                    f"recipe: stage {number} (apply): it lists no transform; give at least one, or leave the stage out."
                )
        before = list(earlier)
        for transform in self.transforms:
            for previous in before:
                if transform.only and previous.only and transform.only.apart(previous.only):
                    continue
                reason = transform.conflicts(previous)
                if reason:
                    raise RecipeError(f"{type(transform).__name__} cannot follow {type(previous).__name__}: {reason}.")
            before.append(transform)

    @property
    def label(self) -> str:
        """The labels of its transforms, or of its stages, for tables."""
        if self.staged:
            return ", then ".join(stage.label for stage in self.stages)
        return " + ".join(transform.label for transform in self.transforms)

    def __iter__(self):
        return iter(self.transforms)

    def __len__(self) -> int:
        return len(self.transforms)

    def __repr__(self) -> str:
        return f"Recipe({self.label})"


def transforms_of(recipe: Iterable[Mapping[str, Any]], also: Sequence[Transform] = ()) -> tuple[Transform, ...]:
    """Return the transforms of a recorded recipe.

    Args:
        recipe: the entries of a model's record, trainings among them.
        also: transforms whose classes may not be registered, and are known all the same.

    Returns:
        Those whose methods are known; a model loads without the others too.
    """
    known = []
    for entry in recipe:
        try:
            known.append(_transform(entry))
        except ActkitError:
            name, settings = next(iter(entry.items()))
            own = next((type(each) for each in also if each.name == name), None)
            known += [] if own is None else [own(**settings)]
    return tuple(known)


def _stage(number: int, entry: Any) -> Stage:
    if not isinstance(entry, Mapping) or len(entry) != 1 or next(iter(entry)) not in ("apply", "train"):
        raise RecipeError(
            f"recipe: stage {number}: {shorten(repr(entry))} was given; each stage is one of `- apply:` with a list of "
            f"methods, and `- train:` with settings such as {{steps: 300}}."
        )
    kind, content = next(iter(entry.items()))
    if kind == "train":
        return Train.parse(content, number)
    if not isinstance(content, list) or not content:
        given = "it lists no transform" if content in ([], None) else f"{shorten(repr(content))} was given"
        raise RecipeError(
            f"recipe: stage {number} (apply): {given}; give a list with at least one method, as in `- apply: [{{awq: "
            f"{{bits: 4}}}}]`, or leave the stage out."
        )
    return Apply(*map(_transform, content))


def _transform(entry: Any) -> Transform:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RecipeError(
            f"recipe: {shorten(repr(entry))} was given; each entry is one method, as in `- awq: {{bits: 4}}`."
        )
    name, settings = next(iter(entry.items()))
    cls = registry.method_class(str(name))
    if not (isinstance(cls, type) and issubclass(cls, Transform)):
        raise RecipeError(
            f"recipe: {name!r} ({registry.origin_of_method(str(name))}) is not a transform, and nothing else is "
            f"applied; a training rule goes into a stage, `- train: {{rules: [{name}], steps: 300}}`, or to "
            f"actkit.train(rules=...)."
        )
    try:
        return cls(**({} if settings is None else settings))
    except ValidationError as error:
        raise RecipeError(f"recipe: {name}: {explain(error, cls)}") from error
    except TypeError as error:
        raise RecipeError(
            f"recipe: {name}: the settings are {shorten(repr(settings))}; give a mapping of names to values."
        ) from error
