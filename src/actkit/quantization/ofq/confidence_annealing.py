"""Confidence-guided annealing: at the end of a training only undecided weights move (OFQ, 2023, arXiv:2302.02210).

    a weight is undecided if it lies within `boundary` steps of a threshold between two codes
    in each step, for all others:  gradient <- 0,  and after the optimizer's step  W <- W before it

Which weights are undecided is found anew in each step, from the weights as they are: once a weight has left the band it
stays where it is. It is put back because a gradient of 0 alone does not hold it: momentum and weight decay move on.
When to use it: a short training (the paper: 30 epochs after 300) at the last, small learning rate, on a model that was
trained through `ofq` or `fake_quantize`, if `oscillation_tracker` finds weights that flip.
Cost: a copy of the weights while a step is made.
As in the release: the scales of rows are found from all weights, so that values of held weights still drift a little;
inside the product of query and key weights, products outside of the band give no gradient, and their factors move.
Settled here: biases, norms, steps and whatever else trains go on training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.layers.latent_product import LatentProduct
from actkit.core.layers.latent_weight import LatentWeight
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.quantization.oscillation import weights_in_training


class ConfidenceAnnealing(TrainingRule):
    """Let only weights near a threshold move.

    Attributes:
        boundary: how near, in steps; the paper tried 0.003 to 0.01.

    Raises:
        ValueError: the value is out of bounds.
    """

    boundary: float = Field(0.005, gt=0, le=0.5)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedAnnealing:
        return AttachedAnnealing(weights_in_training(model, "confidence_annealing"), self.boundary)


class AttachedAnnealing(AttachedRule):
    """The rule at work.

    Args:
        weights: that are held, by the path of their layer.
        boundary: how near a weight is to a threshold that may move.
    """

    def __init__(self, weights: Mapping[str, LatentWeight], boundary: float) -> None:
        self.boundary = boundary
        self.products = [weight for weight in weights.values() if isinstance(weight, LatentProduct)]
        self.single = [weight for weight in weights.values() if not isinstance(weight, LatentProduct)]
        self.before: list[tuple[Tensor, Tensor]] = []  # which values stay, and all of them, of each weight
        self.moved = 0
        for product in self.products:
            product.boundary = boundary

    @torch.no_grad()
    def after_backward(self, progress: float) -> None:
        self.before = []
        for weight in self.single:
            decided = freeze_mask(weight, self.boundary)
            if weight.tensor.grad is not None:
                weight.tensor.grad.masked_fill_(decided, 0)
            self.before.append((decided, weight.tensor.detach().clone()))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        for weight, (decided, before) in zip(self.single, self.before, strict=True):
            weight.tensor.copy_(torch.where(decided, before, weight.tensor))
        self.moved = sum(int((~decided).sum()) for decided, _ in self.before)
        self.before = []

    def report(self) -> dict[str, Any]:
        count = sum(weight.tensor.numel() for weight in self.single)
        return {"undecided": self.moved / max(1, count)}

    def detach(self) -> None:
        for product in self.products:
            product.boundary = None


def freeze_mask(weight: LatentWeight, boundary: float) -> Tensor:
    """Return which values of a weight in training are decided: bool [out, in].

    Args:
        weight: any.
        boundary: values within so many steps of a threshold are not.
    """
    return weight.from_thresholds() > boundary
