"""The places at which a scale per channel can move from what produces a tensor into the linear layers that read it.

Dividing the producer's channels by s and multiplying the consumers' columns by s leaves the function as it is
(SmoothQuant, AWQ). If a pair looks possible but is not, the set is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from actkit.core.layers.attention_rounding import CHILD as ATTENTION_ROUNDING
from actkit.core.layers.known_layers import scales_with_weight, why_unread
from actkit.core.layers.linear import ActLinear
from actkit.core.model.fused_layers import PartRows
from actkit.core.model.parts import Attention, Block, Linear, Mlp, Norm, is_linear
from actkit.core.model.sites import Pairs
from actkit.core.model.wrapping import is_wrapped


@dataclass(frozen=True)
class SharedHeads:
    """Value heads that several query heads read, so that several columns of the output layer read one channel.

    Attributes:
        heads: value heads.
        readers: query heads that read each of them.
        width: channels of a head.
    """

    heads: int
    readers: int
    width: int

    def channels(self) -> Tensor:
        """Return which channel of the value each column of the output layer reads: int64 [columns]."""
        channels = torch.arange(self.heads * self.width).view(self.heads, -1)
        return channels.repeat_interleave(self.readers, 0).flatten()


@dataclass(frozen=True)
class EqualizationSet:
    """A producer and all its consumers.

    Attributes:
        producer: a norm, a linear layer, or the path of an activation (which then needs a scale of its own); None if it
            is outside the block.
        producer_rows: the part of the producer's output rows that is meant, None for all.
        consumers: the layers that read what it gives.
        inspect: path of the module whose output shows the damage of quantizing the consumers.
        refused: why no scale can move here, or None.
        shared: if several columns of the consumer read one channel, which then have one scale.
        rescaled: names of other weights [.., in] whose columns take the scale, and which nobody rounds: a router's.
        fixed: why no scale could move here even if no slot of the layers were filled, or None.
    """

    producer: Norm | Linear | str | None
    producer_rows: PartRows | None
    consumers: tuple[Linear, ...]
    inspect: str
    refused: str | None = None
    shared: SharedHeads | None = None
    rescaled: tuple[str, ...] = ()
    fixed: str | None = None

    def tied(self, values: Tensor) -> Tensor:
        """Give columns that read one channel one value, the largest of theirs.

        Args:
            values: [in] of the consumers.

        Returns:
            [in].
        """
        if self.shared is None:
            return values
        channels = self.shared.channels().to(values.device)
        return self.of_channels(values)[channels]

    def of_channels(self, values: Tensor) -> Tensor:
        """Return for each channel of the producer the largest value of the columns that read it: [channels].

        Args:
            values: [in] of the consumers.
        """
        if self.shared is None:
            return values
        columns = values.view(self.shared.heads, self.shared.readers, self.shared.width)
        return columns.amax(1).flatten()


@dataclass(frozen=True)
class QueryKeySet:
    """Query and key of an attention, between which a scale moves: (q / s) (k s) = q k for every product of theirs.

    Attributes:
        query: a layer.
        query_rows: its output rows that are meant, None for all.
        key: a layer, the same one if they are fused.
        key_rows: as query_rows.
        heads: of the key, and the query heads that read each.
        ties: for each channel of the key which scale is its own, int64; two features that turn together have one.
        inspect: path of the attention.
        refused: why no scale can move here, or None.
    """

    query: Linear
    query_rows: PartRows | None
    key: Linear
    key_rows: PartRows | None
    heads: SharedHeads
    ties: Tensor
    inspect: str
    refused: str | None = None

    def tied(self, values: Tensor) -> Tensor:
        """Give channels of the key that have one scale one value, the largest of theirs.

        Args:
            values: of each channel.
        """
        ties = self.ties.to(values.device)
        largest = values.new_full((int(ties.max()) + 1,), -torch.inf).scatter_reduce(0, ties, values, "amax")
        return largest[ties]

    def of_query(self, values: Tensor) -> Tensor:
        """Return the values of the key's channels for those of the query, which lie head by head.

        Args:
            values: of each channel of the key.
        """
        return values.view(self.heads.heads, -1).repeat_interleave(self.heads.readers, 0).flatten()


def query_key_set(block: Block) -> QueryKeySet | None:
    """Return where a scale moves between query and key of a block, or why not; None without attention.

    Args:
        block: any.
    """
    attention = block.attention
    if attention is None:
        return None
    fused = attention.query_key_value
    query, key = fused or attention.query, fused or attention.key
    assert query is not None and key is not None
    heads = SharedHeads(attention.key_value_heads, attention.heads // attention.key_value_heads, attention.head_dim)
    turned = 0 if attention.pairs is None else _turned_features(block.root)
    refused = None
    if attention.head_norms:
        refused = "query and key go through norms, which take a scale away again"
    elif attention.limit is not None:
        refused = f"query and key are clamped to {attention.limit:g} before they are multiplied"
    elif fused is not None and attention.key_rows is None:
        refused = f"which output rows of {fused.path} are the query's and the key's is not known"
    elif turned is None or turned > attention.head_dim:
        refused = "how many features of a head the rotary embedding turns is not known"
    elif hasattr(attention.module, ATTENTION_ROUNDING):
        refused = "its queries and keys have static scales, which were found for them as they are"
    else:
        both = EqualizationSet(key, attention.key_rows, (query,), attention.path)
        refused = _with_known_layers(both, _shared_parameters(block.root)).refused
    ties = _ties(heads, turned or 0, attention.pairs)
    return QueryKeySet(query, attention.query_rows, key, attention.key_rows, heads, ties, attention.path, refused)


def _turned_features(model: nn.Module) -> int | None:
    """How many features of a head the rotary embedding turns, by the frequencies that the model keeps; None if unknown.

    Transformers' rotary modules hold one frequency for two features, some of them several lists of equal length.
    """
    lengths = {len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq") and buffer.dim() == 1}
    return 2 * lengths.pop() if len(lengths) == 1 else None


def _ties(heads: SharedHeads, turned: int, pairs: Pairs | None) -> Tensor:
    """Which scale each channel of the key has: [heads * width]."""
    places = torch.arange(heads.width)
    if pairs == "halves":
        places[turned // 2 : turned] = places[: turned // 2]
    elif pairs == "neighbours":
        places[:turned] = places[:turned] // 2 * 2
    every = (torch.arange(heads.heads)[:, None] * heads.width + places).flatten()
    return every.unique(return_inverse=True)[1]


def equalization_sets(block: Block) -> tuple[EqualizationSet, ...]:
    """Return the sets of a block, in the order of computation; none for traced models."""
    tied = _shared_parameters(block.root)
    return tuple(_with_known_layers(found, tied) for found in _sets(block))


def _sets(block: Block) -> Iterator[EqualizationSet]:
    shared = block.attention is not None and block.mlp is not None and len(block.norm_readers()) == 1
    if shared:  # side by side behind one norm: only the block's output shows the damage of both
        ((norm, readers),) = block.norm_readers()
        yield EqualizationSet(norm, None, readers, block.path)
    if block.attention is not None:
        if not shared:
            yield _norm_to_inputs(block.attention, block.root)
        yield _value_to_output(block.attention)
    if block.mlp is not None:
        if not shared:
            yield _norm_to_inputs(block.mlp, block.root)
        yield _up_to_down(block.mlp, block.root)
    if block.experts is not None:
        experts = block.experts
        consumers = tuple(linear for mlp in experts.members for linear in mlp.inputs)
        beside = any(inputs.site.name == "mlp.input" for inputs in block.other)
        refused = "an expert that every token goes to reads the norm's output too" if beside else None
        if not consumers:
            refused = "its experts are 3-D parameters; open them first"
        router = (f"{experts.router}.weight",)
        yield EqualizationSet(experts.norm, None, consumers, experts.path, refused, rescaled=router)
        bent = experts.row.limit is not None or experts.row.up_offset != 0
        clamped = "up is clamped or shifted before it is multiplied" if bent else None
        for mlp in experts.members:
            yield replace(_up_to_down(mlp, block.root), refused=clamped)
    if block.path:
        for inputs in block.other:
            unknown = "what produces this input is not described"
            yield EqualizationSet(None, None, inputs.linears, inputs.linears[0].path, unknown)


def _norm_to_inputs(part: Attention | Mlp, root: nn.Module) -> EqualizationSet:
    half = part.norm is not None and part.norm.role == "both"
    refused = "another part of the block, which is not described, reads the norm's output too" if half else None
    if is_wrapped(root, part.path):
        refused = f"{part.path} is wrapped, and something else may come between it and its norm"
    return EqualizationSet(part.norm, None, part.inputs, part.path, refused)


def _value_to_output(attention: Attention) -> EqualizationSet:
    refused, shared = None, None
    if attention.key_value_heads != attention.heads:
        readers = attention.heads // attention.key_value_heads
        shared = SharedHeads(attention.key_value_heads, readers, attention.head_dim)
    if attention.limit is not None:
        refused = f"the value is clamped to {attention.limit:g} before it is mixed"
    producer, rows = attention.value, None
    if attention.query_key_value is not None:
        producer, rows = attention.query_key_value, attention.value_rows
        if rows is None:
            refused = f"which output rows of {producer.path} are the value's is not known"
    return EqualizationSet(producer, rows, (attention.output,), attention.output.path, refused, shared)


def _up_to_down(mlp: Mlp, root: nn.Module) -> EqualizationSet:
    # up is a factor of down's input in a gated MLP; otherwise only ReLU lets a positive scale pass
    passes = mlp.gated or isinstance(root.get_submodule(mlp.activation), nn.ReLU)
    return EqualizationSet(mlp.up if passes else mlp.activation, mlp.up_rows, (mlp.down,), mlp.down.path)


def _with_known_layers(found: EqualizationSet, tied: set[int]) -> EqualizationSet:
    fixed = found.refused or _refused(found, tied)
    return replace(found, refused=fixed or _filled(found), fixed=fixed)


def _refused(found: EqualizationSet, tied: set[int]) -> str | None:
    if found.producer is None:
        return "post-norm: no norm of the block produces this input, it is the residual stream itself"
    if isinstance(found.producer, Norm):
        if found.producer.feeds_residual:
            return "post-norm: the residual stream reads the norm's output too"
        if getattr(found.producer.module, "weight", None) is None:
            return "the norm has no weight that could take the scale"
        if not _known_norm(found.producer):
            return f"the norm is a {type(found.producer.module).__name__}, whose output does not scale with its weight"
    linears = [part for part in (found.producer, *found.consumers) if isinstance(part, Linear)]
    for linear in linears:
        if not is_linear(linear.module):
            kind = type(linear.module).__name__
            return (
                why_unread(linear.module) or f"{linear.path} is a {kind}, which actkit does not read as a linear layer"
            )
    for part in (found.producer, *found.consumers):
        if not isinstance(part, str) and any(id(p) in tied for p in part.module.parameters()):
            return f"{part.path} is shared with another part of the model"
    return None


def _filled(found: EqualizationSet) -> str | None:
    for linear in (part for part in (found.producer, *found.consumers) if isinstance(part, Linear)):
        filled = linear.module.filled_slots if isinstance(linear.module, ActLinear) else ()
        if filled:
            return f"{linear.path} has its slot '{filled[0]}' filled, which was made for its inputs as they are"
    return None


def _known_norm(norm: Norm) -> bool:
    kind = type(norm.module)
    return kind.__module__.startswith(("torch.", "transformers.")) or scales_with_weight(norm.module, norm.offset)


def _shared_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that the model holds under more than one name."""
    seen: set[int] = set()
    return {id(p) for _, p in model.named_parameters(remove_duplicate=False) if id(p) in seen or seen.add(id(p))}  # type: ignore[func-returns-value]
