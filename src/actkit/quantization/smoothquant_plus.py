"""SmoothQuant+: one smoothing strength for the whole model, then 4-bit groups (2023, arXiv:2312.03788).

    alpha = argmin over {0, 1/20, ..., 1} of |h(x) - h_alpha(x)|^2,   h: the states before the head

h_alpha is the whole model smoothed by alpha (the formula is in `smooth`) with all linear layers of its blocks rounded.
Then the model is smoothed by that alpha and its weights are rounded, asymmetric in groups along the inputs.
When to use it: for 4 bits per weight if a few channels of the activations are large. Unlike `awq` it has one strength
for the whole model, judged on the whole model's output.
Cost: one pass over the calibration tokens, and `steps` smoothed and rounded models that run on `search_tokens` of them.
The search of 4 bits was never published; the release holds the smoothing alone. Settled here, as the paper leaves it
open: the loss is the mean squared error of the states before the head ("kl" of the logits and "ce" are settings); value
-> output and up -> down are not smoothed by default (`sets`). From memory of the paper: steps of 0.05, the 164 prompts
of HumanEval as calibration. alpha = 0 is not "no smoothing"; `include_identity` tries that too (not in the paper).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr
from torch import nn
from torch.nn import functional as F

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.forward.batch import first_tokens, main_input, mask_of
from actkit.core.forward.hooks import evaluating
from actkit.core.forward.outputs import BeforeHead, Output, Outputs
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import NonFiniteError
from actkit.core.ground.progress import track
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight, widened
from actkit.core.model.anatomy import Block, Linear, Site
from actkit.core.recipe.blockwise import record_by_block
from actkit.core.recipe.scalable import Sets, scalable_sites, scalable_targets
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Slot, Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import AbsMax, Statistic
from actkit.quantization.rtn import refuse_groups
from actkit.quantization.smooth import refuse_filled, smooth

ROWS = 256  # of logits at a time: a vocabulary may have 262,144 words
Loss = Literal["hidden", "kl", "ce"]


class SmoothQuantPlus(Transform):
    """Smooth by one strength, searched on the whole rounded model; then round the weights.

    Attributes:
        bits: 2 to 8.
        group_size: consecutive inputs per scale, must divide the layer; -1 a whole row; 'auto' the largest of 128, 64,
            32 and 16 that divides it.
        symmetric: no zero point.
        alpha: 0 to 1, or 'search'.
        steps: strengths tried, evenly from 0 to 1.
        loss: of a strength: 'hidden' the squared error of the states before the head, 'kl' of the logits, 'ce' the
            cross entropy of the next token.
        search_tokens: how many tokens the search runs on; None for all.
        include_identity: try the rounded model without smoothing too.
        sets: which may take a scale, as in `smooth`.
        round: whether the weights are rounded; False leaves that to the transform behind it.
        scale_dtype: what scales are rounded to and stored in; a layer whose scales 16 bits cannot hold keeps float32.

    Raises:
        ValueError: a value is out of bounds.
    """

    bits: int = Field(4, ge=2, le=8)
    group_size: Annotated[int, Field(ge=-1)] | Literal["auto"] = "auto"
    symmetric: bool = False
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search", "none"] = "search"
    steps: int = Field(21, ge=2, le=201)
    loss: Loss = "hidden"
    search_tokens: int | None = Field(4096, ge=1)
    include_identity: bool = False
    sets: Sets = Field(("norm",), min_length=1)
    round: bool = True
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"

    tags: ClassVar[Tags] = Tags(slot="weight", needs_data=True, stream="original", plans_in_turn=True)
    not_proposed: ClassVar[str] = "its search runs the whole model 21 times; try it with recipes=['smoothquant_plus']"
    _curve: dict[float | None, float] = PrivateAttr(default_factory=dict)  # the loss by strength; None: no smoothing

    @property
    def grid(self) -> IntegerGrid:
        """The grid that weights are rounded to."""
        return IntegerGrid(self.bits, self.group_size, "input", self.symmetric, scale_dtype=self.scale_dtype)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.tags.slots if self.round else ()

    @property
    def curve(self) -> Mapping[float | None, float]:
        """The loss of each strength that was tried; None stands for no smoothing."""
        return self._curve

    def conflicts(self, earlier: Transform) -> str | None:
        return super().conflicts(earlier) or refuse_filled(earlier)

    def passes(self, tokens: int, rows: int) -> float:
        searched = tokens if self.search_tokens is None else min(self.search_tokens, tokens)
        return 2 + (self.steps + 1) * searched / max(1, tokens) * (self.alpha == "search")

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        if self.alpha != "search":
            return self
        for block in trial.anatomy.blocks:
            refuse_groups(self.grid, trial.anatomy.block(block.index))
        largest: dict[Site, AbsMax] = {}
        for _, statistics in record_by_block(trial.anatomy, self.observe, data, progress=False):
            largest |= statistics
        batches = first_tokens(data, self.search_tokens, trial.model)
        curve = search_strength(trial, batches, largest, self)
        finite = {alpha: loss for alpha, loss in curve.items() if isfinite(loss)}
        if not finite:
            raise NonFiniteError("alpha: every strength gives a NaN or Inf loss; check the calibration data.")
        best = min(finite, key=finite.__getitem__)  # the first of equal ones
        chosen = self.model_copy(update={"alpha": "none" if best is None else best})
        chosen._curve = curve
        return chosen

    def targets(self, block: Block) -> Iterable[Linear | str]:
        if self.round:
            yield from block.linears()
        yield from (x for x in scalable_targets(block, self.sets) if isinstance(x, str) or not self.round)

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        return {site: AbsMax() for site in scalable_sites(block, self.sets).values()}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if self.round:
            refuse_groups(self.grid, block)
        if block.index == 0 and self._curve:
            tried = ", ".join(f"{_named(alpha)}: {loss:.4g}" for alpha, loss in self._curve.items())
            yield Note(block.path or "model", f"strength {self.alpha} of ({tried})")
        largest = {site: seen[site] for site in self.observe(block)}
        yield from self.edits(block, largest, None if self.alpha == "none" else float(self.alpha), self.round)

    def edits(
        self, block: Block, largest: Mapping[Site, AbsMax], alpha: float | None, rounded: bool
    ) -> Iterator[Edit | Skip | Note]:
        """Yield the edits of one block at a strength.

        Args:
            block: to be changed.
            largest: of each site of `scalable_sites`.
            alpha: 0 to 1; None leaves activations as they are.
            rounded: round the weights behind it.
        """
        if alpha is not None:
            yield from smooth(block, largest, alpha, self.sets)
        for linear in block.linears() if rounded else ():
            weight = IntegerWeight.quantize(linear.weight, self.grid)
            yield Replace(linear.path, ActLinear.of(linear, weight=weight))


def search_strength(
    trial: Trial, batches: Sequence[Any], largest: Mapping[Site, AbsMax], settings: SmoothQuantPlus
) -> dict[float | None, float]:
    """Return the loss of the whole model, smoothed and rounded, for every strength that is tried.

    Args:
        trial: tries edits on the model.
        batches: what the models run on.
        largest: the maxima of all blocks.
        settings: grid, loss, strengths.
    """
    model, view = trial.model, trial.anatomy
    with evaluating(model), torch.no_grad():
        outputs = Outputs(model)
        original = [outputs.of(batch, before_head=True, hidden_states=settings.loss == "hidden") for batch in batches]
    strengths: list[float | None] = [step / (settings.steps - 1) for step in range(settings.steps)]
    curve: dict[float | None, float] = {}
    for alpha in track([*strengths, *([None] if settings.include_identity else [])], "Searching the strength"):

        def changes(alpha: float | None = alpha) -> Iterator[Edit]:
            for block in view.blocks:
                found = settings.edits(view.block(block.index), largest, alpha, rounded=True)
                yield from (edit for edit in found if not isinstance(edit, Skip | Note))

        with trial(changes()), evaluating(model), torch.no_grad(), widened(model):
            changed = Outputs(model)
            total, count = 0.0, 0
            for batch, before in zip(batches, original, strict=True):
                after = changed.of(batch, before_head=True, hidden_states=settings.loss == "hidden")
                loss, values = _loss(settings.loss, before, after, batch, model)
                total, count = total + loss, count + values
        curve[alpha] = total / max(1, count)
    return curve


def _loss(kind: Loss, before: Output, after: Output, batch: Any, model: nn.Module) -> tuple[float, int]:
    """The summed loss on a batch, and over how many values (rows for 'kl' and 'ce')."""
    mask = mask_of(batch)
    shape = after.shape[:-1]
    real = torch.ones(shape, dtype=torch.bool) if mask is None or mask.shape != shape else mask.bool()
    if kind == "hidden":
        a, b = (x.states if isinstance(x, BeforeHead) else x.tensor for x in (before, after))
        difference = (a.double() - b.double())[real.to(a.device)]
        return float(difference.square().sum()), difference.numel()
    if kind == "ce":
        real = real & torch.cat((real[:, 1:], torch.zeros_like(real[:, :1])), 1)  # a last token has no next one
    rows = real.flatten().nonzero().squeeze(1)
    following = main_input(batch, model).roll(-1, 1).flatten() if kind == "ce" else None
    total = 0.0
    for some in rows.split(ROWS):
        log_q = F.log_softmax(after.rows(some).double(), -1)
        if following is not None:
            total += float(F.nll_loss(log_q, following[some].to(log_q.device), reduction="sum"))
        else:
            log_p = F.log_softmax(before.rows(some).double(), -1)
            total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return total, len(rows)


def _named(alpha: float | None) -> str:
    return "none" if alpha is None else f"{alpha:g}"
