"""CFSP: narrower MLPs from one pass, coarse scores for blocks, fine scores for units (2024, arXiv:2409.13199).

    coarse: D_l = mean over tokens of arccos(cos(h_in, h_out)) / pi       how far block l turns the hidden state
            S_l = sigmoid(a z_l),   z_l = 13.1072 (D_l - mean D),   keep_l = (1 - p) S_l / mean S
    fine:   s_j = root mean square of unit j at the input of down
    keep the best keep_l * width units of block l; cut rows of gate and up, and columns of down

When to use it: to make a model smaller and faster on any machine and in any library, as what comes out is an ordinary
dense model with narrower MLPs. It loses more quality than rounding to 8 bits does for as many bytes; heal it after by
training low-rank changes (`recovery_ranks`), then round it.
Cost: one forward pass over the calibration text.
The 13.1072 is the release's sum over 131,072 tokens divided by 10,000, so that shares do not depend on how much text is
read. `fine="released"` is the release's default, in which the weights cancel: it sums each weight's share of its own
column over that column, which is 1 for every unit (checked in float64 by a test), so that units are ranked by s alone.
`fine="relative"` takes shares of rows instead, so that weights count; which of the two the paper means is not
known to us.
`fine="magnitude"` and `fine="random"` are controls, and so is `coarse="constant"`, the same share everywhere.
Settled here: cosines are clamped to [-1, 1] before arccos; exactly int(width keep_l) units stay (the release keeps one
more); padding counts for nothing; experts of one block have the share of the block, and an expert that no token reached
stays as it is; `uniform` gives all blocks one width, which plain transformers can load.
Our own reading: ranks in proportion to the coarse score for the recovery, as an outline of the paper says; the release
has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Replace, Set, Skip
from actkit.core.ground.errors import RecipeError
from actkit.core.ground.largest import largest
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import Anatomy, Block, Linear, Site
from actkit.core.model.parts import Mlp
from actkit.core.model.sites import Joined
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.recipe.widths import configured, cut
from actkit.core.watch.capture import record
from actkit.core.watch.joined import Difference
from actkit.core.watch.statistics import Moments

RELEASED = 13.1072  # the release's calibration tokens, 131,072, over its 10,000
ROOM = 1.05  # how far below a whole block the largest share is kept, as in the release

MULTIPLES, LEAST = (128, 64, 32, 16), 16  # of 'auto'; widths have at least so many of them

Coarse = Literal["angle", "cosine", "square", "absolute", "constant"]
Fine = Literal["released", "relative", "wanda", "magnitude", "random"]


class Cfsp(Transform):
    """Make MLPs narrower.

    Attributes:
        sparsity: share of the units that are cut, over the model.
        coarse: what says how much of a block stays: how its output differs from its input, or nothing ('constant').
        fine: what says which units stay.
        steepness: how far shares of blocks differ.
        multiple_of: widths are rounded to multiples of it; 'auto' takes the largest of 128, 64, 32 and 16 that is at
            most a sixteenth of the width, so that groups of a quantizer fit what is left; None for none.
        uniform: all blocks get one width, so that plain transformers loads an export of the model.
        compensate: add what the cut units gave on average to the bias of down.

    Raises:
        ValueError: a value is out of bounds.
    """

    sparsity: float = Field(0.3, gt=0, lt=1)
    coarse: Coarse = "angle"
    fine: Fine = "released"
    steepness: float = Field(1.0, ge=0)
    multiple_of: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    uniform: bool = False
    compensate: bool = False

    tags: ClassVar[Tags] = Tags(needs_data=True, stream="none", least_coverage=0.2)

    _coarse: dict[int, float] = PrivateAttr(default_factory=dict)  # by block
    _shares: dict[int, float] = PrivateAttr(default_factory=dict)
    _units: dict[Site, Moments] = PrivateAttr(default_factory=dict)
    _widths: dict[str, tuple[int, int]] = PrivateAttr(default_factory=dict)  # of MLPs: units before, and kept

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        if "down" not in shapes.roles:
            yield LeftOut("cfsp", "no block of the model has an MLP whose units could be cut")
            return
        why = "fewer units of the MLPs, in any library; not healed by training, so that rounding comes first"
        for share, order in ((0.1, 105), (0.2, 115)):
            yield Idea(f"cfsp {share:.0%}", cls(sparsity=share), why, order)

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        view = trial.anatomy
        blocks = [view.block(block.index) for block in view.blocks]
        pruned = [block for block in blocks if block.mlps()]
        sites = {_hidden(block, expert): Moments() for block in pruned for expert, _ in block.mlps()}
        turns = {_ends(block): Difference() for block in pruned}
        seen = record(view.model, {**sites, **turns}, data, anatomy=view, progress=False)
        planned = self.model_copy()
        planned._units = {site: seen[site] for site in sites}
        kind = "angle" if self.coarse == "constant" else self.coarse
        planned._coarse = {block.index: getattr(seen[_ends(block)], kind) for block in pruned}
        shares = torch.full((len(pruned),), 1 - self.sparsity, dtype=torch.float64)
        if pruned and not self.uniform and self.coarse != "constant":
            shares = allocate(list(planned._coarse.values()), self.sparsity, self.steepness)
        planned._shares = dict(zip(planned._coarse, shares.tolist(), strict=True))
        planned._widths = {}
        return planned

    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for _, mlp in block.mlps() for linear in (*mlp.inputs, mlp.down)]

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for expert, mlp in block.mlps():
            moments = self._units[_hidden(block, expert)]
            if not moments.count:
                yield Skip(mlp.path, "no calibration token reached it")
                continue
            number = width(mlp.width, self._shares[block.index], self.multiple_of, mlp.path)
            kept, rest = split(unit_scores(mlp, moments, self.fine), number)
            self._widths[mlp.path] = mlp.width, number
            if not len(rest):
                yield Skip(mlp.path, f"its share of {self._shares[block.index]:.3f} leaves all {mlp.width} units")
                continue
            behind = mlp.down.weight.detach()[:, rest].double() @ moments.mean[rest] if self.compensate else None
            yield from cut(mlp, kept)
            if behind is not None:
                yield _added(mlp.down.path, block.root.get_submodule(mlp.down.path), behind)

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        if not self._widths:  # no MLP that a token reached
            yield Note("model", "no units were cut")
            return
        before, after = (sum(widths) for widths in zip(*self._widths.values(), strict=True))
        configure = configured(view)
        if configure is not None:
            yield configure
        plain = (
            "plain transformers can load an export" if configure else "widths differ, or no entry of the config says it"
        )
        yield Note(
            "model",
            f"{after} of {before} units stay, {1 - after / before:.1%} are cut ({self.sparsity:.1%} were asked); "
            f"{plain}",
            values={
                "kept": {path: number for path, (_, number) in self._widths.items()},
                "coarse": {str(index): score for index, score in self._coarse.items()},
                "sparsity": 1 - after / before,
            },
        )

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            return (
                "units are cut out of weights as they are; apply cfsp first, and what fills slots of the layers after"
            )
        return super().conflicts(earlier)


def allocate(coarse: Sequence[float], sparsity: float, steepness: float = 1.0) -> Tensor:
    """Share out what stays over blocks.

    Args:
        coarse: a score per block; a block with a higher one keeps more.
        sparsity: share that is cut, over all blocks.
        steepness: how far shares differ.

    Returns:
        Float64 [blocks], each below 1, with 1 - sparsity as their mean.
    """
    scores = torch.tensor(coarse, dtype=torch.float64)
    spread = torch.sigmoid(steepness * RELEASED * (scores - scores.mean()))
    mean = spread.mean()
    if spread.max() / mean * (1 - sparsity) >= 1 and spread.max() > mean:
        room = mean * (1 / (1 - sparsity) - 1) / (spread.max() - mean) / ROOM
        spread = mean + room * (spread - mean)
    return spread / spread.mean() * (1 - sparsity)


def width(units: int, share: float, multiple_of: int | Literal["auto"] | None, path: str) -> int:
    """Return how many units of an MLP stay.

    Args:
        units: that it has.
        share: that stays.
        multiple_of: the number is the nearest multiple of it; None for int(units * share), 'auto' as of `Cfsp`.
        path: of the MLP, for errors.

    Raises:
        RecipeError: none would stay, or the multiple is larger than the MLP is wide.
    """
    fitting = (number for number in MULTIPLES if number * LEAST <= units)
    multiple = next(fitting, None) if isinstance(multiple_of, str) else multiple_of
    if multiple is not None and multiple > units:
        raise RecipeError(f"multiple_of: {multiple} was given, and {path} has {units} units; give at most that.")
    number = int(units * share) if multiple is None else multiple * int((units * share + multiple / 2) / multiple)
    if number < 1:
        raise RecipeError(
            f"sparsity: {path} would keep none of its {units} units at a share of {share:.4f}; give a lower sparsity, "
            f"a smaller multiple_of or a smaller steepness."
        )
    return min(number, units)


def unit_scores(mlp: Mlp, moments: Moments, fine: Fine) -> Tensor:
    """Score the units of an MLP.

    Args:
        mlp: with n units.
        moments: of what down reads, [tokens, n].
        fine: how.

    Returns:
        Float64 [n]; those with the highest scores stay.
    """
    size = (moments.variance + moments.mean.square()).sqrt()
    if fine == "released":
        return size
    if fine == "random":
        return torch.rand(len(size), dtype=torch.float64, generator=torch.Generator().manual_seed(mlp.width))
    down = mlp.down.weight.detach().double().abs()
    if fine == "wanda":
        return down.mean(0) * size
    rows = [down, *(weight.t() for weight in _incoming(mlp))]  # each [hidden, n]
    if fine == "magnitude":
        return torch.stack([weight.mean(0) for weight in rows]).sum(0)
    rows[0] = down * size
    return sum(weight / weight.sum(1, keepdim=True).clamp(min=1e-30) for weight in rows).mean(0) * size  # type: ignore[union-attr]


def split(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the units with the highest scores and the others, in ascending order; of equal ones the first stay."""
    kept = largest(scores, number)
    return kept.nonzero().flatten(), (~kept).nonzero().flatten()


