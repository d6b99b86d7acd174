"""A mix for a limit on the loss: which options places have, which are chosen, and the recipe that makes them.

What the sum of damages says is held beside what was measured: `factor` is how many nats a model really lost for each
that was added up. It begins with the whole-model settings that the search measured, and is that of the newest mix
afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.scope import Scope
from actkit.search.measured import Candidate
from actkit.search.mixing.choice import Option, choose
from actkit.search.mixing.ingredients import Ingredient, LayerBytes, Place
from actkit.search.mixing.times import TimeModel
from actkit.search.results import Proposal

AS_IT_IS = "as it is"
KNOWN = (0.002, 0.5)  # losses between which a factor means something
FACTORS = (0.25, 8.0)  # it is kept between these

Aim = Literal["time", "bytes"]


@dataclass(frozen=True)
class Mix:
    """One choice of options.

    Attributes:
        name: of the candidate.
        options: by place, names.
        damage: their sum, nats per token.
        loss: that is expected of it.
        seconds: per token that are expected.
        share: of the weights of all places, by ingredient.
    """

    name: str
    options: tuple[str, ...]
    damage: float
    loss: float
    seconds: float
    share: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return {**vars(self), "options": list(self.options), "share": dict(self.share)}


@dataclass(frozen=True)
class Mixing:
    """What the search knows for its mixes.

    Attributes:
        places: of the model.
        ingredients: with their damage.
        original: what the layers of the model take, by path.
        rest: bytes per token that everything else reads, by kind of kernel.
        times: the model of time.
        factor: nats that are lost for each of the damage.
        mixes: that were tried.
        notes: why there are no more.
    """

    places: tuple[Place, ...]
    ingredients: tuple[Ingredient, ...]
    original: Mapping[str, LayerBytes]
    rest: Mapping[str, float]
    times: TimeModel
    factor: float = 1.0
    mixes: tuple[Mix, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return {
            "places": [{"block": each.block, "roles": list(each.roles)} for each in self.places],
            "damage": {
                each.name: [sum(each.damage.get(path, 0.0) for path in place.paths) for place in self.places]
                for each in self.ingredients
            },
            "times": self.times.to_dict(),
            "factor": self.factor,
            "mixes": [each.to_dict() for each in self.mixes],
            "notes": list(self.notes),
        }

    def mix(self, name: str, limit: float, aim: Aim = "time") -> tuple[Mix, Proposal] | None:
        """Make the mix that costs least within a limit on the loss.

        Args:
            name: of the candidate.
            limit: on the expected loss.
            aim: what it shall have least of: time per token, or stored bytes.

        Returns:
            The mix and what to try; None if nothing changes.
        """
        table = [self._options(place, aim) for place in self.places]
        chosen = choose([[option for option, _ in options] for options in table], math.log1p(limit) / self.factor)
        parts = [dict(options)[option] for options, option in zip(table, chosen, strict=True)]
        weights: dict[str, float] = {}
        reads = dict(self.rest)
        whole = sum(each.stored for each in self.original.values())
        for place, part in zip(self.places, parts, strict=True):
            for ingredient in part:
                own = sum(self.original[path].stored for path in place.paths)
                weights[ingredient.name] = weights.get(ingredient.name, 0.0) + own / whole
            for path in place.paths:
                taken = self._taken(path, part)
                reads[taken.kind] = reads.get(taken.kind, 0.0) + taken.read
        if not weights:
            return None
        damage = sum(option.damage for option in chosen)
        loss = math.expm1(self.factor * damage)
        found = Mix(name, tuple(x.name for x in chosen), damage, loss, self.times.seconds(reads), weights)
        listed = ", ".join(f"{each} {share:.0%}" for each, share in sorted(weights.items(), key=lambda x: -x[1]))
        why = f"each part has what it can stand (share of the weights: {listed}); expected loss {loss:.1%}"
        return found, Proposal(name, self._recipe(parts), why)

    def _options(self, place: Place, aim: Aim) -> list[tuple[Option, tuple[Ingredient, ...]]]:
        """What a place may have: a storage or none, a selection or none."""
        fitting = [each for each in self.ingredients if all(path in each.damage for path in place.paths)]
        storages = [None, *(each for each in fitting if each.slot == "weight")]
        selections = [None, *(each for each in fitting if each.slot == "select")]
        found = []
        for storage in storages:
            for selection in selections:
                part = tuple(each for each in (storage, selection) if each is not None)
                name = " over ".join(each.name for each in reversed(part)) or AS_IT_IS
                damage = sum(each.damage[path] for each in part for path in place.paths)
                taken = [self._taken(path, part) for path in place.paths]
                if aim == "time":
                    cost = sum(self.times.rate(each.kind) * each.read for each in taken)
                else:
                    cost = sum(each.stored for each in taken)
                found.append((Option(name, damage, cost), part))
        return found

    def _taken(self, path: str, part: Sequence[Ingredient]) -> LayerBytes:
        taken = self.original[path]
        for ingredient in part:
            mine = ingredient.layers[path]
            taken = mine if ingredient.slot == "weight" else taken.under(mine, self.original[path])
        return taken

    def _recipe(self, parts: Sequence[Sequence[Ingredient]]) -> Recipe:
        """One transform per ingredient, limited to its places; storages before selections."""
        transforms = []
        for ingredient in sorted(self.ingredients, key=lambda each: each.slot != "weight"):
            places = [place for place, part in zip(self.places, parts, strict=True) if ingredient in part]
            if places:
                only = Scope.of((role, place.block) for place in places for role in place.roles)
                settings = {**ingredient.transform.model_dump(), "only": only}
                transforms.append(type(ingredient.transform)(**settings))
        return Recipe(transforms)

    def expected(self, candidate: Candidate) -> float | None:
        """Return the sum of damages of a candidate that has the same ingredients everywhere; None for any other."""
        known = {Recipe([each.transform]).dump()["transforms"][0].__repr__(): each for each in self.ingredients}
        found = [known.get(repr(entry)) for entry in candidate.recipe]
        if not found or any(each is None for each in found):
            return None
        return sum(each.total for each in found if each is not None)


def first_factor(mixing: Mixing, candidates: Sequence[Candidate]) -> float:
    """Return how many nats whole-model settings lost for each that was added up: the median, 1 if none tells.

    Args:
        mixing: with ingredients.
        candidates: that were measured.
    """
    found = []
    for candidate in candidates:
        expected, loss = mixing.expected(candidate), candidate.search_loss
        if expected and loss is not None and KNOWN[0] <= loss.value <= KNOWN[1]:
            found.append(math.log1p(loss.value) / expected)
    return _within(median(found)) if found else 1.0


def next_factor(mix: Mix, candidate: Candidate, factor: float) -> float:
    """Return the factor that a measured mix shows.

    Args:
        mix: as it was expected.
        candidate: as it was measured.
        factor: that it was made with; it stays if the loss is too small to tell.
    """
    loss = candidate.search_loss
    if loss is None or not mix.damage or loss.value < KNOWN[0]:
        return factor
    return _within(math.log1p(loss.value) / mix.damage)


def _within(factor: float) -> float:
    return min(max(factor, FACTORS[0]), FACTORS[1])
