"""Exact rewrites by rotations, at four places: R is orthogonal, so that what is rotated by it can be rotated back.

    R1   the residual stream: what writes to it (embedding, output, down) gives x R, what reads it has W diag(gain) R;
         a norm commutes with R once its gain is in the layers behind it
    R2   each value head: value gives x R, output reads it
    R3   query and key, behind the rotary embedding: q R (k R)^T = q k^T, as the model runs
    R4   the input of down: x R as the model runs, W R in the weight

R1 is right only if all blocks and both ends have it. An embedding and a head that are tied keep their table: its rows
are rotated behind the embedding, and what the head reads is rotated back, and multiplied by the last gain, before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import Edit, Insert, Replace, ReplaceTied, Set, get_module, get_tensor, shared_parameters
from actkit.core.edit.folding import set_weight
from actkit.core.grids.parcels import parcels
from actkit.core.layers.cache_rounding import CHILD, CacheRounding
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.hadamard import Rotation
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import DenseWeight
from actkit.core.model.anatomy import Anatomy, Block, EqualizationSet, Linear, Norm, equalization_sets, paths_of_end
from actkit.core.model.own_attention import why_no_cache
from actkit.core.model.parts import is_linear
from actkit.core.model.wrapping import is_wrapped


@dataclass(frozen=True)
class BlockRotations:
    """The rotations of one block.

    Attributes:
        residual: R1, the same one in all blocks.
        value: R2.
        query_key: R3.
        hidden: R4, by the path of the layer that reads what is rotated.
    """

    residual: Rotation | None = None
    value: Rotation | None = None
    query_key: Rotation | None = None
    hidden: Mapping[str, Rotation] = field(default_factory=dict)


def rotate_block(block: Block, rotations: BlockRotations) -> Iterator[Edit]:
    """Yield the edits that rotate a block; each weight is computed in float64 and rounded once.

    Args:
        block: one that takes these rotations (`why_no_value`, `why_no_hidden`, `why_no_residual`).
        rotations: of the block.
    """
    written = _Written()
    if rotations.residual is not None:
        yield from _rotate_residual(block, rotations.residual, written)
    _rotate_inside(block, rotations, written)
    yield from written.edits(rotations.hidden)
    if rotations.query_key is not None and block.attention is not None:
        yield Insert(f"{block.attention.path}.{CHILD}", CacheRounding(None, rotations.query_key))


def rotated_weights(block: Block, rotations: BlockRotations) -> dict[str, Tensor]:
    """Return the weights that R2 and R4 change, by the paths of their layers, as they would be: float64 [out, in].

    Args:
        block: one that takes these rotations.
        rotations: of the block.
    """
    written = _Written()
    _rotate_inside(block, rotations, written)
    return written.weights


def rotate_ends(view: Anatomy, rotation: Rotation) -> Iterator[Edit]:
    """Yield the edits of embedding, last norm and head by which R1 begins and ends.

    Args:
        view: of a model without a reason in `why_no_residual`.
        rotation: R1.
    """
    ends = _Ends.of(view)
    gain = _gain(ends.norm)
    if ends.tied:
        table = DenseWeight(ends.embedding.weight)
        gain = torch.ones_like(ends.embedding.weight[0]).double() if gain is None else gain
        divisor = torch.where(gain == 0, 1e30, 1 / gain)  # a number: NaN and Inf are refused in a model
        back = RoundedInputs(None, divisor=divisor, rotation=rotation.inverted())
        head = ActLinear.of(ends.head, weight=table, inputs=back)
        embedding = QuantizedEmbedding.of(ends.embedding, table, Rotation(rotation.signs))
        yield ReplaceTied((Replace(ends.embedding_path, embedding), Replace(ends.head.path, head)))
    else:
        yield Set(f"{ends.embedding_path}.weight", _by_parcels(ends.embedding.weight.detach(), rotation))
        read = _by_parcels(ends.head.weight.detach(), lambda rows: rotation(rows if gain is None else rows * gain))
        yield set_weight(ends.head, read)
    yield from _without_gain(ends.norm)


def why_no_residual(view: Anatomy) -> str | None:
    """Say why the residual stream of a model is not rotated (R1), or None.

    Args:
        view: of the model, its experts opened.
    """
    model = view.model
    if not view.blocks or view.blocks[0].path == "":
        return "its blocks are not described by a row"
    ends = _Ends.why_not(view)
    if ends is not None:
        return ends
    tied = shared_parameters(model)
    for index in range(len(view.blocks)):
        block = view.block(index)
        whys = ((linear.path, _why_linear(linear, tied)) for linear in block.linears())
        reason = _why_block(block) or next((f"{path} {why}" for path, why in whys if why is not None), None)
        if reason is not None:
            return reason
    return None


def value_set(block: Block) -> EqualizationSet | None:
    """Return the value layer and the output layer of a block's attention; None if they are not described.

    Args:
        block: any.
    """
    sets = (each for each in equalization_sets(block) if each.consumers and each.consumers[0].role == "output")
    return next(sets, None)


def why_no_value(block: Block) -> str | None:
    """Say why the value heads of a block are not rotated (R2), or None.

    Args:
        block: any.
    """
    found = value_set(block)
    return "no attention is described here" if found is None else found.refused


def why_no_query_key(block: Block) -> str | None:
    """Say why query and key of a block are not rotated (R3), or None.

    Args:
        block: any.
    """
    if block.attention is None:
        return "no attention is described here"
    if hasattr(block.attention.module, CHILD):
        return "its keys are rotated or rounded already; rotate first"
    return why_no_cache(block.root)


def why_no_hidden(block: Block) -> str | None:
    """Say why the inputs of a block's down layers are not rotated (R4), or None.

    Args:
        block: any, its experts opened.
    """
    downs = [mlp.down for _, mlp in block.mlps()]
    if not downs:
        return "no MLP is described here"
    tied = shared_parameters(block.root)
    return next((f"{down.path} {why}" for down in downs if (why := _why_linear(down, tied)) is not None), None)


class _Written:
    """Weights and biases of a block in float64, and the layers that they belong to."""

    def __init__(self) -> None:
        self._layers: dict[str, Linear] = {}
        self.weights: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}

    def columns(self, linear: Linear, turn: Callable[[Tensor], Tensor]) -> None:
        """Change what the layer reads: turn maps [out, in] along the inputs."""
        self.weights[linear.path] = turn(self._weight(linear))

    def rows(self, linear: Linear, turn: Callable[[Tensor], Tensor]) -> None:
        """Change what the layer gives: turn maps [..., out] along the last dimension."""
        self.weights[linear.path] = turn(self._weight(linear).mT).mT
        if linear.bias is not None:
            bias = self._biases.get(linear.path, linear.bias.detach().double())
            self._biases[linear.path] = turn(bias[None])[0]

    def _weight(self, linear: Linear) -> Tensor:
        self._layers[linear.path] = linear
        found = self.weights.get(linear.path)
        return linear.weight.detach().double() if found is None else found

    def edits(self, online: Mapping[str, Rotation]) -> Iterator[Edit]:
        """Yield the layers; online: by path, what the inputs of some are rotated by as the model runs."""
        for path, linear in self._layers.items():
            weight = self.weights[path].to(linear.weight.dtype).contiguous()
            bias = None if path not in self._biases else self._biases[path].to(linear.bias.dtype)  # type: ignore[union-attr]
            if path in online:
                trains = any(parameter.requires_grad for parameter in linear.module.parameters())
                new, moved = (None if x is None else nn.Parameter(x, requires_grad=trains) for x in (weight, bias))
                inputs = RoundedInputs(None, rotation=online[path])
                yield Replace(path, ActLinear.of(linear, weight=DenseWeight(new), bias=moved, inputs=inputs))  # type: ignore[arg-type]
                continue
            yield set_weight(linear, weight)
            if bias is not None:
                yield Set(f"{path}.bias", bias)


def _rotate_residual(block: Block, rotation: Rotation, written: _Written) -> Iterator[Edit]:
    for norm, readers, router in _readers(block):
        gain = _gain(norm)
        turn = rotation if gain is None else lambda weight, gain=gain: rotation(weight * gain)  # type: ignore[misc]
        for linear in readers:
            written.columns(linear, turn)
        if router is not None:
            weight = get_tensor(block.root, router).detach()
            yield Set(router, turn(weight.double()).to(weight.dtype))
        yield from _without_gain(norm)
    for linear in _writers(block):
        written.rows(linear, rotation)


def _rotate_inside(block: Block, rotations: BlockRotations, written: _Written) -> None:
    if rotations.value is not None:
        _rotate_value(value_set(block), block, rotations.value, written)
    for _, mlp in block.mlps():
        if mlp.down.path in rotations.hidden:
            written.columns(mlp.down, rotations.hidden[mlp.down.path])


def _rotate_value(found: EqualizationSet | None, block: Block, rotation: Rotation, written: _Written) -> None:
    assert found is not None and isinstance(found.producer, Linear) and block.attention is not None
    rows = found.producer_rows
    of_value = slice(None) if rows is None else rows.indices(found.producer.weight.device)

    def by_head(x: Tensor) -> Tensor:
        return rotation(x.unflatten(-1, (-1, rotation.size))).flatten(-2)

    def of_part(x: Tensor) -> Tensor:
        turned = x.clone()
        turned[..., of_value] = by_head(x[..., of_value])
        return turned

    written.rows(found.producer, of_part)
    for linear in found.consumers:
        written.columns(linear, by_head)


def _readers(block: Block) -> Iterator[tuple[Norm, tuple[Linear, ...], str | None]]:
    """The norms that read the residual stream, the layers behind each, and the weight of a router behind it."""
    for norm, linears in block.norm_readers():
        assert norm is not None
        yield norm, linears, None
    experts = block.experts
    if experts is not None and experts.norm is not None:
        yield experts.norm, tuple(x for mlp in experts.members for x in mlp.inputs), f"{experts.router}.weight"


def _writers(block: Block) -> Iterator[Linear]:
    if block.attention is not None:
        yield block.attention.output
    yield from (mlp.down for _, mlp in block.mlps())


def _gain(norm: Norm) -> Tensor | None:
    """What a norm multiplies by, float64 [channels]; None if by nothing."""
    weight = getattr(norm.module, "weight", None)
    return None if weight is None else weight.detach().double() + norm.offset


def _without_gain(norm: Norm) -> Iterator[Set]:
    weight = getattr(norm.module, "weight", None)
    if weight is not None:
        yield Set(f"{norm.path}.weight", torch.full_like(weight.detach(), 1 - norm.offset))


def _by_parcels(weight: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([turn(rows.double()).to(weight.dtype) for rows in parcels(weight)])


def _why_linear(linear: Linear, tied: Mapping[int, Any]) -> str | None:
    if not is_linear(linear.module):
        return f"is a {type(linear.module).__name__}, which actkit does not read as a linear layer"
    if isinstance(linear.module, ActLinear) and linear.module.filled_slots:
        return f"has its slot '{linear.module.filled_slots[0]}' filled, which was made for it as it is; rotate first"
    if any(id(parameter) in tied for parameter in linear.module.parameters()):
        return "is shared with another part of the model"
    return None


def _why_norm(norm: Norm) -> str | None:
    kind = type(norm.module).__name__
    return None if kind.endswith("RMSNorm") else f"{norm.path} is a {kind}, which subtracts the mean or is not known"


def _why_block(block: Block) -> str | None:
    behind = next((norm.path for norm in block.norms if norm.feeds_residual), None)
    if behind is not None:
        return f"{behind} stands behind attention or MLP, and its gain belongs to the channels as they are"
    if block.attention is None or (block.mlp is None and block.experts is None) or block.other:
        return f"what reads and writes the residual stream in {block.path} is not described whole"
    parts = (block.attention, block.mlp, block.experts)
    for part in (part for part in parts if part is not None):
        if is_wrapped(block.root, part.path):
            return f"{part.path} is wrapped, and something else may come between it and its norm"
        if part.norm is None or (part.norm.role == "both" and block.mlp is None):
            return f"{part.path} is not fed by a norm of its own alone"
    return next((why for norm, _, _ in _readers(block) if (why := _why_norm(norm)) is not None), None)


@dataclass(frozen=True)
class _Ends:
    """Embedding, last norm and head of a model."""

    embedding_path: str
    embedding: Any
    norm: Norm
    head: Linear
    tied: bool

    @classmethod
    def of(cls, view: Anatomy) -> _Ends:
        (embedding,), (head,) = (paths_of_end(view.model, f"get_{end}_embeddings")[:1] for end in ("input", "output"))
        layer, table = (get_module(view.model, path) for path in (head, embedding))
        (last,) = [path for path in view.head if path != head]
        first = view.blocks[0].attention
        offset = 0.0 if first is None or first.norm is None else first.norm.offset
        norm = Norm(last, get_module(view.model, last), offset=offset)
        return cls(embedding, table, norm, Linear(head, "layer", layer), getattr(layer, "weight", None) is table.weight)

    @classmethod
    def why_not(cls, view: Anatomy) -> str | None:
        model = view.model
        table, head = (paths_of_end(model, f"get_{end}_embeddings") for end in ("input", "output"))
        if not table or not head:
            return "it names no embedding, or no head (get_input_embeddings, get_output_embeddings)"
        between = [path for path in view.head if path not in head]
        if len(between) != 1:
            return f"more or less than one norm stands before its head: {', '.join(between) or 'none'}"
        norm = _why_norm(Norm(between[0], get_module(model, between[0])))
        if norm is not None:
            return norm
        stem = {path: get_module(model, path) for path in view.stem if path not in table}
        others = [path for path, module in stem.items() if next(module.parameters(), None) is not None]
        if others:
            return f"{others[0]} writes to the residual stream too"
        embedding, layer = get_module(model, table[0]), get_module(model, head[0])
        if not isinstance(embedding, nn.Embedding) or not is_linear(layer) or isinstance(layer, ActLinear):
            return "a quantized or unknown embedding or head stands there; rotate first"
        return None
