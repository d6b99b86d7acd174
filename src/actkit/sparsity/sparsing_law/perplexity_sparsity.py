"""PPL-p% sparsity: the neurons of an MLP that may be skipped if perplexity may rise by p % (2024, arXiv:2411.02335).

    neuron i is kept if |h_i| * ||W_out[:, i]|| > eps of its layer;  eps: the largest with CETT(eps) <= c (`cett.py`)
    c, shared by all layers: the largest with exp(loss_sparse - loss_dense) <= 1 + p / 100 on the calibration data

It counts contributions and not zeros, so it means the same for any activation function.

When to use it: to compare models, as the number means the same for any activation function; and to skip columns of the
output layers of MLPs when decoding, given some 20,000 tokens of text and no training. Gate and up are still computed in
full.
Cost: one pass that keeps `sample` tokens of every layer, a sort of their neurons (tokens x neurons x outputs additions
per layer), then about ten passes over the data, in float32: differences of the loss below 1e-3 are noise in bfloat16,
so a 16-bit model is searched on a float32 copy.
At run time one multiplication and one comparison per neuron; the columns of weak neurons are not read.

Settled here: eps is exact (`method="sort"`: the CETT of every possible threshold in one sorted sum); the release
bisects over 65,536 candidates up to the 0.99 quantile (`method="grid"`). If even the smallest candidate is too
large, eps is 0; the release then takes index -1, its largest candidate. The shared CETT is found by false position
(Illinois) on the square root of the rise, which is nearly linear, instead of plain bisection, and the search stops
once the rise is at most 1 % of p below p: bisection to 1e-6 would resolve the noise of single neurons.
As in the paper, thresholds come from the dense hidden states: errors that grow from layer to layer are counted in the
loss, not corrected for. What p is here: the release's search over several checkpoints stops at a CETT tolerance of
1e-3, its search on one model at 1e-6, so the paper's figures may not all be equally exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Prefill, check_prefill
from actkit.core.model.anatomy import Block, Linear
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.sparsity.sparsing_law.cett import Method
from actkit.sparsity.sparsing_law.shared_cett import SharedCett, in_float32, largest_cett, selection


class PerplexitySparsity(Transform):
    """Drop the neurons of every MLP whose contribution is small, so that perplexity rises by at most p %.

    It changes the output layers of MLPs only. What stands before it in a recipe (a quantizer, other activation
    functions) is applied first, and perplexity may rise by p % over that of what they left.

    Attributes:
        p: in percent; for classifiers exp of the loss counts as perplexity (batches then hold 'labels').
        tolerance: how far below p the rise may stay, as a share of it.
        method: 'sort' is exact, 'grid' takes the release's candidates.
        sample: tokens per layer that thresholds are computed from.
        cett: the shared CETT; None finds it from p. If it is given no loss is needed, and 0 leaves the model as it is.
        prefill: as in `Teal`; p counts every token as sparse either way.
        thresholds: eps by the path of the output layer; None computes them. What `ppl_sparsity` found may be given.

    Raises:
        ValueError: a value is out of bounds.
        DataError: when applied, the model has no loss.
    """

    p: float = Field(1.0, gt=0, allow_inf_nan=False)
    tolerance: float = Field(0.01, gt=0, lt=1)
    method: Method = "sort"
    sample: int = Field(1024, ge=1)
    cett: float | None = Field(None, ge=0, le=1)
    prefill: Prefill = "sparse"
    thresholds: dict[str, float] | None = None

    tags: ClassVar[Tags] = Tags(
        slot="select", needs_data=True, stream="original", plans_in_turn=True, passes=12, least_coverage=0.15
    )
    not_proposed: ClassVar[str] = "it needs thousands of tokens to be stable; try it with recipes=['ppl_sparsity']"

    @classmethod
    def identity(cls) -> Self:
        return cls(cett=0.0)

    @model_validator(mode="after")
    def _something_is_sparse(self) -> Self:
        check_prefill(self.prefill, "cett", self.cett)
        return self

    @field_validator("thresholds")
    @classmethod
    def _magnitudes(cls, thresholds: dict[str, float] | None) -> dict[str, float] | None:
        for path, eps in (thresholds or {}).items():
            if not 0 <= eps < math.inf:
                raise ValueError(f"{path} has {eps}; it is a magnitude, give 0 or more, finite")
        return thresholds

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        if self.thresholds is not None:
            return self
        with in_float32(trial.model, data[0]) as view:
            search = SharedCett(view, data, method=self.method, sample=self.sample)
            cett = self.cett
            if cett is None:
                cett = largest_cett(search.rise, self.p, self.tolerance).low
            return self.model_copy(update={"cett": cett, "thresholds": search.thresholds(cett)})

    def targets(self, block: Block) -> Iterable[Linear]:
        return [mlp.down for _, mlp in block.mlps()]

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        assert self.thresholds is not None
        if block.index == 0 and self.cett is not None:
            full = f"; dropping every neuron would not raise perplexity by {self.p} %" if self.cett == 1 else ""
            yield Note(block.path or "model", f"shared CETT {self.cett:.4g}{full}")
        for down in self.targets(block):
            if down.path in self.thresholds:
                select = selection(down, self.thresholds[down.path])
                select.prefill = self.prefill
                yield Replace(down.path, ActLinear.of(down, select=select))
            else:
                yield Skip(down.path, "it has no threshold: no calibration token reached it, or none was given")
