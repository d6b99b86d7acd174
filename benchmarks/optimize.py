"""What mixed recipes are worth: is the sum of damages right, and what does a choice by it gain over other choices?

    python benchmarks/optimize.py smollm2                    # writes results/optimize.json

On one model, from the settings that `actkit optimize` mixes (`src/actkit/search/mixing`):

1. Ranking: 30 random mixes, their loss and divergence as measured, and by four estimates: damage (one backward pass),
   damage with the factor of each setting, the squared error of the layers' outputs, and the bytes read alone.
2. Front: mixes chosen for five limits on the loss, beside the same settings in the whole model (uniform) and beside as
   30 random mixes, over the bytes that a token reads; loss is on a split that neither calibration nor damage saw.
   Hypervolume is the share of the area below LIMIT of loss and 1 of the original's bytes that a front takes in; more is
   better.
3. At equal stored bytes: each way to store weights everywhere, and the mix of all of them that takes at most as many.

A mix exchanges layers for those that a whole-model run of the setting made, without calibrating again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from actkit.core.edit.edits import get_module, set_module
from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.forward.outputs import Outputs
from actkit.core.ground.machine import machine, versions
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import widened
from actkit.core.measure.cost import measure_cost
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.watch.damage import layer_damage
from actkit.search.mixing.choice import Option, choose
from actkit.search.mixing.ingredients import Ingredient, Sample, layer_bytes, places_of, reads_of
from actkit.search.mixing.mixing import AS_IT_IS, FACTORS, Mixing
from actkit.search.mixing.times import TimeModel
from actkit.search.splits import split_data
from actkit.zoo.loading import open_model
from actkit.zoo.off_grid import off_grid_twin

RESULTS = Path(__file__).parent / "results" / "optimize.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "rtn 8 bit": {"rtn": {"bits": 8, "group_size": 64}},
    "rtn 4 bit": {"rtn": {"bits": 4, "group_size": 64}},
    "gptq 4 bit": {"gptq": {"bits": 4, "group_size": 64}},
    "gptq 3 bit": {"gptq": {"bits": 3, "group_size": 64}},
    "wina 25%": {"wina": {"sparsity": 0.25}},
    "wina 50%": {"wina": {"sparsity": 0.5}},
}
ON_A_GRID = ("smollm2", "gemma3")  # their weights were rounded before: the off-grid twin is taken
RANDOM = 30
LIMITS = (0.005, 0.01, 0.02, 0.05, 0.1)
LIMIT = 0.2  # of loss, beyond which nothing counts in the hypervolume
DAMAGE, MEASURED = 2, 3  # batches

Choice = Sequence[Sequence[Ingredient]]  # by place


def main() -> None:
    """Run it and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--random", type=int, default=RANDOM)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    bench = Bench(given.model, given.seed)
    record = bench.run(given.random)
    known = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.write_text(json.dumps({**known, given.model: record}, indent=1) + "\n")
    print(f"written: {given.out}")


