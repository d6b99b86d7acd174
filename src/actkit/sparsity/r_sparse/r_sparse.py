"""R-Sparse: large inputs go through the full weight, the rest through a low-rank copy of it (2025, arXiv:2504.19449).

    y = W (m * x) + U_r S_r V_r^T ((1 - m) * x) + b,   W [out, in] = U S V^T
    m_j = 1 if |x_j| * c_j > t,   c_j = ||W[:, j]||_2 ("wina") or 1 ("magnitude")

The budget C = 1 - sparsity, a share of the weight's elements, is split by alpha: the threshold t lets the share
alpha * C of the inputs through (pooled over calibration tokens), and the rank r takes what is left, r (out + in) =
(1 - alpha) * C * out * in. alpha = 1 is WINA with a mask per matrix (or TEAL), bit for bit; alpha = 0 is the low-rank
copy alone. Both need data; a search over one alpha per layer costs up to 134 passes over it (`rank_search.py`).
When to use it: if decoding is bound by reading weights, training is not possible, and WINA alone loses too much. Try
WINA first: it is this method without the second path, needs no memory and no search, and was as good here.
Cost: two thin products per layer beside the masked one; the memory of a layer grows by its factors.

Settled here: shapes are the true ones (the release counts keys and values as square, so that with grouped queries
they exceed the budget), integers are otherwise the release's; one criterion at every alpha (the release falls back to
|x| if alpha is exactly 1: that is criterion="magnitude"); decompositions are in float64, and the factors, which the
release keeps in float16, in the model's dtype, each with the root of the singular values; every token is sparse (the
release evaluates with the last tenth of the tokens); search and thresholds use the same batches. The budget counts
elements, as the paper does: over a quantized weight, a factor's element takes more bytes than a code, so more than
C of the bytes is read, and the notes say how much. Loss of the search: perplexity of a language model; the paper has
no other models, and for them it is the relative error of the outputs. If a quantizer comes before it in one recipe,
the search runs on the model as it was; to search on the quantized model, apply the quantizer first, in a separate run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.forward.batch import BatchContext
from actkit.core.ground.errors import RecipeError
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.low_rank import cached_factors, low_rank
from actkit.core.layers.selections import Prefill, Selection, Threshold, TopK, check_prefill
from actkit.core.measure.quality import measure_quality, task_of
from actkit.core.model.anatomy import Block, Linear, Site
from actkit.core.model.parts import LinearRole
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Quantiles, Statistic
from actkit.sparsity.r_sparse.rank_search import Evolution, evolve
from actkit.sparsity.wina.wina import column_norms

Share = Annotated[float, Field(ge=0, le=1)]
Factors = Callable[[Linear, int], tuple[Tensor, Tensor]]


class RSparse(Transform):
    """Send the large inputs of linear layers through the weight and the others through a low-rank copy of it.

    Attributes:
        sparsity: share of the weight's elements that is not read, in [0, 1); 0 leaves the model as it is.
        alpha: share of the rest that goes to inputs: one number; a mapping from patterns of layer paths to numbers (the
            first that matches counts; 1 if none does); or "search".
        criterion: which inputs are large.
        skip: roles left dense, for example ("output",).
        prefill: as in `Teal`; in a prompt that is read dense nothing is left for the low-rank copy.
        generations: of the search, whose result takes the place of "search" in the recipe.
        population: of the search.
        seed: of the search.

    Raises:
        ValueError: a value is out of bounds.
        RecipeError: when applied, a pattern matches no layer.
    """

    sparsity: float = Field(0.5, ge=0, lt=1)
    alpha: Share | dict[str, Share] | Literal["search"] = 0.95  # on average 0.96 in the published recipe
    criterion: Literal["wina", "magnitude"] = "wina"
    skip: tuple[LinearRole, ...] = ()
    prefill: Prefill = "sparse"
    generations: int = Field(5, ge=1)
    population: int = Field(32, ge=2)
    seed: int = 0

    tags: ClassVar[Tags] = Tags(slot=("select", "correction"), needs_data=True, stream="original")
    not_proposed: ClassVar[str] = (
        "two more products per layer pay only beside more sparsity; try it with recipes=['r_sparse']"
    )

    @classmethod
    def identity(cls) -> Self:
        return cls(sparsity=0.0)

    @model_validator(mode="after")
    def _something_is_sparse(self) -> Self:
        check_prefill(self.prefill, "sparsity", self.sparsity)
        return self

    @property
    def label(self) -> str:
        if not isinstance(self.alpha, dict) or not self.alpha:
            return super().label
        mean = sum(self.alpha.values()) / len(self.alpha)
        given = self.model_dump(exclude_defaults=True) | {"alpha": f"{len(self.alpha)} entries, mean {mean:.2f}"}
        return f"RSparse({', '.join(f'{key}={value}' for key, value in given.items())})"

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        """Check the patterns, and search the alphas if `alpha` is "search"."""
        if isinstance(self.alpha, dict):
            blocks = trial.anatomy.blocks
            paths = [x.path for block in blocks for x in self.targets(trial.anatomy.block(block.index))]
            for pattern in self.alpha:
                if not any(fnmatchcase(path, pattern) for path in paths):
                    raise RecipeError(
                        f"alpha: {pattern!r} matches no linear layer; this model has {', '.join(paths[:8])}, ..."
                    )
        if self.alpha != "search" or self.sparsity == 0:
            return self
        return self.model_copy(update={"alpha": self.search(trial, data).alphas})

    def conflicts(self, earlier: Transform) -> str | None:
        if "inputs" in earlier.slots:
            return "it corrects what its selection drops, from inputs that are not rounded; use one of the two"
        return super().conflicts(earlier)

    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for linear in block.linears() if linear.role not in self.skip]

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        return {_site(linear): Quantiles(weight=self._score(linear)) for linear in self.targets(block)}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for linear in self.targets(block):
            quantiles = seen[_site(linear)]
            if not quantiles.count:
                yield Skip(linear.path, "no calibration token reached it")
                continue
            alpha = self.alpha_of(linear.path)
            layer = self.layer(linear, alpha, quantiles)
            yield Note(linear.path, self._described(layer, alpha))
            yield Replace(linear.path, layer)

    def alpha_of(self, path: str) -> float:
        """Return the alpha of the layer at `path`. Raises RecipeError if the search has yet to find it."""
        if self.sparsity == 0:
            return 1.0  # the whole weight is read, so nothing is left to approximate
        if self.alpha == "search":
            raise RecipeError("alpha: 'search' was given and has not run; use actkit.apply, which plans first.")
        if isinstance(self.alpha, dict):
            return next((value for pattern, value in self.alpha.items() if fnmatchcase(path, pattern)), 1.0)
        return float(self.alpha)

    def layer(self, linear: Linear, alpha: float, quantiles: Quantiles, factors: Factors | None = None) -> ActLinear:
        """Make the changed layer.

        Args:
            linear: the layer as it is.
            alpha: share of the budget that goes to inputs.
            quantiles: of its input times the score.
            factors: used in place of `core.layers.low_rank`.

        Returns:
            The layer that takes its place.
        """
        budget = Budget.of(linear.out_features, linear.in_features, self.sparsity, alpha)
        select: Selection = TopK(0)  # no threshold drops everything for sure
        if budget.channels:
            select = Threshold(quantiles.quantile(budget.dropped), quantiles.weight)
        select.prefill = self.prefill
        correction = None
        if budget.rank:
            correction = LowRank(*(factors or _factors)(linear, budget.rank), of="dropped")
        return ActLinear.of(linear, select=select, correction=correction)

    def _score(self, linear: Linear) -> Tensor | None:
        return column_norms([linear]) if self.criterion == "wina" else None

    def _described(self, layer: ActLinear, alpha: float) -> str:
        budget = Budget.of(layer.out_features, layer.in_features, self.sparsity, alpha)
        factors = 0 if layer.correction is None else layer.correction.nbytes
        traffic = 1 - budget.dropped + factors / layer.storage.nbytes
        return (
            f"{budget.channels} of {layer.in_features} channels and rank {budget.rank}: reads {traffic:.1%} of its "
            f"weight's bytes, takes {factors / layer.storage.nbytes:.1%} more memory"
        )

    # -- the search

    def search(
        self, trial: Trial, data: Sequence[Any], *, factors: Factors | None = None, progress: bool = True
    ) -> Evolution:
        """Search one alpha per layer on the model as it stands, and leave it as it was.

        Statistics and decompositions are computed once. Layers that no token reached are left out.

        Args:
            trial: the model, to be tried with edits.
            data: batches, for thresholds and loss.
            factors: `cached`, to share between searches at several sparsities.
            progress: show a bar.

        Returns:
            The best alphas, and how the search went.
        """
        view = trial.anatomy
        linears = [x for block in view.blocks for x in self.targets(view.block(block.index))]
        wanted = {_site(x): Quantiles(weight=self._score(x)) for x in linears}
        seen = record(trial.model, wanted, data, anatomy=view, progress=progress)
        linears = [x for x in linears if seen[_site(x)].count]
        factors, loss = factors or cached(self.sparsity), _loss(trial, data)

        def loss_of(alphas: dict[str, float]) -> float:
            layers = (self.layer(x, alphas[x.path], seen[_site(x)], factors) for x in linears)
            with trial([Replace(x.path, layer) for x, layer in zip(linears, layers, strict=True)]):
                return loss()

        names = [linear.path for linear in linears]
        settings = {"generations": self.generations, "population": self.population, "seed": self.seed}
        return evolve(loss_of, names, **settings, progress=progress)


@dataclass(frozen=True)
class Budget:
    """How a layer spends the elements that it may read.

    Attributes:
        dropped: share of the inputs that the threshold holds back.
        channels: about so many are let through.
        rank: of the low-rank copy, which serves the others.
    """

    dropped: float
    channels: int
    rank: int

    @classmethod
    def of(cls, outputs: int, inputs: int, sparsity: float, alpha: float) -> Budget:
        """Compute the release's integers, with the true shape [outputs, inputs] of the weight."""
        channels = max(int(inputs * (1 - sparsity) * alpha), 1)
        rank = max(int((inputs * outputs * (1 - sparsity) - channels * outputs) / (inputs + outputs)), 1)
        dropped = (1 - alpha) + alpha * sparsity  # so written, alpha = 1 gives the sparsity bit for bit
        return cls(dropped, channels if alpha > 0 else 0, rank if alpha < 1 else 0)


