"""GGUF: Llama-family models as llama.cpp reads them, their integer codes moved over as they are.

A block of 32 inputs in a row, after the source of the package gguf (0.19); d and m are float16:

    Q8_0   d, 32 signed bytes q           w = d q
    Q4_0   d, 16 bytes of two codes       w = d (q - 8)     the first half of the block in the low halves of the bytes
    Q4_1   d, m, 16 bytes of two codes    w = d q + m

Groups along the inputs whose size is a multiple of 32 (or whole rows) are such blocks with one scale. What is not is
written dense. The rows of query and key are reordered for the llama architecture, which rotates neighbouring channels;
transformers rotates halves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actkit.core.ground.errors import ExportError
from actkit.core.ground.progress import track
from actkit.core.layers.embedding import QuantizedEmbedding
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import DenseWeight, IntegerWeight, WeightStorage
from actkit.core.store.pretrained import base_type
from actkit.formats.gguf_tokenizer import add_vocabulary
from actkit.formats.plain import Plain
from actkit.gguf.architectures import IN_BLOCKS, OUTSIDE, row_order

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # ours -> llama.cpp's
BLOCK = 32
HEAD = "lm_head"
DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Stored:
    """One tensor of the file.

    Attributes:
        kind: its type as GGUF calls it.
        data: bytes uint8 [rows, bytes of a row], or values.
    """

    kind: str
    data: np.ndarray


def write(plain: Plain, path: Path, tokenizer: Any) -> dict[str, Any]:
    """Write one GGUF file.

    Args:
        plain: of a model that `refuse` takes.
        path: of the file.
        tokenizer: of transformers, or None for a file that takes token ids only.

    Returns:
        quantized, dense and notes, as `Exported` has them.

    Raises:
        ExportError: llama.cpp has no place for a module.
    """
    import gguf

    config: Any = plain.skeleton.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    notes = [*_add_settings(writer, config), *add_vocabulary(writer, config, tokenizer), *_ends(plain, tokenizer)]
    quantized: dict[str, str] = {}
    dense: dict[str, str] = {}
    sizes: dict[str, int] = {}
    worst = 0.0  # relative error of a scale in float16

    one_table = _tied(config) or _shared(plain)  # a file without a head says that the embedding is it
    names = [name for name in plain.skeleton.state_dict() if not (name == "lm_head.weight" and one_table)]
    for name in track(names, "Writing tensors", len(names)):
        module, _, leaf = name.rpartition(".")
        heads = (config.num_attention_heads, config.num_key_value_heads, _head_dim(config))
        order = row_order(module, *heads) if architecture == "llama" else None
        changed = plain.layers.get(module, plain.tables.get(module))
        if changed is not None and leaf == "weight":
            why = _unsaid(changed.storage)
            if why is None and isinstance(changed.storage, IntegerWeight):
                stored, error = blocks(changed.storage, order)
                quantized[module] = f"{stored.kind}, from {_describe(changed.storage)}"
                worst = max(worst, error)
            else:
                stored = _dense(changed.storage.dequantize().detach(), order, plain.dtype)
                dense[module] = f"{stored.kind}: {why}"
        else:
            tensor = plain.model.get_submodule(module)._parameters[leaf]
            assert tensor is not None
            stored = _dense(tensor.detach(), order, plain.dtype)
            if tensor.dim() == 2:
                dense[module] = f"{stored.kind}: not quantized by the recipe"
        sizes[stored.kind] = sizes.get(stored.kind, 0) + stored.data.nbytes
        raw = None if stored.kind in ("F32", "F16") else gguf.GGMLQuantizationType[stored.kind]
        writer.add_tensor(f"{gguf_name(module)}.{leaf}", stored.data, raw_dtype=raw)

    main = max(sizes, key=lambda kind: sizes[kind])
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if main == "F32" else f"MOSTLY_{main}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    notes += plain.rewritten(quantized)
    if quantized:
        notes.append(
            f"scales are float16 here, up to {worst:.1e} of their value off; llama.cpp also rounds activations to 8 "
            f"bits when it multiplies them with quantized weights"
        )
    return {"quantized": quantized, "dense": dense, "notes": tuple(notes)}


def gguf_name(module: str) -> str:
    """The name of a module's tensors: 'model.layers.3.mlp.up_proj' -> 'blk.3.ffn_up'. Raises ExportError for others."""
    if module in OUTSIDE:
        return OUTSIDE[module]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if found is None or found[2] not in IN_BLOCKS:
        raise ExportError(f"{module}: llama.cpp has no place for it in this architecture; keep the model another way.")
    return f"blk.{found[1]}.{IN_BLOCKS[found[2]]}"


