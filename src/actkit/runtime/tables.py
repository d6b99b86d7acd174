"""A decoder's weights, packed, and the tables by which the compiled step finds them and everything else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.edit.edits import get_module
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.ground.progress import track
from actkit.core.layers.curve import COEFFICIENTS, curve_of
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.selections import Selection, Threshold, TopK
from actkit.core.model.parts import Block
from actkit.kernels import decode_products as forms
from actkit.kernels import decode_step as steps
from actkit.kernels import integer_dots
from actkit.kernels.decode_attention import functions_of
from actkit.kernels.decode_latent import LatentPlan, latent_memory
from actkit.kernels.output_rows import BundledUnits, PackedRows, blocks_of, bundle_units, pack_rows
from actkit.kernels.packing import PackedWeight, aligned
from actkit.kernels.quantized import BLOCK, Layout, QuantizedWeight
from actkit.kernels.quantized_rows import QuantizedRows, pack_quantized_rows
from actkit.kernels.team import line_padded
from actkit.runtime.blocks import Product, Share, gate_of, same_selection
from actkit.runtime.families import Form, epsilon_of, head_norms_of, is_centered
from actkit.runtime.latent import Latent, plan_of
from actkit.runtime.shards import NoMatrix, packed, part_of

Packed = PackedWeight | PackedRows | QuantizedRows | BundledUnits | QuantizedWeight | NoMatrix
ACTIVATIONS = ("float32", "int16")  # what integer weights are multiplied with
CUT_FROM = 128  # tokens from which heads are cut for threads that do not divide them: below, two meetings cost more
CACHES = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}  # how keys and values are kept
SLICE = [forms.INPUTS_AT, forms.INPUTS]  # of the stage's inputs


class Read(NamedTuple):
    """A piece of a packed weight, and how many of its rows a single step reads.

    Attributes:
        address: of the first row.
        row_bytes: of one row; rows lie side by side.
        rows: how many there are.
        mean: how many a step reads, since the last reset.
        thread: which reads them.
    """

    address: int
    row_bytes: int
    rows: int
    mean: float
    thread: int


@dataclass(frozen=True)
class Matrices:
    """The packed matrices, in the order of the step's table.

    Attributes:
        products: None if a thread has no share.
        weights: packed.
        biases: float32 [columns], or None.
        scores: of the selections.
    """

    products: tuple[Product | None, ...]
    weights: tuple[Packed, ...]
    biases: tuple[Tensor | None, ...]
    scores: list[Tensor]  # whose addresses are in the table

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(weight.nbytes for weight in self.weights)


def choose_activations(wanted: str | None, products: Iterable[Any]) -> str:
    """Choose what integer weights are multiplied with.

    Args:
        wanted: None for fixed point if machine and weights allow it.
        products: of the decoder, or what is stored of them.

    Returns:
        'int16' or 'float32'.

    Raises:
        ValueError: machine and weights do not allow what is wanted.
    """
    if wanted is not None and wanted not in ACTIVATIONS:
        raise ValueError(f"activations: {wanted!r} was given; give {', '.join(ACTIVATIONS)}, or None.")
    reason = None
    if not any(takes_dots(product) for product in products):
        reason = f"the model has no integer weights in groups of inputs, or of whole {BLOCK} outputs per thread"
    elif not integer_dots.available():
        reason = "this processor has no products of bytes (AVX-512 VNNI)"
    if wanted is None:
        return "float32" if reason else "int16"
    if wanted == "int16" and reason:
        raise ValueError(f"activations: 'int16' was given, but {reason}; give 'float32', or None.")
    return wanted


def takes_dots(product: Any) -> bool:
    """Whether a product can be computed in integers: `kernels.numba_integer` says of which weights."""
    kind = product.kind
    return bool(kind.bits) and (kind.axis == "input" or kind.group == BLOCK)


def build(
    layers: Sequence[Sequence[Share]],
    fixed: bool,
    packed_one: Callable[[int], None],
    progress: bool = False,
    before: Callable[[int], None] = lambda index: None,
) -> tuple[Matrices, np.ndarray, np.ndarray]:
    """Pack all products.

    Args:
        layers: [layer, thread], the output layer last.
        fixed: whether integer weights meet activations in fixed point, if they can.
        packed_one: called with each layer that is done.
        progress: show a bar.
        before: called with each layer that is about to be packed.

    Returns:
        The matrices, the table int64 [products, FIELDS] and the layers' table int64 [threads, layers, LAYER_FIELDS].
    """
    found: list[Product | None] = []
    weights: list[Packed] = []
    biases: list[Tensor | None] = []
    rows: list[list[int]] = []
    corrections: list[tuple[int, list[tuple[Product, Packed]]]] = []  # the product's number, its factors
    places = np.zeros((len(layers[0]), len(layers), steps.LAYER_FIELDS), np.int64)
    for index, layer in enumerate(track(layers, "Packing the weights", len(layers), progress)):
        before(index)
        for thread, share in enumerate(layer):
            for stage, wanted in share.stages.items():
                places[thread, index, 2 * stage : 2 * stage + 2] = len(rows), len(wanted)
                own: list[Product | None] = [*wanted] or [None]
                for product in own:
                    found.append(product)
                    if product is None:  # what other threads select still says whether there is a meeting
                        rows.append([0] * forms.FIELDS)
                        weights.append(PackedWeight(torch.empty(0, 0, 0), 0))
                        biases.append(None)
                        continue
                    dots = fixed and takes_dots(product)
                    weights.append(_packed(product))
                    row, bias = row_of(weights[-1], product, dots)
                    factors = product.factors()
                    if factors is not None:
                        corrections.append((len(rows), [(each, _packed(each)) for each in factors]))
                    rows.append(row)
                    biases.append(bias)
            for place, value in share.places.items():
                places[thread, index, place] = value
        packed_one(index)
    for number, both in corrections:  # behind all stages, whose products stand in a row
        assert found[number] is not None
        rows[number][forms.LOW_RANK] = len(rows)
        correction = found[number].correction  # type: ignore[union-attr]
        rows[number][forms.OF_ALL] = correction is None or correction.of == "all"
        for factor, weight in both:
            found.append(factor)
            weights.append(weight)
            rows.append(row_of(weight, factor, fixed and takes_dots(factor))[0])
            biases.append(None)
    return Matrices(tuple(found), tuple(weights), tuple(biases), []), np.array(rows, np.int64), places


def _packed(product: Product) -> Packed:
    if product.kind.factored and not product.factor:
        return NoMatrix(product.outputs, len(product.inputs))
    part = product.part()
    if not product.apart:
        return packed(part)
    if part.dense is None:
        assert part.codes is not None and part.scale is not None
        kind, scale = part.kind, part.scale.float().contiguous()
        return pack_quantized_rows(part.codes, scale, part.zero, bits=kind.bits, group=kind.group)
    if product.down is None:
        return pack_rows(part.dense)
    (_, units), *_ = product.parts
    down = part_of(product.down.module, inputs=units)
    assert down.dense is not None
    return bundle_units(part.dense, down.dense)


def row_of(weight: Packed, product: Any, dots: bool) -> tuple[list[int], Tensor | None]:
    """Make a product's row of the table, but for its selection and its correction.

    Args:
        weight: packed; its address is in the row.
        product: a `blocks.Product`, or what is stored of one.
        dots: whether it is computed in integers.

    Returns:
        int [FIELDS], and the bias that it points to.
    """
    row = [0] * forms.FIELDS
    stored: Any
    if isinstance(weight, NoMatrix):
        tiles, inputs, tile = 1, weight.in_features, weight.tile
        row[forms.FUNCTION] = forms.address(nothing)
    elif isinstance(weight, QuantizedRows):
        rows = weight.layout
        tiles, inputs, tile = 1, weight.out_features, rows.blocks * BLOCK
        stored = np.uint8 if rows.stored_bits == 4 else np.int8
        row[forms.FUNCTION] = forms.address(forms.chosen_code_rows, stored, BLOCK // rows.piece, bool(rows.zeros))
        row[forms.STRIDE], row[forms.MIDDLE] = rows.row_bytes, rows.middle
        row[forms.SCALES_AT], row[forms.ZEROS_AT] = rows.scales_at, rows.zeros_at
    elif not isinstance(weight, QuantizedWeight):
        # Of rows for outputs, the outputs take the place that inputs have in an input-major weight.
        tiles, inputs, tile = weight.buffer.shape if isinstance(weight, PackedWeight) else (1, *weight.buffer.shape)
        stored = np.uint16 if weight.buffer.dtype == torch.bfloat16 else np.float32
        make = {PackedRows: forms.chosen_rows, BundledUnits: forms.units}.get(type(weight), forms.floats)
        row[forms.FUNCTION] = forms.address(make, stored)
        row[forms.STRIDE] = tile * weight.buffer.element_size()
        if isinstance(weight, BundledUnits):
            tile, row[forms.OUTPUTS] = weight.down_at, blocks_of(weight.outputs)
    else:
        layout = weight.layout
        tiles, inputs, tile = layout.n_tiles, layout.in_features, layout.tile
        row[forms.FUNCTION] = _integers(layout, dots)
        row[forms.STRIDE], row[forms.MIDDLE] = layout.record_bytes, layout.middle
        row[forms.SCALES_AT], row[forms.ZEROS_AT], row[forms.GROUP] = layout.code_bytes, layout.zeros_at, layout.group
        if layout.by_input:
            assert weight.scale is not None
            row[forms.SCALES] = weight.scale.data_ptr()
            row[forms.ZEROS] = weight.zero.data_ptr() if weight.zero is not None else weight.scale.data_ptr()
    row[forms.ADDRESS] = weight.buffer.data_ptr()
    row[forms.TILES], row[forms.INPUTS], row[forms.TILE] = tiles, inputs, tile
    row[forms.OUT_AT], row[forms.FIRST_INPUT], row[forms.ALL_INPUTS] = (
        product.at,
        product.inputs.start,
        product.all_inputs,
    )
    row[forms.INPUTS_AT] = product.inputs_at
    bias = product.bias()
    if bias is not None:
        bias = F.pad(bias, (0, max(0, tiles * tile - len(bias)))).contiguous()
        row[forms.BIAS] = bias.data_ptr()
    return row, bias


def nothing() -> Any:
    """Make the product with no matrix: all outputs are 0."""

    def product(row, x, indices, values, count, out, memory):  # type: ignore[no-untyped-def]
        row = carray(row, (forms.FIELDS,))
        carray(out, (row[forms.TILES] * row[forms.TILE],))[:] = 0

    return product


def _integers(layout: Layout, dots: bool) -> int:
    """The address of the function that multiplies with integer weights."""
    stored = np.uint8 if layout.stored_bits == 4 else np.int8
    if layout.by_input:
        return forms.address(forms.groups, stored, bool(layout.zeros), dots)
    if dots:
        return forms.address(forms.records_fixed, stored, bool(layout.zeros))
    return forms.address(forms.records, stored, BLOCK // layout.piece, bool(layout.zeros))


def write_selections(matrices: Matrices, table: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """Write into the table how the products' layers select their inputs now.

    Args:
        matrices: the packed weights.
        table: int64 [products, FIELDS], written.
        places: of the layers.

    Returns:
        Thresholds float32 [products], and the selections.

    Raises:
        ValueError: layers that were packed as one matrix no longer agree.
    """
    thresholds = np.zeros(len(table), np.float32)
    selections: list[Selection | None] = [None if product is None else product.select for product in matrices.products]
    factored = [isinstance(weight, NoMatrix) for weight in matrices.weights]
    matrices.scores.clear()
    for number, (row, select) in enumerate(zip(table, selections)):
        row[forms.SELECT], row[forms.K], row[forms.SCORE] = steps.DENSE, 0, 0
        if factored[number]:
            row[forms.OF_ALL] = select is None
            if select is not None:
                thresholds[number] = _write_rest(row, select, matrices.scores)
            continue
        if select is None:
            continue
        row[forms.SELECT] = steps.THRESHOLD if isinstance(select, Threshold) else steps.TOP_K
        row[forms.K] = min(select.k, row[forms.ALL_INPUTS]) if isinstance(select, TopK) else 0
        if select.score is not None:
            matrices.scores.append(select.score.detach().float().contiguous().clone())
            row[forms.SCORE] = matrices.scores[-1].data_ptr()
        if isinstance(select, Threshold):
            thresholds[number] = float(select.threshold)
    for layer in range(places.shape[1]):
        for stage in range(steps.STAGES):
            ranges = [range(first, first + number) for first, number in places[:, layer, 2 * stage : 2 * stage + 2]]
            for own in ranges:
                for before, p in pairwise(own):
                    # a correction takes the memory of the selection, and factors turn theirs round
                    kept = table[before, forms.LOW_RANK] == 0 and not factored[p]
                    kept &= (table[before, SLICE] == table[p, SLICE]).all()
                    table[p, forms.SHARES_SELECTION] = kept and same_selection(selections[before], selections[p])
            kinds = [table[own.start, forms.SELECT] for own in ranges if own]
            for own in ranges:
                if not own and kinds:
                    table[own.start, forms.SELECT] = steps.TOP_K if kinds[0] == steps.TOP_K else steps.DENSE
    return thresholds, selections


def _write_rest(row: np.ndarray, select: Any, scores: list[Tensor]) -> float:
    """Write what a layer of two factors does not read, and return the threshold; the factors get the others.

    The step adds low-rank products of inputs that were not selected. So what is selected here is |x| * -score > -t,
    with the next number above the layer's own threshold as t: what it drops.
    """
    score = torch.ones(int(row[forms.ALL_INPUTS])) if select.score is None else select.score.detach().float()
    scores.append((-score).contiguous())
    row[forms.SELECT], row[forms.SCORE] = steps.THRESHOLD, scores[-1].data_ptr()
    return -float(np.nextafter(np.float32(float(select.threshold)), np.float32(np.inf)))


def gates(model: nn.Module, blocks: Sequence[Block]) -> np.ndarray:
    """What makes each block's gate sparse now, as `steps.StepPlan` holds it: float32 [layers, 2]."""
    found = np.zeros((len(blocks), 2), np.float32)
    for row, block in zip(found, blocks):
        gate = gate_of(model, block)
        assert block.mlp is not None
        if gate.k is not None:
            row[1] = torch.special.ndtri(torch.tensor(1 - gate.k / block.mlp.down.in_features, dtype=torch.float64))
        row[0] = gate.threshold or 0.0
    return found