def cached(sparsity: float) -> Factors:
    """Return `low_rank` with each weight decomposed once, at the largest rank that the budget allows."""
    return cached_factors(lambda outputs, inputs: Budget.of(outputs, inputs, sparsity, 0).rank)


def _factors(linear: Linear, rank: int) -> tuple[Tensor, Tensor]:
    return low_rank(linear.weight, rank)


def _site(linear: Linear) -> Site:
    return Site("layer.input", path=linear.path)


def _loss(trial: Trial, data: Sequence[Any]) -> Callable[[], float]:
    """How far the model is now: its perplexity, or if it is no language model its distance from how it was."""
    if task_of(trial.model) == "language":
        settings: dict[str, Any] = {"task": "language", "resamples": 1, "progress": False}
        return lambda: measure_quality(trial.model, data, **settings).metrics["perplexity"].value
    masks = [BatchContext.of(batch, trial.model).mask for batch in data]

    def outputs() -> Iterable[Tensor]:
        for output, mask in zip(trial.outputs(), masks, strict=True):
            whole = mask is None or output.shape[:2] != mask.shape
            yield (output if whole else output[mask]).double()

    before = list(outputs())
    norm = float(sum(each.square().sum() for each in before))

    def distance() -> float:
        return float(sum((a - b).square().sum() for a, b in zip(outputs(), before, strict=True))) / norm

    return distance
