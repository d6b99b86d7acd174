"""Round the key-value cache: what grows with the context, in 8 or 4 bits.

    k' = round(k / s) s,   s = max|k| / (2^(b-1) - 1)      of each token and key-value head; values alike
    k' = fp8(k / s) s,     s = max|k| / 448 on calibration text, one for all keys of an attention (`format: fp8`)

When to use it: for long contexts. At 1,300 tokens the float32 cache of SmolLM2-135M is as large as its blocks in 4
bits. 8 bits are nearly free; measure 4. It stacks on everything that changes weights, inputs or selections. `optimize`
tries it if speed is measured behind 1,024 tokens or more (`prompt=`).
`format: fp8` is what others can read: it is exported to compressed-tensors, whose readers round the cache so.
Cost: a rounding of each key and value; no data, but a pass over calibration text for fp8.
Settled here: keys are rounded behind the rotary embedding, as they are kept. Through transformers keys and values are
rounded whenever they are read, and its cache stays as wide as it is; the CPU decoder keeps 8-bit codes. Sinks, caps and
other attention than scaled dot products ('sdpa') are refused by name. Floats of 8 bits are rounded through transformers
alone, and behind no rotation of the keys, whose range calibration does not see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from actkit.core.edit.edits import ATTENTION, Configure, Edit, Insert, Note, Replace, Skip
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.cache_rounding import CHILD, FP8, IMPLEMENTATION, CacheRounding
from actkit.core.model.anatomy import Anatomy, Block, Site
from actkit.core.model.own_attention import why_no_cache
from actkit.core.model.parts import Linear
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import Range, Statistic

LONG = 1024  # tokens from which a search tries it


class QuantizeCache(Transform):
    """Round keys and values of every attention, per token and head, or to fp8 by one scale each.

    Attributes:
        bits: 8 or 4.
        format: 'integer', with a scale for each token and head, or 'fp8', with one for all keys and one for all values
            of an attention, found in calibration.

    Raises:
        ValueError: a value is out of bounds, or has no meaning beside the other.
    """

    bits: Literal[4, 8] = 8
    format: Literal["integer", "fp8"] = "integer"

    tags: ClassVar[Tags] = Tags(least_coverage=0.0)

    @property
    def needs_data(self) -> bool:
        return self.format == "fp8"

    @model_validator(mode="after")
    def _settings_have_a_meaning(self) -> Self:
        if self.format == "fp8" and self.bits != 8:
            raise ValueError(f"bits: {self.bits} was given with format: fp8, which has 8; leave it out")
        return self

    @classmethod
    def proposals(cls, profile: Looked, shapes: Shapes) -> Iterable[Idea | LeftOut]:
        if shapes.no_cache is not None or shapes.prompt < LONG:
            short = f"it pays at long contexts, and speed is measured behind {shapes.prompt} tokens; give prompt={LONG}"
            yield LeftOut("quantize_cache", shapes.no_cache or short)
            return
        why = f"keys and values of {shapes.prompt:,} tokens are read for every new one"
        both = "a new token reads weights and cache"
        yield Idea("cache 8 bit", cls(bits=8), why, 15, stacks=(32, 13, 22), why_stacked=both)
        yield LeftOut("quantize_cache at 4 bits", "it loses much, and the decoder keeps codes of 8 bits")
        yield LeftOut("quantize_cache in fp8", "it is for other readers; the decoder keeps codes of 8 bits")

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        reason = why_no_cache(trial.model)
        if reason is not None:
            raise UnsupportedModelError(f"model: the cache of {type(trial.model).__name__} is not rounded: {reason}.")
        there = [module for module in trial.model.modules() if isinstance(module, CacheRounding)]
        if self.format == "fp8" and any(module.rotation is not None for module in there):
            raise UnsupportedModelError(
                f"format: fp8 was given, and the keys of this {type(trial.model).__name__} are rotated before they are "
                f"rounded (rotate, R3), so that their range is not known; leave R3 out, or take format: integer."
            )
        return self

    def observe(self, block: Block) -> Mapping[Site, Statistic | Sequence[Statistic]]:
        return {site: Range() for site in self._sites(block)}

    def targets(self, block: Block) -> Iterable[Linear]:
        return ()

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if block.attention is None:
            yield Skip(block.path, "no attention is described here")
            return
        if self.format == "fp8":
            yield self._fp8(block, f"{block.attention.path}.{CHILD}", seen)
            return
        path, rotating = f"{block.attention.path}.{CHILD}", getattr(block.attention.module, CHILD, None)
        if rotating is None:
            yield Insert(path, CacheRounding(self.bits))
        else:  # `rotate` put it there: keys are rotated, then rounded
            yield Replace(path, CacheRounding(self.bits, rotating.rotation))

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        yield Configure(ATTENTION, IMPLEMENTATION)
        to = f"{self.bits} bits per token and head; the CPU decoder keeps 8-bit codes, through"
        if self.format == "fp8":
            to = "fp8 by one scale each; the CPU decoder leaves the model to transformers, and through"
        yield Note("model", f"keys and values are rounded to {to} transformers the cache stays wide")

    def _sites(self, block: Block) -> tuple[Site, ...]:
        """Where keys and values are seen, if ranges are to be found; nothing if they cannot be read."""
        sites = tuple(Site(f"attention.{name}", block.index) for name in ("key", "value"))
        readable = self.format == "fp8" and block.attention is not None and all(site in block.taps for site in sites)
        return sites if readable else ()

    def _fp8(self, block: Block, path: str, seen: Seen) -> Edit | Skip:
        """Static scales, or why there are none."""
        sites = self._sites(block)
        if not sites:
            return Skip(path, "keys and values cannot be told apart here")
        key, value = (_scale(seen[site]) for site in sites)
        rounding = CacheRounding(8, scales=(key, value))
        assert block.attention is not None
        there = getattr(block.attention.module, CHILD, None)
        return Insert(path, rounding) if there is None else Replace(path, rounding)


def _scale(values: Any) -> Tensor:
    """The scale of all keys, or of all values: float32 [1]."""
    largest = torch.maximum(-values.low.min(), values.high.max()).float()[None]
    return FP8.from_range(-largest, largest)[0]