def curves(model: nn.Module, blocks: Sequence[Block]) -> dict[str, np.ndarray]:
    """Learned activation functions as they are now, as `steps.StepPlan` holds them: `curves` and `widths`."""
    found = [curve_of(gate_of(model, block).base) for block in blocks]
    rows = np.zeros((len(blocks), max([1, *(len(curve.rows) for curve in found if curve)]), COEFFICIENTS), np.float32)
    widths = np.ones(len(blocks), np.int64)
    for layer, (curve, block) in enumerate(zip(found, blocks)):
        if curve is not None:
            assert block.mlp is not None
            rows[layer, : len(curve.rows)] = curve.rows.numpy()
            widths[layer] = block.mlp.down.in_features // len(curve.rows)
    return {"curves": rows, "widths": widths}


def looked_up(table: Any) -> tuple[Tensor, bool]:
    """Return what the step reads embeddings of: the table, or a row, which is filled when its token comes.

    A row it is for tables of other dtypes, which are widened row by row, and for stored codes.

    Args:
        table: nn.Embedding or QuantizedEmbedding.

    Returns:
        float32 or bfloat16 [entries or 1, hidden], and whether it is a row.
    """
    if isinstance(table, QuantizedEmbedding):
        kind, rowwise = table.storage.dtype, True
    else:
        weight = table.weight.detach()
        kind, rowwise = weight.dtype, weight.dtype not in (torch.bfloat16, torch.float32)
        if not (rowwise or weight.is_contiguous()) or weight.data_ptr() % weight.element_size():
            weight = weight.clone(memory_format=torch.contiguous_format)
    if not rowwise:
        return weight, False
    return torch.zeros(1, table.embedding_dim, dtype=kind if kind == torch.bfloat16 else torch.float32), True


