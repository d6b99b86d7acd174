"""The sets of layers that may take a scale, block by block, with what calibration saw of their input.

Which sets there are says `core/model/equalization.py`, how a scale moves `core/edit/folding.py`; which scale, the
transform.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from actkit.core.edit.edits import Note, Skip
from actkit.core.model.anatomy import Block, EqualizationSet, Linear, Norm, Site, equalization_sets
from actkit.core.recipe.seen import Seen

Kind = Literal["norm", "value", "up"]
Sets = tuple[Kind, ...]


def kind_of(group: EqualizationSet) -> Kind:
    """Return what a set is: 'norm' -> linear layers, 'value' -> output, 'up' -> down.

    Args:
        group: the set.
    """
    if group.consumers and group.consumers[0].role in ("output", "down"):
        return "value" if group.consumers[0].role == "output" else "up"
    return "norm"


def scalable_sets(
    block: Block, sets: Sets, seen: Mapping[Site, Any] | Seen
) -> Iterator[Skip | Note | tuple[EqualizationSet, Any]]:
    """Yield the sets that can take a scale, each with what was seen of its input; for the others, why they cannot.

    Args:
        block: to be changed.
        sets: the kinds that may take one.
        seen: a statistic, or several, of each site of `scalable_sites`.
    """
    sites = scalable_sites(block, sets)
    for group in equalization_sets(block):
        if kind_of(group) not in sets:
            continue
        if group.refused:
            yield Skip(group.inspect, group.refused)
            continue
        found = seen[sites[group.consumers[0].path]]
        first = found[0] if isinstance(found, Sequence) else found
        if first.count:
            yield group, found
        else:
            yield Note(group.inspect, "left as it is: no calibration token reached it")


def scalable_sites(block: Block, sets: Sets) -> dict[str, Site]:
    """Return the sites of what is scaled, by the path of each linear layer that reads it.

    Args:
        block: to be changed.
        sets: the kinds that may take a scale.
    """
    sites = {linear.path: inputs.site for inputs in block.linear_inputs() for linear in inputs.linears}
    chosen = [group for group in equalization_sets(block) if kind_of(group) in sets and not group.refused]
    return {linear.path: sites[linear.path] for group in chosen for linear in group.consumers}


def scalable_targets(block: Block, sets: Sets) -> Iterator[Linear | str]:
    """Yield the layers, and the weights of norms, that scales change.

    Args:
        block: to be changed.
        sets: the kinds that may take one.
    """
    for group in equalization_sets(block):
        if kind_of(group) in sets and not group.refused:
            yield from group.consumers
            if isinstance(group.producer, Norm):
                yield f"{group.producer.path}.weight"
