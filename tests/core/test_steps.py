"""A recipe that begins with another one takes its edits: the same model, and nothing computed twice."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from actkit.core.ground.errors import RecipeError
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.recipe.steps import Steps
from actkit.quantization.awq import Awq


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_longer_recipe_takes_the_edits_of_a_shorter_one(kind, monkeypatch):
    model = tiny_models.build(kind)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(50, (2, 16), generator=generator)} for _ in range(3)]
    awq = {"awq": {"bits": 4, "group_size": 16}}
    short = Recipe.parse({"actkit": 1, "transforms": [awq]})
    long = Recipe.parse({"actkit": 1, "transforms": [awq, {"wina": {"sparsity": 0.25}}]})
    options = {"inplace": False, "undo": "off", "progress": False}
    expected = [apply(model, recipe, batches, **options) for recipe in (short, long)]

    computed = []
    edit = Awq.edit
    monkeypatch.setattr(Awq, "edit", lambda *args: computed.append(1) or edit(*args))
    steps = Steps(1)
    first = apply(model, short, batches, steps=steps, **options)
    blocks = len(computed)
    second = apply(model, long, batches, steps=steps, **options)
    again = apply(model, long, batches, steps=steps, **options)
    assert blocks == 3 and len(computed) == blocks
    for found, other in zip((first, second, again), (expected[0], expected[1], expected[1])):
        mine, theirs = found.model.state_dict(), other.model.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert found.edits == other.edits and found.report.changed == other.report.changed
        assert found.report.notes == other.report.notes and found.report.skipped == other.report.skipped


def test_a_transform_that_sees_later_ones_is_not_shared():
    recipe = Recipe.parse({"actkit": 1, "transforms": ["awq", "wina"]})
    first, second = recipe

    class Edited(Awq):
        tags = Awq.tags.__class__(needs_data=True, stream="edited")

    with pytest.raises(RecipeError, match="Edited calibrates on the edited model"):
        Steps(1).check([Edited(), second])
    Steps(1).check([first, second])
    Steps(2).check([Edited(), second])