def rotaries(model: nn.Module, blocks: Sequence[Block], form: Form, capacity: int) -> list[np.ndarray]:
    """Compute cosine and sine, in one table or two, the shortest first.

    A pass rotates by the first table that reaches its last token. LongRoPE has two: the frequencies of a whole pass
    change when it goes beyond the original context, and what is in the cache by then stays as it was rotated. Types of
    layers may have a table each. If some
    features of a head choose the keys, both of its parts turn as heads of their width, one after the other.

    Args:
        model: the model.
        blocks: its blocks.
        form: how they are put together.
        capacity: tokens.

    Returns:
        float32 [tables, 2, tokens, rotated size] each.
    """
    core: Any = model.get_submodule(model.base_model_prefix)  # type: ignore[arg-type]
    settings: Any = getattr(model.config, "rope_parameters", None) or {}
    if all(turn == steps.UNTURNED for turn in form.turns):
        return [np.zeros((1, 2, capacity, 0), np.float32)]
    lengths = [capacity]
    if settings.get("rope_type") == "longrope":
        lengths = sorted({min(capacity, settings["original_max_position_embeddings"]), capacity})
    choosing = choosing_features(blocks)
    found = []
    for length in lengths:
        of_kinds = []
        for kind in form.kinds or (None,):
            with torch.no_grad():
                given = (torch.zeros(1), torch.arange(length)[None], *(() if kind is None else (kind,)))
                cos, sin = core.rotary_emb(*given)
            of_kinds.append(form.table(torch.stack((cos[0], sin[0])).float()))
        both = torch.stack(of_kinds)
        if choosing:
            size = both.shape[-1]
            planes = [torch.arange(width // 2) * size // width for width in (choosing, size - choosing)]
            both = torch.cat([both[..., each].repeat(1, 1, 1, 2) for each in planes], -1)
        found.append(both.contiguous().numpy())
    return found


def positions(model: nn.Module, capacity: int) -> np.ndarray:
    """Return what is added to the embeddings by position: float32 [capacity, hidden], or [0, hidden].

    Args:
        model: the model.
        capacity: tokens.
    """
    config: Any = model.config
    core: Any = model.get_submodule(model.base_model_prefix)  # type: ignore[arg-type]
    learned = getattr(getattr(core, "decoder", None), "embed_positions", None)
    if learned is None:
        return np.empty((0, config.hidden_size), np.float32)
    if learned.weight.is_meta:
        raise UnsupportedModelError("its positions are learned, and still in the model's files")
    return learned.weight.detach()[learned.offset :][:capacity].float().numpy().copy()


def multiplier_of(embedding: Any) -> float:
    """Return what an embedding multiplies its rows by, as it rounds it; 1 for one that multiplies them itself.

    Args:
        embedding: of the model.

    Raises:
        UnsupportedModelError: it is of a class that may compute something else.
    """
    if isinstance(embedding, QuantizedEmbedding) or type(embedding) is nn.Embedding:
        return 1.0
    scale = getattr(embedding, "embed_scale", None)
    if not isinstance(embedding, nn.Embedding) or not isinstance(scale, Tensor):
        raise UnsupportedModelError(
            f"its embedding is a {type(embedding).__name__}, whose forward pass no decoder calls"
        )
    return float(scale.to(embedding.weight.dtype))


def choosing_features(blocks: Sequence[Block]) -> int:
    """Return how many features of a head choose its keys, 0 for ordinary attention.

    Args:
        blocks: of the model.

    Raises:
        UnsupportedModelError: blocks differ; they share one rotary table.
    """
    found = {getattr(block.attention.module, "r", 0) if block.attention else 0 for block in blocks}
    if len(found) > 1:
        raise UnsupportedModelError(
            f"its blocks choose keys by {', '.join(map(str, sorted(found)))} features of a head"
        )
    return int(found.pop())


def model_tables(
    model: nn.Module,
    blocks: Sequence[Block],
    form: Form,
    rotary: np.ndarray,
    capacity: int,
    threads: int,
    latents: list[Latent] | None = None,
) -> dict[str, Any]:
    """What a plan holds beside the products: norms, rotary embedding, sizes, multipliers."""
    config: Any = model.config
    attention, table = blocks[0].attention, model.get_input_embeddings()  # type: ignore[operator]
    if latents is not None:
        size, shared_by, module = latents[0].value, 1, latents[0].module
    else:
        assert attention is not None
        size, shared_by = attention.head_dim, attention.heads // attention.key_value_heads
        module = attention.module
    hidden, last = config.hidden_size, get_module(model, form.last)
    heads = head_norms_of(form, blocks)

    def gain(path: str | None) -> np.ndarray:
        weight: Any = None if path is None else getattr(get_module(model, path), "weight", None)
        if weight is None:
            return np.ones(hidden, np.float32)
        return (weight.detach().float() + form.offset).numpy()

    def shift(path: str | None) -> np.ndarray:
        bias: Any = None if path is None else getattr(get_module(model, path), "bias", None)
        return np.zeros(hidden, np.float32) if bias is None else bias.detach().float().numpy().copy()

    def stacked(pairs: Any, read: Any) -> np.ndarray:
        return np.stack([np.stack([read(path) for path in pair]) for pair in pairs])

    behind = form.behind if any(path is not None for path in form.behind[0]) else ()
    return {
        "gates": gates(model, blocks),
        **curves(model, blocks),
        "norms": stacked(form.before, gain),
        "biases": stacked(form.before, shift),
        "last_norm": gain(form.last),
        "last_bias": shift(form.last),
        "behind": stacked(behind, gain) if behind else np.empty((0, 2, hidden), np.float32),
        "before": form.before[0][0] is not None,
        "centered": is_centered(last),
        "beside": form.beside,
        "head_norms": _head_norms(model, heads, form.offset, size),
        "epsilon": np.float32(epsilon_of(last)),
        "rotary": rotary.copy(),
        "positions": positions(model, capacity),
        "hidden": hidden,
        "size": size,
        "shared_by": shared_by,
        "scaling": np.float32(getattr(module, "scaling", size**-0.5)),
        "limit": np.float32(form.limit),
        "cap": np.float32(form.bound(config, "cap")),
        "cut_from": 0 if attention is None or attention.key_value_heads % threads == 0 else max(CUT_FROM, threads),
        "embedding": np.float32(form.factor(config, "embedding") * multiplier_of(table)),
        "added": np.float32(form.factor(config, "residual")),
        "scaled": np.float32(form.factor(config, "logits") / form.factor(config, "over")),
        "capped": np.float32(form.bound(config, "capped")),
        **plan_of(model, latents, len(blocks)).fields(),
    }


def _head_norms(model: nn.Module, paths: Sequence[tuple[str, str]], offset: float, size: int) -> np.ndarray:
    """The weights of the norms of query and key, as `steps.StepPlan` holds them."""
    if not paths:
        return np.empty((0, 2, size), np.float32)
    norms: Any = [[get_module(model, path) for path in pair] for pair in paths]
    weights = [[norm.weight.detach().float() + offset for norm in pair] for pair in norms]
    width = max(len(weight) for pair in weights for weight in pair)
    return torch.stack([torch.stack([F.pad(x, (0, width - len(x))) for x in pair]) for pair in weights]).numpy()


def memory(
    plan: steps.StepPlan,
    threads: int,
    heads: int,
    key_value_heads: int,
    capacity: int,
    vocabulary: int,
    cache: str = "float32",
) -> tuple[steps.Work, list[forms.Memory]]:
    """Allocate the memory that the step works in, and the key-value cache.

    Args:
        plan: what is computed.
        threads: of the team.
        heads: of the query.
        key_value_heads: of the cache.
        capacity: tokens.
        vocabulary: words.
        cache: how keys and values are kept, of CACHES.

    Returns:
        The step's memory, and what each thread's products work in, whose addresses the first holds.
    """
    products, layers = plan.products, len(plan.norms)
    widths = products[:, forms.OUT_AT] + products[:, forms.TILES] * products[:, forms.TILE]
    widths = np.append(widths, blocks_of(plan.hidden))  # what bundled units add to
    width, hidden = line_padded(int(widths.max())), line_padded(plan.hidden)
    inputs = line_padded(int(max(products[:, forms.INPUTS].max(), plan.hidden)))
    held = 0 if plan.latent.any() else capacity  # latents are kept elsewhere
    kept = (layers, key_value_heads, held, plan.size * np.dtype(CACHES[cache]).itemsize)
    scales = (layers, key_value_heads, held if cache == "int8" else 0)
    readers = heads // key_value_heads
    memories = [forms.memory(int(products[:, forms.TILE].max())) for _ in range(threads)]
    work = steps.Work(
        embedded=aligned(plan.hidden, np.float32),
        residual=aligned((threads, hidden), np.float32),
        normed=aligned((threads, hidden), np.float32),
        indices=aligned((threads, inputs), np.int32),
        values=aligned((threads, inputs), np.float32),
        everything=np.arange(inputs, dtype=np.int32),
        stage=aligned((threads, width), np.float32),
        scores=aligned((threads, line_padded(readers * capacity)), np.float32),
        queries=aligned(heads * plan.size, np.float32),
        parts=aligned((threads, 2, line_padded(readers * plan.size)), np.float32),
        found=aligned((threads, 3, readers, 2), np.float32),
        partial=aligned((2, threads, width), np.float32),
        mixed=aligned(heads * plan.size, np.float32),
        hidden=aligned(
            int((plan.layers[:, :-1, steps.FIRST_UNIT] + plan.layers[:, :-1, steps.UNITS]).max()), np.float32
        ),
        keys=aligned(kept, np.uint8),
        cached=aligned(kept, np.uint8),
        key_scales=np.zeros(scales, np.float32),
        value_scales=np.zeros(scales, np.float32),
        functions=functions_of(CACHES[cache]),
        logits=aligned(vocabulary, np.float32),
        finite=aligned(threads, np.float32),
        counter=aligned(8, np.int64),
        read=np.zeros(len(products), np.int64),
        factor=aligned((threads, 2 * width), np.float32),
        moments=aligned((threads, 8), np.float64),
        polynomials=aligned((threads, 1, COEFFICIENTS), np.float32),
        cores=aligned((threads, 8), np.int64),
        allowed=np.array(sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [], np.int64),
        memory=np.stack([own.addresses for own in memories]),
        **latent_memory(LatentPlan.of(plan), layers, threads, heads, capacity, width, aligned).fields(),
    )
    return work, memories
