"""What a block of a decoder is made of: which products each thread computes in each stage, and where their outputs go.

A block is described by the kind of its attention and of its MLP; each kind fills its stages of a `Share`, one thread's
part of the block. Another kind is another function beside `grouped_query` and `gated`, and its stage in
`kernels.decode_step`. A module that computes differently names its kind by a class attribute `decodes_as`:
'row' (what the row of the model type says), 'spark_ffn' (gate_proj of the first r inputs, up_proj of the others,
down_proj, act_fn), 'spark_attention' (q_proj, k_proj, v_proj, o_proj; of a head r features choose k keys),
'latent_attention' (`runtime.latent`) or, of an activation, 'statistical_top_k' (base, k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import get_module
from actkit.core.ground.errors import EditError, UnsupportedModelError
from actkit.core.layers.activations import Thresholded, mixes_of, name_of
from actkit.core.layers.curve import CurveKind, curve_of
from actkit.core.layers.linear import ActLinear, LowRank
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.layers.selections import Selection, Threshold, TopK
from actkit.core.model.parts import Attention, Block, Linear, Mlp
from actkit.core.model.wrapping import inside
from actkit.kernels import decode_math as functions
from actkit.kernels import decode_step as steps
from actkit.kernels.quantized import BLOCK, PIECES
from actkit.kernels.quantized_rows import piece_of
from actkit.runtime.shards import Kind, Part, dense_part, held, joined, kind_of, kind_of_stored, part_of, part_of_stored

ACTIVATIONS = {
    "silu": functions.SILU,
    "relu": functions.RELU,
    "gelu": functions.GELU,
    "gelu_tanh": functions.GELU_TANH,
    "relu2": functions.RELU2,
}
CURVES: dict[CurveKind, int] = {
    "rational_a": functions.RATIONAL_A,
    "rational_b": functions.RATIONAL_B,
    "crrelu": functions.CRRELU,
    "poly_relu": functions.POLY_RELU,
    "series_silu": functions.SERIES_SILU,
    "series_relu": functions.SERIES_RELU,
    "series_gelu": functions.SERIES_GELU,
    "series_gelu_tanh": functions.SERIES_GELU_TANH,
    "series_relu2": functions.SERIES_RELU2,
    "poly_norm": functions.POLY_NORM,
}


def described(model: nn.Module, block: Block) -> Block:
    """Return the block with its attention and MLP, even if their modules are of kinds that only `decodes_as` names."""
    attention, mlp = block.attention, block.mlp
    at, path = inside(model, f"{block.path}.self_attn"), inside(model, f"{block.path}.mlp")
    if kind_named(model, at) == "spark_attention":
        spark: Any = get_module(model, at)
        query, key, value, output = (
            _linear(model, f"{at}.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        attention = Attention(
            at, spark, query, key, value, None, output, spark.heads, spark.key_value_heads, spark.head_dim, None
        )
    if kind_named(model, path) == "spark_ffn":
        gate, up, down = (_linear(model, f"{path}.{name}") for name in ("gate_proj", "up_proj", "down_proj"))
        mlp = Mlp(path, get_module(model, path), gate, up, down, f"{path}.act_fn", None)
    if attention is block.attention and mlp is block.mlp:
        return block
    return replace(block, attention=attention, mlp=mlp, other=())


def kind_named(model: nn.Module, path: str) -> str | None:
    """What the module at a path, if there is one, says that it decodes as."""
    try:
        return getattr(get_module(model, path), "decodes_as", None)
    except EditError:
        return None


def _linear(model: nn.Module, path: str) -> Linear:
    return Linear(path, "layer", get_module(model, path))


def check(model: nn.Module, block: Block, latent: bool = False) -> None:
    """Raise UnsupportedModelError if a block is made of something else. latent: its attention is `runtime.latent`'s."""
    attention, mlp = block.attention, block.mlp
    unknown = attention is None or (attention.query_key_value is not None and _fused_rows(attention) is None)
    if unknown and not latent:
        raise UnsupportedModelError(
            f"{block.path}: how one layer holds query, key and value of its attention is not described"
        )
    if block.experts is not None:
        raise UnsupportedModelError(f"{block.path}: it has experts, which the decoder does not compute")
    if mlp is None:
        raise UnsupportedModelError(f"{block.path}: its MLP is not described")
    for path in (mlp.path,) if attention is None else (attention.path, mlp.path):
        if kind_named(model, path) not in (None, "row", "spark_attention", "spark_ffn"):
            raise UnsupportedModelError(f"{path}: the decoder knows no {kind_named(model, path)}")
    gate = _function(get_module(model, mlp.activation))
    activation = gate.base
    curve = None if name_of(activation) in ACTIVATIONS else curve_of(activation)
    if name_of(activation) not in ACTIVATIONS and curve is None:
        known = ", ".join((*ACTIVATIONS, *CURVES))
        mixed = "" if hasattr(activation, "curve") else ", ".join(mixes_of(activation) or ())
        mixing = f" mixes {mixed}, and a unit is computed without the others" if mixed else ""
        raise UnsupportedModelError(
            f"{mlp.activation}: a {type(activation).__name__}{mixing}; the decoder computes {known}"
        )
    if curve is not None and mlp.down.in_features % len(curve.rows):
        raise UnsupportedModelError(f"{mlp.activation}: {len(curve.rows)} groups for {mlp.down.in_features} units")
    if gate.k is not None and gate.code == functions.POLY_NORM:
        raise UnsupportedModelError(
            f"{mlp.activation}: a {type(activation).__name__} behind a statistical top-k; threads meet over gates "
            f"for one of the two, not for both"
        )
    for linear in block.linears():
        if type(linear.module) is not nn.Linear and not isinstance(linear.module, ActLinear):
            raise UnsupportedModelError(
                f"{linear.path} is a {type(linear.module).__name__}, whose forward pass no decoder calls"
            )
        refuse_rounded_inputs(linear.path, linear.module)
        select = None if factors_of(linear.module) is None else selection_of(linear.module)
        if isinstance(select, TopK) or (select is not None and _correction(linear.module)):
            raise UnsupportedModelError(
                f"{linear.path} is kept as two factors and selects its inputs by number, or beside a correction, which "
                f"no product here does"
            )


