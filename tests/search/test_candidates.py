"""Which recipes are proposed: groups that divide, no awq where nothing takes a scale, nothing left out in silence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_models
import torch

from actkit.core.ground import registry
from actkit.core.ground.errors import RecipeError
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.proposals import GROUPS, Idea, Shapes
from actkit.core.recipe.recipe import Recipe
from actkit.quantization.rtn import RoundToNearest
from actkit.search.candidates import given, propose
from actkit.search.profile import profile
from actkit.search.results import Profile
from actkit.sparsity.teal import Teal

BATCHES = {
    "vit": lambda: {"pixel_values": torch.randn(4, 3, 8, 8)},
    "mlp": lambda: torch.randn(4, 16),
    "conv": lambda: torch.randn(4, 3, 8, 8),
}


def seen(kind: str, **settings) -> tuple[Profile, Shapes]:
    model = tiny_models.build(kind, **settings)
    batch = BATCHES[kind]() if kind in BATCHES else {"input_ids": torch.randint(50, (2, 12))}
    view = anatomy(model, batch)
    shapes = Shapes.of(view)
    assert all("ExpertList" not in type(module).__name__ for module in model.modules())  # closed again
    return profile(model, [batch], anatomy=view, progress=False), shapes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "mixtral"])
def test_every_family_gets_recipes_that_fit(kind):
    looked, shapes = seen(kind)
    found, left = propose(looked, shapes)
    assert 1 <= len(found) <= 12
    assert [each.name for each in propose(looked, shapes, most=20)[0]][: len(found)] == [each.name for each in found]
    assert len({each.name for each in found}) == len(found) == len({str(each.recipe.dump()) for each in found})
    for each in found:
        each.recipe.check()
        assert each.why
        for transform in each.recipe:
            size, axis = getattr(transform, "group_size", -1), getattr(transform, "group_axis", "input")
            widths = shapes.inputs if axis == "input" else shapes.outputs
            assert size == -1 or all(width % size == 0 for width in widths)
    used = {transform.name for each in found for transform in each.recipe}
    said = " ".join(each.what for each in left)
    assert all(name in used or name in said for name in registry.method_names())
    assert all(each.reason for each in left)


def test_awq_is_left_out_with_the_reasons_where_nothing_takes_a_scale():
    looked, shapes = seen("llama")
    assert any("awq" in each.name for each in propose(looked, shapes)[0])
    none = replace(shapes, scalable=0, shared=0, refused=("post-norm", "grouped"))
    found, left = propose(looked, none)
    assert not any("awq" in each.name for each in found)
    assert any("wina" in each.name and "rtn 4" in each.name for each in found)
    (reason,) = [each.reason for each in left if each.what == "awq"]
    assert "post-norm; grouped" in reason


@pytest.mark.parametrize(
    ("inputs", "group"), [((256, 768), 64), ((96, 192), 32), ((48, 80), 16), ((40, 64), -1), ((64,), 64)]
)
def test_the_group_is_the_largest_that_divides_all(inputs, group):
    shapes = Shapes(inputs, inputs, 1, (), ("query",))
    assert shapes.group == group
    assert group == -1 or all(width % group == 0 for width in inputs)
    assert not any(all(width % larger == 0 for width in inputs) for larger in GROUPS if larger > group)


def test_zeros_in_the_profile_give_a_recipe_of_their_own():
    looked, shapes = seen("llama")
    sites = tuple(replace(s, density=0.13) if s.name == "mlp.hidden" else s for s in looked.sites)
    found, _ = propose(replace(looked, sites=sites), shapes)
    (each,) = [each for each in found if each.name == "teal 80% on down"]
    (teal,) = each.recipe.transforms
    assert teal.sparsity == 0.8 and set(teal.skip) == set(shapes.roles) - {"down"}
    assert "exactly 0" in each.why


def test_behind_a_long_text_the_cache_is_tried_too():
    looked, shapes = seen("llama")
    assert shapes.prompt == 0 and shapes.no_cache is None
    reasons = {each.what: each.reason for each in propose(looked, replace(shapes, prompt=128))[1]}
    assert "speed is measured behind 128 tokens; give prompt=1024" in reasons["quantize_cache"]
    found, _ = propose(looked, replace(shapes, prompt=2048))
    cached = {each.name: [transform.name for transform in each.recipe] for each in found if "cache" in each.name}
    assert cached["cache 8 bit"] == ["quantize_cache"]
    assert cached["cache 8 bit over rtn 8 bit"] == ["rtn", "quantize_cache"] and "cache 8 bit over rtn 4 bit" in cached
    looked, shapes = seen("bert")
    reasons = {each.what: each.reason for each in propose(looked, replace(shapes, prompt=2048))[1]}
    assert reasons["quantize_cache"] == "it keeps no cache, as it generates nothing"


def test_a_cap_says_what_it_left_out():
    looked, shapes = seen("llama")
    everything, _ = propose(looked, shapes)
    found, left = propose(looked, shapes, most=3)
    assert [each.name for each in found] == [each.name for each in everything[:3]]
    assert {each.name for each in everything[3:]} <= {each.what for each in left}
    with pytest.raises(ValueError, match="max_recipes: 21"):
        propose(looked, shapes, most=21)


def test_what_the_model_went_through_already_is_not_tried_again():
    looked, shapes = seen("llama")
    found, left = propose(looked, shapes, earlier=Recipe.of("rtn").transforms)
    assert found and all(transform.name in ("teal", "wina") for each in found for transform in each.recipe)
    assert any(each.what == "awq 4 bit" and "weight slot" in each.reason for each in left)


def test_without_linear_layers_nothing_is_proposed():
    looked, _ = seen("mlp")
    found, left = propose(looked, Shapes((), (), 0, (), ()))
    assert found == [] and "no block of the model has a linear layer" in left[0].reason


def test_a_new_method_proposes_by_itself(monkeypatch):
    class Bold(RoundToNearest):
        """Two bits for all, stacked over the best base."""

        @classmethod
        def proposals(cls, profile, shapes):
            yield Idea("bold", cls(bits=2, group_size=shapes.group), "nobody tried", 35)

    class Light(Teal):
        """A little sparsity over every base."""

        @classmethod
        def proposals(cls, profile, shapes):
            yield Idea("light", cls(sparsity=0.1), "careful", 11, stacks=(12, 13, 14))

    looked, shapes = seen("llama")
    shapes = replace(shapes, ends=0.0)
    classes = {name: registry.method_class(name) for name in ("rtn", "awq")} | {"bold": Bold, "light": Light}
    monkeypatch.setattr("actkit.search.candidates.registry.method_names", lambda: list(classes))
    monkeypatch.setattr("actkit.search.candidates.registry.method_class", classes.__getitem__)
    names = {cls: name for name, cls in classes.items()}
    monkeypatch.setattr("actkit.core.ground.registry.method_name", names.__getitem__)
    found, _ = propose(looked, shapes)
    stacks = ["light over awq 4 bit", "light over rtn 8 bit", "light over rtn 4 bit"]
    assert [each.name for each in found][:7] == ["rtn 8 bit", "light", *stacks, "rtn 4 bit", "awq 4 bit"]
    assert found[7].name == "bold" and found[3].why == "both at once: they stack"


def test_own_recipes():
    found = given(["rtn", "wina,rtn", "rtn"])
    assert [each.name for each in found] == ["rtn", "rtn over wina", "rtn #2"]
    with pytest.raises(RecipeError):
        given(["no such method"])


def test_recipes_of_ones_own_are_named_by_what_is_set():
    eight, coarse, sparse = {"rtn": {"bits": 8}}, {"rtn": {"group_size": 64}}, {"wina": {"sparsity": 0.25}}
    stacks = [[eight], [eight], [coarse, sparse]]
    names = [each.name for each in given(["rtn", *({"actkit": 1, "transforms": stack} for stack in stacks)])]
    assert names == ["rtn", "rtn bits=8", "rtn bits=8 #2", "wina sparsity=0.25 over rtn group_size=64"]


def test_narrower_mlps_and_factors_are_tried_late_and_only_if_they_can_save() -> None:
    looked, shapes = seen("llama")
    names = [each.name for each in propose(looked, shapes, most=20)[0]]
    assert names.index("cfsp 10%") > names.index("wina 50%") and names[-1] != "cfsp 10%" and "cfsp 20%" in names
    assert "svd 70%" in names
    found, left = propose(looked, replace(shapes, roles=("query", "output"), inputs=(2, 2), outputs=(2, 2)), most=20)
    assert not any(each.name.startswith(("cfsp", "svd")) for each in found)
    reasons = {each.what: each.reason for each in left}
    assert "no block of the model has an MLP" in reasons["cfsp"]
    assert "as narrow as these" in reasons["svd 70%"]
