"""The training of S-KAN in which nodes choose, and are left with what they chose (2024, arXiv:2408.08338).

    full training       all bases learn together, temperature 1
    selective training  loss + entropy * mean over nodes of H(s_j); temperature falls from 1 to `coldest` geometrically;
                        in its last third only the largest share of a node counts
    pruning             at the end of the training each layer becomes what its nodes chose

When to use it: on a model with `SKanLayer`s; then train on for a while, as the pruned model is an ordinary one.
Cost: all bases of the pool in each step.
Our own reading: the phases are the paper's, their lengths and the schedule are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Replace
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.functions.s_kan.s_kan_layer import SKanLayer, choosing

LAST_THIRD = 2 / 3  # of the selective phase


class ChooseBasis(TrainingRule):
    """Let the nodes of S-KAN layers choose their basis, and prune the others at the end.

    Attributes:
        full: share of the training before the selective phase.
        entropy: weight of the gates' entropy in the selective phase.
        coldest: temperature at its end.
        prune: whether the training ends with pruned layers.

    Raises:
        ValueError: a value is out of bounds.
        UnsupportedModelError: when attached, the model has no layer that chooses.
    """

    full: float = Field(0.5, ge=0, lt=1)
    entropy: float = Field(1e-2, ge=0, allow_inf_nan=False)
    coldest: float = Field(0.1, gt=0, le=1)
    prune: bool = True

    keep: ClassVar[Literal["best", "last"]] = "last"

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedChoice:
        layers = choosing(model)
        if not layers:
            raise UnsupportedModelError(
                f"choose_basis: {type(model).__name__} has no SKanLayer, so that nothing is to be chosen; build the "
                f"model with some."
            )
        return AttachedChoice(self, layers)


class AttachedChoice(AttachedRule):
    """The rule at work.

    Args:
        settings: of the rule.
        layers: by path.
    """

    def __init__(self, settings: ChooseBasis, layers: dict[str, SKanLayer]) -> None:
        self.settings, self.layers = settings, layers
        self.done = 0.0  # share of the selective phase

    def before_step(self, progress: float) -> None:
        full = self.settings.full
        self.done = max(0.0, (progress - full) / (1 - full))
        for layer in self.layers.values():
            layer.temperature.fill_(self.settings.coldest**self.done)
            layer.hard.fill_(float(self.done >= LAST_THIRD))

    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        if not self.done or not self.settings.entropy:
            return None
        entropies = [layer.gate_entropy() for layer in self.layers.values()]
        return self.settings.entropy * torch.stack(entropies).mean()

    def report(self) -> dict[str, Any]:
        with torch.no_grad():
            found = [float(layer.gate_entropy()) for layer in self.layers.values()]
        return {"gate_entropy": sum(found) / len(found)}

    def finish(self) -> Iterable[Edit]:
        if self.settings.prune:
            for path, layer in self.layers.items():
                layer.hard.fill_(1.0)  # a training of few steps ends before the last third
                yield Replace(path, layer.pruned())
