"""Series activations and augmented shortcuts, put into a trained model: from PanGu-pi (2023, arXiv:2312.17276).

    block(x):  h = x + attention(norm x) + shortcut(norm x),   h + down( series(gate h') * up h' ),   h' = norm h

Both parts start so that the model computes what it did: the series as its first term alone, the shortcut at 0. What
they are worth shows after training. The paper trains models of these blocks from scratch, with fewer layers than usual
at the same number of parameters; apply it to a model with random weights for that.

When to use it: before a fine-tuning or a training from scratch; `diversity` says whether a model's tokens become alike
with depth, which these parts are meant against.
Cost: no calibration. 2 n numbers per hidden unit, and 2 d^2 / ratio weights per layer; 3 to 4 % more time per token in
the paper. The CPU decoder leaves such a model to transformers.
Settled here: an activation that the series could not start from (ReLU, whose slope at 0 is 0) is left, with the reason;
so are experts that are not opened. Scales no longer move from the norm into the attention (`awq`, `smooth`), as the
shortcut reads the norm too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import nn

from actkit.core.edit.edits import Edit, Note, Replace, Set, Skip, get_module, temporarily
from actkit.core.ground.errors import DataError, RecipeError
from actkit.core.ground.random_numbers import own_random_numbers
from actkit.core.model.anatomy import Attention, Block
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform
from actkit.functions.pangu_pi.series import SeriesActivation, why_no_start
from actkit.functions.pangu_pi.shortcut import AugmentedAttention, AugmentedResidual, AugmentedShortcut


class AddNonlinearity(Transform):
    """Make each activation of an MLP the first term of a series, and put a shortcut beside each attention.

    Attributes:
        series: terms; 1 for none added.
        ratio: how many times narrower than the hidden states the shortcut is; None for no shortcut.
        paths: shortcuts per attention.
        seed: of their first layers.

    Raises:
        RecipeError: when applied, the ratio exceeds the width of the hidden states.
    """

    series: int = Field(2, ge=1)
    ratio: int | None = Field(32, ge=1)
    paths: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)

    tags: ClassVar[Tags] = Tags(changes_function="exact", least_coverage=0.25)
    not_proposed: ClassVar[str] = "it makes a model larger, which pays only after training"

    @classmethod
    def identity(cls) -> Self:
        return cls(series=1, ratio=None)

    def targets(self, block: Block) -> Iterable[Target]:
        if self.series > 1:
            yield from (mlp.activation for _, mlp in block.mlps())
        if self.ratio is not None and block.attention is not None:
            yield from (*block.attention.inputs, block.attention.output)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if self.series > 1:
            yield from self._series(block)
        if self.ratio is not None:
            yield from self._shortcut(block)

    def _series(self, block: Block) -> Iterator[Edit | Skip]:
        if not block.mlps():
            yield Skip(block.path or "model", "no MLP with an activation module; experts must be opened first")
        for _, mlp in block.mlps():
            base = get_module(block.root, mlp.activation)
            reason = "it is a series already" if isinstance(base, SeriesActivation) else why_no_start(base)
            if reason is not None:
                yield Skip(mlp.activation, reason)
            else:
                series = SeriesActivation(base, self.series, mlp.width)
                yield Replace(mlp.activation, series.to(mlp.down.weight.device).train(base.training))

    def _shortcut(self, block: Block) -> Iterator[Edit | Skip]:
        attention = block.attention
        if attention is None:
            yield Skip(block.path or "model", "no attention that actkit reads as a module of its own")
            return
        features = attention.inputs[0].in_features
        assert self.ratio is not None
        if self.ratio > features:
            raise RecipeError(
                f"ratio: {self.ratio} was given, and {attention.path} reads {features} channels, so that the shortcut "
                f"would have no units; give at most {features}."
            )
        path, kind = _place(attention, block)
        if kind is None:
            yield Skip(path, "its norm is inside of the attention, and nothing else takes the residual there")
            return
        weight = attention.output.weight
        with own_random_numbers(torch.device("cpu"), self.seed + block.index):
            shortcut = AugmentedShortcut(features, self.ratio, paths=self.paths)
        inner = get_module(block.root, path)
        yield Replace(path, kind(inner, shortcut.to(weight.device, weight.dtype)).train(inner.training))


def _place(attention: Attention, block: Block) -> tuple[str, Any]:
    """Where the shortcut goes: around the attention, or around BERT's sum inside of it; None if there is no place."""
    inside = [norm for norm in block.norms if norm.feeds_residual and norm.path.startswith(attention.path + ".")]
    if not inside:
        return attention.path, AugmentedAttention
    path = inside[0].path.rpartition(".")[0]
    known = "input_tensor" in inspect.signature(get_module(block.root, path).forward).parameters
    return path, AugmentedResidual if known else None


@contextmanager
def without_nonlinearity(model: nn.Module, *, series: bool = True, shortcuts: bool = True) -> Iterator[nn.Module]:
    """Switch the added parts off for as long as a context lasts: what are they worth in a trained model?

        with without_nonlinearity(model, series=False) as ablated:
            measure(ablated)

    Args:
        model: that `AddNonlinearity` was applied to; changed in place, and as before at the end.
        series: of each series only the first term stays, as it was learned.
        shortcuts: the last layer of each shortcut is 0.

    Raises:
        DataError: the model has none of what is to be switched off.
    """
    edits: list[Edit] = []
    for path, module in model.named_modules():
        if series and isinstance(module, SeriesActivation):
            for name in ("scale", "shift"):
                value = module.get_parameter(name).detach().clone()
                value[1:] = 0
                edits.append(Set(f"{path}.{name}", value))
        if shortcuts and isinstance(module, AugmentedShortcut):
            edits += [Set(f"{path}.up.{index}.weight", 0 * up.weight.detach()) for index, up in enumerate(module.up)]  # type: ignore[operator]
    if not edits:
        raise DataError(
            f"model: this {type(model).__name__} has nothing to switch off; apply the transform add_nonlinearity first."
        )
    with temporarily(model, edits) as changed:
        yield changed
