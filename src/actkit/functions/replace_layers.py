"""What methods share that put layers of their own, with weights drawn anew, in the place of a model's layers.

Without `where` they replace the MLPs of all blocks, if one module holds both of an MLP's layers (ViT, GPT-2, Llama, not
BERT); with it the linear layers that are named, anywhere in the model. Subclasses say what comes there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, PrivateAttr
from torch import nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.ground.errors import EditError
from actkit.core.ground.modules import is_within
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.model.anatomy import Anatomy, Block, Linear, Mlp, is_linear
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform

CPU = torch.device("cpu")


class ReplaceLayers(Transform):
    """Replace MLPs, or the linear layers that are named, by layers with weights drawn anew.

    Attributes:
        where: None for the MLPs of all blocks; else paths or patterns of linear layers.
        seed: of the weights.

    Raises:
        ValueError: a value is out of bounds.
        EditError: when applied, an entry of `where` names no linear layer.
    """

    where: tuple[str, ...] | None = None
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(least_coverage=0.0)
    not_proposed: ClassVar[str] = "its weights are drawn anew, so that the model must be trained after it"
    _paths: tuple[str, ...] = PrivateAttr(default=())

    def layer(self, in_features: int, out_features: int) -> nn.Module:
        """What comes in the place of a linear layer.

        Args:
            in_features: channels of its input.
            out_features: channels of its output.

        Returns:
            A new module.

        Raises:
            ValueError: the settings do not go together.
        """
        raise NotImplementedError

    def mlp(self, old: Mlp, most: int) -> tuple[nn.Module, str, dict[str, int]]:
        """What comes in the place of an MLP.

        Args:
            old: what there is.
            most: parameters of it.

        Returns:
            A new module; what it is, for the note; and figures for it.
        """
        raise NotImplementedError

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        self.layer(4, 4)  # raises what is wrong with the settings together
        planned = self.model_copy()
        if self.where is None:
            return planned
        found: dict[str, None] = {}
        for entry in self.where:
            named = {path: module for path, module in trial.model.named_modules() if fnmatchcase(path, entry)}
            linear = [path for path, module in named.items() if is_linear(module)]
            if not linear:
                what = f"a {type(next(iter(named.values()))).__name__}" if named else "nothing"
                raise EditError(f"where: {entry!r} names {what}; give the path or a pattern of linear layers.")
            found |= dict.fromkeys(linear)
        planned._paths = tuple(found)
        return planned

    def targets(self, block: Block) -> Iterable[Linear]:
        if self.where is not None:
            return [linear for linear in block.linears() if linear.path in self._paths]
        found = [mlp for _, mlp in block.mlps() if _reason(mlp) is None]
        return [linear for mlp in found for linear in (*mlp.inputs, mlp.down)]

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            slot = earlier.slots[0]
            return f"it would take out what the {slot} slot was filled for; put {self.name} first, and train"
        return None

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if self.where is not None:
            for path in self._paths:
                if is_within(path, block.path):
                    yield self._replaced(path, get_module(block.root, path))
            return
        if not block.mlps():
            yield Skip(block.path or "model", "actkit knows no MLP here; name linear layers by `where`")
        for number, (_, mlp) in enumerate(block.mlps()):
            reason = _reason(mlp)
            if reason is not None:
                yield Skip(mlp.path, reason)
                continue
            old = get_module(block.root, mlp.path)
            most = sum(parameter.numel() for parameter in old.parameters())
            with own_random_numbers(CPU, self.seed + 1000 * block.index + number):
                made, text, values = self.mlp(mlp, most)
            kept = sum(parameter.numel() for parameter in made.parameters())
            yield Replace(mlp.path, made.to(mlp.up.weight.dtype).train(old.training))
            figures = {**values, "parameters": kept, "before": most}
            yield Note(mlp.path, f"{text}: {kept} parameters, {most} before", figures)

    def edit_ends(self, view: Anatomy) -> Iterable[Edit]:
        for path in self._paths:
            if not any(is_within(path, block.path) for block in view.blocks):
                yield self._replaced(path, get_module(view.model, path))

    def _replaced(self, path: str, old: nn.Module) -> Replace:
        linear = Linear(path, "layer", old)
        with own_random_numbers(CPU, self.seed + sum(map(ord, path))):
            made = self.layer(linear.in_features, linear.out_features)
        return Replace(path, made.to(linear.weight.dtype).train(old.training))


def _reason(mlp: Mlp) -> str | None:
    """Why an MLP is left as it is, or None."""
    if mlp.up.expert is not None:
        return "experts are left as they are"
    if not all(linear.path.startswith(f"{mlp.path}.") for linear in (*mlp.inputs, mlp.down)):
        return "its two layers lie in different modules; name them by `where`"
    return None
