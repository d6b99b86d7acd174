"""ProSparse: L1 on the hidden values of ReLU MLPs, raised in stages while training goes on (2024, arXiv:2402.13516).

    loss + factor * sum over MLPs of mean |h|,   h = relu(gate x) * up x if the MLP is gated, else relu(up x)
    factor = 0                                       before `start`: the model gets used to its new ReLUs
           = peaks[0]                                until ends[0]
           = before + (after - before) * (1 + sin(pi (s - 1/2))) / 2    between two ends, at share s of the stage

The second of three steps. The first replaces the activation, `swap(model, "silu", "relu")`; the third is the transform
`fatrelu`, after training. The penalty is that of `activation_penalty`: half a sine is its 'cosine'.
When to use it: if you can train the model further, for some hundred million tokens at least, and want zeros that are
exact. Compare with plain ReLU, which in the paper's own figures scores higher at equal tokens, with fewer zeros.
Cost: as there, and one comparison per hidden value to count the zeros.
Left open by the paper: the scale of the norm. A plain sum over the neurons would swamp the loss, so here it is the mean
over tokens and neurons, summed over the MLPs. That is our reading; the paper's peaks may mean less or more under it.
Choose the last peak by trial: it decides the sparsity. The 1B preset leaves out the fine-tuning that followed at a
smaller factor: that is a separate training, with `activation_penalty`. No training code was published to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.activations import record_of
from actkit.core.model.anatomy import Anatomy, Site, anatomy
from actkit.core.recipe.rule import TrainingRule
from actkit.core.train.rules import refuse_reentrant_checkpointing
from actkit.core.watch.capture import resolve
from actkit.sparsity.prosparse.activation_penalty import ActivationPenalty, AttachedPenalty, token_rows


class Stages(NamedTuple):
    """A schedule.

    Attributes:
        start: where the first stage begins: a step number, or a share of the training.
        peaks: the factor at each end.
        ends: where the stages end, in the same unit.
    """

    start: float
    peaks: tuple[float, ...]
    ends: tuple[float, ...]


PRESETS = {
    "7b": Stages(5000, (5e-3, 5e-2, 5e-2, 2e-1, 2e-1), (6000, 10000, 12000, 16000, 16500)),
    "13b": Stages(5500, (5e-3, 1e-2, 1e-2, 2e-2, 2e-2), (6750, 10750, 11000, 15000, 16000)),
    "1b": Stages(10000, (1e-3, 5e-3, 5e-3, 5e-2, 5e-2), (15000, 20000, 25000, 35000, 95000)),
}


class ProSparse(TrainingRule):
    """A penalty on the hidden values of MLPs that rises in stages.

    Attributes:
        preset: a schedule of the paper instead of peaks, ends and start, scaled to the length of the training; '7b' if
            no schedule is given.
        peaks: the factor at the end of each stage, above 0, never falling; two equal ones make a plateau.
        ends: where the stages end, as rising shares of the training or, if the last exceeds 1, as step numbers.
        start: where the first stage begins, in the same unit; the factor is 0 before.
        total: steps of the training, if step numbers are given; by default the last end.
        reduction: of |h| over the neurons; factors compare only at the same one.
        sites: what is penalised, as in `capture.live`.

    Raises:
        ValueError: a value is out of bounds.
    """

    preset: Literal["7b", "13b", "1b"] | None = None
    peaks: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()
    start: float | None = Field(None, ge=0)
    total: float | None = Field(None, gt=1)
    reduction: Literal["mean", "sum"] = "mean"
    sites: tuple[str, ...] = Field(("mlp.hidden",), min_length=1)

    keep: ClassVar[Literal["best", "last"]] = "last"

    @field_validator("sites", mode="before")
    @classmethod
    def _several(cls, sites: Any) -> Any:
        return (sites,) if isinstance(sites, str) else sites

    @field_validator("peaks")
    @classmethod
    def _never_falls(cls, peaks: tuple[float, ...]) -> tuple[float, ...]:
        if not all(peak > 0 and isfinite(peak) for peak in peaks):
            raise ValueError("each must be above 0 and finite")
        if any(after < before for before, after in pairwise(peaks)):
            raise ValueError("they must not fall; a later training at a smaller factor is one with ActivationPenalty")
        return peaks

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        given = {"peaks": self.peaks, "ends": self.ends, "start": self.start, "total": self.total}
        own = [name for name, value in given.items() if value not in (None, ())]
        missing = [name for name in ("peaks", "ends", "start") if name not in own]
        if self.preset is not None and own:
            raise ValueError(f"preset: {self.preset!r} was given beside {', '.join(own)}; give one or the other")
        if own and missing:
            raise ValueError(f"{', '.join(missing)}: missing; give peaks, ends and start together, or a preset")
        if own:
            self._check_places()
        return self

    def _check_places(self) -> None:
        ends, start = self.ends, self.start or 0.0
        if len(self.peaks) != len(ends):
            raise ValueError(f"ends: {len(ends)} were given for {len(self.peaks)} peaks; give one for each")
        if not all(after > before for before, after in pairwise((start, *ends))):
            raise ValueError(f"ends: {ends} was given with start {start}; they must rise from there")
        if self.total is not None and not 1 < ends[-1] <= self.total:
            raise ValueError(
                f"total: {self.total:g} was given and the last end is {ends[-1]:g}; total goes with step numbers, of "
                f"which the last is at most total"
            )

    @property
    def stages(self) -> Stages:
        """Return the schedule in shares of the training."""
        chosen = PRESETS[self.preset or "7b"]
        if self.peaks:
            chosen = Stages(self.start or 0.0, self.peaks, self.ends)
        total = self.total or (chosen.ends[-1] if chosen.ends[-1] > 1 else 1.0)
        return Stages(chosen.start / total, chosen.peaks, tuple(end / total for end in chosen.ends))

    def factor(self, progress: float) -> float:
        """Return what the penalty is multiplied by in a step that begins at a share `progress` of the training."""
        return 0.0 if progress < self.stages.start else self.after_start.factor(progress)

    @property
    def after_start(self) -> ActivationPenalty:
        """Return the same penalty, as it is once `start` is reached."""
        _, peaks, ends = self.stages
        points = tuple(zip(ends, peaks, strict=True))
        return ActivationPenalty(
            weight=1.0, sites=self.sites, reduction=self.reduction, schedule=points, interpolation="cosine"
        )

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedProSparse:
        """Start penalising.

        Args:
            model: the model that is trained.
            optimizer: not needed.
            example: a batch, to trace a model whose architecture is not known.

        Returns:
            The penalty at work.

        Raises:
            ValueError: a site is unknown.
            UnsupportedModelError: an MLP's activation has no exact zeros, or the activations have no graph.
        """
        refuse_reentrant_checkpointing(model)
        view = anatomy(model, example)
        _refuse_smooth(view, tuple(resolve(view, dict.fromkeys(self.sites))))
        return AttachedProSparse(self, view)


class AttachedProSparse(AttachedPenalty):
    """ProSparse at work. It counts the zeros of the passes of a step, before `start` too."""

    def __init__(self, rule: ProSparse, view: Anatomy) -> None:
        super().__init__(rule.after_start, view)
        self.rule = rule
        self._zeros: dict[Site, tuple[float, float]] = {}  # site -> zeros, values
        self.before_step(0.0)

    @property
    def sparsity(self) -> dict[str, float]:
        """Return the share of exact zeros at each site, over the real tokens of the step so far; empty without any."""
        return {str(site): zeros / values for site, (zeros, values) in self._zeros.items()}

    def before_step(self, progress: float) -> None:
        self.factor = self.rule.factor(progress)
        self._zeros.clear()

    def report(self) -> dict[str, Any]:
        """The factor of the step, and the share of zeros at each site."""
        return {**super().report(), "sparsity": self.sparsity}

    def penalty(self, mask: Tensor | None = None, batch: Any = None, output: Any = None) -> Tensor | None:
        for site, tensors in self._activations.items():
            for x in tensors:
                rows, real = token_rows(site, self._taps[site], x.detach(), mask)
                zeros = (rows == 0).sum(-1).float()
                weights = torch.ones_like(zeros) if real is None else real
                before = self._zeros.get(site, (0.0, 0.0))
                self._zeros[site] = (
                    before[0] + float((zeros * weights).sum()),
                    before[1] + float(weights.sum()) * rows.shape[-1],
                )
        return super().penalty(mask, batch, output)


def _refuse_smooth(view: Anatomy, sites: Sequence[Site]) -> None:
    for site in sites:
        if site.name != "mlp.hidden":
            continue
        path = dict(view.block(site.block or 0).mlps())[site.expert].activation
        record = record_of(view.model.get_submodule(path))
        if record is not None and record.elementwise and not record.zeros:
            name = record.name
            raise UnsupportedModelError(
                f"ProSparse: the activation at {path} is {name}, which has no exact zeros, so the penalty would only "
                f"make it smaller; replace it first: swap(model, {name!r}, 'relu')."
            )
