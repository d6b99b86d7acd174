"""Round what linear layers read: 8-bit activations, the other half of integer products.

    y = W q(x) + bias,   q(x) = (clamp(round(x / scale) + zero, 0, 2^b - 1) - zero) * scale   (core/grids/integers.py)

per "token": the scale of each token comes from its own largest value. per "tensor": one scale for all tokens, from what
calibration saw.
When to use it: over `rtn` at 8 bits with one scale per row and no zero points, for prompts, encoders and batches: the
layer then multiplies integers (`kernels.int8_linear`). Per token is the safe choice. Per tensor loses much if a few
channels are far larger than the others: smooth first, or leave `down` out. Over other weights no product gets faster.
Cost: per token none; per tensor one pass over the calibration data. The CPU decoder, which has no use for rounded
inputs, leaves such a model to transformers.
Settled here: every token is rounded, in prefill too; attention, norms and the output layer stay as they are; the range
of a tensor is that of all its values, or of the share `share` of their magnitudes. `half_step` says which number a
symmetric range is divided by: 127 (False; vLLM) or 127.5 (True; transformers' reader of compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.grids.grid import Scope
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.model.anatomy import Block, Linear, Site
from actkit.core.model.parts import LinearRole
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Quantiles, Range, Statistic
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth


class RoundInputs(Transform):
    """Round the inputs of linear layers to integers.

    Attributes:
        bits: 2 to 8.
        per: a scale for each 'token', found as it comes, or one for the whole 'tensor', found in calibration.
        symmetric: no zero point.
        share: of the magnitudes, which the range of a tensor covers.
        half_step: whether a symmetric range is divided by 2^(bits-1) - 0.5 instead of 2^(bits-1) - 1.
        skip: roles that are left as they are, for example ("down",).

    Raises:
        ValueError: a value is out of bounds, or has no meaning beside the others.
    """

    bits: int = Field(8, ge=2, le=8)
    per: Literal["token", "tensor"] = "token"
    symmetric: bool = True
    share: float = Field(1.0, gt=0, le=1)
    half_step: bool = False
    skip: tuple[LinearRole, ...] = ()

    tags: ClassVar[Tags] = Tags(slot="inputs", by_layer=True)

    @property
    def needs_data(self) -> bool:
        return self.per == "tensor"

    @property
    def grid(self) -> IntegerGrid:
        """The grid that inputs are rounded to."""
        scope: Scope = "tensor" if self.per == "tensor" else "group"
        return IntegerGrid(self.bits, -1, symmetric=self.symmetric, scope=scope, half_step=self.half_step)

    @model_validator(mode="after")
    def _settings_have_a_meaning(self) -> Self:
        if self.per == "token" and self.share < 1:
            raise ValueError(f"share: {self.share} was given, and the range of a token is its own; give per: tensor")
        if self.half_step and not self.symmetric:
            raise ValueError("half_step: it divides the range of a symmetric grid; leave it out, or symmetric: false")
        return self

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        weights = RoundToNearest(bits=8, group_size=-1, symmetric=True)
        norms = shapes.scalable and not any(reason.startswith("post-norm") for reason in shapes.refused)
        before = (Smooth(), weights) if norms else (weights,)  # smoothing begins at norms
        why = "weights and inputs of 8 bits: products of many rows (prompts, encoders, batches) get faster"
        yield Idea("rtn 8 bit, inputs 8 bit", cls(), why, 65, before=before)
        yield LeftOut(
            "inputs at 6 bits and less", "nothing here multiplies them faster than 8 bits, and they lose more"
        )
        yield LeftOut("inputs by one scale for all tokens", "per token loses less and is as fast here")

    def conflicts(self, earlier: Transform) -> str | None:
        if {"select", "correction"} <= set(earlier.slots):
            return "it corrects what its selection drops, from inputs that are not rounded; use one of the two"
        return super().conflicts(earlier)

    def targets(self, block: Block) -> Iterable[Linear]:
        return [linear for linear in block.linears() if linear.role not in self.skip]

    def observe(self, block: Block) -> Mapping[Site, Statistic | Sequence[Statistic]]:
        if self.per == "token":
            return {}
        wanted = {linear.path for linear in self.targets(block)}
        sites = [inputs.site for inputs in block.linear_inputs() if any(x.path in wanted for x in inputs.linears)]
        return {site: [Range(), *([Quantiles()] if self.share < 1 else [])] for site in sites}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        wanted = {linear.path for linear in self.targets(block)}
        for inputs in block.linear_inputs():
            linears = [linear for linear in inputs.linears if linear.path in wanted]
            if not linears:
                continue
            scale = zero = None
            if self.per == "tensor":
                found = seen[inputs.site]
                if not found[0].count:
                    yield from (Skip(linear.path, "no calibration token reached it") for linear in linears)
                    continue
                scale, zero = self.grid.from_range(*self._bounds(*found))
                zero = None if zero is None else zero.to(torch.uint8)
            for linear in linears:
                yield Replace(linear.path, ActLinear.of(linear, inputs=RoundedInputs(self.grid, scale, zero)))

    def _bounds(self, values: Range, magnitudes: Quantiles | None = None) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of the range, float32 [1] each."""
        low, high = values.low.min().float()[None], values.high.max().float()[None]
        if magnitudes is None:
            return low, high
        most = magnitudes.quantile(self.share)
        return low.clamp(min=-most), high.clamp(max=most)
