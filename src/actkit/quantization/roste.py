"""RoSTE: rotations only where they lower the error of rounding, then training through it (ICML 2025, arXiv:2502.09003).

    E(R) = sum over weights |q(W R) - W R|^2 + (1/n) sum over n sequences |q(X R) - X R|^2,    R in {I, Hadamard}

of each site alone, with everything that its rotation changes, each tensor once:
R2 the weights of value and output, the values in the cache and the input of output; R3 the keys in the cache; R4 the
weight of down and its input. The smaller of the two is taken, site by site. Then the model is trained rounded:

    rotate: {sites: [R1]}, roste, quantize_cache, fake_quantize  ->  train  ->  freeze      (recipes/roste.yaml)

When to use it: before weights, inputs and cache of 4 bits are trained. Rotating everything can cost more than it
brings (a few large values among equal ones are held better than a Gaussian of the same size); this goes by the error.
Cost: one pass over the calibration data and some roundings of each weight; then that of the rotations chosen, and of
the training: its steps some 1.5 times as long as plain ones, longer with rotations.
As in the release (its description; the code was not at hand): R1 is fixed on, before the search; K = 1, searched once,
before the training. Settled here: keys and values are rounded symmetrically, as `quantize_cache` does, the paper's with
zero points; the errors of activations are those of `rows` sampled tokens times how many a sequence has.
Our own reading: R2 counts the weight of value too, whose rows it mixes; R3 counts keys alone, as queries are not
rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Skip
from actkit.core.edit.rotating import BlockRotations, rotate_block, rotated_weights
from actkit.core.forward.batch import BatchContext
from actkit.core.grids.grid import Grid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.layers.hadamard import Rotation
from actkit.core.model.anatomy import Block, Site
from actkit.core.recipe.seen import Seen, Trial
from actkit.core.recipe.tags import Tags
from actkit.core.watch.statistics import Sample, Statistic
from actkit.quantization.rotate import REASONS, Rotate

OF_HEADS = ("attention.key", "attention.value")  # rounded with a scale for each head


class Roste(Rotate):
    """Rotate values, query and key, and the input of down where that lowers the error of rounding.

    Attributes:
        sites: that are decided: R2 the values, R3 query and key, R4 the input of down.
        seed: of the signs and of the sampled tokens.
        weight_bits: 2 to 8, by rows.
        input_bits: 2 to 8, per token.
        cache_bits: 2 to 8, per token and head.
        rows: tokens that the errors are measured on.

    Raises:
        ValueError: a value is out of bounds.
    """

    sites: tuple[Literal["R2", "R3", "R4"], ...] = Field(("R2", "R3", "R4"), min_length=1)
    seed: int = 0
    weight_bits: int = Field(4, ge=2, le=8)
    input_bits: int = Field(4, ge=2, le=8)
    cache_bits: int = Field(4, ge=2, le=8)
    rows: int = Field(512, ge=1)

    tags: ClassVar[Tags] = Tags(
        changes_function="exact", needs_data=True, stream="original", spans_blocks=True, least_coverage=0.0
    )
    not_proposed: ClassVar[str] = "it stands before a training, which the search does not do"

    _sequences: int = PrivateAttr(1)

    def plan(self, trial: Trial, data: Sequence[Any]) -> Self:
        planned = super().plan(trial, data)
        planned._sequences = sum(BatchContext.of(batch, trial.model).batch_size for batch in data)
        return planned

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        return {site: Sample(self.rows, self.seed) for choice in self._choices(block) for site in choice.sites}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        chosen = BlockRotations()
        for site, why in REASONS.items():
            reason = why(block) if site in self.sites else None
            if reason is not None:
                yield Skip(block.path, f"{site}: {reason}")
        for choice in self._choices(block):
            found = {site: seen[site] for site in choice.sites}
            if not all(sample.count for sample in found.values()):
                yield Skip(choice.path, f"{choice.name}: no calibration token reached it")
                continue
            plain, turned = self._errors(block, choice, found)
            taken = "rotated" if turned < plain else "left"
            values = {"site": choice.name, "plain": plain, "rotated": turned}
            yield Note(choice.path, f"{choice.name} {taken}: error {plain:.4g}, rotated {turned:.4g}", values)
            if turned < plain:
                chosen = choice.added_to(chosen)
        yield from rotate_block(block, chosen)

    def _choices(self, block: Block) -> Iterator[_Choice]:
        """What is decided in a block, each site alone."""
        possible, attention = self.rotations(block), block.attention
        inputs, cache = IntegerGrid(self.input_bits), IntegerGrid(self.cache_bits, symmetric=True)
        if possible.value is not None and attention is not None:
            sites = {Site("attention.mixed", block.index): inputs, Site("attention.value", block.index): cache}
            yield _Choice("R2", attention.path, BlockRotations(value=possible.value), possible.value, sites)
        if possible.query_key is not None and attention is not None:
            keys = {Site("attention.key", block.index): cache}
            yield _Choice("R3", attention.path, BlockRotations(query_key=possible.query_key), possible.query_key, keys)
        for expert, mlp in block.mlps():
            turn = possible.hidden.get(mlp.down.path)
            if turn is not None:
                of_down = {Site("mlp.hidden", block.index, expert): inputs}
                yield _Choice("R4", mlp.down.path, BlockRotations(hidden={mlp.down.path: turn}), turn, of_down)

    def _errors(self, block: Block, choice: _Choice, found: Mapping[Site, Sample]) -> tuple[float, float]:
        """E of one site without its rotation, and with it."""
        weights = IntegerGrid(self.weight_bits)
        linears = {linear.path: linear for linear in block.linears()}
        plain = turned = 0.0
        for path, weight in rotated_weights(block, choice.rotations).items():
            plain += _lost(linears[path].weight.detach().float(), weights)
            turned += _lost(weight.float(), weights)
        for site, grid in choice.sites.items():
            x = found[site].rows.float().unflatten(-1, (-1, choice.rotation.size))  # [tokens, heads, channels]
            both = (x, choice.rotation(x))
            both = both if site.name in OF_HEADS else tuple(each.flatten(-2) for each in both)  # type: ignore[assignment]
            times = found[site].count / len(x) / self._sequences
            plain += _lost(both[0], grid) * times
            turned += _lost(both[1], grid) * times
        return plain, turned


@dataclass(frozen=True)
class _Choice:
    """A site of a block that is rotated or left.

    Attributes:
        name: R2, R3 or R4.
        path: of what it is part of.
        rotations: the block's, if this site alone is rotated.
        rotation: of the channels of a head, or of all.
        sites: the activations that it changes, with the grid that each is rounded to.
    """

    name: str
    path: str
    rotations: BlockRotations
    rotation: Rotation
    sites: Mapping[Site, IntegerGrid]

    def added_to(self, others: BlockRotations) -> BlockRotations:
        """The rotations of others and this one."""
        own = self.rotations
        return replace(
            others,
            value=own.value or others.value,
            query_key=own.query_key or others.query_key,
            hidden={**others.hidden, **own.hidden},
        )


def _lost(x: Tensor, grid: Grid) -> float:
    """The squared error of rounding."""
    return float((grid.fake(x) - x).double().square().sum())
