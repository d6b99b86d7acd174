"""GR-KAN in place of trained MLPs: KAT's conversion of a model (2024, ICLR 2025, arXiv:2409.10594).

    y = W_2 F_2(W_1 F_1(x) + b_1) + b_2        F_1 begins as the identity, F_2 as the activation that stood there

Linear layers stay as they are, so what the model computes changes by the error of F_2 alone. `GroupRational` has the
formula of F. In a gated MLP, which the paper does not have, F_2 is the gate's function and there is no F_1.
When to use it: to give a trained model activations that it can go on learning. The converted model is to be fine-tuned:
by itself it is the old one, a little slower.
Cost: one pass over the calibration data and a fit of milliseconds per MLP.
Settled here: F_2 is fitted to what each MLP reads (the paper and its release fit once, on [-3, 3], and real inputs are
far outside of it): least squares with the density of the measured inputs, and `floor` of the weight spread over their
whole range, so that the rare ones are met too. Nothing is known of inputs that lie further out. `between` fits on an
interval instead, without data.
Our own reading: F_1 stands in front of the MLP as a wrapper, so that the MLP is found by every other method; no scale
moves from the norm through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.ground.errors import CoverageError, RecipeError
from actkit.core.layers.activations import Thresholded, mixes_of, record_of
from actkit.core.model.anatomy import Block, Mlp, Site
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.univariate.fit_rational import RationalFit, fit_rational
from actkit.core.watch.statistics import Histogram, Statistic
from actkit.functions.kat.group_rational import GroupRational, RationalFirst, Share
from actkit.kernels.rationals import Kind

BITS = 5  # of the mantissa, by which measured inputs are told apart
SPREAD = 301  # points over the range


class GrKan(Transform):
    """Replace the activation functions of MLPs by rational functions that groups of channels can learn.

    Attributes:
        groups: of the channels, each with its own function.
        degrees: of numerator and denominator.
        kind: of the denominator, 'A' (as released) or 'B' (as in the paper).
        share: what all groups have in common.
        first: also put one that is the identity in front of each MLP without a gate.
        between: fit on this interval and not on what the MLPs read; needs no data.
        floor: share of the weight that is spread evenly over the range of the inputs.

    Raises:
        ValueError: a value is out of bounds.
        RecipeError: when applied, the groups do not divide the channels.
        CoverageError: when applied, actkit does not know the model's MLPs.
    """

    groups: int = Field(8, ge=1)
    degrees: tuple[int, int] = (5, 4)
    kind: Kind = "A"
    share: Share = "numerator"
    first: bool = True
    between: tuple[float, float] | None = None
    floor: float = Field(0.01, gt=0, le=1)

    tags: ClassVar[Tags] = Tags(stream="original", least_coverage=0.25)
    not_proposed: ClassVar[str] = "it pays only after training: by itself it computes what stood there, a little slower"

    @field_validator("degrees")
    @classmethod
    def _are_degrees(cls, degrees: tuple[int, int]) -> tuple[int, int]:
        if degrees[0] < 1 or degrees[1] < 1:
            raise ValueError("give two degrees of 1 or more")
        return degrees

    @field_validator("between")
    @classmethod
    def _is_an_interval(cls, between: tuple[float, float] | None) -> tuple[float, float] | None:
        if between is not None and not between[0] < between[1]:
            raise ValueError("give a lower end below the upper one, or None to measure it")
        return between

    @property
    def needs_data(self) -> bool:
        return self.between is None

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        mlps = [mlp for block in trial.anatomy.blocks for _, mlp in block.mlps()]
        if not mlps and not any(block.experts for block in trial.anatomy.blocks):
            raise CoverageError(
                f"model: actkit knows no MLP with an activation in this {type(trial.model).__name__}; describe its "
                f"family with register_architecture, or use swap."
            )
        for mlp in mlps:
            for where, channels in ((mlp.activation, mlp.width), (mlp.path, mlp.up.in_features)):
                if channels % self.groups and (where == mlp.activation or self._is_first(mlp)):
                    raise RecipeError(
                        f"groups: {self.groups} were given, and {where} has {channels} channels; give a number that "
                        f"divides them{'' if where == mlp.activation else ', or first=False'}."
                    )
        return self

    def targets(self, block: Block) -> Iterable[str]:
        return block.nonlinearities()

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            return f"it would change what the {earlier.slots[0]} slot was calibrated on; put gr_kan first"
        return super().conflicts(earlier)

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        if self.between is not None:
            return {}
        return {_site(block, expert): Histogram() for expert, _ in block.mlps()}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for expert, mlp in block.mlps():
            old = get_module(block.root, mlp.activation)
            if isinstance(old, Thresholded):
                yield Skip(mlp.activation, "a threshold stands there, whose zeros a rational function would not give")
                continue
            function = function_of(old)
            if function is None:
                yield Skip(mlp.activation, f"a {type(old).__name__} stands there, which is no element-wise function")
                continue
            points, weights = None, None
            if self.between is None:
                inputs: Histogram = seen[_site(block, expert)]
                if not inputs.count:
                    yield Skip(mlp.activation, "no calibration token reached it")
                    continue
                points, weights = points_of(inputs, self.floor)
            between = self.between or (-3.0, 3.0)
            fitted = fit_rational(function, self.degrees, self.kind, between=between, points=points, weights=weights)
            yield Replace(mlp.activation, self._rational(mlp.width, fitted).train(old.training))
            yield Note(mlp.activation, _described(fitted), _values(fitted))
            if self._is_first(mlp):
                inner = get_module(block.root, mlp.path)
                identity = self._rational(mlp.up.in_features, "identity")
                yield Replace(mlp.path, RationalFirst(inner, identity).train(inner.training))

    def _rational(self, channels: int, start: str | RationalFit) -> GroupRational:
        return GroupRational(channels, self.groups, self.degrees, start, self.kind, self.share)

    def _is_first(self, mlp: Mlp) -> bool:
        """Whether a function goes in front; the module of the MLP must be what reads its input."""
        return self.first and not mlp.gated and mlp.up.expert is None and mlp.up.path.startswith(f"{mlp.path}.")


def function_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What an activation module computes, for float64 inputs; None if it is no element-wise function.

    Args:
        module: any module.
    """
    record = record_of(module)
    if record is not None:
        return None if record.mixes else record.function
    if mixes_of(module) != ():
        return None
    like = next(module.parameters(), None)
    return lambda x: module(x if like is None else x.to(like.dtype)).double()


