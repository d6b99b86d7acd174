"""A mix for a limit on the loss: which options places have, which are chosen, and the recipe that makes them.

Damage says how far a model's outputs move, and the limit is on what it loses on text: a selection of inputs moves them
and costs little, rounding loses what it moves. So each ingredient has the factor between the two that was measured with
it in the whole model. What mixes lose beyond the sum of that, as their parts act together, is the factor of the mixing:
1 at first, and that of the newest mix afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.scope import Scope
from actkit.search.measured import Candidate
from actkit.search.mixing.choice import Option, choose
from actkit.search.mixing.ingredients import Ingredient, LayerBytes, Place
from actkit.search.mixing.times import TimeModel
from actkit.search.results import Proposal

AS_IT_IS = "as it is"
KNOWN = 2.0  # the largest loss that says what a setting costs in a few layers
FACTORS = (0.25, 8.0)  # factors are kept between these: a loss of a few thousandths is mostly noise

HALVINGS = 12  # of the limit, in search of the least loss for a speedup

Aim = Literal["time", "bytes"]
Part = tuple[Ingredient, ...]  # of a place: a way to store weights and a selection, or one of them, or none


def name_of(part: Part) -> str:
    """Return the name of what a place has, such as 'wina 25% over rtn 8 bit'."""
    return " over ".join(each.name for each in reversed(part)) or AS_IT_IS


@dataclass(frozen=True)
class Mix:
    """One choice of options.

    Attributes:
        name: of the candidate.
        options: by place, names.
        nats: that its parts are expected to lose.
        loss: that is expected of it.
        seconds: per token that are expected.
        share: of the weights of all places, by ingredient.
    """

    name: str
    options: tuple[str, ...]
    nats: float
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
        factor: nats that a mix loses for each that its parts are expected to.
        mixes: that were tried.
        notes: why there are no more, and what was not timed.
    """

    places: tuple[Place, ...]
    ingredients: tuple[Ingredient, ...]
    original: Mapping[str, LayerBytes]
    rest: Mapping[str, float]
    times: TimeModel
    factor: float = 1.0
    mixes: tuple[Mix, ...] = ()
    notes: tuple[str, ...] = ()

    def noted(self, note: str) -> Mixing:
        """Return the same with one more note."""
        return replace(self, notes=(*self.notes, note))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return {
            "places": [{"block": each.block, "roles": list(each.roles)} for each in self.places],
            "damage": {each.name: self.damage_of(each.name) for each in self.ingredients},
            "factors": {each.name: each.factor for each in self.ingredients},
            "times": self.times.to_dict(),
            "factor": self.factor,
            "mixes": [each.to_dict() for each in self.mixes],
            "notes": list(self.notes),
        }

    def damage_of(self, name: str) -> list[float]:
        """Return the damage of an ingredient at each place, nats per token.

        Args:
            name: of the ingredient.
        """
        found = next(each for each in self.ingredients if each.name == name)
        return [sum(found.damage.get(path, 0.0) for path in place.paths) for place in self.places]

    def mix(
        self, name: str, limit: float, aim: Aim = "time", enough: float | None = None
    ) -> tuple[Mix, Proposal] | None:
        """Make the mix that costs least within a limit on the loss.

        Args:
            name: of the candidate.
            limit: on the expected loss.
            aim: what it shall have least of: time per token, or stored bytes.
            enough: the speedup from which the loss is made smaller instead; None for the most.

        Returns:
            The mix and what to try; None if nothing changes.
        """
        nats = math.log1p(limit) / self.factor
        parts = self.parts(nats, aim)
        if enough is not None:
            most = self.times.seconds(self._reads([()] * len(self.places))) / enough
            low = 0.0
            for _ in range(HALVINGS):
                milder = self.parts((low + nats) / 2, aim)
                if self.times.seconds(self._reads(milder)) <= most:
                    nats, parts = (low + nats) / 2, milder
                else:
                    low = (low + nats) / 2
        weights: dict[str, float] = {}
        reads = self._reads(parts)
        whole = sum(each.stored for each in self.original.values())
        for place, part in zip(self.places, parts, strict=True):
            for ingredient in part:
                own = sum(self.original[path].stored for path in place.paths)
                weights[ingredient.name] = weights.get(ingredient.name, 0.0) + own / whole
        if not weights:
            return None
        nats = sum(each.loss(place.paths) for place, part in zip(self.places, parts, strict=True) for each in part)
        loss = math.expm1(self.factor * nats)
        found = Mix(name, tuple(map(name_of, parts)), nats, loss, self.times.seconds(reads), weights)
        listed = ", ".join(f"{each} {share:.0%}" for each, share in sorted(weights.items(), key=lambda x: -x[1]))
        why = f"each part has what it can stand (share of the weights: {listed}); expected loss {loss:.1%}"
        return found, Proposal(name, self._recipe(parts), why)

    def _reads(self, parts: Sequence[Part]) -> dict[str, float]:
        """Bytes per token by kind of kernel."""
        found = dict(self.rest)
        for place, part in zip(self.places, parts, strict=True):
            for path in place.paths:
                taken = self.taken(path, part)
                found[taken.kind] = found.get(taken.kind, 0.0) + taken.read
        return found

    def parts(self, limit: float, aim: Aim = "time") -> list[Part]:
        """Return what costs least within a limit, by place.

        Args:
            limit: on the nats that the parts are expected to lose.
            aim: what it shall have least of.
        """
        table = [self._options(place, aim) for place in self.places]
        chosen = choose([list(options) for options in table], limit)
        return [options[option] for options, option in zip(table, chosen, strict=True)]

    def _options(self, place: Place, aim: Aim) -> dict[Option, Part]:
        """What a place may have: a storage or none, a selection or none."""
        fitting = [each for each in self.ingredients if all(path in each.damage for path in place.paths)]
        storages = [None, *(each for each in fitting if each.slot == "weight")]
        selections = [None, *(each for each in fitting if each.slot == "select")]
        found = {}
        for storage in storages:
            for selection in selections:
                part = tuple(each for each in (storage, selection) if each is not None)
                damage = sum(each.loss(place.paths) for each in part)
                taken = [self.taken(path, part) for path in place.paths]
                if aim == "time":
                    cost = sum(self.times.rate(each.kind) * each.read for each in taken)
                else:
                    cost = sum(each.stored for each in taken)
                found[Option(name_of(part), damage, cost)] = part
        return found

    def taken(self, path: str, part: Part) -> LayerBytes:
        """Return what a layer takes with some ingredients.

        Args:
            path: of the layer.
            part: the ingredients.
        """
        taken = self.original[path]
        for ingredient in part:
            mine = ingredient.layers[path]
            taken = mine if ingredient.slot == "weight" else taken.under(mine, self.original[path])
        return taken

    def _recipe(self, parts: Sequence[Part]) -> Recipe:
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
        """Return the nats that a candidate is expected to lose that has the same ingredients everywhere; else None."""
        known = {repr(Recipe([each.transform]).dump()["transforms"][0]): each for each in self.ingredients}
        found = [known.get(repr(entry)) for entry in candidate.recipe]
        if not found or any(each is None for each in found):
            return None
        return sum(each.factor * each.total for each in found if each is not None)


def with_factors(ingredients: Sequence[Ingredient], candidates: Sequence[Candidate]) -> tuple[Ingredient, ...]:
    """Return ingredients with the factors that their whole-model candidates show; 1 if none does.

    Args:
        ingredients: with damage.
        candidates: that were measured.
    """
    losses = {each.name: each.search_loss for each in candidates}
    found = []
    for ingredient in ingredients:
        loss = losses.get(ingredient.name)
        known = loss is not None and loss.value <= KNOWN and ingredient.total > 0
        factor = math.log1p(max(loss.value, 0.0)) / ingredient.total if known and loss is not None else 1.0
        found.append(replace(ingredient, factor=_within(factor)))
    return tuple(found)


def next_factor(mix: Mix, candidate: Candidate, factor: float) -> float:
    """Return the factor that a measured mix shows.

    Args:
        mix: as it was expected.
        candidate: as it was measured.
        factor: that it was made with; it stays if the loss says nothing.
    """
    loss = candidate.search_loss
    if loss is None or not mix.nats:
        return factor
    return _within(math.log1p(max(loss.value, 0.0)) / mix.nats)


def _within(factor: float) -> float:
    return min(max(factor, FACTORS[0]), FACTORS[1])