class Bench:
    """One model, its ingredients, and what was measured."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        self.seconds: dict[str, float] = {}
        self.model, tokenizer = open_model(name)
        if name in ON_A_GRID:
            self.model = off_grid_twin(self.model, seed)
        self.splits = split_data(None, self.model, tokenizer, seed=seed)
        self.batches = self.splits.test[:MEASURED]
        self.changed = copy.deepcopy(self.model)  # its layers are exchanged
        self.original = Outputs(self.model, keep=1 << 28)
        self.modules: dict[str, Mapping[str, Any]] = {}
        self.errors: dict[str, dict[str, float]] = {}
        view = anatomy(self.model, self.splits.calibration[0])
        self.places = tuple(places_of(view))
        self.paths = [path for place in self.places for path in place.paths]

    def run(self, count: int) -> dict[str, Any]:
        """Measure everything."""
        mixing = self.prepare()
        uniform = self.uniform(mixing)
        mixing = self.with_factors(mixing, uniform)
        random_mixes = self.random_mixes(mixing, count)
        chosen = self.chosen(mixing)
        equal = self.at_equal_bytes(mixing, uniform)
        ranks = self.ranks(random_mixes)
        volumes = {
            "uniform": hypervolume(uniform),
            "random": hypervolume(random_mixes),
            "mixed": hypervolume(chosen),
            "uniform and random": hypervolume([*uniform, *random_mixes]),
            "uniform and mixed": hypervolume([*uniform, *chosen]),
        }
        print("rank correlations:", json.dumps(ranks, indent=1))
        print("hypervolumes:", json.dumps(volumes))
        return {
            "ranks": ranks,
            "hypervolume": volumes,
            "uniform": uniform,
            "random": random_mixes,
            "mixed": chosen,
            "equal_bytes": equal,
            "factors": {each.name: each.factor for each in mixing.ingredients},
            "seconds": self.seconds,
            "tokens": self.batches.tokens,
            "seed": self.seed,
            "machine": machine(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }

    def prepare(self) -> Mixing:
        """Make every setting of the whole model once, and measure the damage of its layers."""
        samples = []
        for name, entry in SETTINGS.items():
            started = time.perf_counter()
            recipe = Recipe.parse({"actkit": 1, "transforms": [entry]})
            changed = apply(
                self.model, recipe, self.splits.calibration, inplace=False, undo="off", progress=False
            ).model
            sample = Sample.of(name, recipe, changed, self.batches[:1])
            assert sample is not None
            samples.append(sample)
            self.modules[name] = sample.modules
            self.seconds[f"making {name}"] = time.perf_counter() - started
            print(f"{name}: {self.seconds[f'making {name}']:.0f} s", flush=True)
        started = time.perf_counter()
        data = self.splits.search[:DAMAGE]
        damage = layer_damage(self.model, self.modules, data, seed=self.seed, progress=False)
        self.seconds["damage"] = time.perf_counter() - started
        print(
            f"damage of {len(self.paths)} layers x {len(SETTINGS)} settings: {self.seconds['damage']:.0f} s", flush=True
        )
        started = time.perf_counter()
        self.errors = output_errors(self.model, self.modules, data)
        self.seconds["output errors"] = time.perf_counter() - started
        ingredients = tuple(replace(s.ingredient, damage=damage[s.ingredient.name]) for s in samples)
        cost = measure_cost(self.model, self.batches[:1], progress=False)
        original, rest = layer_bytes(self.model, cost, self.paths), reads_of(self.model, cost)
        for taken in original.values():
            rest[taken.kind] -= taken.read
        return Mixing(self.places, ingredients, original, rest, TimeModel(0.0, {}, 1.0))  # a byte is a second

    def measure(self, mixing: Mixing, name: str, parts: Choice) -> dict[str, Any]:
        """Exchange layers, and measure the loss and the divergence."""
        started = time.perf_counter()
        before = {path: get_module(self.changed, path) for path in self.paths}
        for place, part in zip(self.places, parts, strict=True):
            for path in place.paths:
                layer = before[path]
                for ingredient in part:
                    made = self.modules[ingredient.name][path]
                    layer = made if ingredient.slot == "weight" else stacked(layer, made)
                set_module(self.changed, path, layer)
        try:
            with widened(self.changed):
                quality = measure_quality(self.changed, self.batches, reference=self.original, progress=False)
        finally:
            for path, layer in before.items():
                set_module(self.changed, path, layer)
        reads, stored = dict(mixing.rest), sum(mixing.rest.values())
        estimates = {"damage": 0.0, "damage with factors": 0.0, "output error": 0.0, "bytes": 0.0}
        for place, part in zip(self.places, parts, strict=True):
            for path in place.paths:
                taken = mixing.taken(path, part)
                reads[taken.kind] = reads.get(taken.kind, 0.0) + taken.read
                stored += taken.stored
                estimates["bytes"] -= taken.read
                for ingredient in part:
                    estimates["damage"] += ingredient.damage[path]
                    estimates["damage with factors"] += ingredient.factor * ingredient.damage[path]
                    estimates["output error"] += self.errors[ingredient.name][path]
        assert quality.loss is not None
        whole = sum(mixing.rest.values()) + sum(each.read for each in mixing.original.values())
        found = {
            "name": name,
            "loss": quality.loss.value,
            "interval": [quality.loss.low, quality.loss.high],
            "kl": quality.metrics["kl"].value,
            "read": sum(reads.values()) / whole,
            "stored": stored / whole,
            "estimates": estimates,
            "options": [" over ".join(x.name for x in reversed(part)) or AS_IT_IS for part in parts],
        }
        print(
            f"{name}: read {found['read']:.3f}, stored {found['stored']:.3f}, loss {found['loss']:.4f}, divergence "
            f"{found['kl']:.4f}, damage {estimates['damage']:.4f}, with factors {estimates['damage with factors']:.4f} "
            f"({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
        return found

    def uniform(self, mixing: Mixing) -> list[dict[str, Any]]:
        """Every setting alone, and every selection over every storage."""
        storages = [(each,) for each in mixing.ingredients if each.slot == "weight"]
        selections = [(each,) for each in mixing.ingredients if each.slot == "select"]
        stacks = [(*storage, *selection) for storage in storages for selection in selections]
        found = []
        for part in (*storages, *selections, *stacks):
            name = " over ".join(each.name for each in reversed(part))
            found.append(self.measure(mixing, name, [part] * len(self.places)))
        return found

    def with_factors(self, mixing: Mixing, uniform: Sequence[Mapping[str, Any]]) -> Mixing:
        """The factor of each setting; on the search split, as the search has it."""
        found = []
        search = self.splits.search[DAMAGE : DAMAGE + 2]
        test = (self.batches, self.original)
        self.batches, self.original = search, Outputs(self.model, keep=1 << 28)
        for ingredient in mixing.ingredients:
            loss = self.measure(mixing, f"{ingredient.name}, search split", [(ingredient,)] * len(self.places))["loss"]
            found.append(replace(ingredient, factor=max(FACTORS[0], math.log1p(max(loss, 0.0)) / ingredient.total)))
        self.batches, self.original = test
        return replace(mixing, ingredients=tuple(found))

    def random_mixes(self, mixing: Mixing, count: int) -> list[dict[str, Any]]:
        """Mixes by chance, from few changed places to all."""
        draw = random.Random(self.seed)
        found = []
        for number in range(count):
            weights = [draw.random() ** 2 for _ in mixing.ingredients]
            keep = draw.random()
            parts = []
            for _ in self.places:
                part = []
                for slot in ("weight", "select"):
                    of_slot = [(x, w) for x, w in zip(mixing.ingredients, weights, strict=True) if x.slot == slot]
                    if draw.random() < keep:
                        part += draw.choices([x for x, _ in of_slot], [w for _, w in of_slot])
                parts.append(tuple(part))
            found.append(self.measure(mixing, f"random {number + 1}", parts))
        return found

    def chosen(self, mixing: Mixing) -> list[dict[str, Any]]:
        """The choice for each limit."""
        found = []
        for limit in LIMITS:
            started = time.perf_counter()
            parts = mixing.parts(math.log1p(limit), "time")
            self.seconds["a choice"] = time.perf_counter() - started
            found.append(self.measure(mixing, f"mixed, limit {limit:.1%}", parts))
        return found

    def at_equal_bytes(self, mixing: Mixing, uniform: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Beside each way to store weights the mix of storages that takes at most as many bytes and loses least."""
        storages = [x for x in mixing.ingredients if x.slot == "weight"]
        rows = []
        for own in storages:
            limit = sum(own.layers[path].stored for path in self.paths)
            table = [
                [
                    Option(str(at), sum(x.layers[p].stored for p in place.paths) / limit, x.loss(place.paths))
                    for at, x in enumerate(storages)
                ]
                for place in self.places
            ]
            parts = [(storages[int(each.name)],) for each in choose(table, 1.0)]
            base = next(each for each in uniform if each["name"] == own.name)
            rows.append({"uniform": base, "mixed": self.measure(mixing, f"mixed, bytes of {own.name}", parts)})
        return rows

    def ranks(self, mixes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
        """Spearman's correlation of each estimate with what was measured."""
        return {
            name: {
                measured: float(
                    spearmanr([x["estimates"][name] for x in mixes], [x[measured] for x in mixes]).statistic
                )
                for measured in ("loss", "kl")
            }
            for name in mixes[0]["estimates"]
        }


def stacked(layer: Any, selecting: Any) -> Any:
    """The weights of a layer with the selection of another."""
    return ActLinear(layer.storage, layer.bias, selecting.select) if isinstance(layer, ActLinear) else selecting


@torch.no_grad()
def output_errors(model: Any, exchanges: Mapping[str, Mapping[str, Any]], batches: Any) -> dict[str, dict[str, float]]:
    """The squared error of each exchanged layer's output over that of the output: what needs no backward pass."""
    sums: dict[tuple[str, str], float] = {}
    norms: dict[str, float] = {}

    def watch(path: str) -> Any:
        def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            norms[path] = norms.get(path, 0.0) + float(output.float().square().sum())
            for name, layers in exchanges.items():
                moved = float((layers[path](args[0]) - output).float().square().sum())
                sums[name, path] = sums.get((name, path), 0.0) + moved

        return after

    paths = next(iter(exchanges.values()))
    with evaluating(model), hooked(model, after={path: watch(path) for path in paths}):
        forward(model, batches[0])
    return {name: {path: sums[name, path] / norms[path] for path in layers} for name, layers in exchanges.items()}


def hypervolume(points: Sequence[Mapping[str, Any]]) -> float:
    """The area between (1, LIMIT) and the points, in bytes read over the original's and loss, over the whole area."""
    area, lowest = 0.0, LIMIT
    for point in sorted(points, key=lambda each: each["read"]):
        loss = max(point["loss"], 0.0)
        if point["read"] < 1 and loss < lowest:
            area += (1 - point["read"]) * (lowest - loss)
            lowest = loss
    return area / LIMIT


if __name__ == "__main__":
    main()
