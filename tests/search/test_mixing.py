"""Mixes: the choice against brute force, the model of time against known rates, and the recipe that is made."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny_models
from made_up import a_speed, around

from actkit.core.edit import changes
from actkit.core.measure.cost import measure_cost
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.watch.damage import layer_damage
from actkit.quantization.awq import Awq
from actkit.quantization.rtn import RoundToNearest
from actkit.search import search
from actkit.search.mixing.choice import Option, choose
from actkit.search.mixing.drawing import chosen_grid, damage_grid, selection_of, storage_of
from actkit.search.mixing.ingredients import (
    Ingredient,
    LayerBytes,
    Sample,
    is_ingredient,
    layer_bytes,
    places_of,
    reads_of,
)
from actkit.search.mixing.mixing import Mixing
from actkit.search.mixing.times import Timed, TimeModel, fit
from actkit.sparsity.wina.wina import Wina
from actkit.testing import tiny_batches, tiny_model

# -- the choice --------------------------------------------------------------------------------------------------------


def places(seed: int, count: int, options: int) -> list[list[Option]]:
    draw = random.Random(seed)
    return [
        [Option("as it is", 0.0, 1.0)]
        + [Option(f"{n}", draw.random() * 0.1, draw.random()) for n in range(options - 1)]
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_close_to_the_best_of_all(seed: int) -> None:
    table = places(seed, 6, 4)
    for limit in (0.02, 0.1, 0.2):
        found = choose(table, limit)
        assert sum(each.damage for each in found) <= limit
        every = itertools.product(*table)
        within = [each for each in every if sum(option.damage for option in each) <= limit]
        best = min(sum(option.cost for option in each) for each in within)
        cost = sum(option.cost for option in found)
        assert best <= cost + 1e-12
        # a relaxation misses at most what one place can differ by
        assert cost - best <= max(max(x.cost for x in options) - min(x.cost for x in options) for options in table)
        assert cost <= 6.0


def test_a_limit_that_nothing_meets_gets_the_least_harmful() -> None:
    table = [[Option("a", 0.2, 1.0), Option("b", 0.3, 0.1)]] * 2
    assert [each.name for each in choose(table, 0.1)] == ["a", "a"]
    assert [each.name for each in choose(table, 1.0)] == ["b", "b"]
    assert [each.name for each in choose(table, 0.5)] in (["a", "b"], ["b", "a"])


# -- the model of time -------------------------------------------------------------------------------------------------

RATES = {"bfloat16": 1.0e-10, "8 bits": 1.2e-10, "4 bits": 1.5e-10}


def timed(name: str, **reads: float) -> Timed:
    by_kind = {kind.replace("_", " "): size for kind, size in reads.items()}
    return Timed(name, by_kind, 5e-4 + sum(RATES[kind] * size for kind, size in by_kind.items()))


def test_rates_are_found_and_its_errors_are_those_of_what_it_did_not_see() -> None:
    seen = [
        timed("original", bfloat16=2e8),
        timed("half", bfloat16=1e8),
        timed("eight", bfloat16=5e7, **{"8_bits": 8e7}),
        timed("four", bfloat16=5e7, **{"4_bits": 4e7}),
        timed("both", **{"8_bits": 4e7, "4_bits": 2e7}),
    ]
    found = fit(seen)
    for each in seen:
        assert found.seconds(each.reads) == pytest.approx(each.seconds, rel=0.05)
    unseen = timed("unseen", bfloat16=3e7, **{"8_bits": 2e7, "4_bits": 3e7})
    assert found.seconds(unseen.reads) == pytest.approx(unseen.seconds, rel=0.08)
    assert set(found.errors) == {"half", "eight", "four", "both"}
    others = fit([each for each in seen if each.name != "four"])
    assert found.errors["four"] == pytest.approx(others.seconds(seen[3].reads) / seen[3].seconds - 1)


def test_a_kind_that_was_never_timed_has_the_rate_of_the_original() -> None:
    found = fit([timed("original", bfloat16=2e8)])
    assert found.rate("3 bits") == found.fallback == pytest.approx((5e-4 + 2e8 * RATES["bfloat16"]) / 2e8)
    assert found.errors == {}
    with pytest.raises(ValueError, match="nothing was timed"):
        fit([])


# -- what a mix is -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case() -> tuple[Any, Any, Mixing]:
    model = tiny_model("llama")
    batches = tiny_batches(model)
    recipes = {
        "rtn 8 bit": RoundToNearest(bits=8, group_size=8),
        "rtn 2 bit": RoundToNearest(bits=2, group_size=8),
        "wina 50%": Wina(sparsity=0.5),
    }
    samples = []
    for name, transform in recipes.items():
        changed = apply(model, transform, batches, inplace=False, progress=False).model
        sample = Sample.of(name, Recipe([transform]), changed, batches)
        assert sample is not None
        samples.append(sample)
    damage = layer_damage(model, {s.ingredient.name: s.modules for s in samples}, batches, draws=8, progress=False)
    ingredients = tuple(
        Ingredient(s.ingredient.name, s.ingredient.transform, s.ingredient.layers, damage[s.ingredient.name])
        for s in samples
    )
    view = anatomy(model, batches[0])
    found = tuple(places_of(view))
    cost = measure_cost(model, batches, progress=False)
    original = layer_bytes(model, cost, [path for place in found for path in place.paths])
    rest = reads_of(model, cost)
    for taken in original.values():
        rest[taken.kind] -= taken.read
    return model, batches, Mixing(found, ingredients, original, rest, TimeModel(0.0, {}, 1.0))


def test_a_mix_is_made_by_its_recipe(case: tuple[Any, Any, Mixing]) -> None:
    model, batches, mixing = case
    made = mixing.mix("mixed 1", limit=sum(each.total for each in mixing.ingredients) / 2)
    assert made is not None
    mix, proposal = made
    assert len(set(mix.options)) > 1, "the limit was meant to allow more than one option"
    proposal.recipe.check()
    changed = apply(model, proposal.recipe, batches, inplace=False, progress=False).model
    assert changes.of(changed) is not None
    for place, option in zip(mixing.places, mix.options, strict=True):
        for path in place.paths:
            layer = changed.get_submodule(path)
            select = getattr(layer, "select", None)
            grid = getattr(getattr(layer, "storage", None), "grid", None)
            assert (select is not None) == ("wina" in option)
            assert (None if grid is None else grid.bits) == (
                8 if "8 bit" in option else 2 if "2 bit" in option else None
            )
    # what it was thought to read is what it reads, but for the inputs that its selections really keep
    reads = reads_of(changed, measure_cost(changed, batches, progress=False))
    assert mix.seconds == pytest.approx(sum(reads.values()), rel=0.05)


def test_less_loss_costs_more(case: tuple[Any, Any, Mixing]) -> None:
    mixing = case[2]
    made = [mixing.mix("m", limit) for limit in (1e-6, 0.01, 0.1, 1.0, 100.0)]
    seconds = [each[0].seconds for each in made if each is not None]
    assert seconds == sorted(seconds, reverse=True) and len(seconds) >= 3
    for each, limit in zip(made, (1e-6, 0.01, 0.1, 1.0, 100.0), strict=True):
        assert each is None or each[0].loss <= limit * (1 + 1e-9)
    bytes_ = mixing.mix("m", 100.0, "bytes")
    assert bytes_ is not None and all("2 bit" in option for option in bytes_[0].options)


def test_a_speedup_that_is_enough_is_had_for_the_least_loss(case: tuple[Any, Any, Mixing]) -> None:
    mixing = case[2]
    every = sum(each.total for each in mixing.ingredients)
    most, less = mixing.mix("m", every), mixing.mix("m", every, enough=1.5)
    assert most is not None and less is not None
    whole = sum(mixing.rest.values()) + sum(each.read for each in mixing.original.values())
    assert most[0].seconds < less[0].seconds <= whole / 1.5
    assert less[0].nats < most[0].nats


def test_ingredients_come_back_from_the_journal(case: tuple[Any, Any, Mixing]) -> None:
    for each in case[2].ingredients:
        assert Ingredient.from_dict(each.to_dict()) == each


def test_what_can_be_an_ingredient() -> None:
    assert is_ingredient(Recipe([RoundToNearest()]))
    assert is_ingredient(Recipe([Wina()]))
    assert not is_ingredient(Recipe([Awq()]))
    assert not is_ingredient(Recipe([RoundToNearest(), Wina()]))
    assert not is_ingredient(Recipe([RoundToNearest(only={"down": "all"})]))
    assert not is_ingredient(Recipe([RoundToNearest.model_validate({"bits": 8, "embedding": {}})]))


def test_bytes_under_a_selection() -> None:
    original, selected = LayerBytes(400.0, 400.0, "bfloat16"), LayerBytes(410.0, 310.0, "bfloat16, sparse")
    dense = LayerBytes(100.0, 100.0, "4 bits")
    assert dense.under(selected, original) == LayerBytes(110.0, 85.0, "4 bits, sparse")


def test_pictures_have_a_cell_per_place(case: tuple[Any, Any, Mixing]) -> None:
    mixing = case[2]
    made = mixing.mix("mixed 1", limit=sum(each.total for each in mixing.ingredients) / 2)
    assert made is not None
    mix = made[0]
    for picture in (damage_grid(mixing, "rtn 2 bit"), chosen_grid(mixing, mix)):
        root = ElementTree.fromstring(picture)
        cells = [each for each in root.iter() if each.tag == "rect"]
        assert len(cells) == len(mixing.places) == 8
    titles = [each.text for each in ElementTree.fromstring(chosen_grid(mixing, mix)).iter() if each.tag == "title"]
    assert titles[0] == f"block 0, query, key, value: {mix.options[0]}"
    dots = [each for each in ElementTree.fromstring(chosen_grid(mixing, mix)).iter() if each.tag == "circle"]
    assert len(dots) == sum("wina" in option for option in mix.options)
    assert storage_of("wina 50% over rtn 8 bit", mixing) == "rtn 8 bit"
    assert storage_of("wina 50%", mixing) == "as it is"
    assert selection_of("wina 50% over rtn 8 bit", mixing) == "wina 50%"


# -- in the search -----------------------------------------------------------------------------------------------------


def speeds_by_bytes(folders: Any, **_: Any) -> dict[str, Any]:
    """Speeds as if a byte took a nanosecond, in place of fresh processes that take turns."""
    seconds = {name: measure_cost(checkpoint.load(folder)).dense_bytes_per_token for name, folder in folders.items()}
    first = next(iter(seconds.values()))
    found = {}
    for number, (name, each) in enumerate(seconds.items()):
        speed = a_speed(None if number == 0 else around(first / each, 0.01))
        found[name] = replace(speed, rate=around(1e9 / each, 1.0))
    return found


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixing")
    model = tiny_models.build("llama", hidden_size=64, intermediate_size=256, num_hidden_layers=2, vocab_size=128)
    model.save_pretrained(folder / "llama")
    recipes = [
        RoundToNearest(bits=8, group_size=16),
        RoundToNearest(bits=3, group_size=16),
        Wina(sparsity=0.25),
    ]
    settings = {"data": "random", "recipes": recipes, "max_loss": 0.05, "mixes": 2, "threads": 1, "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "measure_speed", speeds_by_bytes)
        result = search.optimize(str(folder / "llama"), out=folder / "out", speed_row=False, **settings)
    return result, folder, settings


def test_mixes_are_measured_like_every_candidate(searched: tuple[Any, Any, dict[str, Any]]) -> None:
    result, folder, _ = searched
    assert result.mixing is not None and result.mixing.mixes
    mixed = [each for each in result.candidates if each.name.startswith("mixed")]
    assert [each.name for each in mixed] == [mix.name for mix in result.mixing.mixes]
    for candidate, mix in zip(mixed, result.mixing.mixes, strict=True):
        assert candidate.failed is None and candidate.search_loss is not None
        assert mix.loss <= 0.05
        assert all(next(iter(entry.values())).get("only") for entry in candidate.recipe) or len(candidate.recipe) == 1
    kinds = [json.loads(line)["kind"] for line in (folder / "out" / "journal.jsonl").read_text().splitlines()]
    assert kinds.count("ingredients") == 1 and kinds.count("candidate") == 3 + len(mixed)
    saved = json.loads((folder / "out" / "results.json").read_text())["mixing"]
    assert len(saved["places"]) == 8 and set(saved["damage"]) == {x.name for x in result.mixing.ingredients}
    page = (folder / "out" / "index.html").read_text()
    assert 'id="mixing"' in page and "What mixed 1 gives each part" in page


def test_a_finished_search_with_mixes_resumes_without_measuring(
    searched: tuple[Any, Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder, settings = searched
    before = (folder / "out" / "journal.jsonl").read_bytes()
    monkeypatch.setattr(search, "measure_speed", None)  # nothing may be timed again
    again = search.optimize(str(folder / "llama"), out=folder / "out", speed_row=False, resume=True, **settings)
    assert (folder / "out" / "journal.jsonl").read_bytes() == before
    assert [each.name for each in again.candidates] == [each.name for each in result.candidates]
    assert again.mixing is not None and again.mixing.to_dict() == result.mixing.to_dict()


def test_mixes_are_tried_if_no_whole_model_setting_may_be_timed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bits and a half of the inputs lose too much everywhere, and so neither is timed by itself."""
    tiny_models.build("llama", hidden_size=64, intermediate_size=256, vocab_size=128).save_pretrained(
        tmp_path / "llama"
    )
    monkeypatch.setattr(search, "measure_speed", speeds_by_bytes)
    recipes = [RoundToNearest(bits=2, group_size=16), Wina(sparsity=0.8)]
    settings = {"data": "random", "recipes": recipes, "max_loss": 1e-4, "mixes": 1, "speed_row": False, "threads": 1}
    result = search.optimize(str(tmp_path / "llama"), out=tmp_path / "out", progress=False, **settings)
    assert all(each.stopped for each in result.candidates if not each.name.startswith("mixed"))
    assert result.mixing is not None and result.mixing.times.constant >= 0
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()]
    assert kinds.count("probe") == 2