def _fused_rows(attention: Attention) -> Literal["parts", "by_head"] | None:
    """How one layer holds query, key and value: all queries first, or head by head; None for any other way."""
    rows, size, heads = attention.value_rows, attention.head_dim, attention.key_value_heads
    if rows is None:
        return None
    query, readers = attention.heads * size, attention.heads // heads
    if (rows.start, len(rows), rows.count) == (query + heads * size, heads * size, 1):
        return "parts"
    by_head = (rows.start, rows.size, rows.count, rows.step)
    return "by_head" if by_head == ((readers + 1) * size, size, heads, (readers + 2) * size) else None


def _shifted(rows: range, by: int) -> range:
    return range(rows.start + by, rows.stop + by)


@dataclass(frozen=True)
class Gate:
    """The activation of a gate.

    Attributes:
        base: without what makes it sparse.
        threshold: below which it is 0; None if it has none.
        k: of a statistical top-k before it; None if it has none.
    """

    base: nn.Module
    threshold: float | None = None
    k: float | None = None

    @property
    def code(self) -> int:
        """Of `kernels.decode_math`."""
        name, curve = name_of(self.base), curve_of(self.base)
        return ACTIVATIONS[str(name)] if name in ACTIVATIONS or curve is None else CURVES[curve.kind]

    @property
    def meets(self) -> bool:
        """Whether it depends on all units, so that threads meet over their gates."""
        return self.k is not None or self.code == functions.POLY_NORM

    @property
    def sparse(self) -> bool:
        """Whether many gates are exactly 0."""
        chosen = self.threshold is not None or self.k is not None
        return chosen or self.code in (functions.RELU, functions.RELU2)


def gate_of(model: nn.Module, block: Block) -> Gate:
    """The gate's activation as it is now, of a block that `check` took."""
    assert block.mlp is not None
    return _function(get_module(model, block.mlp.activation))


def _function(module: Any) -> Gate:
    if isinstance(module, Thresholded):
        return replace(_function(module.base), threshold=float(module.threshold))
    if getattr(module, "decodes_as", None) == "statistical_top_k":
        return Gate(module.base, k=float(module.k))
    return Gate(module)


