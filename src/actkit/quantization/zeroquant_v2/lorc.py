"""LoRC: a low-rank part of the rounding error of each weight is added back (ZeroQuant-V2, 2023, arXiv:2303.08302).

    E = W - W^,   E = U S V^T,   y = W^ x + (U_m S_m^1/2) (S_m^1/2 V_m^T x)

W is the weight that the quantizer of the same recipe rounded (with scales folded into it), W^ what its codes stand for.
When to use it: behind any weight quantizer of 3 bits and less, if a few percent more memory buys quality. The error of
rounding is nearly white, so a small rank captures little of it: finer groups are worth more per byte, at 3 bits twice
as much in our runs.
Cost: an eigendecomposition per layer, no data. A product with rank m more per layer: m (1 / in + 1 / out) of its
weights, 0.3 % of a layer of 5,120 inputs and outputs at rank 8, 2.8 % of one of 576. With `bits: 8` half of that.
As in the paper: the plain Frobenius norm, no activation enters; both factors get the root of the singular values.
Settled here: singular vectors come from the eigenvectors of E E^T or E^T E, whichever is smaller, in float64; factors
in 8 bits have one scale per singular vector. On a model that was quantized in an earlier run it is refused: the weight
before rounding is gone. The product is stored, and computed, beside the codes; `actkit export` writes it as a peft
adapter (`--adapter`), or merges it into weights that are dense again (`--format dense`). The paper puts it on trained
quantizers: `zeroquant`, here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import RecipeError
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.low_rank import captured, check_rank, decompose, stored
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.layers.weights import DenseWeight, IntegerWeight
from actkit.core.model.anatomy import Block, Linear
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform


class Lorc(Transform):
    """Low-rank compensation of the error of the weight quantizer before it.

    Attributes:
        rank: singular vectors kept, at most the smaller dimension of each layer; 0 changes nothing.
        bits: of the factors, 8; None keeps the dtype of the layer.

    Raises:
        ValueError: a value is out of bounds.
        RecipeError: when applied, a layer is not quantized, or was quantized in an earlier run.
    """

    rank: int = Field(8, ge=0)
    bits: Literal[8] | None = None

    tags: ClassVar[Tags] = Tags(slot="correction", by_layer=True)

    @classmethod
    def identity(cls) -> Self:
        return cls(rank=0)

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        yield LeftOut("lorc", "at 4 bits finer groups buy more per byte; for fewer bits try it with recipes=")

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if not self.rank:
            return
        kept: dict[str, dict[str, float]] = {}
        for linear in block.linears():
            error = rounding_error(block, linear)
            check_rank(self.rank, error.shape, linear.path)
            spectrum = decompose(error, self.rank, "gram")
            correction = self._stored(*spectrum.factors(), linear.weight.dtype)
            norm = float(error.norm())
            share = captured(error, spectrum.values)
            kept[linear.path] = {"error": norm, "captured": share, "bytes": correction.nbytes}
            yield Replace(linear.path, ActLinear.of(linear, correction=correction))
        if kept:
            norms = sum(each["error"] ** 2 for each in kept.values())
            share = sum(each["captured"] * each["error"] ** 2 for each in kept.values()) / norms if norms else 1.0
            text = f"rank {self.rank} captures {share:.1%} of the squared error of its weights"
            yield Note(block.path, text, kept)

    def _stored(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> LowRank:
        left, right = stored(left, dtype), stored(right, dtype)
        if self.bits is None:
            return LowRank(left, right)
        columns, rows = (IntegerGrid(self.bits, -1, axis, symmetric=True) for axis in ("output", "input"))
        return LowRank(IntegerWeight.quantize(left, columns), IntegerWeight.quantize(right, rows))


def rounding_error(block: Block, linear: Linear) -> Tensor:
    """Return what a layer's quantizer changed: float32 [out, in], the weight before less what its codes stand for.

    Args:
        block: of the layer, in the run that quantized it.
        linear: the layer as it stands.

    Raises:
        RecipeError: it is not quantized, or was so before the run.
    """
    if not isinstance(linear.module, ActLinear) or isinstance(linear.module.storage, DenseWeight):
        raise RecipeError(f"lorc: {linear.path} is not quantized; put a quantizer in front of it, such as rtn or gptq.")
    if isinstance(linear.module.storage, LowRankWeight):
        raise RecipeError(
            f"lorc: the weight of {linear.path} is kept as two factors already; give svd a higher rank instead."
        )
    before = Linear(linear.path, linear.role, block.original(linear.path), linear.expert)
    if before.module is linear.module or _is_rounded(before):
        raise RecipeError(
            f"lorc: {linear.path} was quantized in an earlier run, and its weight before that is gone; apply the "
            f"quantizer and lorc in one recipe, to the original model."
        )
    return before.weight.detach().float() - linear.weight.detach().float()


def _is_rounded(linear: Linear) -> bool:
    return isinstance(linear.module, ActLinear) and not isinstance(linear.module.storage, DenseWeight)
