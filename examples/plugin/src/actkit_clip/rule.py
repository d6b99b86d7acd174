"""Train a model whose activations stay small, so that `clip` has little to cut off: a training rule.

    loss + weight * sum over MLPs of the mean over tokens and neurons of max(|f(x)| - limit, 0)^2

Cost: the outputs of the activation functions are kept for the backward pass, as they mostly are anyway.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.forward.hooks import hooked
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.rule import AttachedRule, TrainingRule


class LimitPenalty(TrainingRule):
    """Penalise activations above a limit. Experts are left alone.

    Attributes:
        weight: of the penalty.
        limit: the magnitude up to which an activation costs nothing.
        only: patterns of the names of the parameters that train; all that require a gradient if empty.
    """

    weight: float = Field(0.1, ge=0, allow_inf_nan=False)
    limit: float = Field(1.0, gt=0, allow_inf_nan=False)
    only: tuple[str, ...] = ()

    def trainable(self, model: nn.Module) -> tuple[str, ...] | None:
        return self.only or None

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedRule:
        blocks = anatomy(model, example).blocks
        return AttachedLimit(self, model, [block.mlp.activation for block in blocks if block.mlp is not None])


class AttachedLimit(AttachedRule):
    """The rule at work on one model; it keeps no state between steps."""

    def __init__(self, settings: LimitPenalty, model: nn.Module, activations: list[str]) -> None:
        self.settings, self.seen, self.beyond = settings, [], 0.0
        with ExitStack() as stack:
            begin = {"": lambda *_: self.seen.clear()}  # each pass anew, one that only evaluates too
            stack.enter_context(hooked(model, before=begin, after=dict.fromkeys(activations, self._see)))
            self._remove = stack.pop_all().close

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self.seen.append(output)

    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        total = 0.0
        for x in self.seen:  # [batch, length, neurons]
            cost = (x.float().abs() - self.settings.limit).relu().square().mean(-1)
            real = torch.ones_like(cost) if mask is None else mask.to(cost)
            self.beyond = float((x.detach().abs() > self.settings.limit).any(-1)[real > 0].float().mean())
            total = total + (cost * real).sum() / real.sum()
        self.seen.clear()
        return self.settings.weight * total if isinstance(total, Tensor) else None

    def report(self) -> dict[str, Any]:
        """The share of tokens of the last batch with an activation beyond the limit, in the last MLP."""
        return {"beyond": self.beyond}

    def detach(self) -> None:
        self._remove()
        self.seen.clear()
