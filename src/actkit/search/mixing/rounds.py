"""The rounds of mixing: what is measured first, which mixes are tried, and what each teaches the next.

ingredients -> damage of every layer -> seconds per token of every kind of kernel -> a mix at 0.6 of the limit,
measured like every candidate -> the factor and the width of its interval -> a mix that just stays within the limit
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actkit.core.measure.cost import measure_cost
from actkit.core.model.anatomy import Anatomy
from actkit.core.recipe.proposals import LeftOut
from actkit.core.recipe.recipe import Recipe
from actkit.core.watch.damage import layer_damage
from actkit.search.budget import Budget
from actkit.search.journal import Journal
from actkit.search.measured import Candidate
from actkit.search.mixing.ingredients import (
    SPARSE,
    Ingredient,
    is_ingredient,
    layer_bytes,
    places_of,
    reads_of,
)
from actkit.search.mixing.mixing import Aim, Mixing, next_factor, with_factors
from actkit.search.mixing.times import Timed, fit
from actkit.search.results import Proposal
from actkit.search.workshop import Workshop, recipe_key

FIRST = 0.6  # of the limit, what the first mix may lose
ENOUGH = 1.08  # times the speedup that is asked for: the lower bound has to reach it
MARGIN = 1.5  # of half the interval that the last mix had, kept below the limit
CLOSE = 0.1  # two limits that differ by less give the same mix
BATCHES = 2  # of the search split, for the damage
PROBES = 3  # settings timed for their kernels alone

Measure = Callable[[Sequence[Proposal]], tuple[list[Candidate], list[LeftOut]]]
Time = Callable[[Candidate, Sequence[Candidate]], Iterator[tuple[Candidate, dict[str, Any]]]]


@dataclass
class Rounds:
    """Tries mixes, as far as the minutes go.

    Attributes:
        shop: makes and measures.
        journal: keeps what was measured.
        budget: of time.
        measure: some proposals, as candidates.
        time: some candidates in turns with the original.
    """

    shop: Workshop
    journal: Journal
    budget: Budget
    measure: Measure
    time: Time

    def prepare(
        self,
        view: Anatomy,
        proposals: Sequence[Proposal],
        original: Candidate,
        candidates: Sequence[Candidate],
    ) -> Mixing | str:
        """Measure what mixes rest on.

        Args:
            view: of the model.
            proposals: that were tried.
            original: as it was measured.
            candidates: the same, of the proposals.

        Returns:
            What mixes are made of, or why there are none.
        """
        places = tuple(places_of(view))
        chosen = [each for each in proposals if is_ingredient(each.recipe)]
        if len(chosen) < 2 or not places:
            return "fewer than two settings can be limited to some layers"
        paths = [path for place in places for path in place.paths]
        ingredients = with_factors(self._ingredients(chosen, paths), candidates)
        cost = measure_cost(self.shop.model, self.shop.splits.test[:1], progress=False)
        whole, rest = layer_bytes(self.shop.model, cost, paths), reads_of(self.shop.model, cost)
        for taken in whole.values():
            rest[taken.kind] -= taken.read
        timed = self._timed(original, candidates, ingredients)
        if not timed:
            return "no speed was measured, so nothing says what a layer costs"
        found = Mixing(places, ingredients, whole, rest, fit(timed))
        storages = {taken.kind for x in ingredients if x.slot == "weight" for taken in x.layers.values()}
        kinds = storages | {kind + SPARSE for kind in storages if any(x.slot == "select" for x in ingredients)}
        unknown = sorted(kinds - found.times.rates.keys())
        note = f"not timed, so taken at the original's time per byte: {'; '.join(unknown)}"
        return replace(found, notes=(note,)) if unknown else found

    def run(
        self, mixing: Mixing, count: int, limit: float, aim: Aim, min_speedup: float | None = None
    ) -> tuple[Mixing, list[Candidate], list[LeftOut]]:
        """Try so many mixes.

        Args:
            mixing: what `prepare` gave.
            count: how many at most.
            limit: on the loss, which the upper bound of its interval may reach.
            aim: what they shall have least of.
            min_speedup: that is enough; what it does not need of the limit is not lost. None for the most.

        Returns:
            The same with its mixes, these as candidates, and what the minutes did not pay for.
        """
        found: list[Candidate] = []
        left: list[LeftOut] = []
        seen: set[str] = set()
        share = FIRST * limit
        for number in range(1, count + 1):
            made = mixing.mix(f"mixed {number}", share, aim, None if min_speedup is None else ENOUGH * min_speedup)
            if made is None:
                mixing = mixing.noted("no setting stays within the limit at any place")
                break
            mix, proposal = made
            key = recipe_key(proposal.recipe)
            if key in seen:
                mixing = mixing.noted("another round would repeat a mix")
                break
            seen.add(key)
            measured, unpaid = self.measure([proposal])
            left += unpaid
            if not measured:
                break
            candidate = measured[0]
            found.append(candidate)
            factor = next_factor(mix, candidate, mixing.factor)
            mixing = replace(mixing, mixes=(*mixing.mixes, mix), factor=factor)
            loss = candidate.search_loss
            if candidate.failed is not None or loss is None:
                break
            wide = min(max(loss.high - loss.value, 0.0), limit)
            following = max(limit - MARGIN * wide, 0.3 * limit)
            if abs(following / max(loss.value, 1e-9) - 1) < CLOSE and candidate.stopped is None:
                mixing = mixing.noted(f"{candidate.name} is as close to the limit as its interval allows")
                break
            share = following
        return mixing, found, left

    def _ingredients(self, proposals: Sequence[Proposal], paths: Sequence[str]) -> list[Ingredient]:
        """What each setting makes of the layers at the places. Layers of experts stand in none."""
        keys = [recipe_key(each.recipe) for each in proposals]
        for entry in self.journal.find("ingredients"):
            if entry["keys"] == keys:
                return [Ingredient.from_dict(each) for each in entry["ingredients"]]
        samples = [sample for sample in map(self.shop.sample, proposals) if sample is not None]
        damage = layer_damage(
            self.shop.model,
            {s.ingredient.name: {path: s.modules[path] for path in paths if path in s.modules} for s in samples},
            self.shop.splits.search[:BATCHES],
            seed=self.shop.seed,
            progress=self.shop.progress,
        )
        self.shop.samples.clear()
        found = [replace(each.ingredient, damage=damage[each.ingredient.name]) for each in samples]
        self.journal.add("ingredients", keys=keys, ingredients=[each.to_dict() for each in found])
        return found

    def _timed(
        self, original: Candidate, candidates: Sequence[Candidate], ingredients: Sequence[Ingredient]
    ) -> list[Timed]:
        """What was timed, and what has to be for the kinds of kernels that nothing was timed of; the original first."""
        ratios: list[tuple[str, dict[str, float], float]] = []
        for each in candidates:
            engines = [speed.engine for speed in (each.speed, original.speed) if speed is not None]
            if each.ratio is not None and each.reads and len(engines) == 2 and engines[0] == engines[1]:
                ratios.append((each.name, each.reads, each.ratio.value))
        known = {kind for _, reads, _ in ratios for kind in reads} | set(original.reads)
        probes = self._probes(ingredients, known)
        entries = {entry["key"]: entry for entry in self.journal.find("probe")}
        waiting = [each for each in probes if recipe_key(each.recipe) not in entries]
        if waiting and self.budget.over(self.budget.speeds(len(waiting)), "timing kernels") is None:
            made = [self.shop.probe(each) for each in waiting]
            for candidate, content in self.time(original, made):
                key = recipe_key(candidate.methods)
                self.journal.add("probe", key=key, name=candidate.name, reads=candidate.reads, **content)
        found = [entry for entry in self.journal.find("probe") if entry["speed"] is not None]
        ratios += [(entry["name"], entry["reads"], entry["speed"]["ratio"]["value"]) for entry in found]
        if original.speed is not None:
            rate = original.speed.rate.value
        elif found:
            rate = found[0]["original"]["rate"]["value"]
        else:
            return []
        return [Timed("original", original.reads, 1 / rate), *(Timed(n, reads, 1 / rate / x) for n, reads, x in ratios)]

    def _probes(self, ingredients: Sequence[Ingredient], known: set[str]) -> list[Proposal]:
        """Settings of the whole model whose kernels were not timed; those that need no data first."""
        storages = sorted((x for x in ingredients if x.slot == "weight"), key=lambda x: x.transform.needs_data)
        selections = [x for x in ingredients if x.slot == "select"]
        found: list[Proposal] = []
        for storage in storages:
            kind = next(iter(storage.layers.values())).kind
            if kind not in known:
                found.append(Proposal(f"probe {storage.name}", Recipe([storage.transform]), "its kernel"))
                known = known | {kind}
            if selections and kind + SPARSE not in known:
                stack = Recipe([storage.transform, selections[-1].transform])
                name = f"probe {selections[-1].name} over {storage.name}"
                found.append(Proposal(name, stack, "its kernel"))
                known = known | {kind + SPARSE}
        return found[:PROBES]
