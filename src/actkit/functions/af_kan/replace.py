"""AF-KAN or ReLU-KAN in place of MLPs or single linear layers of a model, to be trained (2025, arXiv:2503.06112).

    mlp(x) = second(first(x)),    first: [..., hidden] -> [..., width],  second: [..., width] -> [..., hidden]
    or one layer(x),              each an AF-KAN layer y = W s(norm(h(x))), or ReLU-KAN's y = W A(x)

When to use it: `af_kan` to try a KAN in a small model of images or tables: in place of the MLPs of its blocks, or of
the layers that you name, such as its head. The weights are drawn anew, so train after it.
Cost: an MLP's hidden width is chosen so that it has at most the parameters of the one before.
Settled here: an MLP is replaced if one module holds both of its layers (ViT, GPT-2, Llama, not BERT); a gated one too,
by an AF-KAN without gate. A single layer becomes a layer of the same widths: AF-KAN's has about its parameters,
ReLU-KAN's grid + order times as many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.ground.errors import EditError
from actkit.core.ground.modules import is_within
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.model.anatomy import Anatomy, Block, Linear, Mlp, is_linear
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.univariate.kan_linear import KanLinear
from actkit.core.univariate.shifted_pairs import COMBINATIONS
from actkit.functions.af_kan.af_kan_layer import AfKanLayer, relu_kan_layer
from actkit.functions.af_kan.reductions import REDUCTIONS

Kind = Literal["af_kan", "relu_kan"]


class AfKanMlp(nn.Module):
    """Two layers in place of an MLP: [..., width] -> [..., width].

    Args:
        width: of input and output.
        hidden: between the layers.
        kind: of both layers.
        settings: of an AF-KAN layer, or of `relu_kan_layer`.
    """

    linear_inputs: ClassVar[tuple[tuple[str | None, tuple[str, ...]], ...]] = (
        (None, ("up.coefficients",)),
        (None, ("down.coefficients",)),
    )

    def __init__(self, width: int, hidden: int, kind: Kind = "af_kan", **settings: Any) -> None:
        super().__init__()
        self.width, self.hidden, self.kind, self.settings = width, hidden, kind, settings
        self.up = layer_of(kind, width, hidden, **settings)
        self.down = layer_of(kind, hidden, width, **settings)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        return self.down(self.up(x))

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"width": self.width, "hidden": self.hidden, "kind": self.kind, "settings": dict(self.settings)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> AfKanMlp:
        """The MLP that `spec` described, in the dtype of what stood there; its values come from the checkpoint."""
        made = cls(spec["width"], spec["hidden"], spec["kind"], **spec["settings"])
        like = None if original is None else next(original.parameters(), None)
        return made if like is None else made.to(like.dtype)


class AfKan(Transform):
    """Replace MLPs, or the linear layers that are named, by KAN layers with weights drawn anew.

    Attributes:
        where: None for the MLPs of all blocks; else paths or patterns of linear layers.
        kind: 'af_kan' or 'relu_kan'.
        grid: intervals of [0, 1].
        order: how far a pair reaches over its interval.
        act: the function of AF-KAN, by name.
        combine: how AF-KAN combines a pair.
        reduce: how AF-KAN reduces the values of an input.
        scale: by what AF-KAN brings values to [0, 1].
        seed: of the weights.

    Raises:
        ValueError: a value is out of bounds.
        EditError: when applied, an entry of `where` names no linear layer.
    """

    where: tuple[str, ...] | None = None
    kind: Kind = "af_kan"
    grid: int = Field(3, ge=1)
    order: int = Field(3, ge=0)
    act: str = "silu"
    combine: str = "quad1"
    reduce: str = "global_attn"
    scale: Literal["sample", "running"] = "sample"
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(least_coverage=0.0)
    not_proposed: ClassVar[str] = "its weights are drawn anew, so that the model must be trained after it"
    _paths: tuple[str, ...] = PrivateAttr(default=())

    @field_validator("combine")
    @classmethod
    def _is_a_combination(cls, combine: str) -> str:
        if combine not in COMBINATIONS:
            raise ValueError(f"give one of {', '.join(COMBINATIONS)}")
        return combine

    @field_validator("reduce")
    @classmethod
    def _is_a_reduction(cls, reduce: str) -> str:
        if reduce not in REDUCTIONS:
            raise ValueError(f"give one of {', '.join(REDUCTIONS)}")
        return reduce

    @property
    def layer_settings(self) -> dict[str, Any]:
        """Of every layer, as JSON takes them."""
        names = ("grid", "order") if self.kind == "relu_kan" else ("grid", "order", "act", "combine", "reduce", "scale")
        return {name: getattr(self, name) for name in names}

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        layer_of(self.kind, 4, 4, **self.layer_settings)  # raises what is wrong with the settings together
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
        found = [mlp for _, mlp in block.mlps() if self._reason(mlp) is None]
        return [linear for mlp in found for linear in (*mlp.inputs, mlp.down)]

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            return f"it would take out what the {earlier.slots[0]} slot was filled for; put af_kan first, and train"
        return None

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if self.where is not None:
            for path in self._paths:
                if is_within(path, block.path):
                    yield self._layer(path, get_module(block.root, path))
            return
        if not block.mlps():
            yield Skip(block.path or "model", "actkit knows no MLP here; name linear layers by `where`")
        for number, (_, mlp) in enumerate(block.mlps()):
            reason = self._reason(mlp)
            if reason is not None:
                yield Skip(mlp.path, reason)
                continue
            old = get_module(block.root, mlp.path)
            width = mlp.down.out_features
            most = sum(parameter.numel() for parameter in old.parameters())
            with own_random_numbers(torch.device("cpu"), self.seed + 1000 * block.index + number):
                made = self._widest(width, most)
            kept = sum(parameter.numel() for parameter in made.parameters())
            yield Replace(mlp.path, made.to(mlp.up.weight.dtype).train(old.training))
            text = f"{self.kind} of width {made.hidden} in place of {mlp.width}: {kept} parameters, {most} before"
            yield Note(mlp.path, text, {"hidden": made.hidden, "parameters": kept, "before": most})

    def edit_ends(self, view: Anatomy) -> Iterable[Edit]:
        for path in self._paths:
            if not any(is_within(path, block.path) for block in view.blocks):
                yield self._layer(path, get_module(view.model, path))

    def _widest(self, width: int, most: int) -> AfKanMlp:
        """The MLP with the most hidden units that has at most so many parameters."""

        def count(hidden: int) -> int:
            with torch.device("meta"):
                made = AfKanMlp(width, hidden, self.kind, **self.layer_settings)
            return sum(parameter.numel() for parameter in made.parameters())

        low, high = 1, max(2, most // width)
        while low < high - 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) <= most else (low, middle)
        return AfKanMlp(width, low, self.kind, **self.layer_settings)

    def _layer(self, path: str, old: nn.Module) -> Replace:
        linear = Linear(path, "layer", old)
        with own_random_numbers(torch.device("cpu"), self.seed + sum(map(ord, path))):
            made = layer_of(self.kind, linear.in_features, linear.out_features, **self.layer_settings)
        return Replace(path, made.to(linear.weight.dtype).train(old.training))

    def _reason(self, mlp: Mlp) -> str | None:
        """Why an MLP is left as it is, or None."""
        if mlp.up.expert is not None:
            return "experts are left as they are"
        if not all(linear.path.startswith(f"{mlp.path}.") for linear in (*mlp.inputs, mlp.down)):
            return "its two layers lie in different modules; name them by `where`"
        return None


def layer_of(kind: Kind, in_features: int, out_features: int, **settings: Any) -> AfKanLayer | KanLinear:
    """Make a layer.

    Args:
        kind: 'af_kan' or 'relu_kan'.
        in_features: channels of its input.
        out_features: channels of its output.
        settings: as in `AfKanLayer` or `relu_kan_layer`.

    Returns:
        The layer.

    Raises:
        ValueError: an unknown kind, or what the layer refuses.
    """
    if kind == "relu_kan":
        return relu_kan_layer(in_features, out_features, **settings)
    if kind != "af_kan":
        raise ValueError(f"kind: {kind!r} was given, allowed are 'af_kan' and 'relu_kan'.")
    return AfKanLayer(in_features, out_features, **settings)
