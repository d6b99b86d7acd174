"""Which recipes to try on a model, from its profile and its shapes, and which methods are left out and why.

At most 12: rounding at 8 and 4 bits (rtn), awq at 4 bits, input sparsity (teal, wina) at two levels, and wina over the
rounded weights. Groups are the largest of 64, 32, 16 that divides every layer's inputs. The levels are 25 and 50 %;
where the profile finds sites whose values are mostly exactly 0, their share is a level of its own for the layers that
read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from actkit.core.ground import registry
from actkit.core.ground.errors import ActkitError
from actkit.core.model.anatomy import Anatomy, Block, equalization_sets
from actkit.core.recipe.transform import Recipe, Transform
from actkit.core.watch.capture import opened_experts
from actkit.search.profile import INT4_POOR, SPARSE
from actkit.search.results import LeftOut, Profile, Proposal

MOST = 12
LEVELS = (0.25, 0.5)
GROUPS = (64, 32, 16)
HIGHEST = 0.9  # of the sparsity taken from zeros that are there anyway
RULE = "it is a training rule, not a change of a trained model"
TRAINING = "another activation function changes the model, and pays only after training"
SEARCHED = 1024  # tokens that awq replays for each of its 20 ratios


@dataclass(frozen=True)
class Shapes:
    """What decides which methods fit. inputs, outputs: of all linear layers in blocks. scalable, refused: sets of
    layers that awq can and cannot give a scale, with the reasons for the latter. roles: of the layers."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scalable: int
    refused: tuple[str, ...]
    roles: tuple[str, ...]

    @classmethod
    def of(cls, view: Anatomy) -> Shapes:
        """Read off a model; experts are opened for it and closed again."""
        with opened_experts(view):
            blocks: list[Block] = [view.block(block.index) for block in view.blocks]
            linears = [linear for block in blocks for linear in block.linears()]
            sets = [found for block in blocks for found in equalization_sets(block)]
            return cls(
                tuple(linear.in_features for linear in linears),
                tuple(linear.out_features for linear in linears),
                sum(found.refused is None for found in sets),
                tuple(dict.fromkeys(found.refused for found in sets if found.refused is not None)),
                tuple(dict.fromkeys(linear.role for linear in linears)),
            )

    @property
    def group(self) -> int:
        """The group size for rounding: -1 (whole rows) where none of GROUPS divides every layer's inputs."""
        common = gcd(*self.inputs) if self.inputs else 0
        return next((size for size in GROUPS if common % size == 0), -1)


def propose(
    profile: Profile, shapes: Shapes, *, most: int = MOST, earlier: Sequence[Transform] = ()
) -> tuple[list[Proposal], list[LeftOut]]:
    """The recipes to try, most promising first, at most `most`; then what is left out, each with its reason.

    earlier: what the model went through already. Raises ValueError for most outside of 1 to 12.
    """
    if not 1 <= most <= MOST:
        raise ValueError(f"max_recipes: {most} was given, allowed are 1 to {MOST}.")
    left: list[LeftOut] = list(_about_methods(shapes))
    if not shapes.inputs:
        return [], [LeftOut("every recipe", "no block of the model has a linear layer"), *left]
    found: list[Proposal] = []
    for name, transforms, why in _ideas(profile, shapes):
        proposal = Proposal(name, Recipe.parse({"actkit": 1, "transforms": transforms}), why)
        if any(proposal.recipe.dump() == each.recipe.dump() for each in found):
            continue  # the share of zeros is a level already, and every layer reads such a site
        try:
            proposal.recipe.check(earlier=earlier)
        except ActkitError as error:
            left.append(LeftOut(name, str(error)))
            continue
        found.append(proposal)
    left += [LeftOut(each.name, f"more than max_recipes={most}; it stands later in the order") for each in found[most:]]
    return found[:most], left


def given(recipes: Iterable[Any], earlier: Sequence[Transform] = ()) -> list[Proposal]:
    """The user's own recipes instead. Raises RecipeError for what is not one, or does not fit the model's changes."""
    found: list[Proposal] = []
    for source in recipes:
        recipe = Recipe.of(source)
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


Idea = tuple[str, list[Mapping[str, Any]], str]


