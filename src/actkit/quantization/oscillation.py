"""Weights that flip back and forth while a model is trained rounded: how many, how often, and how near to a threshold.

    code_t of each weight after step t;  a flip: code_t differs from code_t-1
    an oscillation: a flip against the direction of the last one
    ema <- (1 - momentum) ema + momentum [oscillation]      the share of steps in which a weight oscillates, lately

When to use it: beside any training through `fake_quantize` or `ofq`, to see whether it ends in a point or in a snapshot
of weights that do not settle. `freeze_above` also stops them: a weight whose ema exceeds it is held at the code that it
had on average (iterative freezing, 2022, arXiv:2203.11086), the baseline of `ofq`.
Cost: 8 bytes for each weight (13 with `freeze_above`), and a rounding of all weights in each step.
As in the release of OFQ: the ema and its momentum, and the direction of the last flip. Settled here: a value next to a
threshold counts as another code once it is more than 1e-5 steps beyond it, as rounding alone may move it over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.latent_product import LatentProduct
from actkit.core.layers.latent_weight import LatentWeight
from actkit.core.recipe.rule import AttachedRule, TrainingRule

OSCILLATES = 0.005  # the ema from which a weight counts as one that oscillates
NEAR = 0.05  # steps from a threshold within which a weight counts as near to it
BINS = 10  # of the histogram of distances, from 0 to half a step
TOLERANCE = 1e-5  # steps


class OscillationTracker(TrainingRule):
    """Follow the codes of weights in training.

    Attributes:
        momentum: of the ema.
        freeze_above: hold weights whose ema is larger, at their average code; None holds none.

    Raises:
        ValueError: a value is out of bounds.
    """

    momentum: float = Field(0.01, gt=0, lt=1)
    freeze_above: float | None = Field(None, gt=0, lt=1)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedTracker:
        weights = weights_in_training(model, "oscillation_tracker")
        if self.freeze_above is not None:
            weights = {path: weight for path, weight in weights.items() if not isinstance(weight, LatentProduct)}
        return AttachedTracker(self, weights)


class AttachedTracker(AttachedRule):
    """The tracker at work.

    Args:
        rule: its settings.
        weights: that are followed, by the path of their layer.
    """

    def __init__(self, rule: OscillationTracker, weights: Mapping[str, LatentWeight]) -> None:
        self.rule, self.weights, self.steps = rule, weights, 0
        self.followed = {path: _Followed.of(weight, rule.freeze_above) for path, weight in weights.items()}

    def after_backward(self, progress: float) -> None:
        for path, followed in self.followed.items():
            grad = self.weights[path].tensor.grad if followed.held is not None else None
            if grad is not None and followed.held is not None:
                grad.masked_fill_(followed.held, 0)

    def after_step(self, progress: float) -> None:
        self.steps += 1
        for path, followed in self.followed.items():
            if followed.held is not None:
                followed.hold(self.weights[path])
            followed.follow(self.weights[path], self.rule.momentum, self.rule.freeze_above)

    def report(self) -> dict[str, Any]:
        return {path: self._of(path) for path in self.followed} | {"all": self._of(None)}

    def _of(self, path: str | None) -> dict[str, Any]:
        """The figures of a layer, or of all together."""
        paths = list(self.followed) if path is None else [path]
        followed = [self.followed[each] for each in paths]
        count = sum(each.ema.numel() for each in followed)
        distances = torch.cat([self.weights[each].from_thresholds().flatten() for each in paths])
        bins = torch.histc(distances.clamp(max=0.5), BINS, 0, 0.5).int().tolist()
        figures = {
            "oscillating": sum(int((each.ema > OSCILLATES).sum()) for each in followed) / count,
            "flips per 1000 steps": 1000 * sum(each.flips for each in followed) / count / max(1, self.steps),
            "near a threshold": float((distances <= NEAR).float().mean()),
            "distances": bins,
        }
        if self.rule.freeze_above is not None:
            figures["held"] = sum(int(each.held.sum()) for each in followed if each.held is not None) / count
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "followed": {path: each.state() for path, each in self.followed.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state.get("steps", 0)
        for path, values in state.get("followed", {}).items():
            self.followed[path].take(values)


class _Followed:
    """What is kept of one weight; all [out, in].

    Attributes:
        codes: of the last step.
        direction: of the last flip, -1, 0 or 1.
        ema: of oscillations.
        held: which values are held; None if none ever is.
        average: of the codes, if some may be held.
        flips: how many there were.
    """

    TENSORS = ("codes", "direction", "ema", "held", "average")

    def __init__(self, codes: Tensor, freezes: bool) -> None:
        self.codes = codes.short()
        self.direction = torch.zeros_like(codes, dtype=torch.int8)
        self.ema = torch.zeros(codes.shape, device=codes.device)
        self.held = torch.zeros_like(codes, dtype=torch.bool) if freezes else None
        self.average = codes.float() if freezes else None
        self.flips = 0

    @classmethod
    def of(cls, weight: LatentWeight, freeze_above: float | None) -> _Followed:
        return cls(weight.integers(), freeze_above is not None)

    @torch.no_grad()
    def follow(self, weight: LatentWeight, momentum: float, freeze_above: float | None) -> None:
        places = weight.places()
        stays = (places - self.codes).abs() <= 0.5 + TOLERANCE
        codes = torch.where(stays, self.codes, places.round().clamp_(0, weight.grid.levels).short())
        turned = (codes - self.codes).sign().to(torch.int8)
        flipped = turned != 0
        self.ema.lerp_(((self.direction * turned) == -1).float(), momentum)
        self.direction = torch.where(flipped, turned, self.direction)
        self.flips += int(flipped.sum())
        self.codes = codes
        if self.held is not None and self.average is not None and freeze_above is not None:
            self.held |= self.ema > freeze_above
            self.average = torch.where(self.held, self.average, self.average.lerp(codes.float(), momentum))

    @torch.no_grad()
    def hold(self, weight: LatentWeight) -> None:
        """Put the values that are held in the middle of their code, wherever its scale is now."""
        assert self.average is not None
        codes = self.average.round().clamp(0, weight.grid.levels).to(torch.uint8)
        middle = weight.grid.dequantize(codes, *weight.scales()).to(weight.dtype)
        weight.tensor.copy_(torch.where(self.held, middle, weight.tensor))  # type: ignore[arg-type]

    def state(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.TENSORS if getattr(self, name) is not None}
        return {**found, "flips": self.flips}

    def take(self, values: Mapping[str, Any]) -> None:
        for name in self.TENSORS:
            if name in values:
                setattr(self, name, values[name].to(self.ema.device))
        self.flips = values["flips"]


def weights_in_training(model: nn.Module, rule: str) -> dict[str, LatentWeight]:
    """Return the weights in training of a model, by the path of their layer.

    Args:
        model: any model.
        rule: who asks.

    Raises:
        UnsupportedModelError: there are none.
    """
    named = model.named_modules()
    found = {path.rpartition(".")[0]: module for path, module in named if isinstance(module, LatentWeight)}
    if not found:
        raise UnsupportedModelError(
            f"{rule}: the model has no weights in training; apply fake_quantize or ofq, then train under it."
        )
    return found
