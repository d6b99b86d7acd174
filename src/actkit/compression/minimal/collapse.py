"""Trained single-head attention with two matrices in place of four, exactly (2024, arXiv:2410.13732).

    (W_q x + b_q) . (W_k y + b_k)  =  (W x + u) . y + const(x),      W = W_k^T W_q,   u = W_k^T b_q
    W_o (sum_y a_xy (W_v y + b_v)) + b_o  =  V (sum_y a_xy y) + c,   V = W_o W_v,     c = W_o b_v + b_o

Softmax takes a term that is constant over keys away, so that b_k drops out, and its rows sum to 1, so that b_v goes to
the output. Of a bare stack (no norms, no residual sums) the V of all layers are one matrix at the end: S + 1 matrices
for 4 S.

When to use it: `collapse_attention` on a model with one head as wide as the hidden states, to halve what its attention
stores and computes; before anything else fills its layers.
Cost: none; with n channels 2 n^2 numbers a layer less.
Settled here: in a model of transformers the query layer gets W and u, the output layer V and c, and modules that pass
their input on stand where key and value were; so masks, caches and attention functions stay as they are. A
`ReducedAttention` of a model of your own becomes its collapsed form. Computed in float64 and rounded once. Not exact,
and refused: rotary embeddings, norms or clamps of query and key, attention that is not softmax. Several heads would be
exact and larger (a matrix as wide as the model for each), and are refused too.
Our own reading: the formulas with biases are ours; the paper merges matrices without. Dropout of attention weights in
training breaks the sum of 1, so collapse a model that is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from actkit.compression.minimal.minimal_vit import ReducedEncoder
from actkit.compression.minimal.reduced_attention import ReducedAttention
from actkit.core.edit.edits import Edit, Note, Replace, Set, Skip
from actkit.core.ground.errors import EditError
from actkit.core.layers.attention_function import function_of
from actkit.core.layers.known_layers import why_unread
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.nothing import PassThrough
from actkit.core.layers.weights import DenseWeight
from actkit.core.model.anatomy import Attention, Block
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.tags import Tags
from actkit.core.recipe.transform import Target, Transform

Part = Literal["qk", "vo"]
Pair = tuple[Tensor, Tensor | None]  # the weight and the bias of a layer, float64


def query_key(query: nn.Module, key: nn.Module) -> Pair:
    """Return the layer W x + u whose products with the tokens are those of query and key, up to constants over keys.

    Args:
        query: a linear layer.
        key: one of the same size.
    """
    (q, q_bias), (k, _) = _values(query), _values(key)
    return k.mT @ q, None if q_bias is None else k.mT @ q_bias


def value_output(value: nn.Module, output: nn.Module) -> Pair:
    """Return the layer that gives of mixed tokens what output gives of mixed values.

    Args:
        value: a linear layer.
        output: one that reads what it gives, mixed by weights that sum to 1.
    """
    (v, v_bias), (o, bias) = _values(value), _values(output)
    moved = None if v_bias is None else o @ v_bias
    return o @ v, bias if moved is None else moved if bias is None else moved + bias


@torch.no_grad()
def collapsed(attention: ReducedAttention, what: Iterable[Part] = ("qk", "vo")) -> ReducedAttention:
    """Return a trained full attention in its collapsed form.

    Args:
        attention: of one head.
        what: which pairs of matrices become one.

    Raises:
        EditError: it has several heads, or nothing to collapse.
    """
    settings = attention.settings
    if settings["heads"] > 1:
        raise EditError(f"heads: {_several(settings['heads'], settings['features'])}")
    chosen = [part for part in what if settings[part] == "full"]
    if not chosen:
        raise EditError(
            f"what: qk={settings['qk']!r} and vo={settings['vo']!r} are there, and {', '.join(what)} was to be "
            f"collapsed; only 'full' has two matrices to multiply."
        )
    made = ReducedAttention(**settings | dict.fromkeys(chosen, "collapsed")).double()
    layers = {name: getattr(attention, name) for name in ("query", "key", "value", "output")}
    pairs = {name: _values(layer) for name, layer in layers.items() if layer is not None}
    if "qk" in chosen:
        pairs["query"] = query_key(layers["query"], layers["key"])
    if "vo" in chosen:
        pairs["output"] = value_output(layers["value"], layers["output"])
    for name, layer in made.named_children():
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(pairs[name][0])
        if layer.bias is not None:
            layer.bias.copy_(pairs[name][1])  # type: ignore[arg-type]
    if attention.form is not None and made.form is not None:
        made.form.copy_(attention.form)
    standing = next(attention.parameters())
    return made.to(standing.device, standing.dtype).train(attention.training)


@torch.no_grad()
def collapse_stack(encoder: ReducedEncoder) -> ReducedEncoder:
    """Return a bare encoder with one matrix a layer, and one at the end.

    Args:
        encoder: with norm 'bare' and one head; of any form.

    Raises:
        EditError: it has norms and residual sums, or several heads.
    """
    if encoder.norm != "bare":
        raise EditError(
            f"encoder: its layers have norms and residual sums (norm={encoder.norm!r}), through which no matrix can be "
            f"moved; collapse each attention by itself (collapsed)."
        )
    layers: list[ReducedAttention] = [layer.attention for layer in encoder.layers]  # type: ignore[assignment, misc]
    features = layers[0].settings["features"]
    made = ReducedEncoder(features, len(layers), None, "bare", qk="collapsed", vo="none").double()
    last = ReducedAttention(features, qk="collapsed", vo="collapsed").double()
    made.layers[-1].attention = last
    # what a layer of the old stack reads is x = P y + c, with y what one of the new stack reads
    p = torch.eye(features, dtype=torch.float64, device=next(encoder.parameters()).device)
    c = p.new_zeros(features)
    for old, new in zip(layers, made.layers, strict=True):
        if old.settings["heads"] > 1:
            raise EditError(f"heads: {_several(old.settings['heads'], features)}")
        (w, u), (v, b) = _collapsed_pairs(old)
        query: Any = new.attention.query  # type: ignore[union-attr]
        query.weight.copy_(p.mT @ w @ p)
        query.bias.copy_(p.mT @ (w @ c + u))
        p, c = v @ p, v @ c + b
    assert last.output is not None
    last.output.weight.copy_(p)
    last.output.bias.copy_(c)
    standing = next(encoder.parameters())
    return made.to(standing.device, standing.dtype).train(encoder.training)


class CollapseAttention(Transform):
    """Multiply query with key, and value with output, of attention with one head.

    Attributes:
        what: which pairs become one matrix.

    Raises:
        EditError: when applied: an attention has several heads, or cannot be collapsed exactly.
    """

    what: tuple[Part, ...] = ("qk", "vo")

    tags: ClassVar[Tags] = Tags(changes_function="exact", least_coverage=0.05)
    not_proposed: ClassVar[str] = "models with one head as wide as their hidden states are rare; try it with recipes="

    @field_validator("what", mode="before")
    @classmethod
    def _several(cls, what: Any) -> Any:
        found = (what,) if isinstance(what, str) else what
        if isinstance(found, list | tuple) and not found:
            raise ValueError("what: nothing was given; name qk, vo or both")
        return found

    def targets(self, block: Block) -> Iterable[Target]:
        if block.attention is not None:
            yield from (*block.attention.inputs, block.attention.output)
        yield from _reduced(block)

    def conflicts(self, earlier: Transform) -> str | None:
        if earlier.slots:
            return f"{type(earlier).__name__} filled the layers that are to be multiplied; collapse first"
        return super().conflicts(earlier)

    def edit(self, block: Block, seen: Seen) -> Iterable[Edit | Skip | Note]:
        for path, module in _reduced(block).items():
            try:
                new = collapsed(module, self.what)
            except EditError as error:
                raise EditError(f"collapse_attention: {path}: {error}") from error
            yield Replace(path, new)
            yield _note(path, module, new)
        if block.attention is not None:
            yield from self._layers(block, block.attention)

    def _layers(self, block: Block, attention: Attention) -> Iterable[Edit | Note]:
        reason = why_not(attention, block.root)
        if reason is not None:
            raise EditError(f"collapse_attention: {attention.path}: {reason}")
        query, key, value, output = attention.query, attention.key, attention.value, attention.output
        assert query is not None and key is not None and value is not None
        paths = [linear.path for linear in (query, key, value, output)]
        before = _numbers(block.root.get_submodule(path) for path in paths)
        if "qk" in self.what:
            weight, bias = query_key(query.module, key.module)
            yield Set(f"{query.path}.weight", weight.to(query.weight.dtype))
            if bias is not None:
                yield Set(f"{query.path}.bias", bias.to(query.weight.dtype))
            yield Replace(key.path, PassThrough().train(key.module.training))
        if "vo" in self.what:
            weight, bias = value_output(value.module, output.module)
            dtype = output.weight.dtype
            if bias is not None and output.bias is None:
                made = ActLinear.of(output.module, weight=DenseWeight(weight.to(dtype)), bias=bias.to(dtype))
                yield Replace(output.path, made)
            else:
                yield Set(f"{output.path}.weight", weight.to(dtype))
                if bias is not None:
                    yield Set(f"{output.path}.bias", bias.to(dtype))
            yield Replace(value.path, PassThrough().train(value.module.training))
        after = _numbers(block.root.get_submodule(path) for path in paths)
        yield Note(attention.path, f"{before:,} numbers became {after:,}", {"before": before, "after": after})


def why_not(attention: Attention, model: nn.Module) -> str | None:
    """Say why an attention cannot be collapsed exactly and with a gain, or None.

    Args:
        attention: of the model.
        model: that it belongs to.
    """
    if attention.heads > 1:
        return f"heads: {_several(attention.heads, attention.heads * attention.head_dim)}"
    if attention.pairs is not None:
        return "its rotary embedding turns query and key between their layers and their products; it is not exact"
    if attention.head_norms:
        return "its query and key go through norms before they are multiplied; it is not exact"
    if attention.limit is not None:
        return f"its query, key and value are clamped to {attention.limit:g}; it is not exact"
    if function_of(model) is not None:
        return "its attention is no plain softmax, which takes constants over keys away; it is not exact"
    layers = (attention.query, attention.key, attention.value, attention.output)
    if any(layer is None for layer in layers):
        return "query, key and value are one layer here, which cannot be told apart; give a model that has three"
    for layer in layers:
        assert layer is not None
        reason = why_unread(layer.module)
        if type(layer.module) is not nn.Linear or reason is not None:
            kind = f"a {type(layer.module).__name__}" if reason is None else reason
            return f"{layer.path}: {kind} stands there, no plain linear layer; collapse first, and once"
        if {layer.in_features, layer.out_features} != {attention.head_dim}:
            return (
                f"{layer.path} is {layer.out_features} x {layer.in_features} and the head {attention.head_dim} wide; "
                f"what is collapsed has one head as wide as the hidden states"
            )
    return None


def _collapsed_pairs(attention: ReducedAttention) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """W, u and V, b of an attention of any form with one head, float64."""
    features = attention.settings["features"]
    form = attention.matrix()
    if form is not None:
        form = form.double()
        w, u = (form @ form.mT if attention.settings["qk"] == "cholesky" else form), None
    else:
        assert attention.query is not None
        key = attention.query if attention.settings["qk"] == "shared" else attention.key
        w, u = _values(attention.query) if key is None else query_key(attention.query, key)
    one = torch.eye(features, dtype=torch.float64, device=w.device)
    v, b = (one, None) if attention.output is None else _values(attention.output)
    if attention.value is not None and attention.output is not None:
        v, b = value_output(attention.value, attention.output)
    nothing = w.new_zeros(features)
    return (w, nothing if u is None else u), (v, nothing if b is None else b)


def _values(layer: Any) -> Pair:
    return layer.weight.detach().double(), None if layer.bias is None else layer.bias.detach().double()


def _reduced(block: Block) -> dict[str, ReducedAttention]:
    """The reduced attentions of a block by path."""
    return {
        f"{block.path}.{path}".removeprefix("."): module
        for path, module in block.module.named_modules()
        if isinstance(module, ReducedAttention)
    }


def _note(path: str, old: nn.Module, new: nn.Module) -> Note:
    before, after = _numbers([old]), _numbers([new])
    return Note(path, f"{before:,} numbers became {after:,}", {"before": before, "after": after})


def _numbers(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _several(heads: int, features: int) -> str:
    return (
        f"it has {heads}, and collapsed each needs a matrix of {features} x {features} for query and key: "
        f"exact, and {'as large as' if heads == 2 else 'larger than'} before; give a model with one head."
    )
