"""Decoder: a Llama-family model, one token after another on the CPU, in one compiled call per token.

    decoder = Decoder(model)
    for token in decoder.generate(prompt_ids, max_new_tokens=64): ...

The model's layers are packed once, each thread's share apart (`kernels.decode_step` says how it is shared); plain
layers and ActLinears (integer weights, inputs selected by threshold or top-k) decode alike. The prompt goes through
dense matrix products in chunks. A block is described by the kind of its attention and of its MLP, and each kind fills
its stages; others can be added beside `_attention` and `_gated_mlp`.

Exactness: everything but the stored weights is float32, the cache too. For bfloat16 weights, the prompt's products
round their inputs to bfloat16, as the processor's matrix units want it; the decoding step does not.
Cost: a second copy of the weights, packed, beside the model, whose embedding and config are used.
Left open by the design: attention that is not grouped-query, and MLPs without a gate, are refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.activations import name_of
from actkit.core.anatomy import anatomy
from actkit.core.architectures import find_architecture
from actkit.core.edits import get_module
from actkit.core.errors import DataError, MemoryLimitError, NonFiniteError, UnsupportedModelError
from actkit.core.generation import generate_ids
from actkit.core.linear import ActLinear, Selection, Threshold, TopK
from actkit.core.memory import format_bytes
from actkit.core.parts import Block, Linear
from actkit.core.runner import check_model
from actkit.kernels import decode_step as steps
from actkit.kernels.packing import PackedWeight, in_order
from actkit.kernels.process import LOCK, follow_torch_threads, most_threads
from actkit.kernels.quantized import BLOCK, PIECES, QuantizedWeight, outputs_of
from actkit.kernels.team import address, line_padded
from actkit.runtime.shards import Part, join, packed, part_of

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = {
    "silu": steps.SILU,
    "relu": steps.RELU,
    "gelu": steps.GELU,
    "gelu_tanh": steps.GELU_TANH,
    "relu2": steps.RELU2,
}
CHUNK = 512  # tokens of a prompt that go through a layer at once
FEW = 2  # new tokens up to which single steps are faster than a pass of dense products
ROWS = 8  # of x that one pass of an integer kernel serves


def supports(model: nn.Module) -> str | None:
    """Why a model cannot be decoded here, or None."""
    kind = getattr(getattr(model, "config", None), "model_type", "").removeprefix("actkit_")
    if kind not in FAMILY or find_architecture(kind) is None:
        return f"its model_type is {kind!r}; the decoder takes {', '.join(FAMILY)}"
    if not hasattr(model, "lm_head"):
        return "it has no output layer; load the model with its language-model head"
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return "it is not on the CPU"
    try:
        for block in anatomy(model).blocks:
            _check_block(model, block)
    except UnsupportedModelError as error:
        return str(error)
    return None


def _check_block(model: nn.Module, block: Block) -> None:
    attention, mlp = block.attention, block.mlp
    if attention is None or attention.query is None or attention.key is None or attention.value is None:
        raise UnsupportedModelError(f"{block.path}: its attention has no query, key and value layers of their own")
    if mlp is None or mlp.gate is None:
        raise UnsupportedModelError(f"{block.path}: its MLP has no gate")
    if name_of(get_module(model, mlp.activation)) not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{mlp.activation}: a {type(get_module(model, mlp.activation)).__name__}; the decoder computes "
            f"{', '.join(ACTIVATIONS)}"
        )
    for linear in block.linears():
        if isinstance(linear.module, ActLinear) and linear.module.correction is not None:
            raise UnsupportedModelError(f"{linear.path}: it has a low-rank correction")


# -- what a layer is made of -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """Parts of layers that read the same inputs with the same selection. at: where each part's outputs begin."""

    linears: tuple[nn.Module, ...]
    part: Part
    bias: Tensor | None
    at: int
    select: Selection | None
    inputs: range


def _selection(module: nn.Module) -> Selection | None:
    return module.select if isinstance(module, ActLinear) else None


