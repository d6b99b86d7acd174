"""Quantization-aware training, first step: layers that are trained as they will be stored, rounded.

    y = q_w(W) q_x(x) + bias          gradients pass the rounding as if it were not there (straight-through, 2013,
                                      arXiv:1308.3432)
    weights, by "range":    the range of a row, times `clip`, found anew in each step; dW = d q_w(W), everywhere
             by "statsq":   half-integers of a step of 2 mean|W| / n, found anew (2023, arXiv:2302.02210); the same
             by "lsq":      symmetric, with a learned step (2020, arXiv:1902.08153); none to a clipped weight
    inputs,  by "token":    the range of each token, times `clip`; dx = d q_x(x), everywhere
             by "lsq":      a learned step, between two learned vectors: q_x(x) = grid(x + before) + after

The three stages are `fake_quantize`, a training of any kind (`actkit.train`, a `train:` stage, a loop of your own), and
`freeze`, which stores integers of the same values. A saved model in between holds the weights that are trained, whole.
When to use it: below 4 bits, or with inputs of 4 bits, if rounding after training (`gptq`, `omniquant`) loses too much
and there are data and time to train. `ofq` has its settings for vision transformers, and the rules that go with them.
Cost: a training, its steps some 1.3 to 2 times as long as those of the plain model; in memory what training takes, in
float32. One pass over calibration data for the learned steps of inputs, else none.
Settled here: biases, norms, convolutions, embedding and head stay as they are. The scale of a row is float32. The paper
of `lsq` starts from the first batch, here from calibration; a learned step counts by its magnitude, in place of a floor
of 1e-5. `clip` shrinks both ends of a range, so that a zero point stays a code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import pi, sqrt
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Replace, Skip
from actkit.core.grids.grid import Grid
from actkit.core.grids.half_integers import HalfIntegerGrid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.learned import first_step
from actkit.core.layers.latent_weight import LatentWeight
from actkit.core.layers.learned_inputs import LearnedInputs
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.model.anatomy import Block, Linear, Site
from actkit.core.model.parts import LinearRole
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Slot, Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Moments, Statistic
from actkit.quantization.rtn import refuse_groups


class TrainedWeights(BaseModel):
    """How weights are seen while they are trained.

    Attributes:
        by: 'range', 'statsq' or 'lsq', see above.
        bits: 2 to 8; of 'statsq' 1 to 7.
        group_size: weights per scale; -1 for a whole row, 'auto' for the largest of 128, 64, 32 and 16 that divides it.
        symmetric: no zero point; of 'range' only, the others have none.
        clip: what both ends of a range are multiplied by; of 'range' only.

    Raises:
        ValueError: a value is out of bounds, or has no meaning beside the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    by: Literal["range", "statsq", "lsq"] = "range"
    bits: int = Field(4, ge=1, le=8)
    group_size: Annotated[int, Field(ge=-1)] | Literal["auto"] = -1
    symmetric: bool = False
    clip: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _settings_have_a_meaning(self) -> Self:
        _ = self.grid  # it refuses bits and a group size of 0
        if self.by != "range" and (self.symmetric or self.clip != 1):
            raise ValueError(
                f"symmetric, clip: they say how a range is taken, and {self.by} takes none; leave them out"
            )
        return self

    @property
    def grid(self) -> Grid:
        """The grid that weights are seen through."""
        if self.by == "statsq":
            return HalfIntegerGrid(self.bits, self.group_size)
        return IntegerGrid(self.bits, self.group_size, symmetric=self.symmetric or self.by == "lsq")

    def of(self, weight: Tensor) -> LatentWeight:
        """Return the trainable weight that begins as `weight` [out, in]."""
        return LatentWeight.of(weight, self.grid, clip=self.clip, learned=self.by == "lsq")


