"""AdaDim: per layer, groups along the inputs or along the outputs, whichever errs less (2023, arXiv:2309.15531).

    axis = argmin over input, output of mean |f(x; W) - f(x; round(W, axis))|^2

f is attention for its query, key and value, the MLP for its gate and up, and a layer by itself otherwise. Groups along
the output lie within one input channel: a channel with large activations has scales of its own, and spoils no others.
When to use it: for 3 or 4 bits if some input channels stand out and nothing can take awq's scale, or if a sparse kernel
is to skip inputs: an input channel with its scales is what it reads. Formats other than actkit's folder know groups of
inputs only; `axes: [input]` is then a plain quantizer.
Cost: per query, key, value, gate and up three runs of the attention or the MLP on search_tokens, per other layer three
products; with gptq its cost too. No gradients.
As in the release: hidden states of the original model decide, layers of a block in the order query, key, value, output,
gate, up, down, each seeing those before it rounded already; a tie goes to groups of inputs; rounding to nearest decides
for gptq too, which then rounds with the chosen groups on the hidden states of the rounded model.
Settled here: zero lies in the range of every group (`convention: llm-awq` is the release's grid); a layer whose outputs
no group divides keeps groups of inputs, and a note says so; objective 'layer' judges each layer by its own output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, isfinite
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Note, Replace, Skip, get_module
from actkit.core.grids.grid import GroupAxis
from actkit.core.grids.integers import Convention, IntegerGrid
from actkit.core.ground.errors import NonFiniteError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import IntegerWeight
from actkit.core.model.anatomy import Block, Linear, Site
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes, poor_at_four_bits
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.calls import Call
from actkit.core.watch.statistics import Gram, Statistic
from actkit.quantization.gptq import Gptq, SecondOrder

SCALED = ("Awq", "Smooth", "SmoothQuantPlus")  # they scale input channels, which groups of outputs absorb


class AdaDim(Transform):
    """Round weights in groups along the axis that errs less, layer by layer.

    Attributes:
        bits: 2 to 8.
        group_size: weights per scale; -1 for a whole row or column; 'auto' the largest of 128, 64, 32 and 16 that
            divides it.
        method: how weights are rounded, 'rtn' or 'gptq'.
        axes: that are tried, 'input' or 'output'.
        symmetric: no zero point.
        convention: "llm-awq" for the grid of the release; rtn only.
        scale_dtype: what scales are rounded to and stored in; a layer whose scales 16 bits cannot hold keeps float32.
        objective: 'inspect' compares outputs of attention and MLP, 'layer' those of each layer.
        search_tokens: how many tokens decide; None for all.
        damp: as of `gptq`.
        act_order: as of `gptq`.

    Raises:
        ValueError: a value is out of bounds.
    """

    bits: int = Field(3, ge=2, le=8)
    group_size: Annotated[int, Field(ge=-1)] | Literal["auto"] = "auto"
    method: Literal["rtn", "gptq"] = "rtn"
    axes: tuple[GroupAxis, ...] = Field(("input", "output"), min_length=1)
    symmetric: bool = False
    convention: Convention = "zero_in_range"
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    objective: Literal["inspect", "layer"] = "inspect"
    search_tokens: int | None = Field(None, ge=1)
    damp: float = Field(0.01, gt=0, le=1)
    act_order: bool = True

    tags: ClassVar[Tags] = Tags(slot="weight", needs_data=True, stream="both", records_calls=True, sums_calls=True)

    @model_validator(mode="after")
    def _grids_are_possible(self) -> Self:
        for axis in self.axes:
            self.grid(axis)  # it refuses a group size of 0
        return self

    def grid(self, axis: GroupAxis) -> IntegerGrid:
        """Return the grid with groups along an axis."""
        settings = (self.bits, self.group_size, axis, self.symmetric, self.convention)
        return IntegerGrid(*settings, scale_dtype=self.scale_dtype)

    @property
    def rounder(self) -> Gptq:
        """The second-order rounding that `method: gptq` stands for."""
        return Gptq(bits=self.bits, group_size=self.group_size, damp=self.damp, act_order=self.act_order)

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        if shapes.output_group is None:
            yield LeftOut("adadim", "no group divides the outputs of all layers, so it could choose nothing")
            return
        four = cls(bits=4, group_size=min(shapes.group, shapes.output_group), search_tokens=1024)
        yield Idea("adadim 4 bit", four, f"each layer chooses the axis of its groups{poor_at_four_bits(profile)}", 145)

    def conflicts(self, earlier: Transform) -> str | None:
        if type(earlier).__name__ in SCALED and "output" in self.axes:
            return (
                "groups of outputs lie within an input channel, whose scale takes part in every choice and helps none; "
                "use one of the two, or axes: [input]"
            )
        return super().conflicts(earlier)

    def passes(self, tokens: int, rows: int) -> float:
        searched = tokens if self.search_tokens is None else min(self.search_tokens, tokens)
        return 6 * searched / max(1, tokens) + (4 if self.method == "gptq" else 0)

    def memory(self, block: Block, length: int) -> int:
        return self.rounder.memory(block, length) if self.method == "gptq" else 0

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        for linear in block.linears():
            misfits = self._misfits(linear)
            if "input" in misfits or len(misfits) == len(self.axes):
                raise ValueError(f"{linear.path}: {next(iter(misfits.values()))}.")
        return {}

    def _misfits(self, linear: Linear) -> dict[GroupAxis, str]:
        """Why groups along an axis do not fit a layer, of those that do not."""
        found = {axis: self.grid(axis).fits(linear.out_features, linear.in_features) for axis in self.axes}
        return {axis: reason for axis, reason in found.items() if reason}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        parts = inspected(block) if self.objective == "inspect" else {}
        chosen: dict[str, dict[str, Any]] = {}
        for stage in self.rounder.stages(block):
            grams: dict[Site, Gram] = {}
            if self.method == "gptq":
                grams = dict(seen.observe({inputs.site: Gram(torch.float32) for inputs in stage}))
            for inputs in stage:
                second_order = None
                if grams:
                    second_order = SecondOrder.of(inputs.site, grams.pop(inputs.site), self.damp, self.act_order)
                recorded: dict[str, list[Call]] = {}
                for linear in inputs.linears:
                    part, misfits = parts.get(linear.path, linear.path), self._misfits(linear)
                    if len(misfits) + 1 < len(self.axes) and part not in recorded:
                        # what a part is called with does not change while its layers are rounded
                        recorded = {part: seen.calls(part, stream="original", max_tokens=self.search_tokens)}
                    axes = [axis for axis in self.axes if axis not in misfits]
                    losses = self._losses(linear, axes, part, recorded[part], seen) if len(axes) > 1 else {}
                    axis = min(axes, key=lambda axis: losses.get(axis, inf))
                    grid = self.grid(axis).of(linear.out_features, linear.in_features)
                    weight = linear.weight.detach()
                    stored = second_order.round(weight, grid) if second_order else IntegerWeight.quantize(weight, grid)
                    yield Replace(linear.path, ActLinear.of(linear, weight=stored))
                    chosen[linear.path] = {"axis": axis} | {str(other): loss for other, loss in losses.items()}
                    for other, reason in misfits.items():
                        yield Note(linear.path, f"groups along the {other} were not tried: {reason}")
                    if second_order is not None and second_order.note:
                        yield Note(linear.path, second_order.note)
        along = [path.removeprefix(f"{block.path}.") for path, each in chosen.items() if each["axis"] == "output"]
        yield Note(block.path, f"groups along the output: {', '.join(along) or 'none'}", chosen)

    def _losses(
        self, linear: Linear, axes: list[GroupAxis], part: str, calls: list[Call], seen: Seen
    ) -> dict[GroupAxis, float]:
        """The finite mean squared errors of a part's output with a layer rounded along each axis; {} without tokens."""
        with seen.trial([]) as model:
            targets = [call.replay(get_module(model, part)).float() for call in calls]
        sums = []
        for axis in axes:
            stored = IntegerWeight.quantize(linear.weight, self.grid(axis))
            with seen.trial([Replace(linear.path, ActLinear.of(linear, weight=stored))]) as model:
                changed = get_module(model, part)
                sums.append(_squared_error(calls, changed, targets))
        totals = seen.total(torch.tensor(sums, dtype=torch.float64)).tolist()
        losses = {axis: error / count for axis, (error, count) in zip(axes, totals, strict=True) if count}
        if losses and not any(map(isfinite, losses.values())):
            raise NonFiniteError(
                f"{linear.path}: with groups along every axis the error is NaN or Inf; check the calibration data."
            )
        return {axis: loss for axis, loss in losses.items() if isfinite(loss)}


def _squared_error(calls: list[Call], module: nn.Module, targets: list[Tensor]) -> tuple[float, int]:
    """The sum of squared differences over the real tokens of all calls, and how many values that is."""
    total, count = 0.0, 0
    for call, target in zip(calls, targets, strict=True):
        difference = call.real(call.replay(module).float() - target)
        total, count = total + float(difference.square().sum()), count + difference.numel()
    return total, count


def inspected(block: Block) -> dict[str, str]:
    """Return the path of the part whose output judges a layer, by the layer's path, where it is not the layer's own."""
    attention = [] if block.attention is None else [(block.attention.path, block.attention.inputs)]
    parts = [*attention, *((mlp.path, mlp.inputs) for _, mlp in block.mlps())]
    return {linear.path: part for part, linears in parts for linear in linears}
