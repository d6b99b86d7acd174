"""Quantization-aware training, last step: integers in place of what was trained.

    q_w(W) x  ->  (codes - zero) * scale,      grid(x + before) + after  ->  grid(x - shift), bias + W after

When to use it: behind `fake_quantize` or `ofq` and the training. The frozen model computes what the trained one did, to
rounding; it is small on disk and in memory, is exported like a model that was rounded after training, and cannot be
trained on.
Cost: none.
Settled here: a learned vector behind the inputs becomes part of the bias, one before them their shift, which no other
program's reader of integers knows; learn without (`biases: false`) if the model is to be exported. What rounds the
operands of an attention (`ofq`) stays as it was trained: it stores a step and two vectors, and no weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

from torch import nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.ground.errors import RecipeError
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import Block
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform


class Freeze(Transform):
    """Store integers in place of weights and inputs in training."""

    tags: ClassVar[Tags] = Tags(changes_function="exact", least_coverage=0.0, plans_in_turn=True)
    not_proposed: ClassVar[str] = "it ends a training, which the search does not do"

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        if not any(_in_training(module) for module in trial.model.modules()):
            raise RecipeError(
                "freeze: the model has no weights or inputs in training; apply fake_quantize first, and train it."
            )
        return self

    def targets(self, block: Block) -> Iterable[Target]:
        return [linear for linear in block.linears() if _in_training(linear.module)]

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for name, module in list(block.module.named_modules()):
            if _in_training(module):
                yield Replace(f"{block.path}.{name}".removeprefix("."), module.frozen())  # type: ignore[operator]


def _in_training(module: nn.Module) -> bool:
    return isinstance(module, ActLinear) and module.in_training