def points_of(inputs: Histogram, floor: float) -> tuple[Tensor, Tensor]:
    """Return the points that a function is fitted on, and their weights.

    Args:
        inputs: of the function.
        floor: share of the weight that lies on the whole range, a twentieth of it added at both ends.

    Returns:
        Centres of the histogram's bins, then points over the range: float64 [k] each.
    """
    lower, upper, counts = inputs.cells(bits=BITS)
    low, high = float(lower[0]), float(upper[-1])
    margin = (high - low) / 20
    spread = torch.linspace(low - margin, high + margin, SPREAD, dtype=torch.float64)
    points = torch.cat(((lower + upper) / 2, spread))
    weights = torch.cat(((1 - floor) * counts / counts.sum(), torch.full_like(spread, floor / SPREAD)))
    return points, weights


def _site(block: Block, expert: int | None) -> Site:
    return Site("mlp.preactivation", block.index, expert)


def _described(fitted: RationalFit) -> str:
    low, high = fitted.between
    return (
        f"fitted on {low:.3g} to {high:.3g}: off by {fitted.largest_error:.2g} at most (at {fitted.at:.3g}), by "
        f"{fitted.error:.2g} in the mean square"
    )


def _values(fitted: RationalFit) -> dict[str, float]:
    low, high = fitted.between
    return {"low": low, "high": high, "largest_error": fitted.largest_error, "at": fitted.at, "error": fitted.error}
