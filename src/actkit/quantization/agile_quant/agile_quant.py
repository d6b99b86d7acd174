"""Agile-Quant: static 8-bit activations, and attention weights as powers of two (AAAI 2024, arXiv:2312.05693).

    q(x)_c = clamp(round(x_c / s_c), -2^(b-1), 2^(b-1) - 1) s_c      s_c = max |x_c| / (2^(b-1) - 0.5)     "channel"
    q(x)_c = (clamp(round(x_c / (s 2^a_c)) + z, 0, 2^b - 1) - z) s 2^a_c      a_c = 0 to K                 "trip"
    p' = 2^-k,   k = round(-log2 p)                                           of each attention weight p

What linear layers read is rounded by a scale per channel, found in calibration: any, or one for all times a power of
two (TRIP, after FQ-ViT), which an integer product takes as a shift of the weight's column. Queries, keys and values are
rounded by one scale per head, attention weights to 4-bit powers of two, which shift instead of multiply.
When to use it: behind `gptq` at 4 bits (`[gptq, agile_quant]`), if static activations are asked for and per-token ones
(`round_inputs`) are not; TRIP if the target multiplies integers. Nothing here multiplies them faster: it is computed in
floats, and says what a device of that kind would lose. Its pruning of prompts is `token_pruner.py`.
Cost: one pass over the calibration data, and one over its first batch to see that the attention asks for what is put
there. Attention weights are explicit then: memory and time grow with the square of the text.
As in the release: symmetric grids with half a step more at the top, K = 3, ranges of everything that calibration saw,
attention weights that are not scaled back to a sum of 1. Its LLaMA file has any scales ("channel"), the text TRIP.
Settled here: queries and keys are rounded behind the rotary embedding, where the attention function meets them (the
release: before it); TRIP's error is a mean over `rows` random tokens. `zero: last` keeps a code for 0, so that 4 bits
are 4; `beyond` is the release's, whose 17 values need a fifth. Norms, activation functions, embedding and head stay.
Our own reading: calibration follows the rounded blocks before, with the weights as they were rounded before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from actkit.core.edit.edits import ATTENTION, Configure, Edit, Insert, Note, Replace, Skip
from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.powers import PowerGrid, Zero, power_factors
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.attention_rounding import AttentionRounding, static_grid
from actkit.core.layers.cache_rounding import IMPLEMENTATION
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.model.anatomy import Anatomy, Block, Linear, Site
from actkit.core.model.parts import attention_implementation
from actkit.core.recipe.rounded_attention import child_path, why_unrounded
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Slot, Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Range, Sample, Statistic

OPERANDS = ("query", "key", "value")


class AgileQuant(Transform):
    """Round inputs by static scales per channel, attention by static scales per head and powers of two.

    Attributes:
        bits: of what linear layers read, 2 to 8; None leaves it.
        act_scale: a scale of its own for each 'channel', or 'trip', one for all times powers of two.
        powers: K of TRIP, the largest factor is 2^K times the smallest.
        rows: tokens that TRIP's factors are chosen on.
        attention_bits: of queries, keys and values, 2 to 8; None leaves them.
        softmax: what attention weights are rounded to: 'log2', 'uniform' steps from 0 to 1, or 'none'.
        softmax_bits: of an attention weight, 2 to 6.
        zero: of 'log2': 'last' keeps one of the codes for 0, 'beyond' adds one.

    Raises:
        ValueError: a value is out of bounds, or nothing is rounded.
    """

    bits: int | None = Field(8, ge=2, le=8)
    act_scale: Literal["channel", "trip"] = "channel"
    powers: int = Field(3, ge=0, le=8)
    rows: int = Field(512, ge=1)
    attention_bits: int | None = Field(8, ge=2, le=8)
    softmax: Literal["log2", "uniform", "none"] = "log2"
    softmax_bits: int = Field(4, ge=2, le=6)
    zero: Zero = "last"

    tags: ClassVar[Tags] = Tags(slot="inputs", needs_data=True)
    not_proposed: ClassVar[str] = "no product here gets faster by it, and inputs rounded per token lose less"

    @model_validator(mode="after")
    def _something_is_rounded(self) -> Self:
        if self.bits is None and not self._rounds_attention:
            raise ValueError("bits, attention_bits, softmax: nothing is left to round; give one of them")
        return self

    @property
    def slots(self) -> tuple[Slot, ...]:
        return () if self.bits is None else ("inputs",)

    @property
    def least_coverage(self) -> float:
        return self.tags.least_coverage if self.bits is not None else 0.0  # attention alone changes no parameter

    @property
    def grid(self) -> IntegerGrid:
        """The grid that inputs are rounded to."""
        assert self.bits is not None
        return static_grid(self.bits) if self.act_scale == "channel" else IntegerGrid(self.bits, scope="tensor")

    @property
    def weights(self) -> Grid | None:
        """The grid that attention weights are rounded to."""
        if self.softmax == "none":
            return None
        return (
            PowerGrid(self.softmax_bits, zero=self.zero) if self.softmax == "log2" else IntegerGrid(self.softmax_bits)
        )

    @property
    def _rounds_attention(self) -> bool:
        return self.attention_bits is not None or self.softmax != "none"

    def conflicts(self, earlier: Transform) -> str | None:
        if {"select", "correction"} <= set(earlier.slots) and self.bits is not None:
            return "it corrects what its selection drops, from inputs that are not rounded; use one of the two"
        return super().conflicts(earlier)

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        if not self._rounds_attention:
            return self
        reason = self._why_changed(trial.model) or why_unrounded(trial, data)
        if reason is not None:
            raise UnsupportedModelError(
                f"model: the attention of {type(trial.model).__name__} is not rounded: {reason}. Leave it out "
                f"(attention_bits: null, softmax: none)."
            )
        return self

    def _why_changed(self, model: nn.Module) -> str | None:
        """Why static scales of queries, keys and values would be those of others, or None."""
        if self.attention_bits is None or attention_implementation(model) != IMPLEMENTATION:
            return None
        return "its queries, keys or values are rounded or rotated in the attention function (quantize_cache, rotate)"

    def targets(self, block: Block) -> Iterable[Linear]:
        return () if self.bits is None else block.linears()

    def observe(self, block: Block) -> Mapping[Site, Statistic | Sequence[Statistic]]:
        wanted: dict[Site, Statistic | Sequence[Statistic]] = {}
        if self.bits is not None:
            sample = [Sample(self.rows)] if self.act_scale == "trip" else []
            wanted |= {inputs.site: [Range(), *sample] for inputs in block.linear_inputs()}
        if self.attention_bits is not None:
            wanted |= {site: Range() for site in _operands(block)}
        return wanted

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if self.bits is not None:
            yield from self._inputs(block, seen)
        path = child_path(block)
        if not self._rounds_attention:
            return
        if path is None:
            yield Skip(block.path, "no attention is described here")
            return
        scales: dict[str, Tensor] = {}
        if self.attention_bits is not None:
            sites = _operands(block)
            if not sites:
                yield Skip(path, "queries, keys and values cannot be told apart here; give attention_bits: null")
                return
            assert block.attention is not None
            for name, site in zip(OPERANDS, sites, strict=True):
                largest = torch.maximum(-seen[site].low, seen[site].high).float()
                heads = block.attention.heads if name == "query" else block.attention.key_value_heads
                largest = largest.view(heads, -1).amax(-1)
                scales[name] = static_grid(self.attention_bits).from_range(-largest, largest)[0]
        yield Insert(path, AttentionRounding(self.attention_bits, weights=self.weights, **scales))

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        if not self._rounds_attention:
            return
        yield Configure(ATTENTION, IMPLEMENTATION)
        if self.weights is not None:
            text = f"attention weights are rounded to {self.weights.name}, and formed for that: [heads, queries, keys]"
            yield Note("model", text)

    def _inputs(self, block: Block, seen: Seen) -> Iterator[Edit | Skip | Note]:
        """Yield the layers of a block with rounded inputs."""
        for inputs in block.linear_inputs():
            found = seen[inputs.site]
            values = found[0]
            reason = None if values.count else "no calibration token reached it"
            if any(isinstance(linear.module, ActLinear) and linear.module.inputs for linear in inputs.linears):
                reason = "the layer rotates its inputs, whose ranges are not known"
            if reason is not None:
                yield from (Skip(linear.path, reason) for linear in inputs.linears)
                continue
            low, high, zero = values.low.float(), values.high.float(), None
            if self.act_scale == "channel":
                scale, _ = self.grid.from_range(low, high)
            else:
                scale, zero, exponents = power_factors(found[1].rows, low, high, self.grid, self.powers)
                counts = torch.bincount(exponents, minlength=self.powers + 1).tolist()
                figures = {f"2^{a}": count for a, count in enumerate(counts)}
                shown = ", ".join(f"{name}: {count}" for name, count in figures.items())
                yield Note(inputs.linears[0].path, f"channels by factor {shown}", figures)
            for linear in inputs.linears:
                yield Replace(linear.path, ActLinear.of(linear, inputs=RoundedInputs(self.grid, scale, zero)))


def _operands(block: Block) -> list[Site]:
    """The sites of queries, keys and values, in this order; none if one of them cannot be read."""
    sites = [Site(f"attention.{name}", block.index) for name in OPERANDS]
    return sites if block.attention is not None and all(site in block.taps for site in sites) else []
