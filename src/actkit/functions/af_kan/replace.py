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

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from actkit.core.model.anatomy import Mlp
from actkit.core.univariate.kan_linear import KanLinear
from actkit.core.univariate.shifted_pairs import COMBINATIONS
from actkit.functions.af_kan.af_kan_layer import AfKanLayer, relu_kan_layer
from actkit.functions.af_kan.reductions import REDUCTIONS
from actkit.functions.replace_layers import ReplaceLayers

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


class AfKan(ReplaceLayers):
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

    kind: Kind = "af_kan"
    grid: int = Field(3, ge=1)
    order: int = Field(3, ge=0)
    act: str = "silu"
    combine: str = "quad1"
    reduce: str = "global_attn"
    scale: Literal["sample", "running"] = "sample"

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

    def layer(self, in_features: int, out_features: int) -> nn.Module:
        return layer_of(self.kind, in_features, out_features, **self.layer_settings)

    def mlp(self, old: Mlp, most: int) -> tuple[nn.Module, str, dict[str, int]]:
        """The one with the most hidden units that has at most the parameters there are."""
        width = old.down.out_features

        def count(hidden: int) -> int:
            with torch.device("meta"):
                made = AfKanMlp(width, hidden, self.kind, **self.layer_settings)
            return sum(parameter.numel() for parameter in made.parameters())

        low, high = 1, max(2, most // width)
        while low < high - 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) <= most else (low, middle)
        made = AfKanMlp(width, low, self.kind, **self.layer_settings)
        return made, f"{self.kind} of width {low} in place of {old.width}", {"hidden": low}


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