# -- products ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """One matrix of a thread: some outputs, or some inputs, of linear layers that are stored and select alike.

    Attributes:
        parts: each layer with its outputs (`by_rows` False) or its inputs (True).
        kind: how the matrix is stored.
        at: where its outputs begin among those of the stage.
        by_rows: it holds some inputs of the layers.
        biased: whether the layers' biases belong to this share.
        zeros: whether many inputs are exactly 0; these are left out even if nothing selects.
        apart: whether each output has its own row, to be skipped behind a sparse gate.
        down: of bundled units, the layer that their column is taken from.
        factor: of the layer's low-rank correction, or of its weight, the one that this is.
        inputs_at: where its inputs begin in those of the stage.
        transposed: the layer's outputs are inputs here.
    """

    parts: tuple[tuple[Linear, range], ...]
    kind: Kind
    at: int = 0
    by_rows: bool = False
    biased: bool = True
    zeros: bool = False
    apart: bool = False
    down: Linear | None = None
    factor: Literal["", "right", "left"] = ""
    inputs_at: int = 0
    transposed: bool = False

    @property
    def select(self) -> Selection | None:
        """What selects the inputs; raises ValueError if the layers no longer agree."""
        if self.factor or self.transposed:
            return None
        first, *others = (selection_of(linear.module) for linear, _ in self.parts)
        if not all(same_selection(first, other) for other in others):
            paths = ", ".join(linear.path for linear, _ in self.parts)
            raise ValueError(f"{paths}: they were packed as one matrix and select their inputs differently now.")
        if first is not None and self.apart:
            raise ValueError(f"{self.parts[0][0].path}: it was packed to skip outputs, and selects its inputs now.")
        return Threshold(0.0) if first is None and self.zeros else first

    @property
    def inputs(self) -> range:
        """Which inputs this part reads."""
        linear, cut = self.parts[0]
        if self.factor == "left" or self.transposed:
            return range(self.all_inputs)
        return cut if self.by_rows else range(linear.in_features)

    @property
    def all_inputs(self) -> int:
        """Inputs of the whole product."""
        if self.transposed:
            return len(self.parts[0][1])
        return self._thin.rank if self.factor == "left" else self.parts[0][0].in_features

    @property
    def outputs(self) -> int:
        """Outputs of this part."""
        return self.parts[0][0].out_features if self.by_rows else sum(len(cut) for _, cut in self.parts)

    @property
    def correction(self) -> LowRank | None:
        """The low-rank correction of the layer, which then is one alone."""
        return _correction(self.parts[0][0].module)

    @property
    def _thin(self) -> Thin:
        """The two factors of the layer, which then is one alone."""
        linear, cut = self.parts[0]
        return Thin(linear.module, None if self.by_rows else cut, cut if self.by_rows else None)

    def factors(self) -> tuple[Product, Product] | None:
        """The two products of the correction, or of a weight that is kept as factors, right and left, if any."""
        if self.factor or not is_thin(self.parts[0][0].module):
            return None
        both = replace(self, at=0, biased=False, zeros=False)
        right, left = self._thin.kinds
        return replace(both, factor="right", kind=right), replace(both, factor="left", kind=left)

    def part(self) -> Part:
        """The matrix."""
        if self.factor:
            return self._thin.part(self.factor)
        if self.by_rows:
            (linear, cut), *_ = self.parts
            return part_of(linear.module, inputs=cut)
        if self.transposed:
            (linear, cut), *_ = self.parts
            return part_of(linear.module, outputs=cut).transposed()
        return joined([part_of(linear.module, outputs=cut) for linear, cut in self.parts])

    def bias(self) -> Tensor | None:
        """float32 [outputs], or None."""
        found = [getattr(linear.module, "bias", None) for linear, _ in self.parts]
        if not self.biased or all(bias is None for bias in found):
            return None
        cuts = [range(linear.out_features) if self.by_rows else cut for linear, cut in self.parts]
        return torch.cat(
            [
                torch.zeros(len(cut)) if bias is None else bias.detach().float()[cut.start : cut.stop]
                for bias, cut in zip(found, cuts)
            ]
        )


@dataclass(frozen=True)
class Thin:
    """The two factors of a layer: of its weight, of its correction, or of both side by side.

    Attributes:
        module: the layer.
        outputs: of it that the left one has; None for all.
        inputs: of it that the right one has; None for all.
    """

    module: Any
    outputs: range | None
    inputs: range | None

    @property
    def stored(self) -> LowRankWeight | None:
        """The weight, if its factors are multiplied as they are stored."""
        weight = factors_of(self.module)
        return None if weight is None or _correction(self.module) else weight

    @property
    def _rows(self) -> range | None:
        """Of the right factor, those that belong to the heads of the outputs."""
        weight = factors_of(self.module)
        if weight is None or weight.heads == 1 or self.outputs is None:
            return None
        size = weight.shape[0] // weight.heads
        return range(self.outputs.start // size * weight.rank, self.outputs.stop // size * weight.rank)

    @property
    def rank(self) -> int:
        """What both products meet in."""
        weight, correction = factors_of(self.module), _correction(self.module)
        own = 0 if weight is None else len(self._rows or range(weight.heads * weight.rank))
        return own + (0 if correction is None else correction.left.shape[1])

    @property
    def kinds(self) -> tuple[Kind, Kind]:
        """How the right and the left factor are kept: a block for each head makes floats of codes."""
        stored, floats = self.stored, Kind(held(self.module.storage.dtype))
        if stored is None:
            correction = _correction(self.module)
            assert correction is not None
            floats = Kind(held(correction.left.dtype))
            return floats, floats
        right = kind_of_stored(stored.right, self._rows, self.inputs)
        return right, kind_of_stored(stored.left, self.outputs) if stored.heads == 1 else floats

    def part(self, factor: Literal["right", "left"]) -> Part:
        """One of the two matrices."""
        stored, kind = self.stored, self.kinds[factor == "left"]
        if stored is not None and factor == "right" and (self._rows is None or self.inputs is None):
            return part_of_stored(stored.right, self._rows, self.inputs)
        if stored is not None and factor == "left" and stored.heads == 1:
            return part_of_stored(stored.left, self.outputs)
        weight, correction = factors_of(self.module), _correction(self.module)
        found = [] if weight is None else [weight.factors(self.outputs)]
        if correction is not None:
            left, right = correction.factors()
            found.append((left if self.outputs is None else left[self.outputs.start : self.outputs.stop], right))
        if factor == "left":
            return dense_part(torch.cat([left for left, _ in found], 1).detach(), kind)
        return dense_part(torch.cat([right for _, right in found]).detach(), kind, inputs=self.inputs)


def factors_of(module: nn.Module) -> LowRankWeight | None:
    """Return the weight of a layer that is kept as two factors; None for any other."""
    storage = module.storage if isinstance(module, ActLinear) else None
    return storage if isinstance(storage, LowRankWeight) else None


def is_thin(module: nn.Module) -> bool:
    """Whether a layer's outputs, or a part of them, come out of two thin products."""
    return _correction(module) is not None or factors_of(module) is not None


