"""Adapters by name: which layers get two thin matrices beside them, of which rank, and where these begin.

    y = W x + (alpha / rank) B A x,   B: [out, rank], from zero,   A: [rank, in]

`lora` gives all layers one rank and a random A; `eva` takes both from data. A name of the entry-point group
`actkit.adapters` stands for a class like them. What trains them is `low_rank_training.py`, with the layers of peft.

When to use it: to train a model, or to heal one that was changed, with a hundredth of the trainable numbers.
Cost: two thin products beside each layer while it is trained, nothing once they are merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from actkit.core.ground import registry
from actkit.core.ground.errors import RecipeError
from actkit.core.ground.modules import is_within
from actkit.core.ground.yaml_files import explain, parse_call, shorten
from actkit.core.model.anatomy import Anatomy, Linear, anatomy
from actkit.core.model.parts import Convolution, LinearRole


@dataclass(frozen=True)
class AdaptedLayer:
    """How one layer is adapted.

    Attributes:
        rank: of the change.
        alpha: it is multiplied by alpha / rank.
        start: A to begin with, [rank, in], of a convolution [rank, in x kernel]; None for peft's random one.
    """

    rank: int
    alpha: float
    start: Tensor | None = field(default=None, repr=False)


class Adapter(BaseModel):
    """The settings that all adapters have.

    Attributes:
        rank: of the changes, as a mean over layers.
        alpha: a change is multiplied by alpha / rank; default 2 * rank.
        roles: of the layers in the blocks, such as [query, gate]; all of them if not given.
        also: modules that train whole beside the changes, by patterns of their paths, such as [classifier].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(8, ge=1)
    alpha: float | None = Field(None, gt=0)
    roles: tuple[LinearRole, ...] | None = None
    also: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def layers(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, AdaptedLayer]:
        """Return how which layers are adapted.

        Args:
            model: that is to be trained.
            batches: what it is to be trained on, of which an adapter may read some.

        Returns:
            By the paths of the layers.

        Raises:
            ValueError: the model has no such layers, or one that cannot be adapted.
        """
        raise NotImplementedError

    def whole(self, model: nn.Module) -> tuple[str, ...]:
        """Return which modules train whole.

        Args:
            model: that is to be trained.

        Returns:
            Their paths; of one inside another the outer one.

        Raises:
            ValueError: a pattern of `also` fits no module.
        """
        paths = [path for path, _ in model.named_modules() if path]
        found: list[str] = []
        for pattern in self.also:
            fitting = [path for path in paths if fnmatchcase(path, pattern)]
            if not fitting:
                raise ValueError(
                    f"also: {pattern!r} fits no module; give patterns of paths such as {', '.join(paths[-3:])}."
                )
            found += fitting
        return tuple(
            path for path in dict.fromkeys(found) if not any(is_within(path, each) for each in found if each != path)
        )


class Lora(Adapter):
    """One rank for all layers, and a random start."""

    def layers(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, AdaptedLayer]:
        view = anatomy(model, next(iter(batches), None))
        layer = AdaptedLayer(self.rank, self.scale * self.rank)
        return {linear.path: layer for linear in chain(*adaptable(view, self.roles).values())}


def parse_adapter(source: Any) -> Adapter:
    """Read an adapter.

    Args:
        source: an adapter, 'name', 'name:setting=value,setting=value', or {name: settings}.

    Raises:
        RecipeError: an unknown name or setting, or a value out of bounds.
    """
    if isinstance(source, Adapter):
        return source
    entry = parse_call(source, "adapter") if isinstance(source, str) else source
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RecipeError(
            f"adapter: {shorten(repr(source))} was given; give an adapter, its name, or {{name: settings}}."
        )
    name, settings = next(iter(entry.items()))
    cls = registry.adapter_class(str(name))
    try:
        return cls(**(settings or {}))
    except (ValidationError, TypeError) as error:
        what = explain(error, cls) if isinstance(error, ValidationError) else f"the settings are {settings!r}."
        raise RecipeError(f"adapter: {name}: {what}") from error


def adaptable(view: Anatomy, roles: Iterable[LinearRole] | None) -> dict[int, list[Linear | Convolution]]:
    """Find the layers that adapters stand beside: linear ones, and in a traced model plain Conv2d of one group.

    Args:
        view: of the model.
        roles: of the layers ('layer' in a traced model); None for all that stand in blocks.

    Returns:
        The layers, by block.

    Raises:
        ValueError: no layer has such a role, or one is quantized, packed or among experts that are no layers.
    """
    roles = None if roles is None else tuple(roles)
    by_block: dict[int, list[Linear | Convolution]] = {}
    for block in map(view.block, range(len(view.blocks))):
        closed = block.experts is not None and not block.experts.members
        if closed and (roles is None or {"gate", "up", "down"} & set(roles)):
            raise ValueError(
                f"roles: {block.experts.path} keeps its experts in 3-D parameters, which are no linear layers; apply a "  # type: ignore[union-attr]
                f"transform that opens them first, or leave gate, up and down out."
            )
        plain = [
            each for each in block.convolutions() if isinstance(each.module, nn.Conv2d) and each.module.groups == 1
        ]
        by_block[block.index] = [*plain, *block.linears()]
    chosen = {
        index: [layer for layer in layers if roles is None or _role(layer) in roles]
        for index, layers in by_block.items()
    }
    if not any(chosen.values()):
        found = ", ".join(sorted({_role(layer) for layers in by_block.values() for layer in layers})) or "none"
        given = "all" if roles is None else ", ".join(roles) or "none"
        raise ValueError(f"roles: {given} were given; the blocks of this model have {found}.")
    for layer in chain(*chosen.values()):
        module: Any = layer.module
        if not isinstance(module, nn.Linear | Conv1D | nn.Conv2d) or not module.weight.is_floating_point():
            raise ValueError(
                f"model: {layer.path} ({type(module).__name__}) has a weight that cannot be trained and merged; train "
                f"first and quantize or sparsify this layer after, or leave out the role {_role(layer)!r}."
            )
    return chosen


def _role(layer: Linear | Convolution) -> LinearRole:
    return layer.role if isinstance(layer, Linear) else "layer"
