"""What mixes are made of: settings that go layer by layer, what they make of each layer, and what it then reads.

A place is the linear layers that read one tensor of a block (query, key and value; output; gate and up; down): they
share a mask. At each place a mix has a way to store weights, or none, and a selection of inputs, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from actkit.core.layers.linear import ActLinear
from actkit.core.measure.cost import Cost, measure_cost
from actkit.core.model.anatomy import Anatomy
from actkit.core.model.parts import LinearRole
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.transform import Transform

SLOTS = ("weight", "select")
SPARSE = ", sparse"


@dataclass(frozen=True)
class Place:
    """Linear layers of a block that read one tensor.

    Attributes:
        block: its index.
        roles: of the layers.
        paths: of the layers.
    """

    block: int
    roles: tuple[LinearRole, ...]
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """The roles, for tables."""
        return ", ".join(self.roles)


@dataclass(frozen=True)
class LayerBytes:
    """What a layer takes.

    Attributes:
        stored: bytes.
        read: bytes of them that a token reads.
        kind: of the kernel that multiplies it.
    """

    stored: float
    read: float
    kind: str

    def under(self, selection: LayerBytes, original: LayerBytes) -> LayerBytes:
        """Return the same weights with the inputs that a selection keeps, which was seen over the original's weights.

        Args:
            selection: of the same layer.
            original: the layer as it was.
        """
        scores = selection.stored - original.stored
        density = (selection.read - scores) / original.read
        return LayerBytes(self.stored + scores, self.read * density + scores, self.kind + SPARSE)


@dataclass(frozen=True)
class Ingredient:
    """A setting, and what it makes of every layer.

    Attributes:
        name: of the proposal that it comes from.
        transform: with its settings.
        layers: what it takes, by path.
        damage: of each layer, nats per token; empty until it is measured.
        factor: nats of loss that the whole model really lost for each that `damage` adds up to.
    """

    name: str
    transform: Transform
    layers: Mapping[str, LayerBytes]
    damage: Mapping[str, float] = field(default_factory=dict)
    factor: float = 1.0

    @property
    def slot(self) -> str:
        """What it fills: 'weight' or 'select'."""
        return self.transform.slots[0]

    @property
    def total(self) -> float:
        """Its damage if every layer has it, by the sum."""
        return sum(self.damage.values())

    def loss(self, paths: Iterable[str]) -> float:
        """Return the nats of loss that it is expected to cost in some layers.

        Args:
            paths: of the layers.
        """
        return self.factor * sum(self.damage[path] for path in paths)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        layers = {path: [each.stored, each.read, each.kind] for path, each in self.layers.items()}
        recipe = Recipe([self.transform]).dump()
        return {"name": self.name, "recipe": recipe, "layers": layers, "damage": dict(self.damage)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Ingredient:
        """Read what `to_dict` gave."""
        layers = {path: LayerBytes(*each) for path, each in content["layers"].items()}
        return cls(content["name"], Recipe.parse(content["recipe"]).transforms[0], layers, content["damage"])


@dataclass(frozen=True)
class Sample:
    """An ingredient whose damage is not measured yet, with the layers that it puts in place.

    Attributes:
        ingredient: without damage.
        modules: by path.
    """

    ingredient: Ingredient
    modules: Mapping[str, nn.Module]

    @classmethod
    def of(cls, name: str, recipe: Recipe, model: nn.Module, batches: Sequence[Any]) -> Sample | None:
        """Read it off a changed model.

        Args:
            name: of the proposal.
            recipe: that made the model.
            model: the changed model.
            batches: for the share of the inputs that selections keep.

        Returns:
            None if the recipe is not a single setting that can be limited to some layers.
        """
        if not is_ingredient(recipe):
            return None
        modules = {path: module for path, module in model.named_modules() if isinstance(module, ActLinear)}
        taken = layer_bytes(model, measure_cost(model, batches, progress=False), modules)
        return cls(Ingredient(name, recipe.transforms[0], taken), modules)


def is_ingredient(recipe: Recipe) -> bool:
    """Whether a recipe is a single setting that can be limited to some layers, of weights or of a selection."""
    if len(recipe.transforms) != 1:
        return False
    transform = recipe.transforms[0]
    if getattr(transform, "embedding", None) is not None:  # it changes more than layers of blocks
        return False
    alone = transform.slots in tuple((slot,) for slot in SLOTS)
    return alone and transform.only is None and transform.cannot_be_limited(whole_blocks=False) is None


def places_of(view: Anatomy) -> list[Place]:
    """Return the places of a model, in the order of computation; of experts none.

    Args:
        view: of the model.
    """
    found = []
    for index in range(len(view.blocks)):
        for inputs in view.block(index).linear_inputs():
            linears = [linear for linear in inputs.linears if linear.expert is None]
            if linears:
                found.append(Place(index, tuple(x.role for x in linears), tuple(x.path for x in linears)))
    return found


def layer_bytes(model: nn.Module, cost: Cost, paths: Iterable[str]) -> dict[str, LayerBytes]:
    """Return what layers take.

    Args:
        model: as it stands.
        cost: of the model.
        paths: of the layers.
    """
    found = {each.path: each for each in cost.layers}
    return {
        path: LayerBytes(
            float(found[path].weight_bytes),
            float(found[path].bytes_per_token or 0.0),
            kind_of(model.get_submodule(path)),
        )
        for path in paths
    }


def kind_of(layer: nn.Module) -> str:
    """Return by what kernel a layer is multiplied, as far as it matters for its time: '4 bits', 'bfloat16, sparse'.

    Args:
        layer: linear; 'other' for what holds no weight.
    """
    storage: Any = layer.storage if isinstance(layer, ActLinear) else layer
    weight = getattr(storage, "weight", None)
    if isinstance(layer, ActLinear):
        grid = getattr(storage, "grid", None)
        kind = str(storage.dtype).removeprefix("torch.") if grid is None else f"{grid.bits} bits"
        return kind + SPARSE if layer.select is not None else kind
    return "other" if weight is None else str(weight.dtype).removeprefix("torch.")


def reads_of(model: nn.Module, cost: Cost) -> dict[str, float]:
    """Return the bytes per token that a model reads, by the kind of kernel.

    Args:
        model: as it stands.
        cost: of the model.
    """
    modules = dict(model.named_modules())
    found: dict[str, float] = {}
    for each in cost.layers:  # experts count as layers that stand there only while they are opened
        kind = kind_of(modules[each.path]) if each.path in modules else "experts"
        found[kind] = found.get(kind, 0.0) + (each.bytes_per_token or 0.0)
    return found