def blocks(weight: IntegerWeight, order: Tensor | None = None) -> tuple[Stored, float]:
    """Cut a weight [out, in] into blocks of 32 inputs.

    Args:
        weight: the weight.
        order: of the rows; None if they stay.

    Returns:
        The blocks, and the largest relative error that float16 makes on a scale.
    """
    outputs, inputs = weight.shape
    codes = weight.integers().cpu()
    count = inputs // BLOCK
    repeats = count // weight.scale.shape[1]
    scale = weight.scales().cpu().repeat_interleave(repeats, 1)  # [out, blocks]
    zero = torch.full_like(scale, 2 ** (weight.grid.bits - 1))
    if weight.zero is not None:
        zero = weight.zero.cpu().float().repeat_interleave(repeats, 1)
    if order is not None:
        codes, scale, zero = codes[order], scale[order], zero[order]
    d, error = scale.half(), _rounding(scale)
    codes = codes.reshape(outputs, count, BLOCK)
    if weight.grid.bits > 4:
        values = (codes.short() - zero.short()[..., None]).to(torch.int8)
        kind, parts = "Q8_0", [_bytes(d), values.numpy().view(np.uint8)]
    else:
        if weight.zero is None:
            codes = codes + (8 - 2 ** (weight.grid.bits - 1))
        half = (codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4).numpy()
        kind, parts = "Q4_0", [_bytes(d), half]
        if weight.zero is not None:
            kind, parts = "Q4_1", [_bytes(d), _bytes((-zero * d.float()).half()), half]
    return Stored(kind, np.concatenate(parts, axis=-1).reshape(outputs, -1)), error


def as_read(plain: Plain, quantized: Iterable[str]) -> dict[str, nn.Module]:
    """What a reader that widens the blocks computes in place of the quantized layers: scales and minima in float16.

    Args:
        plain: the exported model.
        quantized: paths of the layers that `write` wrote quantized.

    Returns:
        Path -> the layer as it is read.
    """
    found: dict[str, nn.Module] = {}
    for path in quantized:
        changed = plain.layers.get(path, plain.tables.get(path))
        assert changed is not None
        weight = changed.storage
        assert isinstance(weight, IntegerWeight)
        scale = weight.scales().half().float()
        held: WeightStorage = weight.rescaled(scale)
        if weight.zero is not None and weight.grid.bits <= 4:  # w = d q + m, and m is no multiple of d
            minimum = (-weight.zero.float() * scale).half().float()
            codes = weight.integers().float().unflatten(1, (scale.shape[1], -1))
            values = codes * scale[..., None] + minimum[..., None]
            held = DenseWeight(nn.Parameter(values.flatten(1).to(weight.dtype), requires_grad=False))
        if isinstance(changed, ActLinear):
            found[path] = ActLinear.of(changed, weight=held)
            continue
        found[path] = QuantizedEmbedding(held, changed.factor, changed.padding_idx)
        if _shared(plain):
            found[HEAD] = ActLinear.of(plain.layers[HEAD], weight=held)
    return found


def _shared(plain: Plain) -> bool:
    """Whether a rounded embedding and a rounded head are one table."""
    head = plain.layers.get(HEAD)
    return head is not None and any(table.storage is head.storage for table in plain.tables.values())


def _bytes(values: Tensor) -> np.ndarray:
    """float16 [out, blocks] -> uint8 [out, blocks, 2]."""
    return values.contiguous().numpy().view(np.uint8).reshape(*values.shape, 2)


