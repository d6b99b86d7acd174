"""Top-k Transformer: of each token's hidden values in an MLP only the k largest stay (2022, arXiv:2210.06313).

    f(x) = down( top_k( act(up x) ) )            top_k: all entries of a token but the k largest become 0
    f(x) = down( top_k( act(gate x) ) * up x )   if the MLP is gated: top-k acts on the gate's output

No new parameters; k = all neurons is the ordinary MLP. A gradient flows only through the entries that are kept. It is
meant to be in place from the first training step; put into a trained model it changes the function. If a token has
fewer than k positive values after a ReLU, its zeros stay zeros.
When to use it: before you train: it belongs in a model from the first step. To learn whether a trained model has
zeros that can be skipped at all, run `neuron_activity` instead; to cut a trained model, take a method with thresholds
(`cats`, `teal`, `ppl_sparsity`).
Cost: the choice of the k largest per token, here exact. The authors use an operator of TPUs that finds most of them;
an estimate from mean and variance, which needs no sorting, is the transform `sparkify`. A gain in speed needs a kernel
that skips the zeros of the down projection.
Left open by the paper: gated MLPs (here the gate's output, whose zeros are zeros of the product), ties (here the first
of equal values, so that exactly k survive), and activations other than ReLU, for which `by="abs"` keeps by magnitude.
How few neurons fire without any top-k is measured by `neuron_activity`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import field_validator
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.ground.errors import RecipeError
from actkit.core.ground.largest import largest
from actkit.core.layers.activation_function import Axis
from actkit.core.layers.activations import Activation, is_activation
from actkit.core.layers.folding import ScaledActivation
from actkit.core.model.anatomy import Block, Linear
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform

By = Literal["value", "abs"]


class TopKActivation(nn.Module):
    """An activation of which each token keeps its k largest outputs; the others become 0.

    Of equal outputs the first ones are kept, so that exactly k are. NaN is always kept, so that it is seen.

    Args:
        base: the activation.
        k: how many of the channels (the last dimension) to keep, or as a float their share, in (0, 1].
        by: what is compared: 'value', the outputs, or 'abs', their magnitudes.

    Raises:
        ValueError: k is out of bounds (at the call, if k exceeds the channels), or `by` is unknown.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ("channels",)
    gives_zeros: ClassVar[bool] = True

    def __init__(self, base: nn.Module, k: int | float, by: By = "value") -> None:
        super().__init__()
        if by not in ("value", "abs"):
            raise ValueError(f"by: {by!r} was given, allowed are 'value' and 'abs'.")
        self.base, self.k, self.by = base, checked_k(k), by

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to x [..., channels]; the shape stays."""
        y = self.base(x)
        score = y.detach() if self.by == "value" else y.detach().abs()
        kept = largest(score, neurons_kept(self.k, y.shape[-1]))
        return torch.where(kept, y, torch.zeros((), dtype=y.dtype, device=y.device))

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return {"k": self.k, "by": self.by}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module) -> TopKActivation:
        """Make it around the activation that stands in its place."""
        return cls(original, spec["k"], spec["by"])

    def extra_repr(self) -> str:
        return f"k={self.k}, by={self.by!r}"


class TopKMlp(Transform):
    """Keep the k largest hidden values of each token in every MLP; if it is gated, of the gate's output.

    In a traced model, every activation module between two linear layers is changed.

    Attributes:
        k: an integer is a number of neurons, a float a share of them (the paper's are 0.04 for T5, 0.08 for ViT).
        activation: 'relu' also replaces the activation by ReLU, as the paper does with GELU; None leaves it.
        by: 'value' as in the paper, or 'abs', which suits activations with negative outputs.

    Raises:
        RecipeError: when applied, an MLP has fewer than k neurons.
    """

    k: int | float = 0.0625
    activation: Literal["relu"] | None = None
    by: By = "value"

    tags: ClassVar[Tags] = Tags(least_coverage=0.25)
    not_proposed: ClassVar[str] = "another activation function changes the model, and pays only after training"

    @field_validator("k", mode="before")
    @classmethod
    def _in_bounds(cls, k: Any) -> Any:
        return checked_k(k)

    @classmethod
    def identity(cls) -> Self:
        return cls(k=1.0)

    def targets(self, block: Block) -> Iterable[str]:
        return block.nonlinearities()

    def conflicts(self, earlier: Transform) -> str | None:
        if {"select", "inputs"} & set(earlier.slots):
            return "its thresholds or scales were calibrated on activations that the top-k would change; top-k first"
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        places = {mlp.activation: mlp.width for _, mlp in block.mlps()}
        for place in self._traced(block):
            if isinstance(place, Skip):
                yield place
            else:
                path, neurons = place
                places[path] = min(neurons, places.get(path, neurons))  # one module may serve several layers
        if not places:
            yield Skip(block.path or "model", "no MLP with an activation module")
        for path, neurons in places.items():
            if self.k > neurons:
                raise RecipeError(
                    f"k: {self.k} was given, the MLP at {path} has {neurons} neurons; give at most that, or a share."
                )
            # a scale that an equalization divides by stays outermost, so that the unscaled values are compared
            while isinstance(get_module(block.root, path), ScaledActivation):
                path += ".activation"
            if self.activation is not None:
                yield Replace(path, Activation(self.activation))
            yield Replace(path, TopKActivation(get_module(block.root, path), self.k, self.by))

    def _traced(self, block: Block) -> Iterator[tuple[str, int] | Skip]:
        """Yield path and neurons of each activation module of a traced model, or why it is left alone."""
        modules = dict(block.module.named_modules())
        for chain in block.chains:
            module = modules.get(chain.nonlinearity)
            if not (isinstance(chain.first, Linear) and isinstance(chain.second, Linear)):
                yield Skip(chain.nonlinearity, "it stands at a convolution, whose channels are not the last dimension")
            elif module is None or not is_activation(module):
                yield Skip(chain.nonlinearity, f"before {chain.second.path}: no activation module to put top-k around")
            else:
                yield chain.nonlinearity, chain.first.out_features


def neurons_kept(k: int | float, channels: int) -> int:
    """Return the number that k stands for.

    Args:
        k: a number, which stands for itself, or as a float a share of the channels.
        channels: how many there are.

    Returns:
        The number; of a share, rounded, at least 1.

    Raises:
        ValueError: it exceeds the channels.
    """
    if isinstance(k, float):
        return max(1, round(k * channels))
    if k > channels:
        raise ValueError(f"k: {k} was given for {channels} channels; give at most that, or a share as a float.")
    return k


def checked_k(k: Any) -> int | float:
    """Return k as it is. Raises ValueError for anything but an integer from 1 on or a float in (0, 1]."""
    whole = isinstance(k, int) and not isinstance(k, bool) and k >= 1
    share = isinstance(k, float) and 0 < k <= 1
    if not (whole or share):
        raise ValueError(
            f"k: {k!r} was given; give a number of neurons from 1 on, or a share of them as a float in (0, 1]."
        )
    return k