class TrainedInputs(BaseModel):
    """How inputs are rounded while weights are trained.

    Attributes:
        by: 'token' or 'lsq', see above.
        bits: 2 to 8.
        symmetric: no zero point; of 'token' only.
        clip: what both ends of a token's range are multiplied by; of 'token' only.
        per: of 'lsq': one learned step for the 'tensor', or one for each 'channel' or 'position'; the latter holds for
            sequences of one length only.
        biases: of 'lsq': learn a vector before and one after.
        unsigned: of 'lsq': roles whose inputs have codes without a sign, such as ("down",) behind ReLU or GELU.

    Raises:
        ValueError: a value is out of bounds, or has no meaning beside the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    by: Literal["token", "lsq"] = "token"
    bits: int = Field(8, ge=2, le=8)
    symmetric: bool = False
    clip: float = Field(1.0, gt=0, le=1)
    per: Literal["tensor", "channel", "position"] = "tensor"
    biases: bool = True
    unsigned: tuple[LinearRole, ...] = ()

    @model_validator(mode="after")
    def _settings_have_a_meaning(self) -> Self:
        others = ("symmetric", "clip") if self.by == "lsq" else ("per", "biases", "unsigned")
        given = [name for name in others if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)}: it has no meaning for inputs by {self.by!r}; leave it out")
        return self

    def of(self, linear: Linear, magnitudes: Tensor | None, positions: int) -> RoundedInputs:
        """Return what rounds the inputs of a layer.

        Args:
            linear: the layer.
            magnitudes: mean |x| of each channel, of 'lsq'.
            positions: how many a sequence has, of 'lsq' per position.
        """
        if magnitudes is None:
            return RoundedInputs(IntegerGrid(self.bits, -1, symmetric=self.symmetric), clip=self.clip)
        unsigned = linear.role in self.unsigned
        return self.learned(magnitudes, linear.in_features, positions, linear.weight.dtype, unsigned=unsigned)

    def learned(
        self, magnitudes: Tensor, channels: int, positions: int, dtype: torch.dtype, *, unsigned: bool = False
    ) -> LearnedInputs:
        """Return what rounds by learned steps.

        Args:
            magnitudes: mean |x| of each channel.
            channels: how many.
            positions: how many a sequence has, per position.
            dtype: of the parameters.
            unsigned: codes have no sign.
        """
        grid = IntegerGrid(self.bits, -1, symmetric=not unsigned, scope="tensor")
        mean = magnitudes.float()
        step = first_step(mean if self.per == "channel" else mean.mean()[None], grid)
        step = torch.where(step > 0, step, 1.0)  # of a channel that was always 0
        if self.per == "position":
            step = step.expand(positions, 1)
        zero = torch.zeros(1, dtype=torch.uint8) if unsigned else None
        return LearnedInputs(grid, step, zero, biases=self.biases, channels=channels, dtype=dtype)


class FakeQuantize(Transform):
    """Put weights in training, and what rounds inputs in training, into linear layers.

    Attributes:
        weights: how weights are seen; None leaves them as they are.
        inputs: how inputs are rounded; None leaves them as they are.
        skip: roles that are left as they are.

    Raises:
        ValueError: a value is out of bounds, or has no meaning beside the others.
    """

    weights: TrainedWeights | None = TrainedWeights()
    inputs: TrainedInputs | None = None
    skip: tuple[LinearRole, ...] = ()

    tags: ClassVar[Tags] = Tags(slot=("weight", "inputs"))
    not_proposed: ClassVar[str] = "it is to be trained, which the search does not do"

    @property
    def slots(self) -> tuple[Slot, ...]:
        given: dict[Slot, Any] = {"weight": self.weights, "inputs": self.inputs}
        return tuple(slot for slot, settings in given.items() if settings is not None)

    @property
    def needs_data(self) -> bool:
        return self.inputs is not None and self.inputs.by == "lsq"

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.weights is None and self.inputs is None:
            raise ValueError("weights, inputs: both are null, so that nothing would be done; give one of the two")
        return self

    def conflicts(self, earlier: Transform) -> str | None:
        if self.needs_data and {"select", "correction"} & set(earlier.slots):
            return (
                "it shifts inputs by what it learns, which a selection or correction does not know; use one of the two"
            )
        return super().conflicts(earlier)

    def targets(self, block: Block) -> Iterable[Linear]:
        return self.trained(block)

    def trained(self, block: Block) -> Sequence[Linear]:
        """The layers that are made to be trained one by one."""
        return [linear for linear in block.linears() if linear.role not in self.skip]

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        if self.weights is not None:
            refuse_groups(self.weights.grid, block)
        if not self.needs_data:
            return {}
        wanted = {linear.path for linear in self.targets(block)}
        sites = [inputs.site for inputs in block.linear_inputs() if any(x.path in wanted for x in inputs.linears)]
        return {site: Moments() for site in sites}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        sites = {linear.path: inputs.site for inputs in block.linear_inputs() for linear in inputs.linears}
        positions = self._positions(seen)
        for linear in self.trained(block):
            weight = inputs = None
            if self.weights is not None:
                weight = self.weights.of(linear.weight)
            if self.inputs is not None:
                found = seen[sites[linear.path]] if self.needs_data else None
                if found is not None and not found.count:
                    yield Skip(linear.path, "no calibration token reached it")
                    continue
                magnitudes = None if found is None else _magnitudes(found, linear)
                inputs = self.inputs.of(linear, magnitudes, positions)
            yield Replace(linear.path, ActLinear.of(linear, weight=weight, inputs=inputs))
        if self.weights is not None:
            yield from (
                Skip(convolution.path, "convolutions are not trained rounded, and stay as they are")
                for convolution in block.convolutions()
            )

    def _positions(self, seen: Seen) -> int:
        """How many positions the sequences of the calibration data have, if that is needed."""
        if self.inputs is None or self.inputs.per != "position":
            return 0
        lengths = sorted({call.hidden.shape[-2] for call in seen.block_calls})
        if len(lengths) != 1:
            raise ValueError(
                f"per: a step for each position needs sequences of one length, and the data have {lengths}; give such "
                f"data, or per: tensor."
            )
        return lengths[0]


def _magnitudes(found: Moments, linear: Linear) -> Tensor:
    """The mean magnitude of each channel that a layer rounds; of rotated ones that of a normal value of their size."""
    if not isinstance(linear.module, ActLinear) or linear.module.inputs is None:
        return found.mean_abs
    size = (found.variance + found.mean.square()).mean().sqrt()
    return (size * sqrt(2 / pi)).expand(linear.in_features)
