"""Rotations by Hadamard matrices: outliers of activations spread over all channels, exactly (QuaRot, arXiv:2404.00456).

    x' = x R,   W' = W R,   x' W'^T = x W^T         R = diag(signs) H / sqrt(n),  H a Hadamard matrix

    R1  the residual stream, from the embedding to the head     merged (online behind and before tied ends)
    R2  each value head, from value to output                   merged
    R3  query and key of each head, behind the rotary embedding online, in attention
    R4  the input of down                                       online, its inverse in the weight of down

A channel a hundred times as large as the others becomes a sum over all of them, and 4 bits per token hold the rest too.
When to use it: before weights *and* activations or the cache are rounded to 4 to 6 bits: `rotate`, then `gptq` or
`rtn`, then `round_inputs` or `quantize_cache`. Weights alone gain little from it, and a spread outlier may cost more
than it brings: compare with and without.
Cost: no data. R1 and R2 cost nothing as the model runs (two rotations per token if embedding and head are tied); R3 two
small ones per head, R4 one of the MLP's width per block. The CPU decoder leaves a model with an online rotation to
transformers, and no format outside actkit can say it.
Settled here: signs first, then H, so that they count (`core/layers/hadamard.py`); R2 and R3 are shared by the heads of
a block. A gain is put into the layers behind its norm before R1. R1 is all or nothing: refused, with the reason, behind
norms that subtract the mean or that stand behind attention or MLP (gemma2, gemma3, olmo2); what the whole model gives
is compared before and after, as of all that is exact.
Our own reading: of QuaRot's and SpinQuant's sites as the sheet of RoSTE names them; no released code was run beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from actkit.core.edit.edits import ATTENTION, Configure, Edit, Note, Skip
from actkit.core.edit.rotating import (
    BlockRotations,
    rotate_block,
    rotate_ends,
    value_set,
    why_no_hidden,
    why_no_query_key,
    why_no_residual,
    why_no_value,
)
from actkit.core.ground import offload
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.cache_rounding import CHILD, IMPLEMENTATION
from actkit.core.layers.hadamard import Rotation
from actkit.core.model.anatomy import Anatomy, Block, Linear, Norm
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.quantization.smooth import refuse_filled

RotationSite = Literal["R1", "R2", "R3", "R4"]
REASONS: dict[str, Callable[[Block], str | None]] = {"R2": why_no_value, "R3": why_no_query_key, "R4": why_no_hidden}


class Rotate(Transform):
    """Rotate activations, and the weights with them; the outputs stay.

    Attributes:
        sites: what is rotated: R1 the residual stream, R2 the values, R3 query and key, R4 the input of down.
        seed: of the signs.

    Raises:
        ValueError: a value is out of bounds.
    """

    sites: tuple[RotationSite, ...] = Field(("R1", "R2", "R3", "R4"), min_length=1)
    seed: int = 0

    tags: ClassVar[Tags] = Tags(changes_function="exact", spans_blocks=True, least_coverage=0.0)
    not_proposed: ClassVar[str] = "it changes nothing alone, and pays at 4 to 6 bits of activations, not faster here"

    def conflicts(self, earlier: Transform) -> str | None:
        return super().conflicts(earlier) or refuse_filled(earlier)

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        self._check(trial.anatomy)
        return self

    def _check(self, view: Anatomy) -> None:
        """Raise UnsupportedModelError for a site that this model does not have, or a size without a rotation."""
        kind = type(view.model).__name__
        blocks = [view.block(index) for index in range(len(view.blocks))]
        if "R1" in self.sites:
            offload.refuse_offloaded(view.model, "R1 changes the whole model at once")
            reason = why_no_residual(view)
            if reason is not None:
                raise UnsupportedModelError(
                    f"model: the residual stream of {kind} is not rotated (R1): {reason}. Leave R1 out of sites."
                )
        for site, why in REASONS.items():
            if site in self.sites and all(why(block) is not None for block in blocks):
                raise UnsupportedModelError(
                    f"model: {kind} has nothing that {site} rotates: {why(blocks[0])}. Leave {site} out of sites."
                )
        for block in blocks:
            try:
                self.rotations(block)
            except ValueError as error:
                raise UnsupportedModelError(f"model: {kind} is not rotated: {error}") from error

    def rotations(self, block: Block) -> BlockRotations:
        """Return the rotations that a block takes.

        Args:
            block: any.

        Raises:
            ValueError: there is no rotation of a site's size; it names the site.
        """
        wanted = [site for site in self.sites if site == "R1" or REASONS[site](block) is None]
        attention = block.attention
        head = 0 if attention is None else attention.head_dim
        return BlockRotations(
            self.drawn("R1", block, _width(block)) if "R1" in wanted else None,
            self.drawn("R2", block, head) if "R2" in wanted else None,
            self.drawn("R3", block, head) if "R3" in wanted else None,
            {
                mlp.down.path: self.drawn("R4", block, mlp.down.in_features, mlp.down.path)
                for _, mlp in block.mlps()
                if "R4" in wanted
            },
        )

    def drawn(self, site: RotationSite, block: Block, size: int, path: str = "") -> Rotation:
        """Return the rotation of a site: that of R1 is one for all blocks.

        Args:
            site: to be rotated.
            block: that holds it.
            size: channels.
            path: of the layer, if the block has several of them.

        Raises:
            ValueError: there is no rotation of that size.
        """
        place = "" if site == "R1" else path or block.path
        try:
            return Rotation.drawn(size, f"{self.seed} {site} {place}")
        except ValueError as error:
            raise ValueError(f"{site} of {block.path}: {error} Leave {site} out of sites.") from error

    def targets(self, block: Block) -> Iterable[Linear | str]:
        if "R1" in self.sites:
            yield from block.linears()
            yield from (f"{norm.path}.weight" for norm in _gains(block))
            return
        if "R2" in self.sites and why_no_value(block) is None:
            found = value_set(block)
            yield from () if found is None else (found.producer, *found.consumers)  # type: ignore[misc]
        if "R4" in self.sites and why_no_hidden(block) is None:
            yield from (mlp.down for _, mlp in block.mlps())

    def memory(self, block: Block, length: int) -> int:
        return sum(8 * each.in_features * each.out_features for each in self.targets(block) if isinstance(each, Linear))

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for site, why in REASONS.items():
            reason = why(block) if site in self.sites else None
            if reason is not None:
                yield Skip(block.path, f"{site}: {reason}")
        yield from rotate_block(block, self.rotations(block))

    def edit_ends(self, view: Anatomy) -> Iterable[Edit | Skip | Note]:
        if "R1" in self.sites:
            yield from rotate_ends(view, self.drawn("R1", view.blocks[0], _width(view.blocks[0])))
        blocks = [view.block(index) for index in range(len(view.blocks))]
        if any(block.attention is not None and hasattr(block.attention.module, CHILD) for block in blocks):
            yield Configure(ATTENTION, IMPLEMENTATION)


def _width(block: Block) -> int:
    """Channels of the residual stream."""
    return block.attention.inputs[0].in_features if block.attention is not None else 0


def _gains(block: Block) -> list[Norm]:
    norms = [norm for norm, _ in block.norm_readers()] + ([] if block.experts is None else [block.experts.norm])
    return [norm for norm in norms if norm is not None and getattr(norm.module, "weight", None) is not None]