def refuse_rounded_inputs(path: str, module: nn.Module) -> None:
    """Raise UnsupportedModelError for a layer that rotates or rounds its inputs, as no product of the decoder does."""
    if isinstance(module, ActLinear) and module.inputs is not None:
        raise UnsupportedModelError(f"{path} {module.inputs.does}, which the decoder does not")


def selection_of(module: nn.Module) -> Selection | None:
    """Return what selects the inputs of a layer; None if nothing does."""
    refuse_rounded_inputs("a layer that was packed", module)  # put into the model since
    return module.select if isinstance(module, ActLinear) else None


def _correction(module: nn.Module) -> LowRank | None:
    return module.correction if isinstance(module, ActLinear) else None


def same_selection(a: Selection | None, b: Selection | None) -> bool:
    """Whether two selections choose the same inputs for every token."""
    if a is None or b is None:
        return a is b
    if a.spec() != b.spec():
        return False
    if (a.score is None) != (b.score is None) or (a.score is not None and not torch.equal(a.score, b.score)):  # type: ignore[arg-type]
        return False
    return not isinstance(a, Threshold) or torch.equal(a.threshold, b.threshold)  # type: ignore[union-attr, arg-type]


def columns(
    layers: Sequence[tuple[Linear, range]], begins: Sequence[int] | None = None
) -> tuple[list[Product], list[int]]:
    """Make products of outputs of layers that share an input, as few as possible, and say where each layer's begin.

    Args:
        layers: with their outputs.
        begins: where in the stage's inputs each layer's begin, if that is not 0 for all.
    """
    begins = begins or [0] * len(layers)
    runs: list[list[tuple[Linear, range, Kind]]] = []
    firsts: list[int] = []
    for (linear, cut), begin in zip(layers, begins):
        kind = kind_of(linear.module, outputs=cut)
        last = runs[-1][0] if runs else None
        alike = last is not None and last[2].joins(kind) and not is_thin(last[0].module)
        alike = alike and not is_thin(linear.module) and firsts[-1] == begin
        if alike and same_selection(selection_of(last[0].module), selection_of(linear.module)):  # type: ignore[index]
            runs[-1].append((linear, cut, kind))
        else:
            runs.append([(linear, cut, kind)])
            firsts.append(begin)
    products: list[Product] = []
    places: list[int] = []
    at = 0
    for run, begin in zip(runs, firsts):
        kind = run[0][2]
        for _, _, other in run[1:]:
            kind = kind.joined(other)
        products.append(Product(tuple((linear, cut) for linear, cut, _ in run), kind, at, inputs_at=begin))
        for _, cut, _ in run:
            places.append(at)
            at += len(cut)
        start = products[-1].at
        at = start + -(-(at - start) // BLOCK) * BLOCK + BLOCK  # a product writes whole tiles
    return products, places


def rows(linear: Linear, cut: range, first: bool, zeros: bool = False) -> Product:
    """Make the product of some inputs of a layer; the bias belongs to the share that begins with the `first`."""
    return Product(((linear, cut),), kind_of(linear.module, inputs=cut), by_rows=True, biased=first, zeros=zeros)


def share_of(total: int, index: int, count: int, unit: int = 1) -> range:
    """The part of `total` that belongs to one of `count` threads, in whole units."""
    units = -(-total // unit)
    return range(min(total, units * index // count * unit), min(total, units * (index + 1) // count * unit))


# -- blocks ------------------------------------------------------------------------------------------------------------


@dataclass
class Share:
    """One thread's part of a block.

    Attributes:
        stages: the products of each.
        places: where to find what in their outputs.
    """

    stages: dict[int, list[Product]] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)


def grouped_query(
    share: Share, block: Block, thread: int, threads: int, *, window: int, turn: int, rotary: int = 0
) -> None:
    """Add grouped-query attention: whole key-value heads with their readers.

    Args:
        share: filled.
        block: whose attention.
        thread: whose share, from 0.
        threads: of the team.
        window: how many tokens a query sees, 0 for all.
        turn: how query and key turn, as `steps.TURN`.
        rotary: by which table.
    """
    attention = block.attention
    assert attention is not None
    own, size = share_of(attention.key_value_heads, thread, threads), attention.head_dim
    wide = attention.heads // attention.key_value_heads * size  # the queries of a key-value head
    queries, keys = range(own.start * wide, own.stop * wide), range(own.start * size, own.stop * size)
    products: list[Product] = []
    places, strides = [0, 0, 0], (wide, size)
    fused = attention.query_key_value
    if fused is not None and _fused_rows(attention) == "by_head":
        strides = (wide + 2 * size, wide + 2 * size)
        places = [0, wide, wide + size]
        if own:
            products, _ = columns([(fused, range(own.start * strides[0], own.stop * strides[0]))])
    elif own:
        products, places = columns(_query_key_value(attention, queries, keys))
    share.stages[steps.QKV] = products
    share.stages[steps.OUTPUT] = [rows(attention.output, queries, own.start == 0)] if own else []
    share.places |= dict(zip((steps.QUERY_AT, steps.KEY_AT, steps.VALUE_AT), places))
    share.places |= dict(zip((steps.QUERY_STEP, steps.KEY_STEP), strides))
    share.places |= {steps.FIRST_HEAD: own.start, steps.HEADS: len(own), steps.WINDOW: window, steps.TURN: turn}
    share.places |= {steps.ROTARY: rotary}
    if getattr(attention.module, "decodes_as", None) == "spark_attention":
        share.places |= {steps.CHOOSING: attention.module.r, steps.KEYS: attention.module.k}  # type: ignore[dict-item]


def _query_key_value(attention: Attention, queries: range, keys: range) -> list[tuple[Linear, range]]:
    """The layers of query, key and value with these rows of each."""
    fused = attention.query_key_value
    if fused is None:
        assert attention.query and attention.key and attention.value
        return [(attention.query, queries), (attention.key, keys), (attention.value, keys)]
    query, other = attention.heads * attention.head_dim, attention.key_value_heads * attention.head_dim
    return [(fused, queries), (fused, _shifted(keys, query)), (fused, _shifted(keys, query + other))]


def gated(share: Share, block: Block, thread: int, threads: int, gate: Gate) -> None:
    """Add an MLP: whole units, in multiples that cut no group of the weights, if possible.

    Without a gate the up projection takes its place. Behind a sparse gate only the rows of the up projection are read
    whose gate is not 0, if nothing selects its inputs and its weights are floats or have groups of inputs; the down
    projection leaves out the others. If both are floats and select nothing, a unit's row and column lie side by side.
    Exact.

    Args:
        share: filled.
        block: whose MLP.
        thread: whose share, from 0.
        threads: of the team.
        gate: the activation.
    """
    mlp = block.mlp
    assert mlp is not None
    units, begin = mlp.down.in_features, 0
    if mlp.gate is not None and getattr(mlp.module, "decodes_as", None) == "spark_ffn":
        begin = mlp.gate.in_features  # where the up projection's inputs begin
    unit = BLOCK if units >= 4 * threads * BLOCK else PIECES[0]
    own = share_of(units, thread, threads, unit)
    stages: dict[int, list[Product]] = {steps.GATE_UP: [], steps.DOWN: [], steps.UP: [], steps.UNITS_BUNDLED: []}
    places = [0, 0]
    if own:
        if not mlp.gated:
            stages[steps.GATE_UP], _ = columns([(mlp.up, own)])
            places = [0, -1]
        elif mlp.gate is None:  # one layer for both, the gate's rows first
            stages[steps.GATE_UP], places = columns([(mlp.up, own), (mlp.up, _shifted(own, units))])
        elif gate.sparse and _has_rows(mlp.up.module):
            stages[steps.GATE_UP], _ = columns([(mlp.gate, own)])
            last = stages[steps.GATE_UP][-1].at + (len(own) // BLOCK + 2) * BLOCK
            places = [0, last]
            after = last + (len(own) // BLOCK + 1) * BLOCK  # where the product's input is laid out
            kind = kind_of(mlp.up.module, outputs=own)
            product = Product(((mlp.up, own),), kind, after, apart=True, inputs_at=begin)
            if _bundles(mlp.up, mlp.down):
                stages[steps.UNITS_BUNDLED] = [replace(product, down=mlp.down)]
            else:
                stages[steps.UP] = [product]
        else:
            stages[steps.GATE_UP], places = columns([(mlp.gate, own), (mlp.up, own)], (0, begin))
        if not stages[steps.UNITS_BUNDLED]:
            stages[steps.DOWN] = [rows(mlp.down, own, own.start == 0, gate.sparse)]
    for stage in (steps.UP, steps.UNITS_BUNDLED):
        if not stages[stage]:
            del stages[stage]
    share.stages |= stages
    share.places |= dict(zip((steps.GATE_AT, steps.UP_AT), places))
    share.places |= {steps.UNITS: len(own), steps.FIRST_UNIT: own.start, steps.ACTIVATION: gate.code}
    share.places |= {steps.ALL_UNITS: units if gate.meets else 0}


def _has_rows(module: nn.Module) -> bool:
    """Whether a layer can be stored row by row, to skip outputs."""
    if selection_of(module) or is_thin(module):
        return False
    kind = kind_of(module)
    if kind.dtype is not None:
        return True
    n_in: int = module.in_features  # type: ignore[assignment]
    return kind.axis == "input" and piece_of(kind.group, n_in) is not None


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer multiplies floats with all of its inputs and adds no correction."""
    return kind_of(module).dtype is not None and not selection_of(module) and not is_thin(module)


def _bundles(up: Linear, down: Linear) -> bool:
    """Whether plain layers are stored alike and add no bias."""
    plain = _is_plain(up.module) and _is_plain(down.module)
    return plain and kind_of(up.module) == kind_of(down.module) and up.bias is None and down.bias is None


def head(share: Share, module: nn.Module, thread: int, threads: int) -> None:
    """Add the output layer: some words of the vocabulary, in whole groups of the weights, if possible."""
    outputs: int = module.out_features  # type: ignore[assignment]
    unit = BLOCK if outputs >= 4 * threads * BLOCK else PIECES[0]
    own = share_of(outputs, thread, threads, unit)
    share.stages[steps.HEAD] = columns([(Linear("lm_head", "layer", module), own)])[0] if own else []
    share.places |= {steps.UNITS: len(own), steps.FIRST_UNIT: own.start}
