"""Penalise activations while training, so that more of them become zero: L1 or Hoyer, with a schedule.

    loss + factor * sum over sites of penalty(x)
    l1:     mean over tokens of |x|, its mean (or sum) over channels
    hoyer:  mean over tokens of (sum |x|)^2 / (channels * sum x^2): between 1 / channels (one active) and 1 (all alike)

When to use it: while training a model whose activation function can be 0 (after `swap` to ReLU), to be followed by a
method that skips zeros. `prosparse` is L1 with the paper's schedule.
Cost: the activations of the sites are kept for the backward pass, as they mostly are anyway. L1 shrinks the scale of
the activations too; Hoyer, the square of Hoyer's measure (2020, arXiv:1908.09979), ignores scale.
Factors are comparable only at the same measure and reduction. Means are over real tokens; padding is left out.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from actkit.core.forward.hooks import hooked
from actkit.core.model.anatomy import Anatomy, Site, Tap, anatomy
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.core.train.rules import refuse_reentrant_checkpointing
from actkit.core.watch.capture import live, resolve
from actkit.core.watch.rows import channels_last


class ActivationPenalty(TrainingRule):
    """Add a penalty on activations to the loss.

    Attributes:
        weight: the factor when the schedule is at 1.
        measure: 'l1' or 'hoyer', see above.
        sites: as in `capture.live`; a name without a block means that site in every block.
        reduction: over channels, for 'l1'.
        schedule: points (share of the training that is done, factor relative to `weight`); flat before the first and
            after the last.
        interpolation: between the points; 'cosine' is half a period, flat at both ends.

    Raises:
        ValueError: a value is out of bounds.
    """

    weight: float = Field(1e-3, ge=0, allow_inf_nan=False)
    measure: Literal["l1", "hoyer"] = "l1"
    sites: tuple[str, ...] = Field(("mlp.hidden",), min_length=1)
    reduction: Literal["mean", "sum"] = "mean"
    schedule: tuple[tuple[float, float], ...] = Field(((0.0, 1.0),), min_length=1)
    interpolation: Literal["linear", "cosine", "step"] = "linear"

    keep: ClassVar[Literal["best", "last"]] = "last"

    @field_validator("sites", mode="before")
    @classmethod
    def _several(cls, sites: Any) -> Any:
        return (sites,) if isinstance(sites, str) else sites

    @field_validator("schedule")
    @classmethod
    def _in_order(cls, schedule: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        shares = [share for share, _ in schedule]
        if any(later <= earlier for earlier, later in pairwise(shares)):
            raise ValueError("its shares must rise")
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError("its shares must lie in 0 to 1")
        if not all(0 <= factor < math.inf for _, factor in schedule):
            raise ValueError("its factors must be 0 or more")
        return schedule

    def factor(self, progress: float) -> float:
        """Return what the penalty is multiplied by when a share `progress` of the training is done."""
        points = self.schedule
        if progress <= points[0][0]:
            return self.weight * points[0][1]
        for (start, before), (end, after) in pairwise(points):
            if progress < end:
                done = (progress - start) / (end - start)
                done = {"linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2, "step": 0.0}[self.interpolation]
                return self.weight * (before + done * (after - before))
        return self.weight * points[-1][1]

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedPenalty:
        """Start penalising.

        Args:
            model: the model that is trained.
            optimizer: not needed.
            example: a batch, to trace a model whose architecture is not known.

        Returns:
            The penalty at work.

        Raises:
            ValueError: a site is unknown.
            UnsupportedModelError: the model's activations have no graph.
        """
        refuse_reentrant_checkpointing(model)
        return AttachedPenalty(self, anatomy(model, example))


class AttachedPenalty(AttachedRule):
    """An activation penalty at work.

    Attributes:
        factor: what the penalty is multiplied by now.
    """

    def __init__(self, settings: ActivationPenalty, view: Anatomy) -> None:
        self.settings = settings
        self.factor = settings.factor(0.0)
        self._taps = {site: view.tap(view.canonical(site)) for site in resolve(view, dict.fromkeys(settings.sites))}
        with ExitStack() as stack:
            # each pass of the model begins anew, even one that only evaluates, so that nothing piles up
            stack.enter_context(hooked(view.model, before={"": lambda *_: self._activations.clear()}))
            self._activations = stack.enter_context(live(view.model, self._taps, view))
            self._detach = stack.pop_all().close

    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        """Return the penalty of the last forward pass, to be added to the loss.

        Args:
            mask: [batch, length], 0 for padding; None if no token is padding.
            batch: not read, as the activations were recorded.
            output: not read either.

        Raises:
            ValueError: the last forward pass left no activations with a graph.
        """
        factor = self.factor
        if factor == 0:
            self._activations.clear()
            return None
        seen = [(site, x) for site, tensors in self._activations.items() for x in tensors]
        self._activations.clear()
        if not any(x.requires_grad for _, x in seen) and torch.is_grad_enabled():
            raise ValueError(
                f"ActivationPenalty: the last forward pass left {len(seen)} activations and none has a graph, so the "
                f"penalty would do nothing. Call penalty() once after each forward pass of the model; what produces "
                f"the activations must be trainable, and gradient checkpointing not re-entrant."
            )
        device = seen[-1][1].device
        return factor * torch.stack([self._measure(site, x, mask).to(device) for site, x in seen]).sum()

    def before_step(self, progress: float) -> None:
        self.factor = self.settings.factor(progress)

    def report(self) -> dict[str, Any]:
        """The factor of the step."""
        return {"factor": self.factor}

    def detach(self) -> None:
        self._detach()
        self._activations.clear()

    def _measure(self, site: Site, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, real = token_rows(site, self._taps[site], x, mask)
        magnitude = rows.float().abs()
        if self.settings.measure == "l1":
            each = magnitude.mean(-1) if self.settings.reduction == "mean" else magnitude.sum(-1)
        else:
            squares = magnitude.square().sum(-1)
            each = magnitude.sum(-1).square() / (rows.shape[-1] * squares.clamp(min=torch.finfo(torch.float32).tiny))
        return each.mean() if real is None else (each * real).sum() / real.sum()


def token_rows(site: Site, tap: Tap, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Lay out activations as rows, and say which rows are real.

    Args:
        site: where x was read; named in errors.
        tap: the tap that read it; it knows the layout.
        x: the activations.
        mask: [batch, length], 0 for padding; None if no token is padding.

    Returns:
        x as [rows, channels], and float32 [rows] with 1 for real rows; None if all are.

    Raises:
        ValueError: the batch is padded, and the mask does not fit the rows.
    """
    x = channels_last(tap, x)
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or bool(mask.all()) or tap.layout == "channels_first":
        return rows, None
    if tap.expert is not None:
        raise ValueError(f"mask: the batch is padded, and which rows of {site} are padding is not known; do not pad.")
    if len(rows) == mask.numel():
        return rows, mask.flatten().to(rows.device, torch.float32)
    if len(rows) == len(mask):  # one vector per sequence
        return rows, None
    raise ValueError(f"mask: it has shape {tuple(mask.shape)}, which does not fit the {len(rows)} rows of {site}.")