def _equal(a: Selection | None, b: Selection | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.spec() != b.spec():
        return False
    if (a.score is None) != (b.score is None) or (a.score is not None and not torch.equal(a.score, b.score)):  # type: ignore[arg-type]
        return False
    return not isinstance(a, Threshold) or torch.equal(a.threshold, b.threshold)  # type: ignore[union-attr, arg-type]


def _columns(layers: Sequence[tuple[Linear, range]]) -> tuple[list[_Product], list[int]]:
    """Some outputs of layers that share an input, as few products as possible, and where each layer's begin."""
    products: list[_Product] = []
    places: list[int] = []
    at = 0
    runs: list[list[tuple[Linear, range]]] = []
    for linear, outputs in layers:
        alike = runs and _equal(_selection(runs[-1][0][0].module), _selection(linear.module))
        if alike:
            runs[-1].append((linear, outputs))
        else:
            runs.append([(linear, outputs)])
    for run in runs:
        parts = [part_of(linear.module, outputs=outputs) for linear, outputs in run]
        biases = [_bias(linear.module, outputs) for linear, outputs in run]
        offset = 0
        for part in join(parts):
            covered: list[Part] = []
            while sum(p.outputs for p in covered) < part.outputs:
                covered.append(parts[len(covered) + offset])
            start = at
            for k in range(offset, offset + len(covered)):
                places.append(at)
                at += parts[k].outputs
            some = biases[offset : offset + len(covered)]
            bias = None
            if any(b is not None for b in some):
                bias = torch.cat([torch.zeros(p.outputs) if b is None else b for p, b in zip(covered, some)])
            first = run[offset][0].module
            products.append(
                _Product(
                    tuple(linear.module for linear, _ in run[offset : offset + len(covered)]),
                    part,
                    bias,
                    start,
                    _selection(first),
                    range(run[offset][0].in_features),
                )
            )
            at = start + -(-part.outputs // BLOCK) * BLOCK + BLOCK  # a product writes whole tiles
            offset += len(covered)
    return products, places


def _bias(module: nn.Module, outputs: range) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach().float()[outputs.start : outputs.stop]


def _rows(linear: Linear, inputs: range, first: bool) -> _Product:
    """Some inputs of a layer; the bias belongs to the first thread's share."""
    module = linear.module
    bias = _bias(module, range(linear.out_features)) if first else None
    return _Product((module,), part_of(module, inputs=inputs), bias, 0, _selection(module), inputs)


def _share(total: int, index: int, count: int, unit: int = 1) -> range:
    """The part of `total` that belongs to one of `count` threads, in whole units."""
    units = -(-total // unit)
    return range(min(total, units * index // count * unit), min(total, units * (index + 1) // count * unit))


@dataclass
class _Layer:
    """One thread's part of a block: the products of each stage, and where to find what in their outputs."""

    stages: dict[int, list[_Product]] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)


def _attention(layer: _Layer, block: Block, thread: int, threads: int, window: int) -> None:
    """Grouped-query attention: whole key-value heads with their readers."""
    attention = block.attention
    assert attention is not None and attention.query and attention.key and attention.value
    own, size = _share(attention.key_value_heads, thread, threads), attention.head_dim
    readers = attention.heads // attention.key_value_heads
    queries = range(own.start * readers * size, own.stop * readers * size)
    keys = range(own.start * size, own.stop * size)
    products: list[_Product] = []
    places = [0, 0, 0]
    if own:
        products, places = _columns([(attention.query, queries), (attention.key, keys), (attention.value, keys)])
    layer.stages[steps.QKV] = products
    layer.stages[steps.OUTPUT] = [_rows(attention.output, queries, thread == 0)] if own else []
    layer.places |= dict(zip((steps.QUERY_AT, steps.KEY_AT, steps.VALUE_AT), places))
    layer.places |= {steps.FIRST_HEAD: own.start, steps.HEADS: len(own), steps.WINDOW: window}


def _gated_mlp(layer: _Layer, block: Block, thread: int, threads: int, activation: int) -> None:
    """A gated MLP: whole units, in multiples that cut no group of the weights where that can be."""
    mlp = block.mlp
    assert mlp is not None and mlp.gate is not None
    units = mlp.down.in_features
    unit = BLOCK if units >= 4 * threads * BLOCK else PIECES[0]
    own = _share(units, thread, threads, unit)
    products: list[_Product] = []
    places = [0, 0]
    if own:
        products, places = _columns([(mlp.gate, own), (mlp.up, own)])
    layer.stages[steps.GATE_UP] = products
    layer.stages[steps.DOWN] = [_rows(mlp.down, own, thread == 0)] if own else []
    layer.places |= dict(zip((steps.GATE_AT, steps.UP_AT), places))
    layer.places |= {steps.UNITS: len(own), steps.FIRST_UNIT: own.start, steps.ACTIVATION: activation}


# -- the decoder -------------------------------------------------------------------------------------------------------


class Decoder:
    """Decodes a model of the Llama family on the CPU.

    model: llama, mistral, qwen2 or qwen3 of transformers, with nn.Linear or ActLinear layers. capacity: tokens that the
    cache holds; the model's context, at most 4096, where None. threads: torch's number where None.

    Raises UnsupportedModelError for another model, MemoryLimitError before anything is allocated where weights and
    cache do not fit into free memory, ValueError for settings out of bounds. A decoder is used by one thread at a time;
    several decoders take turns.
    """

    def __init__(self, model: nn.Module, *, capacity: int | None = None, threads: int | None = None) -> None:
        reason = supports(model)
        if reason is not None:
            raise UnsupportedModelError(f"model: {type(model).__name__} cannot be decoded here: {reason}.")
        check_model(model)
        config: Any = model.config
        context = config.max_position_embeddings
        self.capacity = min(context, 4096) if capacity is None else capacity
        if not 1 <= self.capacity <= context:
            raise ValueError(f"capacity: {capacity} was given; give 1 to {context}, the model's context.")
        self.threads = min(torch.get_num_threads(), most_threads()) if threads is None else threads
        if not 1 <= self.threads <= most_threads():
            raise ValueError(f"threads: {threads} was given; give 1 to {most_threads()}, which can run side by side.")
        self.model, self.position = model, 0
        blocks = list(anatomy(model).blocks)
        first = blocks[0].attention
        assert first is not None
        self.size, self.hidden = first.head_dim, config.hidden_size
        self.heads, self.key_value_heads = first.heads, first.key_value_heads
        self._check_memory(model, len(blocks))
        self.embedding = model.get_input_embeddings().weight.detach()  # type: ignore[operator, union-attr]
        self._keep: list[Any] = []
        self._layers = [
            [self._layer(model, block, thread, index) for thread in range(self.threads)]
            for index, block in enumerate(blocks)
        ]
        self._head = [self._output(model, thread) for thread in range(self.threads)]
        self._build(model, blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(weight.nbytes for weight in self._packed)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key-value cache."""
        return self._work.keys.nbytes + self._work.cached.nbytes

    @property
    def density(self) -> float | None:
        """Share of the weight bytes of selecting layers that was read by single steps since the last reset."""
        read, of = self._work.read.sum(0)
        return float(read / of) if of else None

    def reset(self) -> None:
        """Forget all tokens."""
        self.position = 0
        self._work.read[:] = 0

    def __call__(self, new: Sequence[int]) -> Tensor:
        """Logits of the token after some more tokens: float32 [vocabulary].

        Raises DataError where the cache is full or a token is not in the vocabulary, NonFiniteError for logits that
        are NaN or Inf.
        """
        tokens = [int(token) for token in new]
        if not tokens:
            raise DataError("new: no token was given; give at least one.")
        if self.position + len(tokens) > self.capacity:
            raise DataError(
                f"capacity: the cache holds {self.capacity} tokens and {self.position} are in it, {len(tokens)} more "
                f"were given; build the decoder with a larger capacity, or reset() it."
            )
        if not 0 <= min(tokens) <= max(tokens) < len(self.embedding):
            raise DataError(f"new: token {max(tokens)} of {min(tokens)} to {max(tokens)}; the model embeds 0 to "
                            f"{len(self.embedding) - 1}.")  # fmt: skip
        if len(tokens) <= FEW:
            for token in tokens:
                self._step(token)
        else:
            for start in range(0, len(tokens), CHUNK):
                self._chunk(tokens[start : start + CHUNK])
        logits = self._logits()
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                f"logits: NaN or Inf after token {self.position}; check the weights and scales of the model."
            )
        return logits

    def generate(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        end: Collection[int] | None = None,
    ) -> Iterator[int]:
        """The tokens that follow a prompt, one by one, from an empty cache; as `core.generation.generate_ids`.

        Raises DataError before the first token where prompt and new tokens exceed the cache.
        """
        length = torch.as_tensor(input_ids).numel()
        if length + max_new_tokens > self.capacity:
            raise DataError(
                f"max_new_tokens: {max_new_tokens} after a prompt of {length} tokens exceed the cache of "
                f"{self.capacity}; ask for fewer, or build the decoder with a larger capacity."
            )
        return generate_ids(
            self.model,
            input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            end=end,
            decoder=self,
        )

    # -- building

    def _check_memory(self, model: nn.Module, layers: int) -> None:
        weights = sum(parameter.nbytes for parameter in model.parameters())
        weights += sum(buffer.nbytes for buffer in model.buffers())
        cache = 2 * layers * self.key_value_heads * self.capacity * self.size * 4
        free = psutil.virtual_memory().available
        if weights + cache > free:
            raise MemoryLimitError(
                f"capacity: packed weights ({format_bytes(weights)}) and a cache of {self.capacity} tokens "
                f"({format_bytes(cache)}) do not fit into the {format_bytes(free)} that are free; give a smaller "
                f"capacity."
            )

    def _layer(self, model: nn.Module, block: Block, thread: int, index: int) -> _Layer:
        layer = _Layer()
        kinds = getattr(model.config, "layer_types", None)
        slides = kinds is None or kinds[index] == "sliding_attention"
        window = (getattr(model.config, "sliding_window", None) or 0) if slides else 0
        if getattr(model.config, "use_sliding_window", True) is False:
            window = 0
        _attention(layer, block, thread, self.threads, window)
        assert block.mlp is not None
        activation = ACTIVATIONS[str(name_of(get_module(model, block.mlp.activation)))]
        _gated_mlp(layer, block, thread, self.threads, activation)
        return layer

    def _output(self, model: nn.Module, thread: int) -> _Layer:
        module: Any = model.lm_head
        outputs = module.out_features
        own = _share(outputs, thread, self.threads, PIECES[0])
        layer = _Layer()
        layer.stages[steps.HEAD] = _columns([(Linear("lm_head", "layer", module), own)])[0] if own else []
        return layer

    def _build(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        parts = [
            p.part for layer in (*self._layers, self._head) for own in layer for s in own.stages.values() for p in s
        ]
        by_output = [part for part in parts if part.axis == "output"]
        by_input = [part for part in parts if part.axis == "input"]
        piece = min((part.group for part in by_output), default=PIECES[-1])
        zeros = {
            "output": any(part.zero is not None for part in by_output),
            "input": any(part.zero is not None for part in by_input),
        }
        self._packed: list[PackedWeight | QuantizedWeight] = []
        self._selections: list[Selection | None] = []
        rows: list[list[int]] = []
        thresholds: list[float] = []
        layers = np.zeros((self.threads, len(blocks) + 1, steps.LAYER_FIELDS), np.int64)
        for index, layer in enumerate((*self._layers, self._head)):
            for thread, own in enumerate(layer):
                for stage, products in own.stages.items():
                    layers[thread, index, 2 * stage : 2 * stage + 2] = len(rows), len(products)
                    before: Selection | None = None
                    for number, product in enumerate(products):
                        weight = packed(product.part, piece, zeros.get(product.part.axis, False))
                        row = self._row(weight, product)
                        row[steps.SHARES_SELECTION] = int(number > 0 and _equal(before, product.select))
                        before = product.select
                        self._packed.append(weight)
                        self._selections.append(product.select)
                        rows.append(row)
                        is_threshold = isinstance(product.select, Threshold)
                        thresholds.append(float(product.select.threshold) if is_threshold else 0.0)  # type: ignore[union-attr, arg-type]
                    if not products:  # what other threads select still says whether there is a meeting
                        row = [0] * steps.FIELDS
                        others = [o.stages[stage][0].select for o in layer if o.stages[stage]]
                        row[steps.SELECT] = steps.TOP_K if isinstance(others[0], TopK) else steps.DENSE
                        rows.append(row)
                        self._packed.append(PackedWeight(torch.empty(0, 0, 0), 0))
                        self._selections.append(None)
                        thresholds.append(0.0)
                for place, value in own.places.items():
                    layers[thread, index, place] = value
        for own in (part for layer in (*self._layers, self._head) for part in layer):
            own.stages = {}  # the unpacked weights are not needed any more
        table = np.array(rows, np.int64)
        self._plan = self._tables(model, blocks, layers, table, np.array(thresholds, np.float32))
        self._formats = _formats(table, piece, zeros)
        self._work = self._memory(len(blocks), table)

    def _row(self, weight: PackedWeight | QuantizedWeight, product: _Product) -> list[int]:
        row = [0] * steps.FIELDS
        if isinstance(weight, PackedWeight):
            tiles, inputs, tile = weight.buffer.shape
            row[steps.KIND] = steps.BFLOAT16 if weight.dtype == torch.bfloat16 else steps.FLOAT32
            row[steps.STRIDE] = tile * weight.buffer.element_size()
        else:
            layout = weight.layout
            tiles, inputs, tile = layout.n_tiles, layout.in_features, layout.tile
            kinds = (
                (steps.INT4_GROUPS, steps.INT8_GROUPS) if layout.by_input else (steps.INT4_RECORDS, steps.INT8_RECORDS)
            )
            row[steps.KIND] = kinds[layout.stored_bits == 8]
            row[steps.STRIDE], row[steps.MIDDLE] = layout.record_bytes, layout.middle
            row[steps.SCALES_AT], row[steps.ZEROS_AT], row[steps.GROUP] = (
                layout.code_bytes,
                layout.zeros_at,
                layout.group,
            )
            if layout.by_input:
                assert weight.scale is not None
                row[steps.SCALES] = weight.scale.data_ptr()
                row[steps.ZEROS] = weight.zero.data_ptr() if weight.zero is not None else weight.scale.data_ptr()
        row[steps.ADDRESS] = weight.buffer.data_ptr()
        row[steps.TILES], row[steps.INPUTS], row[steps.TILE] = tiles, inputs, tile
        row[steps.OUT_AT] = product.at
        if product.bias is not None:
            row[steps.BIAS] = self._kept(F.pad(product.bias, (0, tiles * tile - len(product.bias))))
        select = product.select
        row[steps.FIRST_INPUT], row[steps.ALL_INPUTS] = product.inputs.start, int(product.linears[0].in_features)  # type: ignore[arg-type]
        if select is not None:
            row[steps.SELECT] = steps.THRESHOLD if isinstance(select, Threshold) else steps.TOP_K
            row[steps.K] = min(select.k, row[steps.ALL_INPUTS]) if isinstance(select, TopK) else 0
            row[steps.SCORE] = 0 if select.score is None else self._kept(select.score)
        return row

    def _kept(self, tensor: Tensor) -> int:
        """The address of a float32 copy that lives as long as the decoder."""
        array = tensor.detach().float().contiguous().numpy().copy()
        self._keep.append(array)
        return address(array)

    def _tables(
        self, model: nn.Module, blocks: Sequence[Block], layers: np.ndarray, products: np.ndarray, cuts: np.ndarray
    ) -> steps.Plan:
        core: Any = model.get_submodule(model.base_model_prefix)  # type: ignore[arg-type]
        config: Any = model.config

        def weights(modules: Sequence[Any]) -> Tensor:
            return torch.stack([module.weight.detach().float() for module in modules])

        both = [core.layers[b.index] for b in blocks]
        norms = torch.stack([weights([b.input_layernorm, b.post_attention_layernorm]) for b in both])
        inner = [b.self_attn for b in both]
        head_norms = torch.empty(0, 2, self.size)
        if hasattr(inner[0], "q_norm"):
            head_norms = torch.stack([weights([a.q_norm, a.k_norm]) for a in inner])
        with torch.no_grad():
            cos, sin = core.rotary_emb(torch.zeros(1), torch.arange(self.capacity)[None])
        if config.rope_parameters.get("rope_type") == "dynamic":
            longest = core.rotary_emb.original_max_seq_len
            if self.capacity > longest:
                raise ValueError(
                    f"capacity: {self.capacity} was given; dynamic rotary scaling changes with the length beyond "
                    f"{longest} tokens, give at most that."
                )
        scaling = np.float32(getattr(inner[0], "scaling", self.size**-0.5))
        return steps.Plan(
            layers,
            products,
            cuts,
            norms.numpy(),
            core.norm.weight.detach().float().numpy().copy(),
            head_norms.numpy(),
            np.float32(config.rms_norm_eps),
            torch.stack((cos[0], sin[0])).float().contiguous().numpy(),
            self.hidden,
            self.size,
            self.heads // self.key_value_heads,
            scaling,
        )

    def _memory(self, layers: int, products: np.ndarray) -> steps.Work:
        widths = products[:, steps.OUT_AT] + products[:, steps.TILES] * products[:, steps.TILE]
        width = line_padded(int(widths.max()))
        inputs = line_padded(int(max(products[:, steps.INPUTS].max(), self.hidden)))
        threads, hidden = self.threads, line_padded(self.hidden)
        cache = (layers, self.key_value_heads, self.capacity, self.size)
        units = int(products[:, steps.ALL_INPUTS].max())
        return steps.Work(
            residual=np.zeros((threads, hidden), np.float32),
            normed=np.zeros((threads, hidden), np.float32),
            indices=np.zeros((threads, inputs), np.int32),
            values=np.zeros((threads, inputs), np.float32),
            everything=np.arange(inputs, dtype=np.int32),
            stage=np.zeros((threads, width), np.float32),
            scores=np.zeros((threads, line_padded(self.capacity)), np.float32),
            sums=np.zeros((threads, line_padded(max(int(products[:, steps.TILE].max()), ROWS * 6144))), np.float32),
            partial=np.zeros((2, threads, width), np.float32),
            mixed=np.zeros(self.heads * self.size, np.float32),
            hidden=np.zeros(units, np.float32),
            keys=np.zeros(cache, np.float32),
            cached=np.zeros(cache, np.float32),
            logits=np.zeros((threads, width), np.float32),
            counter=np.zeros(1, np.int64),
            read=np.zeros((threads, 2), np.float64),
        )

    # -- running

    def _step(self, token: int) -> None:
        work = self._work
        work.residual[:, : self.hidden] = self.embedding[token].float().numpy()
        work.counter[0] = 0
        with LOCK:
            self._follow_threads()
            came = steps.step(self.threads, self.position, self._plan, work, self._formats)
        if not came:
            raise RuntimeError(
                f"threads: {self.threads} threads of the decoder did not run side by side; build it with fewer."
            )
        self.position += 1

    def _follow_threads(self) -> None:
        before = torch.get_num_threads()
        if before == self.threads:
            follow_torch_threads(1 << 30)
            return
        torch.set_num_threads(self.threads)
        try:
            follow_torch_threads(1 << 30)
        finally:
            torch.set_num_threads(before)

    def _logits(self) -> Tensor:
        """float32 [vocabulary] of the last token."""
        place = self._plan.layers[:, -1, 2 * steps.HEAD : 2 * steps.HEAD + 2]
        found = [
            torch.from_numpy(self._work.logits[thread, : self._packed[first].out_features])
            for thread, (first, number) in enumerate(place)
            if number
        ]
        return torch.cat(found)

    # -- the prompt

    def _chunk(self, tokens: list[int]) -> None:
        """Some tokens through all layers at once: dense products, every token's inputs selected."""
        plan, work, n = self._plan, self._work, len(tokens)
        x = self.embedding[torch.tensor(tokens)].float()  # [tokens, hidden]
        begin, end = self.position, self.position + n
        cos, sin = (torch.from_numpy(table[begin:end]) for table in plan.rotary)
        ahead = torch.arange(end)[None, :] - torch.arange(begin, end)[:, None]  # [tokens, all]: 0 is itself
        for layer in range(len(plan.norms)):
            places = plan.layers[:, layer]
            normed = self._norm(x, plan.norms[layer, 0])
            stages = self._products(layer, steps.QKV, [normed] * self.threads)
            window = int(places[0, steps.WINDOW])
            mask = (ahead <= 0) & (ahead > -window) if window else ahead <= 0
            mixed = []
            for thread, out in enumerate(stages):
                heads, first = int(places[thread, steps.HEADS]), int(places[thread, steps.FIRST_HEAD])
                if not heads:
                    mixed.append(x.new_zeros(n, 0))
                    continue
                readers = heads * plan.shared_by
                query = self._heads(out, int(places[thread, steps.QUERY_AT]), readers, layer, 0, cos, sin)
                key = self._heads(out, int(places[thread, steps.KEY_AT]), heads, layer, 1, cos, sin)
                value = self._heads(out, int(places[thread, steps.VALUE_AT]), heads, layer, None, cos, sin)
                keys = torch.from_numpy(work.keys[layer, first : first + heads, :end])
                values = torch.from_numpy(work.cached[layer, first : first + heads, :end])
                keys[:, begin:], values[:, begin:] = key, value
                out = F.scaled_dot_product_attention(
                    query[None],
                    keys[None],
                    values[None],
                    attn_mask=mask,
                    scale=float(plan.scaling),
                    enable_gqa=True,
                )[0]
                mixed.append(out.transpose(0, 1).reshape(n, -1))
            x = x + self._summed(layer, steps.OUTPUT, mixed)
            normed = self._norm(x, plan.norms[layer, 1])
            hidden = []
            for thread, out in enumerate(self._products(layer, steps.GATE_UP, [normed] * self.threads)):
                units = int(places[thread, steps.UNITS])
                gate, up = (out[:, int(places[thread, at]) :][:, :units] for at in (steps.GATE_AT, steps.UP_AT))
                hidden.append(_activate(int(places[thread, steps.ACTIVATION]), gate) * up)
            x = x + self._summed(layer, steps.DOWN, hidden)
        last = self._norm(x[-1:], plan.last_norm)
        for thread, out in enumerate(self._products(len(plan.norms), steps.HEAD, [last] * self.threads)):
            work.logits[thread, : out.shape[1]] = out[0].numpy()
        self.position = end

    def _norm(self, x: Tensor, weight: np.ndarray) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], torch.from_numpy(weight), float(self._plan.epsilon))

    def _heads(
        self, out: Tensor, at: int, heads: int, layer: int, norm: int | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """[tokens, ...] to [heads, tokens, size]; where norm (0 query, 1 key) is given, normed and rotated."""
        found = out[:, at : at + heads * self.size].unflatten(1, (heads, self.size)).transpose(0, 1)
        if norm is None:
            return found
        if len(self._plan.head_norms):
            found = self._norm(found, self._plan.head_norms[layer, norm])
        half = self.size // 2
        turned = torch.cat((-found[..., half:], found[..., :half]), -1)
        return found * cos + turned * sin

    def _summed(self, layer: int, stage: int, inputs: list[Tensor]) -> Tensor:
        outs = self._products(layer, stage, inputs)
        return sum((out[:, : self.hidden] for out in outs if out.shape[1]), torch.zeros(1))

    def _products(self, layer: int, stage: int, inputs: list[Tensor]) -> list[Tensor]:
        """Each thread's products of a stage: inputs [tokens, own inputs] to float32 [tokens, width]."""
        ranges = self._plan.layers[:, layer, 2 * stage : 2 * stage + 2]
        whole = torch.cat(inputs, 1) if stage in (steps.OUTPUT, steps.DOWN) else inputs[0]
        outs = []
        for thread, (first, number) in enumerate(ranges.tolist()):
            if not number:
                outs.append(inputs[thread].new_zeros(len(whole), 0))
                continue
            pieces: list[Tensor] = []
            at = 0
            for p in range(first, first + number):
                row = self._plan.products[p]
                begin = int(row[steps.FIRST_INPUT])
                select = self._selections[p]
                x = whole if select is None else select(whole)
                x = x[:, begin : begin + int(row[steps.INPUTS])]
                pieces.append(x.new_zeros(len(x), int(row[steps.OUT_AT]) - at))
                pieces.append(self._dense(p, x))
                at = int(row[steps.OUT_AT]) + pieces[-1].shape[1]
            outs.append(torch.cat(pieces, 1))
        return outs

    def _dense(self, p: int, x: Tensor) -> Tensor:
        """One packed matrix times [tokens, in], the bias added: float32 [tokens, out]."""
        weight, row = self._packed[p], self._plan.products[p]
        if isinstance(weight, PackedWeight):
            given = x.to(weight.dtype)
            tiles = [in_order_columns(given @ tile, weight.dtype).float() for tile in weight.buffer]
            y = torch.cat(tiles, 1)[:, : weight.out_features]
        else:
            y = outputs_of(self._integer(weight, x), weight.layout)
        if row[steps.BIAS]:
            y = y + next(torch.from_numpy(a) for a in self._keep if address(a) == row[steps.BIAS])[: y.shape[1]]
        return y

    def _integer(self, weight: QuantizedWeight, x: Tensor) -> Tensor:
        """In passes of ROWS tokens, each of which reads the weight once."""
        from actkit.kernels.numba_quantized import quantized_dense_linear

        rows = [
            quantized_dense_linear(some.contiguous(), weight.buffer, weight.scale, weight.zero, weight.layout)
            for some in x.split(ROWS)
        ]
        return torch.cat(rows)


def in_order_columns(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of a product with a packed tile in the order of the outputs."""
    return in_order(y) if dtype == torch.bfloat16 else y


def _activate(code: int, x: Tensor) -> Tensor:
    if code == steps.SILU:
        return F.silu(x)
    if code == steps.RELU:
        return F.relu(x)
    if code == steps.RELU2:
        return F.relu(x).square()
    return F.gelu(x, approximate="none" if code == steps.GELU else "tanh")


def _formats(products: np.ndarray, piece: int, zeros: dict[str, bool]) -> steps.Formats:
    kinds = set(products[products[:, steps.TILES] > 0][:, steps.KIND].tolist())
    pieces = (0,) * (BLOCK // piece)
    records = kinds & {steps.INT8_RECORDS, steps.INT4_RECORDS}
    groups = kinds & {steps.INT8_GROUPS, steps.INT4_GROUPS}
    return steps.Formats(
        float32=(0,) if steps.FLOAT32 in kinds else None,
        bfloat16=(0,) if steps.BFLOAT16 in kinds else None,
        int8_records=pieces if steps.INT8_RECORDS in kinds else None,
        int4_records=pieces if steps.INT4_RECORDS in kinds else None,
        int8_groups=(0,) if steps.INT8_GROUPS in kinds else None,
        int4_groups=(0,) if steps.INT4_GROUPS in kinds else None,
        records_stored=(0,) * zeros["output"] if records else (),
        groups_stored=(0,) * zeros["input"] if groups else (),
    )