def test_experts_are_left_as_they_are(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of experts stand at no place, as they are opened for a run alone; attention is mixed."""
    tiny_models.build("mixtral", hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path / "mixtral")
    monkeypatch.setattr(search, "measure_speed", speeds_by_bytes)
    recipes = [RoundToNearest(bits=8, group_size=16), RoundToNearest(bits=2, group_size=16)]
    result = search.optimize(
        str(tmp_path / "mixtral"),
        out=tmp_path / "out",
        data="random",
        recipes=recipes,
        mixes=1,
        max_loss=0.5,
        speed_row=False,
        threads=1,
        progress=False,
    )
    assert result.mixing is not None and len(result.mixing.places) == 4
    assert all("experts" not in path for place in result.mixing.places for path in place.paths)
    mixed = [each for each in result.candidates if each.name.startswith("mixed")]
    assert mixed and mixed[0].failed is None


def test_mixes_can_be_left_out(searched: tuple[Any, Any, dict[str, Any]]) -> None:
    _, folder, settings = searched
    with pytest.raises(ValueError, match="min_speedup: 1 was given; give a ratio above 1"):
        search.optimize(str(folder / "llama"), out=folder / "none", min_speedup=1.0, **settings)
    with pytest.raises(ValueError, match="min_speedup: 2 was given with speed=False"):
        search.optimize(str(folder / "llama"), out=folder / "none", min_speedup=2.0, speed=False, **settings)
    with pytest.raises(ValueError, match="mixes: -1 was given"):
        search.optimize(str(folder / "llama"), out=folder / "none", **{**settings, "mixes": -1})
