"""Round-to-nearest: every weight to the closest point of an integer grid. The baseline of all weight quantizers.

    w' = (clamp(round(w / scale) + zero, 0, 2^b - 1) - zero) * scale      (grids and conventions:
    core/grids/integers.py)

When to use it: first, as it takes seconds and no data: 8 bits halve the size of a 16-bit model at no measurable loss on
the embedded models. At 4 bits and less compare with `awq`.
Cost: one pass over the weights, no data. Groups may lie along the input (the usual choice, what serving formats
know) or along the output (one scale per input channel and group of outputs).
Settled here: scales take 16 bits. On smollm2 (4 bits, groups of 64) that is 4.375 bits per weight for 4.625, and a
perplexity of 32.71 for 32.78 on 2,048 tokens; at 3 bits 74.7 for 74.4, in groups of 32 30.15 for 30.07.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import Convention, IntegerGrid
from actkit.core.layers.conv import ActConv
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.layers.weights import rounded
from actkit.core.model.anatomy import Anatomy, Block, Site
from actkit.core.model.parts import Convolution, Linear
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes, poor_at_four_bits
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Statistic
from actkit.quantization.ends import Ends, round_ends

WORTHWHILE = 0.05  # share of a model that embedding and head hold, from which rounding them is tried


class RoundedWeights(Transform):
    """Rounds the weights of linear layers, and of convolutions that they fit, to a grid; a base for what says which.

    Attributes:
        embedding: how embedding and head are rounded; None leaves them.
    """

    embedding: Ends | None = None

    tags: ClassVar[Tags] = Tags(slot="weight", by_layer=True)

    @property
    def grid(self) -> Grid:
        """The grid that weights are rounded to."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _grid_is_possible(self) -> Self:
        _ = self.grid  # it refuses a group size of 0
        return self

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.tags.factors and earlier.slots == self.slots:  # both factors are rounded
            return None
        return super().conflicts(earlier)

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        refuse_groups(self.grid, block)
        return {}

    def targets(self, block: Block) -> Iterable[Linear | Convolution]:
        return [*block.linears(), *(each for each in block.convolutions() if self._misfit(each) is None)]

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for linear in block.linears():
            factors = _factors(linear)
            weight = rounded(linear.weight, self.grid) if factors is None else factors.rounded(self.grid)
            yield Replace(linear.path, ActLinear.of(linear, weight=weight))
        for convolution in block.convolutions():
            reason = self._misfit(convolution)
            if reason is None:
                weight = rounded(convolution.weight, self.grid)
                yield Replace(convolution.path, ActConv.of(convolution.module, weight=weight))
            else:
                yield Skip(convolution.path, reason)

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        return round_ends(view, self.embedding)

    def _misfit(self, convolution: Convolution) -> str | None:
        """Why the groups do not fit a convolution, whose inputs are its channels times its kernel."""
        reason = self.grid.fits(*convolution.weight.shape)
        return None if reason is None else f"{reason}; group_size=-1 rounds it by whole rows"


class RoundToNearest(RoundedWeights):
    """Round the weights of linear layers to integers.

    Attributes:
        bits: 2 to 8.
        group_size: weights per scale, must divide the layer; -1 for a whole row or column; 'auto' the largest of 128,
            64, 32 and 16 that divides it.
        group_axis: along 'input' or 'output'.
        symmetric: no zero point.
        convention: "llm-awq" for the grid of AWQ's release.
        scale_dtype: what scales are rounded to and stored in; a layer whose scales 16 bits cannot hold keeps float32.
        embedding: how embedding and head are rounded; None leaves them.

    Raises:
        ValueError: a value is out of bounds.
    """

    bits: int = Field(4, ge=2, le=8)
    group_size: Annotated[int, Field(ge=-1)] | Literal["auto"] = "auto"
    group_axis: Literal["input", "output"] = "input"
    symmetric: bool = False
    convention: Convention = "zero_in_range"
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"

    @property
    def grid(self) -> IntegerGrid:
        """The grid that weights are rounded to."""
        return IntegerGrid(
            self.bits, self.group_size, self.group_axis, self.symmetric, self.convention, scale_dtype=self.scale_dtype
        )

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        fits, hard = shapes.group_fits, poor_at_four_bits(profile)
        yield Idea("rtn 8 bit", cls(bits=8, group_size=shapes.group), f"the safest cut; {fits}", 10, base=2)
        yield Idea("rtn 4 bit", cls(bits=4, group_size=shapes.group), f"{fits}{hard}", 20, base=3)
        if shapes.ends >= WORTHWHILE:
            too = cls(bits=8, group_size=shapes.group, embedding=Ends())
            yield Idea("rtn 8 bit, embedding too", too, f"embedding and head are {shapes.ends:.0%} of the model", 12)
        if shapes.finer_group is not None and not shapes.scalable:
            finer = cls(bits=4, group_size=shapes.finer_group)
            name = f"rtn 4 bit, groups of {shapes.finer_group}"
            yield Idea(name, finer, f"finer groups if 4 bits lose too much{hard}", 130)
        if shapes.output_group is not None:
            columns = cls(bits=4, group_size=shapes.output_group, group_axis="output")
            yield Idea("rtn 4 bit, groups of outputs", columns, "one scale per input channel, for outliers", 140)
        yield LeftOut("rtn at 3 bits", "3 bits save a quarter of 4 on disk, decode no faster and cost far more quality")


def refuse_groups(grid: Grid, block: Block) -> None:
    """Raise ValueError that names the first layer that the groups do not fit."""
    for linear in block.linears():
        factors = _factors(linear)
        shape = (linear.out_features, linear.in_features)
        reason = grid.fits(*shape) if factors is None else factors.misfit(grid)
        if reason:
            raise ValueError(f"{linear.path}: {reason}.")


def _factors(linear: Linear) -> LowRankWeight | None:
    """The factors that stand in place of a layer's weight, or None."""
    storage = getattr(linear.module, "storage", None)
    return storage if isinstance(storage, LowRankWeight) else None
