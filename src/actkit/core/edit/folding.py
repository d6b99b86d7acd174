"""Exact rewrites: a scale, and a shift, moved from what linear layers read into whatever produces it.

    z = (x - shift) / scale,   W x + b = (W diag(scale)) z + (b + W shift)

The producer gives z in place of x: the rows of a linear layer and the weight of a norm are divided by the scale, biases
are shifted first. Nothing else in the model changes. Which layers read what is said by `equalization_sets`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from actkit.core.edit.edits import Edit, Replace, Set, get_module, get_tensor
from actkit.core.grids.parcels import parcels
from actkit.core.layers.conv1d import is_conv1d
from actkit.core.layers.folding import ScaledActivation
from actkit.core.layers.linear import ActLinear
from actkit.core.model.anatomy import Block, EqualizationSet, Linear, Norm, QueryKeySet


def fold(block: Block, group: EqualizationSet, scale: Tensor, shift: Tensor | None = None) -> Iterator[Edit]:
    """Yield the edits that make the consumers read (x - shift) / scale, and leave the function as it is.

    Computed in float64 and rounded once, to the dtype of each weight.

    Args:
        block: the block.
        group: consumers, and what produces their input.
        scale: [in], positive; one value for columns that read one channel (`EqualizationSet.tied`).
        shift: [in]; None for none. See `why_no_shift`.

    Raises:
        ValueError: the set takes no scale, or no shift, or columns that read one channel have several values.
    """
    reason = group.refused if shift is None else why_no_shift(group)
    if reason is not None:
        raise ValueError(f"group: {group.inspect} takes no {'scale' if shift is None else 'shift'}: {reason}.")
    if not torch.equal(group.tied(scale), scale):
        raise ValueError(
            f"scale: columns of {group.inspect} that read one channel need one value; use group.tied(scale)."
        )
    producer, columns = group.producer, scale.double()
    channels = group.of_channels(columns)
    moved = None if shift is None else shift.double()
    if isinstance(producer, Norm):
        columns = channels = _as_stored(producer, channels)
        yield from divide_norm(producer, channels, moved)
    elif isinstance(producer, Linear):
        rows = channels.new_ones(producer.out_features)
        rows[slice(None) if group.producer_rows is None else group.producer_rows.indices(scale.device)] = channels
        yield _multiply_weight(producer, 1 / rows[:, None])
        yield from _folded_bias(producer, producer.bias, rows, None)
    elif producer is not None:
        yield Replace(producer, ScaledActivation(get_module(block.root, producer), columns))
    for linear in group.consumers:
        added = None if moved is None else linear.weight.detach().double() @ moved
        yield _multiply_weight(linear, columns)
        if added is not None:
            yield _add_to_bias(linear, added)
    for name in group.rescaled:
        other = get_tensor(block.root, name).detach()
        yield Set(name, (other.double() * columns).to(other.dtype))


def fold_query_key(found: QueryKeySet, scale: Tensor) -> Iterator[Edit]:
    """Yield the edits by which keys are multiplied by a scale and queries divided by it, so that their products stay.

    Computed in float64 and rounded once, to the dtype of each weight.

    Args:
        found: of a block.
        scale: of each channel of the key, positive; one value for channels that are tied (`QueryKeySet.tied`).

    Raises:
        ValueError: the set takes no scale, or channels that are tied have several values.
    """
    if found.refused is not None:
        raise ValueError(f"found: query and key of {found.inspect} take no scale: {found.refused}.")
    if not torch.equal(found.tied(scale), scale):
        raise ValueError(
            f"scale: features of {found.inspect} that turn together need one value; use found.tied(scale)."
        )
    scale = scale.double()
    rows: dict[str, Tensor] = {}
    parts = ((found.query, found.query_rows, found.of_query(1 / scale)), (found.key, found.key_rows, scale))
    for linear, chosen, factors in parts:
        factor = rows.setdefault(linear.path, scale.new_ones(linear.out_features))
        factor[slice(None) if chosen is None else chosen.indices(scale.device)] = factors
    for linear in {each.path: each for each in (found.query, found.key)}.values():
        yield _multiply_weight(linear, rows[linear.path][:, None])
        yield from _folded_bias(linear, linear.bias, 1 / rows[linear.path], None)


def divide_norm(norm: Norm, scale: Tensor, shift: Tensor | None = None) -> Iterator[Set]:
    """Yield the edits by which a norm gives (z - shift) / scale in place of z; what reads it is left as it is.

    Args:
        norm: with a bias, if there is a shift.
        scale: float64 [channels].
        shift: float64 [channels], or None.
    """
    weight: Tensor = norm.module.weight.detach()  # type: ignore[union-attr, operator, assignment]
    # a norm that multiplies by (offset + weight), as Gemma's, keeps its offset
    folded = (weight.double() + norm.offset) / scale - norm.offset
    yield Set(f"{norm.path}.weight", folded.to(weight.dtype))
    yield from _folded_bias(norm, getattr(norm.module, "bias", None), scale, shift)


def _as_stored(norm: Norm, scale: Tensor) -> Tensor:
    """The scale by which a norm's output is divided once its weight is rounded to its dtype, float64 [channels].

    A norm that multiplies by (1 + weight) stores 0.05 as -0.95, of which 16 bits keep two digits. What reads it takes
    the same scale, so that nothing is lost. A channel whose weight would be rounded to nothing keeps scale 1.
    """
    before = norm.module.weight.detach().double() + norm.offset  # type: ignore[union-attr, operator]
    dtype: torch.dtype = norm.module.weight.dtype  # type: ignore[union-attr, assignment]
    after = (before / scale - norm.offset).to(dtype).double() + norm.offset
    stored = torch.where(after == 0, torch.ones_like(scale), before / after)
    return torch.where(before == 0, scale, stored)


def shift_norm(norm: Norm, shift: Tensor) -> tuple[Set, Tensor]:
    """Let a norm give x - shift. What reads it must take that back, as `fold` does for layers that hold plain weights.

    Args:
        norm: one with a bias.
        shift: [channels].

    Returns:
        The edit, and the shift that is left of it once the bias is rounded to its dtype, float64 [channels].
    """
    bias: Tensor = norm.module.bias.detach()  # type: ignore[union-attr, operator, assignment]
    moved = (bias.double() - shift.double()).to(bias.dtype)
    return Set(f"{norm.path}.bias", moved), bias.double() - moved.double()


def why_no_shift(group: EqualizationSet) -> str | None:
    """Say why no shift can move through a set, or None if it can.

    Args:
        group: the set.
    """
    if group.refused is not None:
        return group.refused
    if not isinstance(group.producer, Norm):
        return "only a norm takes a shift into its bias"
    if getattr(group.producer.module, "bias", None) is None:
        return f"{group.producer.path} is a {type(group.producer.module).__name__} without a bias"
    if group.rescaled:
        return "the router reads the norm's output too, and has no bias"
    return None


def _folded_bias(part: Norm | Linear, bias: Tensor | None, scale: Tensor, shift: Tensor | None) -> Iterator[Set]:
    if bias is not None:
        moved = bias.detach().double() if shift is None else bias.detach().double() - shift
        yield Set(f"{part.path}.bias", (moved / scale).to(bias.dtype))


def _add_to_bias(linear: Linear, added: Tensor) -> Edit:
    """Add float64 [out] to the bias of a layer; one that has none becomes an ActLinear with one."""
    if linear.bias is not None:
        return Set(f"{linear.path}.bias", (linear.bias.detach().double() + added).to(linear.bias.dtype))
    return Replace(linear.path, ActLinear.of(linear, bias=added.to(linear.weight.dtype)))


def _multiply_weight(linear: Linear, factor: Tensor) -> Set:
    """Multiply the dense weight of a layer by float64 [in] or [out, 1]."""
    old = linear.weight.detach()
    factors = parcels(factor.expand_as(old))
    return set_weight(linear, torch.cat([(a * b).to(old.dtype) for a, b in zip(parcels(old), factors, strict=True)]))


def set_weight(linear: Linear, weight: Tensor) -> Set:
    """Give a layer another dense weight, in the orientation in which it stores it.

    Args:
        linear: whose weight slot no method has filled.
        weight: [out, in], in the dtype of the layer.
    """
    if isinstance(linear.module, ActLinear):  # of an exact rewrite; a quantized one would fill the same slot
        return Set(f"{linear.path}.storage.tensor", weight)
    return Set(f"{linear.path}.weight", weight.t().contiguous() if is_conv1d(linear.module) else weight)