def recovery_ranks(coarse: Mapping[int, float], rank: float, steepness: float = 1.0) -> dict[int, int]:
    """Spread the rank of low-rank training over blocks, in proportion to what their share goes by.

    Args:
        coarse: by block, as the values of the note on the model say.
        rank: the mean.
        steepness: as of `Cfsp`.

    Returns:
        A rank per block, at least 1, for `ranks=` of `actkit.finetuning.low_rank_training.train_low_rank`.
    """
    scores = torch.tensor(list(coarse.values()), dtype=torch.float64)
    spread = torch.sigmoid(steepness * RELEASED * (scores - scores.mean()))
    return {index: max(1, round(float(rank * own / spread.mean()))) for index, own in zip(coarse, spread, strict=True)}


def _incoming(mlp: Mlp) -> list[Tensor]:
    """The weights [n, hidden] that make the units: up, and gate if there is one."""
    if mlp.up_rows is None:
        return [linear.weight.detach().double().abs() for linear in mlp.inputs]
    weight, up = mlp.up.weight.detach().double().abs(), mlp.up_rows.indices()
    others = torch.ones(len(weight), dtype=torch.bool).index_fill(0, up, False)
    return [weight[others], weight[up]]


def _hidden(block: Block, expert: int | None) -> Site:
    return Site("mlp.hidden", block.index, expert)


def _ends(block: Block) -> Joined:
    return Joined(Site("block.input", block.index), Site("block.output", block.index))


def _added(path: str, down: Any, values: Tensor) -> Edit:
    """The edit that adds values [out] to the bias of a layer."""
    if down.bias is not None:
        return Set(f"{path}.bias", (down.bias.detach().double() + values).to(down.bias.dtype))
    dtype = next(down.parameters()).dtype
    return Replace(path, ActLinear.of(down, bias=values.to(dtype)))
