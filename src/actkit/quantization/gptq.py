"""GPTQ: round one input channel after the other, and let those to come make up for the error (2022, arXiv:2210.17323).

    H = X^T X / n + damp mean(diag H) I,   H^-1 = U^T U  (U upper),   for each input i, most active first:
    q_i = round(w_i),   e = (w_i - q_i) / U_ii,   w_j -= e U_ij  for all j > i

It lowers the squared error of a layer's outputs on the calibration text, for all rows of the weight at once.
When to use it: for 4 and 3 bits, if rounding to nearest loses too much and some minutes of calibration are at hand.
It goes where awq does not, such as post-norm models, as no scale is folded anywhere.
Cost: per block a pass over the calibration tokens and a part of one, one second moment per tensor that layers read, and
a Cholesky factor of it; no gradients. Memory: 28 bytes per pair of inputs of the widest layer, and what the last layers
of attention and MLP read and give.
As in the release and its successors: blocks of 128 columns, `damp` 0.01, the order by activity with scales that are
found before it from the whole weight (static groups, which leave the stored format as it is), true sequential: what a
layer reads is observed after the layers before it were rounded, those of its own block too.
Groups along the output have their scales from the column as it stands when its turn comes, errors of others added.
Settled here: U is found without inverting H: with the channels in reverse order, H = M M^T (in float64), and U is the
inverse of M turned around. A channel that was always 0 is rounded to nearest; the release sets its weights to 0, though
text to come may use it. If H has no Cholesky factor, ten times the damping is tried, three times; then, as in an
expert that no token reached, weights are rounded to nearest, and a note says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.scales import holds
from actkit.core.ground.errors import NonFiniteError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Anatomy, Block, LinearInput, Site
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes, poor_at_four_bits
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Gram, Statistic
from actkit.kernels.gram import STRIP
from actkit.kernels.second_order import round_columns
from actkit.quantization.ends import Ends, round_ends
from actkit.quantization.rtn import refuse_groups

BLOCK = 128  # columns whose errors reach the columns behind them in one product
TRIES = 4  # dampings, each ten times the one before
LEAF = 64  # below it a triangle is inverted as a whole
BYTES = 28  # per pair of inputs: the moment, its copy in order, the factor in float64 and its inverse


class Gptq(Transform):
    """Second-order rounding of the weights of linear layers.

    Attributes:
        bits: 2 to 8.
        group_size: weights per scale, must divide the layer; -1 for a whole row or column; 'auto' the largest of 128,
            64, 32 and 16 that divides it.
        group_axis: along 'input' or 'output'.
        symmetric: no zero point.
        damp: added to the diagonal of the second moment, as a share of its mean.
        act_order: most active channels first.
        true_sequential: observe the inputs of a layer after the layers before it were rounded; False observes a whole
            block at once, which costs two passes in place of little more than one, and holds all its moments.
        scale_dtype: what scales are rounded to and stored in; a layer whose scales 16 bits cannot hold keeps float32.
        embedding: how embedding and head are rounded, to nearest; None leaves them.

    Raises:
        ValueError: a value is out of bounds.
    """

    bits: int = Field(4, ge=2, le=8)
    group_size: Annotated[int, Field(ge=-1)] | Literal["auto"] = "auto"
    group_axis: Literal["input", "output"] = "input"
    symmetric: bool = False
    damp: float = Field(0.01, gt=0, le=1)
    act_order: bool = True
    true_sequential: bool = True
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    embedding: Ends | None = None

    tags: ClassVar[Tags] = Tags(
        slot="weight", by_layer=True, needs_data=True, stream="edited", passes=1, observes_in_turn=True
    )

    @property
    def grid(self) -> IntegerGrid:
        """The grid that weights are rounded to."""
        return IntegerGrid(self.bits, self.group_size, self.group_axis, self.symmetric, scale_dtype=self.scale_dtype)

    @model_validator(mode="after")
    def _grid_is_possible(self) -> Self:
        _ = self.grid  # it refuses a group size of 0
        return self

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        yield LeftOut(
            "gptq at 3 bits", "3 bits save a quarter of 4 on disk, decode no faster and cost far more quality"
        )
        why = f"errors of rounding are moved onto channels that carry less; {shapes.group_fits}"
        four = cls(bits=4, group_size=shapes.group)
        yield Idea("gptq 4 bit", four, f"{why}{poor_at_four_bits(profile)}", 35)

    def memory(self, block: Block, length: int) -> int:
        widths = [[inputs.linears[0].in_features for inputs in stage] for stage in self.stages(block)]
        moments = max((sum(4 * width**2 for width in stage) for stage in widths), default=0)
        return moments + (BYTES - 4) * max((width for stage in widths for width in stage), default=0) ** 2

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        refuse_groups(self.grid, block)
        return {}  # `edit` observes what each layer reads when its turn comes

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        errors: dict[str, tuple[float, float]] = {}  # of a layer's outputs: rounded to nearest, and as it is now
        for stage in self.stages(block):
            grams = dict(seen.observe({inputs.site: Gram(torch.float32) for inputs in stage}))
            for inputs in stage:
                second_order = SecondOrder.of(inputs.site, grams.pop(inputs.site), self.damp, self.act_order)
                for linear in inputs.linears:
                    weight = linear.weight.detach()
                    grid = self.grid.of(*weight.shape)
                    stored = second_order.round(weight, grid)
                    if second_order.note:
                        yield Note(linear.path, second_order.note)
                    elif second_order.moment is not None:
                        both = (grid.fake(weight), stored.dequantize())
                        errors[linear.path] = tuple(second_order.error(weight, each) for each in both)  # type: ignore[assignment]
                    yield Replace(linear.path, ActLinear.of(linear, weight=stored))
        if errors:
            nearest, now = (sum(each) for each in zip(*errors.values(), strict=True))
            share = f", {now / nearest:.2f} x that of rounding to nearest" if nearest else ""
            values = {path: {"nearest": before, "gptq": after} for path, (before, after) in errors.items()}
            yield Note(block.path, f"mean squared error of the layers' outputs {now:.3g}{share}", values)

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        return round_ends(view, self.embedding)

    def stages(self, block: Block) -> Iterator[list[LinearInput]]:
        """What is observed together: the inputs of equal layers of all experts, else one; or a whole block."""
        inputs = block.linear_inputs()
        if not self.true_sequential:
            yield list(inputs)
            return
        ranked = sorted(inputs, key=lambda each: each.site.expert is not None and each.site.name == "mlp.hidden")
        for _, stage in groupby(ranked, lambda each: each.site.name if each.site.expert is not None else each.site):
            yield list(stage)


@dataclass(frozen=True)
class SecondOrder:
    """How the layers that read one tensor are rounded.

    Attributes:
        moment: X^T X / n of the tensor, [in, in]; None if no token was seen.
        order: of the columns; None rounds to nearest.
        note: what is worth saying, or ''.
    """

    moment: Tensor | None
    order: Order | None
    note: str = ""

    @classmethod
    def of(cls, site: Site, gram: Gram, damp: float = 0.01, act_order: bool = True) -> SecondOrder:
        """Read it off what was observed.

        Args:
            site: of the tensor.
            gram: what was seen there.
            damp: as a setting of `Gptq`.
            act_order: as a setting of `Gptq`.

        Raises:
            NonFiniteError: sums of products are infinite.
        """
        if not gram.count:
            return cls(None, None, "rounded to nearest: no calibration token reached it")
        moment = gram.mean_gram
        if not torch.isfinite(moment).all():
            raise NonFiniteError(f"{site}: products of its values overflow {moment.dtype}; check the calibration data.")
        order = Order.of(moment, damp, act_order)
        if order is None:
            return cls(moment, None, "rounded to nearest: its second moment has no Cholesky factor")
        more = f"damp {order.damp:g} was needed, as its second moment has no Cholesky factor with less"
        return cls(moment, order, more if order.damp > damp else "")

    def round(self, weight: Tensor, grid: IntegerGrid) -> IntegerWeight:
        """Round a weight [out, in] to a grid."""
        if self.order is None:
            return IntegerWeight.quantize(weight, grid)
        stored = round_in_order(weight, self.order, grid)
        if holds(stored.scales(), grid.scale_dtype):
            return stored
        return round_in_order(weight, self.order, replace(grid, scale_dtype="float32"))

    def error(self, weight: Tensor, rounded: Tensor) -> float:
        """Return the mean squared error of a layer's outputs, per token and output.

        Args:
            weight: [out, in].
            rounded: [out, in].
        """
        assert self.moment is not None
        change = (weight - rounded).float()
        total = 0.0
        for start in range(0, change.shape[1], STRIP):  # it is symmetric: each strip with what stands behind it, twice
            strip, behind = change[:, start : start + STRIP], change[:, start + STRIP :]
            moment = self.moment[start : start + STRIP, start:]
            mixed = strip @ moment
            own, others = mixed[:, : strip.shape[1]], mixed[:, strip.shape[1] :]
            total += float((own * strip).sum()) + 2 * float((others * behind).sum())
        return total / len(change)


class Order(NamedTuple):
    """In which order the columns of a weight are rounded, and where errors go.

    Attributes:
        columns: int64 [in], a permutation.
        upper: float32 [in, in], the triangle U with H^-1 = U^T U, of the columns in this order.
        damp: that was needed.
    """

    columns: Tensor
    upper: Tensor
    damp: float

    @classmethod
    def of(cls, moment: Tensor, damp: float = 0.01, act_order: bool = True) -> Order | None:
        """Read the order off a second moment X^T X / n.

        Args:
            moment: [in, in].
            damp: as a setting of `Gptq`.
            act_order: as a setting of `Gptq`.

        Returns:
            None if the damped moment has no Cholesky factor, not even with 1,000 times the damping.
        """
        active = moment.diagonal()
        columns = torch.arange(len(active), device=active.device)
        if act_order:
            columns = active.argsort(descending=True, stable=True)
        reverse = columns.flip(0)
        turned = moment[reverse[:, None], reverse].double()
        diagonal = turned.diagonal()
        live = diagonal > 0
        mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
        diagonal[~live] = mean
        before = 0.0
        for step in range(TRIES):
            diagonal += (damp * 10**step - before) * mean
            before = damp * 10**step
            factor, failed = torch.linalg.cholesky_ex(turned)
            if not int(failed) and bool(factor.sum().isfinite()):  # as all are, without a copy
                factor = factor.float()  # what it is inverted to is kept in float32 too
                _invert(factor)
                return cls(columns, factor.flip(0, 1), before)
        return None


def _invert(lower: Tensor) -> None:
    """Invert a lower triangle in place, by halves."""
    if len(lower) <= LEAF:
        unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
        return
    half = len(lower) // 2
    top, corner, bottom = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert(top)
    _invert(bottom)
    corner.copy_(bottom @ corner @ top).neg_()


def round_in_order(weight: Tensor, order: Order, grid: IntegerGrid) -> IntegerWeight:
    """Round a weight, each column's error moved onto those behind it.

    Args:
        weight: [out, in].
        order: of its columns.
        grid: to round to; its groups fit the weight.

    Returns:
        The codes, in the dtype of the weight, with the columns where they were.
    """
    columns, upper = order.columns, order.upper
    left = weight.float()[:, columns]  # what is left to round, in order
    back = columns.argsort()
    if grid.group_axis == "input":  # static groups: their scales are those of the weight before errors move
        scale, zero = grid.parameters(weight)
        shift = torch.full_like(scale, grid.middle) if zero is None else zero.float()
        groups = columns // grid.size(len(columns))
    parts = []
    for start in range(0, len(columns), BLOCK):
        chosen, behind = slice(start, min(start + BLOCK, len(columns))), slice(start + BLOCK, None)
        part, triangle = left[:, chosen], upper[chosen, chosen]
        if grid.group_axis == "input":
            codes, errors = round_columns(part, triangle, scale, shift, groups[chosen], grid.levels)
            parts.append([codes])
        else:
            *found, errors = _round_by_columns(part, triangle, grid)
            parts.append(found)
        left[:, behind].addmm_(errors, upper[chosen, behind], alpha=-1)
    found = [torch.cat(each, 1)[:, back] for each in zip(*parts, strict=True)]
    if grid.group_axis == "output":
        scale, zero = found[1], None if grid.symmetric else found[2]
    return IntegerWeight.of_codes(found[0], scale, zero, grid, weight.dtype)


def _round_by_columns(part: Tensor, upper: Tensor, grid: IntegerGrid) -> list[Tensor]:
    """Codes, scales, zeros (if there are some) and errors of some columns, whose groups lie along the output."""
    rest = part.t().contiguous()
    found = []
    for i, column in enumerate(rest):
        codes, scale, zero = grid.quantize(column[:, None])
        errors = (column - grid.dequantize(codes, scale, zero)[:, 0]) / upper[i, i]
        rest[i + 1 :].sub_(torch.outer(upper[i, i + 1 :], errors))
        found.append([each for each in (codes, scale, zero, errors[:, None]) if each is not None])
    return [torch.cat(each, 1) for each in zip(*found, strict=True)]
