"""Round the key-value cache: what grows with the context, in 8 or 4 bits.

    k' = round(k / s) s,   s = max|k| / (2^(b-1) - 1)      of each token and key-value head; values alike

When to use it: for long contexts. At 1,300 tokens the float32 cache of SmolLM2-135M is as large as its blocks in 4
bits. 8 bits are nearly free; measure 4. It stacks on everything that changes weights, inputs or selections. `optimize`
tries it if speed is measured behind 1,024 tokens or more (`prompt=`).
Cost: no data; a rounding of each key and value.
Settled here: keys are rounded behind the rotary embedding, as they are kept. Through transformers keys and values are
rounded whenever they are read, and its cache stays as wide as it is; the CPU decoder keeps 8-bit codes. Sinks, caps and
other attention than scaled dot products ('sdpa') are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

from actkit.core.edit.edits import ATTENTION, Configure, Edit, Insert, Note, Replace, Skip
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.cache_rounding import CHILD, IMPLEMENTATION, CacheRounding
from actkit.core.model.anatomy import Anatomy, Block
from actkit.core.model.own_attention import why_no_cache
from actkit.core.model.parts import Linear
from actkit.core.recipe.proposals import Idea, LeftOut, Looked, Shapes
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform

LONG = 1024  # tokens from which a search tries it


class QuantizeCache(Transform):
    """Round keys and values of every attention, per token and head.

    Attributes:
        bits: 8 or 4.

    Raises:
        ValueError: a value is out of bounds.
    """

    bits: Literal[4, 8] = 8

    tags: ClassVar[Tags] = Tags(least_coverage=0.0)

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

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        reason = why_no_cache(trial.model)
        if reason is not None:
            raise UnsupportedModelError(f"model: the cache of {type(trial.model).__name__} is not rounded: {reason}.")
        return self

    def targets(self, block: Block) -> Iterable[Linear]:
        return ()

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        if block.attention is None:
            yield Skip(block.path, "no attention is described here")
            return
        path, rotating = f"{block.attention.path}.{CHILD}", getattr(block.attention.module, CHILD, None)
        if rotating is None:
            yield Insert(path, CacheRounding(self.bits))
        else:  # `rotate` put it there: keys are rotated, then rounded
            yield Replace(path, CacheRounding(self.bits, rotating.rotation))

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        yield Configure(ATTENTION, IMPLEMENTATION)
        wide = "the CPU decoder keeps 8-bit codes, through transformers the cache stays wide"
        yield Note("model", f"keys and values are rounded to {self.bits} bits per token and head; {wide}")
