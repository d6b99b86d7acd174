"""SmoothQuant: outliers of activations moved into weights, exactly (2022, arXiv:2211.10438).

    s_j = max(a_j^alpha / w_j^(1 - alpha), 1e-5),   a_j = max over tokens |x_j|,   w_j = max over rows |W[:, j]|

for every set of linear layers that read one tensor (w_j is the largest of all of them). What produces x is divided by
s, the columns of W are multiplied by it, so that the function stays and x becomes easier to round: alpha = 0 evens out
the weights, alpha = 1 the activations.
When to use it: before `round_inputs` (8-bit activations), or before a weight quantizer if the weights of a layer meet
activations with large channels. `smoothquant_plus` searches alpha.
Cost: one pass over the calibration tokens, and nothing at run time.
As in the release: sets from norm to linear layers only, alpha 0.5, both maxima clamped to 1e-5 from below. Settled
here: value -> output and up -> down can be scaled too (`sets`), query heads that share a value head with one scale; a
channel that no token reaches (a_j = 0) is reported. A set that takes no scale (post-norm) is left as it is, and the
report says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from actkit.core.edit.edits import Edit, Note, Skip
from actkit.core.edit.folding import fold
from actkit.core.model.anatomy import Block, Linear, Site
from actkit.core.recipe.scalable import Sets, scalable_sets, scalable_sites, scalable_targets
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Transform
from actkit.core.watch.statistics import AbsMax, Statistic

SMALLEST = 1e-5  # of the maxima and of a scale, as in the release


class Smooth(Transform):
    """Move the outliers of activations into the weights that read them.

    Attributes:
        alpha: 0 to 1, how much of the activations' spread moves.
        sets: which may take a scale: norm -> linear layers, value -> output, up -> down.

    Raises:
        ValueError: a value is out of bounds.
    """

    alpha: float = Field(0.5, ge=0, le=1)
    sets: Sets = Field(("norm",), min_length=1)

    tags: ClassVar[Tags] = Tags(changes_function="exact", needs_data=True, stream="original", least_coverage=0.25)
    not_proposed: ClassVar[str] = "it changes nothing alone; it stands before what rounds, in those candidates"

    def conflicts(self, earlier: Transform) -> str | None:
        return super().conflicts(earlier) or refuse_filled(earlier)

    def targets(self, block: Block) -> Iterable[Linear | str]:
        yield from scalable_targets(block, self.sets)

    def observe(self, block: Block) -> Mapping[Site, Statistic]:
        return {site: AbsMax() for site in scalable_sites(block, self.sets).values()}

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        yield from smooth(block, {site: seen[site] for site in self.observe(block)}, self.alpha, self.sets)


def smooth(
    block: Block, largest: Mapping[Site, AbsMax], alpha: float, sets: Sets = ("norm",)
) -> Iterator[Edit | Skip | Note]:
    """Yield the edits that smooth one block, and say what was left as it is.

    Args:
        block: to be changed.
        largest: of each site of `scalable_sites`.
        alpha: 0 to 1.
        sets: which may take a scale.
    """
    for each in scalable_sets(block, sets, largest):
        if isinstance(each, Skip | Note):
            yield each
            continue
        group, statistic = each
        dead = int((statistic.value == 0).sum())
        if dead:
            yield Note(group.inspect, f"{dead} channels are 0 on all calibration tokens")
        weights = [linear.weight.detach() for linear in group.consumers]
        yield from fold(block, group, group.tied(smoothing_scale(statistic.value, weights, alpha)))


def smoothing_scale(largest: Tensor, weights: Iterable[Tensor], alpha: float) -> Tensor:
    """Return s of the layers that read one tensor: float64 [in].

    Args:
        largest: max |x| of each channel, [in].
        weights: theirs, [out, in] each.
        alpha: 0 to 1.
    """
    largest = largest.double()
    columns = torch.stack([weight.abs().amax(0).to(largest) for weight in weights]).amax(0)
    scale = largest.clamp(min=SMALLEST) ** alpha / columns.clamp(min=SMALLEST) ** (1 - alpha)
    return scale.clamp(min=SMALLEST)


def refuse_filled(earlier: Transform) -> str | None:
    """Say why scales may not move behind what filled a slot, or None if it filled none."""
    if earlier.slots:
        return f"it would rescale what the {earlier.slots[0]} slot was filled for; put it first"
    return None
