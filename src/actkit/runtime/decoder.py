"""Decoder: a model of Llama's kin, one token after another on the CPU, in one compiled call per token.

    decoder = Decoder(model)
    for token in decoder.generate(prompt_ids, max_new_tokens=64): ...

The model's layers are packed once, each thread's share apart (`kernels.decode_step` says how it is shared); plain
layers and ActLinears (integer weights, inputs selected by threshold or top-k) decode alike. A prompt goes through
dense matrix products in chunks, or step by step if it has up to `few` tokens, a number that the model's shapes and
formats give (`runtime.prompt`). `runtime.blocks` says what a block is made of.

Exactness: everything but the stored weights is float32, with three exceptions. Integer weights meet activations that
are rounded to 16 bits, relative to the largest of 128, and in a prompt to 8 bits, relative to the largest of a group
(unless `activations` says 'float32'). For bfloat16 models the prompt's products and attention round to bfloat16; the
decoding step does not. And the cache is in bfloat16 or in codes of 8 bits if `cache` says so.
Cost: a second copy of the weights, packed, beside the model, whose embedding and config are used; with `decode_only`
the model gives up its own.
Left open by the design: norms of query and key that subtract the mean, norms behind the residual sum, experts and
convolutions are refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from actkit.core.edit.edits import get_module
from actkit.core.forward.hooks import refuse_compiled_or_sharded
from actkit.core.forward.named_functions import unknown_function
from actkit.core.ground.errors import DataError, MemoryLimitError, NonFiniteError, UnsupportedModelError
from actkit.core.ground.memory import format_bytes, release_memory
from actkit.core.ground.offload import refuse_offloaded
from actkit.core.layers.attention_rounding import AttentionRounding
from actkit.core.layers.cache_rounding import CHILD, IMPLEMENTATION, RoundedAttention
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.linear import ActLinear
from actkit.core.measure.generation import generate_ids
from actkit.core.measure.sampling import LIKELIEST, Sampling
from actkit.core.model.anatomy import anatomy, paths_of_end
from actkit.core.model.architectures import find_architecture
from actkit.core.model.parts import Block, attention_implementation
from actkit.core.store.pending import pending_of
from actkit.kernels import decode_products as forms
from actkit.kernels import decode_step as steps
from actkit.kernels.numba_cpu import array
from actkit.kernels.process import LOCK, follow_torch_threads, most_threads
from actkit.kernels.team import release
from actkit.runtime import blocks as parts
from actkit.runtime import packed, tables
from actkit.runtime.families import FAMILIES, Form, form_of, model_type
from actkit.runtime.latent import latent_attention, latent_of, latents_of, refuse
from actkit.runtime.prompt import few_tokens, read_prompt

if TYPE_CHECKING:
    from actkit.runtime.batch import Batch

CHUNK = 512  # tokens of a prompt that go through a layer at once
EVERY_KERNEL = 1 << 30  # bytes, of which kernels use all threads
# What a decoder drops when it is closed.
HELD = (
    "model",
    "embedding",
    "_embedding",
    "_table",
    "_matrices",
    "_plan",
    "_work",
    "_memories",
    "_rotaries",
    "_turned",
    "_selections",
)


def supports(model: nn.Module) -> str | None:
    """Why a model cannot be decoded here, or None."""
    if isinstance(model, packed.PackedModel):
        return None
    kind = model_type(model)
    if kind not in FAMILIES or find_architecture(kind) is None:
        return f"its model_type is {kind!r}; docs/architectures.md lists what the decoder takes"
    if not hasattr(model, "lm_head"):
        return "it has no output layer; load the model with its language-model head"
    function = unknown_function(model, known=(RoundedAttention,))
    if function is not None:
        return function
    allowed = ("cpu",) if pending_of(model) is None else ("cpu", "meta")
    if any(parameter.device.type not in allowed for parameter in model.parameters()):
        return "it is not on the CPU"
    try:
        blocks = _blocks(model)
        for block in blocks:
            latent = latent_of(model, block)
            parts.check(model, block, latent is not None)
            if latent is not None:
                refuse(latent)
        latents_of(model, blocks)
        parts.refuse_rounded_inputs("lm_head", get_module(model, "lm_head"))
        if getattr(model.get_input_embeddings(), "rotation", None) is not None:  # type: ignore[operator]
            return "its embedding is rotated, which the decoder does not"
        form_of(model, blocks)
        tables.multiplier_of(model.get_input_embeddings())  # type: ignore[operator]
        tables.positions(model, 0)
        coded = codes_of_cache(model, blocks)
        if tables.choosing_features(blocks) and coded:
            return "its blocks choose keys by some features of a head, which are not kept as codes"
    except UnsupportedModelError as error:
        return str(error)
    return None


def codes_of_cache(model: nn.Module, blocks: Sequence[Block]) -> bool:
    """Say whether keys and values are kept as 8-bit codes: the model rounds them so (`quantize_cache`).

    Args:
        model: what is decoded.
        blocks: its blocks.

    Raises:
        UnsupportedModelError: it rounds them in another way, or in some blocks only.
    """
    if attention_implementation(model) != IMPLEMENTATION:
        return False
    if any(isinstance(module, AttentionRounding) for module in model.modules()):
        raise UnsupportedModelError("its attention rounds what it multiplies, which is computed by transformers alone")
    children = [getattr(block.attention.module, CHILD, None) for block in blocks if block.attention]
    if any(getattr(child, "static", False) for child in children):
        raise UnsupportedModelError("its keys and values are rounded to fp8, and codes of 8 bits are what is kept")
    found = {getattr(child, "bits", None) for child in children}
    if found == {None}:
        return False  # a rotation of queries and keys alone cancels in their products
    if any(getattr(child, "rotation", None) is not None for child in children):
        raise UnsupportedModelError("its queries and keys are rotated before they are rounded, as the decoder does not")
    if found != {8}:
        said = ", ".join(f"{bits} bits" if bits else "not at all" for bits in sorted(found, key=str))
        raise UnsupportedModelError(f"its keys and values are rounded to {said}, and codes of 8 bits are what is kept")
    return True


class Decoder:
    """Decodes a model of the Llama family on the CPU.

    A decoder is used by one thread at a time; several decoders take turns. `close()`, or the end of a `with`, gives its
    memory back.

    Args:
        model: of one of `runtime.families.FAMILIES`, with nn.Linear or ActLinear layers. If its weights are still in
            its files (`core.store.pending`), each layer is read when it is packed, and no dense copy is ever held. Of a
            packed folder (`runtime.packed`) they are mapped as they lie.
        capacity: tokens that the cache holds; None for the model's context, at most 4096.
        threads: None for torch's number.
        cache: how keys and values are kept, 'float32', 'bfloat16' or 'int8' (codes per head and token); None for
            'float32', or what the model rounds them to (`quantize_cache`).
        activations: what integer weights are multiplied with, 'float32' or 'int16'; None for 'int16' if processor and
            weights allow it.
        decode_only: leave the model without its layers' weights, which the decoder holds packed; it can then do nothing
            else.
        progress: show a bar.

    Raises:
        UnsupportedModelError: the model is another.
        MemoryLimitError: weights and cache do not fit into free memory; raised before anything is allocated.
        ValueError: a setting is out of bounds.
    """

    closed = False

    def __init__(
        self,
        model: nn.Module,
        *,
        capacity: int | None = None,
        threads: int | None = None,
        cache: str | None = None,
        activations: str | None = None,
        decode_only: bool = False,
        progress: bool = False,
    ) -> None:
        if isinstance(model, packed.PackedModel):
            vars(self).update(packed.restored(model, capacity, threads, activations, cache))
            return
        refuse_compiled_or_sharded(model)
        refuse_offloaded(model, "the decoder packs all weights in memory")
        reason = supports(model)
        if reason is not None:
            raise UnsupportedModelError(f"model: {type(model).__name__} cannot be decoded here: {reason}.")
        config: Any = model.config
        context = config.max_position_embeddings
        self.capacity = min(context, 4096) if capacity is None else capacity
        if not 1 <= self.capacity <= context:
            raise ValueError(f"capacity: {capacity} was given; give 1 to {context}, the model's context.")
        self.threads = min(torch.get_num_threads(), most_threads()) if threads is None else threads
        if not 1 <= self.threads <= most_threads():
            raise ValueError(f"threads: {threads} was given; give 1 to {most_threads()}, which can run side by side.")
        self.model, self.position, self._steps = model, 0, 0
        pending = pending_of(model)
        blocks = _blocks(model)
        first, latents = blocks[0].attention, latents_of(model, blocks)
        choosing = bool(tables.choosing_features(blocks))
        self.cache = _choose_cache(cache, codes_of_cache(model, blocks), choosing, latents is not None)
        if latents is not None:
            heads, key_value_heads = latents[0].heads, latents[0].heads
            of_token = 4.0 * len(blocks) * latents[0].cached
        else:
            assert first is not None
            heads, key_value_heads = first.heads, first.key_value_heads
            width = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / first.head_dim}[self.cache]  # bytes of an entry
            of_token = 2 * len(blocks) * key_value_heads * first.head_dim * width
        self._check_memory(model, len(blocks), of_token, decode_only and pending is None)
        form = form_of(model, blocks)
        self._rotaries = tables.rotaries(model, blocks, form, self.capacity)
        self._turned = self._rotaries[-1]
        others = tables.model_tables(model, blocks, form, self._turned, self.capacity, self.threads, latents)
        layers = [[self._share(model, block, form, thread) for thread in range(self.threads)] for block in blocks]
        layers.append([parts.Share() for _ in range(self.threads)])
        for thread, share in enumerate(layers[-1]):
            parts.head(share, model.lm_head, thread, self.threads)  # type: ignore[arg-type]
        products = [product for layer in layers for share in layer for own in share.stages.values() for product in own]
        products += [factor for product in products for factor in product.factors() or ()]
        self.activations = tables.choose_activations(activations, products)
        self.vocabulary: int = model.lm_head.out_features  # type: ignore[union-attr, assignment]
        self._table: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.vocabulary_in: int = self._table.num_embeddings
        if pending is not None:
            for path in paths_of_end(model, "get_input_embeddings"):
                pending.fill(model, path, mapped=True)  # a token's row is read when the token comes
        self.embedding, self._by_row = tables.looked_up(self._table)

        def before(index: int) -> None:
            if pending is not None:
                pending.fill(model, "lm_head" if index == len(blocks) else blocks[index].path)

        def packed_one(index: int) -> None:
            if pending is not None:
                pending.drop(model, "lm_head" if index == len(blocks) else blocks[index].path)
                release_memory(cycles=False)  # the allocator would keep what every block leaves
            elif decode_only:
                linears = [model.lm_head] if index == len(blocks) else [x.module for x in blocks[index].linears()]
                for linear in linears:
                    _release(linear)  # type: ignore[arg-type]

        self._matrices, table, places = tables.build(layers, self.activations == "int16", packed_one, progress, before)
        thresholds, self._selections = tables.write_selections(self._matrices, table, places)
        self._embedding = array(self.embedding)
        self._plan = steps.StepPlan(layers=places, products=table, thresholds=thresholds, **others)
        in_integers = self.activations != "float32"
        self.few = few_tokens(self._plan, self._matrices, self.embedding.dtype, in_integers)
        self._work, self._memories = tables.memory(
            self._plan,
            self.threads,
            heads,
            key_value_heads,
            self.capacity,
            self.vocabulary,
            self.cache,
        )

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        """Why a model cannot be decoded here, or None."""
        return supports(model)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self._matrices.nbytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key-value cache."""
        work = self._work
        kept = [work.keys, work.cached, work.key_scales, work.value_scales]
        kept += [work.latent_cache, work.latent_keys, work.latent_values]
        return sum(each.nbytes for each in kept)

    @property
    def density(self) -> float | None:
        """Share of the weight bytes that single steps have read since the last reset; None if nothing is skipped.

        It counts layers that select their inputs or whose outputs are skipped, without low-rank corrections.
        """
        table, products = self._plan.products, self._matrices.products
        skips = [product is not None and product.apart for product in products]
        chosen = (table[:, forms.SELECT] != steps.DENSE) | np.array(skips)
        whole = self._steps * (table[:, forms.INPUTS] * self._row_bytes)[chosen].sum()
        return float((self._work.read * self._row_bytes)[chosen].sum() / whole) if whole else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of weights that a single step read, the mean since the last reset; scales of groups of inputs too."""
        if not self._steps:
            return None
        shared = sum(weight.nbytes - weight.buffer.nbytes for weight in self._matrices.weights)
        return float((self._work.read * self._row_bytes).sum()) / self._steps + shared

    def reads(self) -> list[tables.Read]:
        """Return what a single step reads of the packed weights, piece by piece, to compare with the memory's speed.

        Scales of groups of inputs, which lie apart, are left out.
        """
        table, places, found = self._plan.products, self._plan.layers, []
        stages = range(steps.STAGES)
        for layer in range(places.shape[1]):
            for stage in stages:
                for thread, (first, number) in enumerate(places[:, layer, 2 * stage : 2 * stage + 2].tolist()):
                    own = list(range(first, first + number))
                    own += [p + k for p in map(int, table[own, forms.LOW_RANK]) if p for k in (0, 1)]
                    for p in own:
                        address, stride, rows = table[p, [forms.ADDRESS, forms.STRIDE, forms.INPUTS]].tolist()
                        mean = float(self._work.read[p] / max(1, self._steps))
                        for tile in range(int(table[p, forms.TILES])):
                            found.append(tables.Read(address + tile * rows * stride, stride, rows, mean, thread))
        return found

    @property
    def _row_bytes(self) -> np.ndarray:
        """Of each product: int64 [products]."""
        return self._plan.products[:, forms.TILES] * self._plan.products[:, forms.STRIDE]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the packed weights and the cache back; it decodes no more. More than once is fine."""
        self._release_cores()
        self.closed = True
        for name in HELD:
            vars(self).pop(name, None)

    def reset(self) -> None:
        """Forget all tokens."""
        self._check_open()
        self.position = self._steps = 0
        self._work.read[:] = 0
        self._release_cores()

    def follow_selections(self) -> None:
        """Select as the model's layers and gates do now: their thresholds, numbers and scores were changed in place.

        Raises:
            ValueError: layers that were packed as one matrix no longer select alike.
        """
        thresholds, self._selections = tables.write_selections(self._matrices, self._plan.products, self._plan.layers)
        self._plan.thresholds[:] = thresholds
        if not isinstance(self.model, packed.PackedModel):
            blocks = _blocks(self.model)
            self._plan.gates[:] = tables.gates(self.model, blocks)
            for name, values in tables.curves(self.model, blocks).items():
                getattr(self._plan, name)[:] = values

    def __call__(self, new: Sequence[int]) -> Tensor:
        """Return the logits of the token after some more tokens: float32 [vocabulary].

        Several tokens are a prompt: layers that select inputs in decoding only (`Selection.prefill`) read all of them.

        Args:
            new: token ids.

        Raises:
            DataError: the cache is full, or a token is not in the vocabulary.
            NonFiniteError: logits are NaN or Inf.
        """
        parts, several = self._parts(new), len(new) > 1
        dense = several and any(select is not None and select.prefill == "dense" for select in self._selections)
        for part in parts:
            if dense or len(part) > self.few:
                self._read(part, dense=dense)
                continue
            for token in part:
                self._step(token)
        self._check_finite()
        return torch.from_numpy(self._work.logits[: self.vocabulary].copy())

    def all_logits(self, new: Sequence[int], *, as_prompt: bool = False) -> Tensor:
        """Return the logits after each of some more tokens: float32 [tokens, vocabulary].

        They go through dense products, however few they are.

        Args:
            new: token ids.
            as_prompt: layers that select inputs in decoding only read all of them, as they do in a prompt; by default
                the inputs of every token are selected, as wherever quality is measured.

        Raises:
            DataError: as in a call.
            NonFiniteError: logits are NaN or Inf.
        """
        found = [self._read(part, every=True, dense=as_prompt) for part in self._parts(new)]
        self._check_finite()
        return torch.cat([part[:, : self.vocabulary] for part in found if part is not None])

    def _parts(self, new: Sequence[int]) -> list[list[int]]:
        """Check some more tokens, and cut them into chunks of a prompt."""
        self._check_open()
        tokens = [int(token) for token in new]
        if not tokens:
            raise DataError("new: no token was given; give at least one.")
        if self.position + len(tokens) > self.capacity:
            raise DataError(
                f"capacity: the cache holds {self.capacity} tokens and {self.position} are in it, {len(tokens)} more "
                f"were given; build the decoder with a larger capacity, or reset() it."
            )
        if not 0 <= min(tokens) <= max(tokens) < self.vocabulary_in:
            raise DataError(f"new: token {max(tokens)} of {min(tokens)} to {max(tokens)}; the model embeds 0 to "
                            f"{self.vocabulary_in - 1}.")  # fmt: skip
        self._turn(self.position + len(tokens))
        return [tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK)]

    def _check_finite(self) -> None:
        if not np.isfinite(self._work.finite).all():
            raise NonFiniteError(
                f"logits: NaN or Inf after token {self.position}; check the weights and scales of the model."
            )

    def generate(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = LIKELIEST,
        end: Collection[int] | None = None,
    ) -> Iterator[int]:
        """Yield the tokens that follow a prompt, one by one, from an empty cache.

        Args:
            input_ids: the prompt.
            max_new_tokens: at most so many.
            sampling: as in `core.measure.generation.generate_ids`.
            end: tokens that end the text; by default the model's.

        Raises:
            DataError: before the first token, if prompt and new tokens exceed the cache.
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
            sampling=sampling,
            end=end,
            decoder=self,
        )

    def batch(self, sequences: int = 8) -> Batch:
        """Return what writes several texts at once with this decoder (`runtime.batch`).

        Args:
            sequences: at once, 1 to 8.

        Raises:
            UnsupportedModelError: the model has latent attention, or rotary frequencies that change with the length.
            MemoryLimitError: a cache for each sequence does not fit into free memory.
            ValueError: the number of sequences is out of bounds.
        """
        from actkit.runtime.batch import Batch

        return Batch(self, sequences)

    # -- building

    def _check_memory(self, model: nn.Module, layers: int, of_token: float, decode_only: bool) -> None:
        weights = sum(parameter.nbytes for parameter in model.parameters())
        weights += sum(buffer.nbytes for buffer in model.buffers())
        needed = weights // max(1, layers) if decode_only else weights  # a layer's own go when it is packed
        cache = int(of_token * self.capacity)
        free = psutil.virtual_memory().available
        if needed + cache > free:
            raise MemoryLimitError(
                f"capacity: packed weights ({format_bytes(needed)}) and a cache of {self.capacity} tokens "
                f"({format_bytes(cache)}) do not fit into the {format_bytes(free)} that are free; give a smaller "
                f"capacity, or decode_only=True if the model is needed for nothing else."
            )

    def _share(self, model: nn.Module, block: Block, form: Form, thread: int) -> parts.Share:
        share, window = parts.Share(), form.windowed(model.config, block.index)
        latent = latent_of(model, block)
        if latent is None:
            turn, rotary = form.turns[block.index], form.tables[block.index]
            parts.grouped_query(share, block, thread, self.threads, window=window, turn=turn, rotary=rotary)
        else:
            latent_attention(share, latent, thread, self.threads)
        parts.gated(share, block, thread, self.threads, parts.gate_of(model, block))
        return share

    # -- running

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("decoder: it was closed, so its weights and its cache are gone; build another one.")

    def _step(self, token: int) -> None:
        with LOCK:
            self._follow_threads()
            row = token
            if self._by_row:
                self.embedding.copy_(self._rows([token]))
                row = 0
            came = steps.step(self.threads, self.position, row, self._embedding, self._plan, self._work)
        if not came:
            raise RuntimeError(
                f"threads: {self.threads} threads of the decoder did not run side by side; build it with fewer."
            )
        self.position += 1
        self._steps += 1

    def _rows(self, tokens: list[int]) -> Tensor:
        """The embeddings of tokens, before the multiplier of their family: [tokens, hidden]."""
        chosen = torch.tensor(tokens)
        if isinstance(self._table, QuantizedEmbedding):
            return self._table(chosen).to(self.embedding.dtype)
        if self._by_row:
            return self._table.weight.detach()[chosen].to(self.embedding.dtype)
        return self.embedding[chosen]

    def _turn(self, end: int) -> None:
        """Rotate as in a pass that ends at this token."""
        table = next(table for table in self._rotaries if end <= table.shape[2])
        if table is not self._turned:
            self._plan.rotary[:, :, : table.shape[2]] = table
            self._turned = table

    def _read(self, tokens: list[int], every: bool = False, dense: bool = False) -> Tensor | None:
        embedded, in_integers = self._rows(tokens), self.activations != "float32"
        with torch.no_grad():
            found = read_prompt(
                embedded,
                self.position,
                self._plan,
                self._work,
                self._matrices,
                self._selections,
                in_integers=in_integers,
                dense=dense,
                every=every,
            )
        self.position += len(tokens)
        return found

    def _release_cores(self) -> None:
        """Let threads run everywhere again that were moved to a core of their own."""
        if not self.closed and self._work.cores[:, 1].any():
            with LOCK:
                self._follow_threads()
                release(self.threads, self._work.cores, self._work.allowed)

    def _follow_threads(self) -> None:
        before = torch.get_num_threads()
        if before == self.threads:
            follow_torch_threads(EVERY_KERNEL)
            return
        torch.set_num_threads(self.threads)
        try:
            follow_torch_threads(EVERY_KERNEL)
        finally:
            torch.set_num_threads(before)


def _choose_cache(wanted: str | None, coded: bool, choosing: bool, latent: bool) -> str:
    """How keys and values are kept. coded: the model rounds them to codes; choosing: some features choose its keys."""
    if latent and wanted not in (None, "float32"):
        raise ValueError(f"cache: {wanted!r} was given, but latents are kept in float32; give 'float32', or None.")
    if wanted is None:
        return "int8" if coded else "float32"
    if wanted not in tables.CACHES:
        raise ValueError(f"cache: {wanted!r} was given; give {', '.join(tables.CACHES)}, or None.")
    if coded and wanted != "int8":
        raise ValueError(
            f"cache: {wanted!r} was given, but the model rounds its keys and values to 8 bits; give 'int8', or None."
        )
    if choosing and wanted == "int8":
        raise ValueError(
            "cache: 'int8' was given, but some features of a head choose its keys, which are not kept as codes; give "
            "'bfloat16' or 'float32'."
        )
    return wanted


def _blocks(model: nn.Module) -> list[Block]:
    return [parts.described(model, block) for block in anatomy(model).blocks]


def _release(linear: nn.Module) -> None:
    """Drop the weight of a layer: what is left has its shape, and no memory."""
    if not isinstance(linear, ActLinear):
        linear.weight = nn.Parameter(linear.weight.detach().to("meta"), requires_grad=False)  # type: ignore[union-attr, operator]
        return
    linear.unpack()
    for part in (linear.storage, linear.correction):
        for inner in () if part is None else part.modules():
            for name, values in [*inner.named_parameters(recurse=False), *inner.named_buffers(recurse=False)]:
                is_parameter = isinstance(values, nn.Parameter)
                values = values.detach().to("meta")
                setattr(inner, name, nn.Parameter(values, requires_grad=False) if is_parameter else values)
