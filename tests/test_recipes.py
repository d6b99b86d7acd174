"""The recipes that come with the repository are read as they are written."""

from pathlib import Path

import pytest

from actkit.core.recipe.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_valid(path):
    recipe = Recipe.load(path)
    recipe.check()
    assert Recipe.parse(recipe.dump()).dump() == recipe.dump()
