"""LSSA and LSSAR: attention by softplus and the length in place of softmax (2025, ICML 2026, arXiv:2501.13428).

    s_ij = log(d) log(N_i) cos(q_i, k_j),   A = softplus(s) / sum softplus(s)     (lssa)
    A' = relu(N A - O)^p / sum relu(N A - O)^p                                    (lssar)

`weights.py` has the formulas whole. N_i is how many keys query i reads: padding on either side, a cache, windows and
heads that share keys are read off the mask.
When to use it: for a language model that is trained on short texts and must read much longer ones. The transform only
changes the function: a model that was trained with softmax must be trained behind it, from the start or on from its
weights (`actkit train`); until then its outputs are another model's. One that was trained by `lssa` may take `lssar`,
or another power, without training.
Cost: no data. Where softmax has a fused kernel these weights are formed, in chunks of queries; the CPU decoder leaves
the model to transformers.
Settled here: the rows that are not shifted are those that read at most three keys (the paper: the first three rows,
which is the same without padding). The largest of a row is divided out before the power, so that it does not overflow;
of the two additions of 1e-8 to a divisor the second one, which then no longer fits, is left out. A row of equal weights
keeps them. Scores are made in float32, also in 16-bit models. Queries and keys come as attention has them, behind the
rotary embedding and norms of its own; its scaling is not used, as vectors are divided by their lengths.
Our own reading: the paper's code was not obtainable. The formulas follow two independent implementations that agree,
and a reading note; the abstract calls the re-weighting free of training, the table's rows are read as trained with it.
Both work here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field
from torch import nn

from actkit.core.edit.edits import ATTENTION, Configure, Edit, Note, Skip
from actkit.core.forward.limits import has_position_table
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.attention_function import AttentionFunction, function_of
from actkit.core.model.anatomy import Anatomy, Block
from actkit.core.model.own_attention import why_no_function
from actkit.core.model.parts import Linear
from actkit.core.recipe.own_attention import why_unasked
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.functions.softplus_attention.attention import LssaAttention, LssarAttention

OVER = ("sdpa", "eager", "lssa", "lssar", "mapped_attention")  # the functions whose place it may take


class Lssa(Transform):
    """Compute every attention by softplus and the length (LSSA); train the model behind it.

    Raises:
        ValueError: a value is out of bounds.
    """

    tags: ClassVar[Tags] = Tags(least_coverage=0.0)
    not_proposed: ClassVar[str] = "the model must be trained behind it; put it into a recipe with a training"

    def function(self) -> AttentionFunction:
        """Return the attention function that it sets."""
        return LssaAttention()

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        name = self.function().spec()["name"]
        reason = why_no_function(trial.model, OVER) or why_unasked(trial, self.function().spec(), data)
        if reason is not None:
            raise UnsupportedModelError(
                f"model: the attention of {type(trial.model).__name__} cannot be {name!r}: {reason}."
            )
        return self

    def conflicts(self, earlier: Transform) -> str | None:
        return None  # another of the kind takes its place

    def targets(self, block: Block) -> Iterable[Linear]:
        return ()

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if block.attention is None:
            yield Skip(block.path, "no attention is described here")

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        softmax = function_of(view.model) is None
        yield Configure(ATTENTION, self.function().spec())
        if softmax:
            yield Note("model", _advice(view.model))


class Lssar(Lssa):
    """Compute every attention by softplus and the length, re-weighted (LSSAR); train the model behind it.

    Attributes:
        power: of the re-weighting. 15 held on the longest inputs in the paper, 3 was better at the length of training.
        offset_rows: rows that read at most so many keys are not shifted.

    Raises:
        ValueError: a value is out of bounds.
    """

    power: float = Field(15, ge=1, allow_inf_nan=False)
    offset_rows: int = Field(3, ge=0)

    def function(self) -> AttentionFunction:
        return LssarAttention(power=self.power, offset_rows=self.offset_rows)


def _advice(model: nn.Module) -> str:
    """What to do behind it."""
    said = "attention is no longer softmax: train the model behind this (actkit train), its outputs are another model's"
    if has_position_table(model):
        said += "; it looks positions up in a table, so that no training makes it read beyond its context"
    return said