def _unsaid(weight: WeightStorage) -> str | None:
    """Why a changed weight has no block type, or None."""
    if isinstance(weight, DenseWeight):
        return "its weight is not quantized"
    if not isinstance(weight, IntegerWeight):
        return f"its weight is stored as {weight.kind}, which GGUF has no block type for"
    grid, (_, inputs) = weight.grid, weight.shape
    if grid.group_axis == "output":
        return "its scales are per input channel and group of outputs, and GGUF's blocks lie along the inputs"
    size = inputs if grid.group_size == -1 else grid.group_size
    if size % BLOCK:
        return f"groups of {size} inputs are no multiple of GGUF's blocks of {BLOCK}"
    if weight.zero is not None and grid.bits == 8:
        return "GGUF has no block type of 8 bits with zero points"
    if _rounding(weight.scales().cpu()) > 2**-10:  # float16 rounds to 2^-11 of a number inside its range
        return "some of its scales lie outside of float16's range, in which GGUF keeps them"
    return None


def _rounding(scale: Tensor) -> float:
    """The largest relative error that float16 makes on a scale."""
    return float(((scale.half().float() - scale).abs() / scale).max())


def _dense(tensor: Tensor, order: Tensor | None, dtype: torch.dtype) -> Stored:
    """A matrix in the model's dtype, a vector in float32 (llama.cpp computes norms and biases so)."""
    tensor = tensor.cpu() if order is None else tensor.cpu()[order]
    if tensor.dim() < 2 or dtype == torch.float32:
        return Stored("F32", tensor.float().contiguous().numpy())
    if dtype == torch.float16:
        return Stored("F16", tensor.half().contiguous().numpy())
    return Stored("BF16", tensor.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint8))


def _describe(weight: IntegerWeight) -> str:
    grid = weight.grid
    groups = "one scale per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    return f"{grid.bits} bits, {groups}, {'symmetric' if grid.symmetric else 'with zero points'}"


# -- settings ----------------------------------------------------------------------------------------------------------


def refuse(plain: Plain) -> None:
    """Raise ExportError for what llama.cpp would compute another way, naming the setting."""
    config: Any = plain.skeleton.config
    kind = base_type(str(config.model_type))
    if kind not in ARCHITECTURES or not type(plain.skeleton).__name__.endswith("ForCausalLM"):
        raise ExportError(
            f"model: GGUF export knows the language models of {', '.join(ARCHITECTURES)}; this is a "
            f"{type(plain.skeleton).__name__}. Export it as compressed-tensors."
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(
            f"hidden_act: the model has {config.hidden_act!r}, and llama.cpp computes silu in these architectures."
        )
    if kind == "qwen3" and config.attention_bias:
        raise ExportError("attention_bias: the model has biases in its attention, and llama.cpp's qwen3 has none.")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default":
        raise ExportError(f"rope_type: the model has {rope!r}; GGUF export writes 'default' only.")
    rounded = next((path for path, layer in plain.layers.items() if layer.inputs is not None), None)
    if rounded is not None:
        raise ExportError(
            f"{rounded}: it rounds its inputs, and GGUF does not say how; llama.cpp decides. Export the model as "
            f"compressed-tensors, or one on which only the weights were rounded."
        )
    if plain.dtype not in DENSE:
        raise ExportError(f"dtype: the model is {plain.dtype}; GGUF export writes float32, float16 and bfloat16.")


def unread(plain: Plain) -> str | None:
    """Why transformers' reader of GGUF cannot read a file that llama.cpp reads, or None."""
    config: Any = plain.skeleton.config
    if config.model_type == "qwen3" and _head_dim(config) != 128:
        return "transformers takes 128 channels per head of a qwen3 GGUF, whatever the file says; llama.cpp reads it"
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        return "transformers leaves out the biases of a llama GGUF; llama.cpp reads them"
    return None


def _add_settings(writer: Any, config: Any) -> list[str]:
    """The architecture's settings; returns notes."""
    size = _head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return [f"the model attends to the last {window} tokens only; llama.cpp attends to all in this architecture"]
    return []


def _ends(plain: Plain, tokenizer: Any) -> list[str]:
    """A note if transformers' `generate` stops at tokens that the file does not name."""
    stops = getattr(getattr(plain.skeleton, "generation_config", None), "eos_token_id", None)
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    others = [] if tokenizer is None else [str(token) for token in stops if token != tokenizer.eos_token_id]
    if not others:
        return []
    return [
        f"transformers' generate stops at token {', '.join(others)} too; the file names {tokenizer.eos_token_id} only"
    ]


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tied(config: Any) -> bool:
    return bool(config.tie_word_embeddings)
