"""Which recipes to try on a model, and which methods are left out and why: what the methods propose, in their order.

Each registered transform says by `proposals` which settings suit the model's profile and shapes. A setting that stacks
is also tried over the bases, those rounded weights over which others may stand. The first 12 are tried, if no other
number is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from actkit.core.ground import registry
from actkit.core.ground.errors import ActkitError, RecipeError
from actkit.core.recipe.proposals import Idea, LeftOut, Shapes
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.transform import Transform
from actkit.search.results import Profile, Proposal

USUAL, MOST = 12, 20  # recipes that are tried
RULE = "it is a training rule, not a change of a trained model"


def propose(
    profile: Profile, shapes: Shapes, *, most: int = USUAL, earlier: Sequence[Transform] = ()
) -> tuple[list[Proposal], list[LeftOut]]:
    """List the recipes to try, most promising first.

    Args:
        profile: of the model.
        shapes: of its layers.
        most: how many at most, 1 to 20.
        earlier: what the model went through already.

    Returns:
        The recipes, and what is left out, each with its reason.

    Raises:
        ValueError: `most` is out of bounds.
    """
    if not 1 <= most <= MOST:
        raise ValueError(f"max_recipes: {most} was given, allowed are 1 to {MOST}.")
    ideas, left = _ideas(profile, shapes)
    if not shapes.inputs:
        return [], [LeftOut("every recipe", "no block of the model has a linear layer"), *left]
    found: list[Proposal] = []
    for proposal in _in_order(ideas):
        if any(proposal.recipe.dump() == each.recipe.dump() for each in found):
            continue  # the share of zeros is a level already, and every layer reads such a site
        try:
            proposal.recipe.check(earlier=earlier)
        except ActkitError as error:
            left.append(LeftOut(proposal.name, str(error)))
            continue
        found.append(proposal)
    left += [LeftOut(each.name, f"more than max_recipes={most}; it stands later in the order") for each in found[most:]]
    return found[:most], left


def given(recipes: Iterable[Any], earlier: Sequence[Transform] = ()) -> list[Proposal]:
    """List the user's own recipes instead.

    Args:
        recipes: each as `Recipe.of` takes it.
        earlier: what the model went through already.

    Returns:
        The recipes, by names that tell them apart.

    Raises:
        RecipeError: one is no recipe, or does not fit the model's changes.
    """
    found: list[Proposal] = []
    for source in recipes:
        recipe = Recipe.of(source).unstaged("actkit.optimize")
        recipe.check(earlier=earlier)
        name = " over ".join(_named(transform) for transform in reversed(recipe.transforms))
        same = sum(each.name.split(" #")[0] == name for each in found)
        found.append(Proposal(f"{name} #{same + 1}" if same else name, recipe, "given"))
    return found


def _named(transform: Transform) -> str:
    """'rtn bits=8 group_size=64': the method, and what was set otherwise than by default."""
    settings = transform.model_dump(mode="json", exclude_defaults=True)
    shown = [f"{key}={value if isinstance(value, str | int | float) else '...'}" for key, value in settings.items()]
    return " ".join([transform.name, *shown])


def _ideas(profile: Profile, shapes: Shapes) -> tuple[list[Idea], list[LeftOut]]:
    """What all registered methods propose, and what they leave out; a method that does not load is left out."""
    ideas: list[Idea] = []
    left: list[LeftOut] = []
    for name in registry.method_names():
        try:
            method = registry.method_class(name)
        except RecipeError as error:
            left.append(LeftOut(name, str(error)))
            continue
        if not (isinstance(method, type) and issubclass(method, Transform)):
            left.append(LeftOut(name, RULE))
            continue
        for each in method.proposals(profile, shapes):
            if isinstance(each, Idea):
                ideas.append(each)
            else:
                left.append(each)
    return ideas, left


def _in_order(ideas: Sequence[Idea]) -> Iterator[Proposal]:
    """Ideas alone and stacked, by their order."""
    bases = sorted((idea for idea in ideas if idea.base is not None), key=lambda idea: idea.base or 0)
    ordered = [(idea.order, idea.name, [*idea.before, idea.transform], idea.why) for idea in ideas]
    for idea in ideas:
        for order, base in zip(idea.stacks, bases, strict=False):
            name = f"{idea.name} over {base.name}"
            ordered.append((order, name, [base.transform, idea.transform], idea.why_stacked))
    for _, name, transforms, why in sorted(ordered, key=lambda each: each[0]):
        yield Proposal(name, Recipe(transforms), why)  # type: ignore[arg-type]