def _ideas(profile: Profile, shapes: Shapes) -> list[Idea]:
    group, low, high = shapes.group, *LEVELS
    words = "whole rows" if group == -1 else f"groups of {group}"
    fits = f"{words} fit all layers"
    if group == -1:
        fits = f"whole rows, because none of the groups {', '.join(map(str, sorted(GROUPS)))} divides all layers"
    poor = [w.int4_snr for w in profile.weights if w.int4_snr is not None and w.int4_snr < INT4_POOR]
    hard = f"; {len(poor)} layers keep less than {INT4_POOR:.0f} dB at 4 bits" if poor else ""
    rtn8, rtn4 = ({"rtn": {"bits": bits, "group_size": group}} for bits in (8, 4))
    awq4 = {"awq": {"bits": 4, "group_size": group, "search_tokens": SEARCHED}}

    def sparse(method: str, share: float, **more: Any) -> dict[str, Any]:
        return {method: {"sparsity": share, **more}}

    small = _small_share(profile)
    guess = f"the profile finds {small:.0%} of the inputs below 1 % of their scale" if small is not None else "always"
    scales = f"{shapes.scalable} sets of layers can take a scale, {len(shapes.refused)} kinds cannot"
    ideas: list[Idea] = [
        ("rtn 8 bit", [rtn8], f"the safest cut; {fits}"),
        ("rtn 4 bit", [rtn4], f"{fits}{hard}"),
    ]
    if shapes.scalable:
        ideas.append(("awq 4 bit", [awq4], f"{scales}{hard}"))
    ideas.append((f"wina {low:.0%}", [sparse("wina", low)], guess))
    ideas += _zeros(profile, shapes)
    if shapes.scalable:
        ideas.append((f"wina {low:.0%} over awq 4 bit", [awq4, sparse("wina", low)], "both at once: they stack"))
    ideas.append((f"wina {low:.0%} over rtn 8 bit", [rtn8, sparse("wina", low)], "both at once: they stack"))
    ideas += [
        (f"teal {low:.0%}", [sparse("teal", low)], f"{guess}; magnitude alone, the baseline of wina"),
        (f"wina {high:.0%}", [sparse("wina", high)], f"{guess}; half of the weight bytes"),
    ]
    if shapes.scalable:
        ideas.append((f"wina {high:.0%} over awq 4 bit", [awq4, sparse("wina", high)], "the fewest bytes per token"))
    ideas.append((f"teal {high:.0%}", [sparse("teal", high)], f"{guess}; magnitude alone"))
    if not shapes.scalable:
        ideas.append((f"wina {low:.0%} over rtn 4 bit", [rtn4, sparse("wina", low)], "both at once: they stack"))
    finer = _finer(shapes)
    if finer is not None:
        what = {"rtn": {"bits": 4, "group_size": finer}}
        name = "rtn"
        if shapes.scalable:
            what, name = {"awq": {"bits": 4, "group_size": finer, "search_tokens": SEARCHED}}, "awq"
        ideas.append((f"{name} 4 bit, groups of {finer}", [what], f"finer groups where 4 bits lose too much{hard}"))
    outputs = gcd(*shapes.outputs)
    along = next((size for size in GROUPS if outputs % size == 0), None)
    if along is not None:
        grid = {"bits": 4, "group_size": along, "group_axis": "output"}
        ideas.append(("rtn 4 bit, groups of outputs", [{"rtn": grid}], "one scale per input channel, for outliers"))
    return ideas


def _zeros(profile: Profile, shapes: Shapes) -> list[Idea]:
    """teal at the share of exact zeros, for the layers that read them, where the profile finds such sites."""
    sites = [site for site in profile.sites if site.read_by and 100 * (1 - site.density) >= SPARSE]
    roles = {w.role for w in profile.weights for site in sites if w.path in site.read_by}
    if not sites or not roles:
        return []
    share = min(HIGHEST, int(10 * min(1 - site.density for site in sites)) / 10)
    others = [role for role in shapes.roles if role not in roles]
    names = ", ".join(sorted(roles))
    recipe = {"teal": {"sparsity": share, "skip": others}}
    why = f"{share:.0%} or more of the inputs of {names} are exactly 0: skipping them costs nothing"
    return [(f"teal {share:.0%} on {names}", [recipe], why)]


def _finer(shapes: Shapes) -> int | None:
    common = gcd(*shapes.inputs)
    smaller = [size for size in GROUPS if size < shapes.group and common % size == 0]
    return max(smaller, default=None)


def _small_share(profile: Profile) -> float | None:
    """Over the sites that linear layers read: the median share of values below 1 % of the site's scale."""
    shares = sorted(1 - site.above_one_percent for site in profile.sites if site.read_by)
    return shares[len(shares) // 2] if shares else None


def _about_methods(shapes: Shapes) -> Iterable[LeftOut]:
    """Every registered method that no recipe of the search uses, with the reason."""
    reasons = {
        "rotate_columns": "it adds a product per norm to every token, which only pays beside a sparsity that the "
        "search does not reach; try it with recipes=['rotate_columns,wina']",
        "swap": TRAINING,
        "activation_penalty": RULE,
        "prosparse": RULE,
        "cats": "at equal bytes it lost more than wina and teal wherever the activation gives no zeros of its own; try "
        "it with recipes=['cats']",
        "r_sparse": "two more products per layer pay only beside more sparsity; try it with recipes=['r_sparse']",
        "ppl_sparsity": "it needs thousands of tokens to be stable; try it with recipes=['ppl_sparsity']",
        "fatrelu": "it fits models with ReLU alone, and how much it may drop is yours to choose (`sweep_threshold`)",
        "top_k_mlp": TRAINING,
        "sparkify": TRAINING,
    }
    used = {"rtn", "teal", "wina", "awq"}
    yield LeftOut("rtn and awq at 3 bits", "3 bits are stored in 4 here, so they cost quality and save nothing")
    yield LeftOut(
        "teal and wina with greedy allocation",
        "hundreds of passes over the calibration data; try it with recipes= and allocation: greedy",
    )
    for name in registry.method_names():
        if name not in used:
            yield LeftOut(name, reasons.get(name, "this search does not know the method; try it with recipes="))
    if shapes.inputs and not shapes.scalable:
        why = "; ".join(shapes.refused) or "no norm or layer is known that could take a scale"
        yield LeftOut("awq", f"no set of layers can take its scales: {why}")
    elif shapes.refused:
        yield LeftOut("awq's scale on some layers, which are rounded without one", "; ".join(shapes.refused))
