"""SVD: two thin factors in place of each weight, closest in a plain, a Fisher-weighted or a whitened norm.

    W ~ L R,   W [out, in],   L [out, r],   R [r, in],   r = floor(budget * out * in / (out + in))
    svd:      min ||W - L R||_F
    fisher:   min ||(W - L R) diag(f)^(1/2)||_F,   f_j = sum over i of E[(dL / dW_ij)^2]     (FWSVD, arXiv:2207.00112)
    whiten:   min E ||W x - L R x||^2                                 (DRONE, 2021; SVD-LLM, 2024, arXiv:2403.07378)

When to use it: to make a model smaller where codes are not wanted, or beside them: factors are weights, so that `rtn`
rounds both, and `wina` selects what they read. On small language models rounding loses far less for as many bytes; a
whitened norm loses less than the others. `flashsvd` runs what this transform makes so that less memory is held.
Cost: a decomposition of each weight, in float64. No data for `svd`; a pass over the calibration text for `whiten`, and
a forward and a backward pass over it, with labels, for `fisher`.
A layer multiplies twice, and the product is never formed; below a budget of 1 that is less work than before.
Settled here: ranks come from a budget of numbers, by layer; the one of a head (`per_head`: query, key and value, each
head by itself) from the shape of the head. Both factors get the root of the singular values. The Gram matrix of the
whitened norm is that of what the changed model feeds a layer, block after block; its square root is symmetric in place
of Cholesky's, which changes no product, and holds for inputs that span less than the whole space.
Our own reading: FWSVD weighs rows of a weight stored as [in, out], which are input channels here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.layers.conv1d import is_conv1d
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.low_rank import check_rank, factored_by_head, rank_within, stored
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.layers.weights import DenseWeight
from actkit.core.model.anatomy import Block, Linear, Site
from actkit.core.model.parts import LinearRole
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.train.squared_gradients import squared_gradients
from actkit.core.watch.spectrum import Gram
from actkit.core.watch.statistics import Statistic

OF_HEADS = ("query", "key", "value", "query_key_value")
MULTIPLE = 16  # of ranks from a budget that are four times as large, so that groups of a quantizer fit them
WORTH = 0.8  # share of a weight's numbers above which factors are not proposed
Rank = Annotated[int, Field(ge=1)]


class Svd(Transform):
    """Put two thin factors in place of the weights of linear layers.

    Attributes:
        budget: numbers in the factors as a share of those in the weight; what `rank` says comes first.
        rank: of the factors, for all layers, or by role; roles that are not named stay as they are. With `per_head`
            that of each head.
        norm: in which the product is closest.
        per_head: query, key and value are factored head by head.
        skip: roles left as they are, for example ("output",).
        algorithm: 'random' is faster for large weights and small ranks, and nearly as close.
        seed: of 'random'.

    Raises:
        ValueError: a value is out of bounds; when applied, a rank is above that of a weight, or of a head.
    """

    budget: float = Field(0.5, gt=0, le=1)
    rank: Rank | dict[LinearRole, Rank] | None = None
    norm: Literal["svd", "fisher", "whiten"] = "svd"
    per_head: bool = False
    skip: tuple[LinearRole, ...] = ()
    algorithm: Literal["svd", "random"] = "svd"
    seed: int = 0

    tags: ClassVar[Tags] = Tags(
        slot="weight", by_layer=True, factors=True, needs_data=True, plans_in_turn=True, least_coverage=0.0
    )

    _importance: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # by layer: [in]

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        method = cls(budget=0.7, norm="whiten")
        pairs = list(zip(shapes.inputs, shapes.outputs, strict=True))
        factors = sum(method._rank(outputs, inputs) * (inputs + outputs) for inputs, outputs in pairs)
        share = factors / max(1, sum(inputs * outputs for inputs, outputs in pairs))
        name = f"svd {method.budget:.0%}"
        if share > WORTH:
            yield LeftOut(
                name, f"factors of layers as narrow as these hold {share:.0%} of the numbers of their weights"
            )
            return
        yield Idea(
            name, method, f"two thin factors hold {share:.0%} of the numbers of the weights; rounding loses less", 118
        )

    @classmethod
    def cannot_be_limited(cls, *, whole_blocks: bool) -> str | None:
        return None  # its plan sees each layer by itself

    @property
    def needs_data(self) -> bool:
        return self.norm != "svd"

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        """Square the gradients of the loss, if that is the norm."""
        if self.norm != "fisher":
            return self
        view = trial.anatomy
        blocks = (self.within(view.block(block.index)) for block in view.blocks)
        linears = [linear for block in blocks if block is not None for linear in self.targets(block)]
        found = squared_gradients(trial.model, {x.path: _parameter(x) for x in linears}, data, progress=False)
        planned = self.model_copy()
        planned._importance = {x.path: found[x.path].sum(1 if is_conv1d(x.module) else 0).double() for x in linears}
        return planned

    def targets(self, block: Block) -> Iterable[Linear]:
        named = self.rank.keys() if isinstance(self.rank, dict) else None
        return [x for x in block.linears() if x.role not in self.skip and (named is None or x.role in named)]

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        if self.norm != "whiten":
            return {}
        wanted = {linear.path for linear in self.targets(block)}
        return {
            each.site: Gram() for each in block.linear_inputs() if any(linear.path in wanted for linear in each.linears)
        }

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        wanted = {linear.path for linear in self.targets(block)}
        kept: dict[str, dict[str, float]] = {}
        for inputs in block.linear_inputs():
            for linear in (linear for linear in inputs.linears if linear.path in wanted):
                gram = seen[inputs.site] if self.norm == "whiten" else None
                if gram is not None and not gram.count:
                    yield Skip(linear.path, "no calibration token reached it")
                    continue
                weight = linear.weight.detach()
                heads = self._heads(block, linear)
                storage = self._factored(linear, weight, heads, None if gram is None else gram.mean_gram)
                if heads > 1 and storage.right.shape[0] > linear.in_features:
                    yield Note(
                        linear.path,
                        f"{heads} heads of rank {storage.rank} are wider together than its {linear.in_features} "
                        "inputs, so that what flashsvd holds is larger than what a plain layer gives",
                    )
                error = float((storage.dequantize().double() - weight.double()).norm() / weight.double().norm())
                numbers = storage.left.shape[0] * storage.rank + storage.right.shape[0] * storage.shape[1]
                kept[linear.path] = {"rank": storage.rank, "share": numbers / weight.numel(), "error": error}
                yield Replace(linear.path, ActLinear.of(linear, weight=storage))
        if kept:
            shares, errors = ([each[key] for each in kept.values()] for key in ("share", "error"))
            yield Note(
                block.path,
                f"factors hold {sum(shares) / len(shares):.1%} of the numbers of their weights, "
                f"off by {sum(errors) / len(errors):.1%} of their norms (means of {len(kept)} layers)",
                kept,
            )

    def _heads(self, block: Block, linear: Linear) -> int:
        if not self.per_head or linear.role not in OF_HEADS or block.attention is None:
            return 1
        return linear.out_features // block.attention.head_dim

    def _rank(self, outputs: int, inputs: int) -> int:
        """The rank that the budget allows."""
        rank = rank_within(outputs, inputs, self.budget)
        return rank // MULTIPLE * MULTIPLE if rank >= 4 * MULTIPLE else rank

    def _factored(self, linear: Linear, weight: Tensor, heads: int, gram: Tensor | None) -> LowRankWeight:
        shape = (linear.out_features // heads, linear.in_features)
        rank = self.rank[linear.role] if isinstance(self.rank, dict) else self.rank
        rank = self._rank(*shape) if rank is None else rank
        check_rank(rank, shape, linear.path if heads == 1 else f"each head of {linear.path}")
        left, right = factored_by_head(
            weight,
            heads,
            rank,
            gram=gram,
            importance=self._importance.get(linear.path),
            algorithm=self.algorithm,
            seed=self.seed,
        )
        return LowRankWeight(stored(left, weight.dtype), stored(right, weight.dtype), heads)


def _parameter(linear: Linear) -> nn.Parameter:
    module: Any = linear.module
    if isinstance(module, ActLinear):
        assert isinstance(module.storage, DenseWeight)  # another one would fill the slot
        return module.storage.tensor  # type: ignore[return-value]
    return module.weight
