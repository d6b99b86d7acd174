"""GGUF: models of Llama's kin and Gemma 3 as llama.cpp reads them, their integer codes moved over as they are.

A block of 32 inputs in a row, after the source of the package gguf (0.19); d and m are float16:

    Q8_0   d, 32 signed bytes q           w = d q
    Q4_0   d, 16 bytes of two codes       w = d (q - 8)     the first half of the block in the low halves of the bytes
    Q4_1   d, m, 16 bytes of two codes    w = d q + m

Groups along the inputs whose size is a multiple of 32 (or whole rows) are such blocks with one scale. What is not is
written dense. The rows of query and key are reordered for the llama architecture, which rotates neighbouring channels;
transformers rotates halves. Norms of Gemma 3 hold 1 more here. What is refused, and the settings, are in
`gguf_settings.py`.
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
from actkit.formats.gguf_settings import ARCHITECTURES, add_settings, ends, head_dim
from actkit.formats.gguf_tokenizer import add_vocabulary
from actkit.formats.plain import Plain
from actkit.gguf.architectures import ARCHITECTURES as KNOWN
from actkit.gguf.architectures import OUTSIDE, GgufArchitecture, row_order

BLOCK = 32
HEAD = "lm_head"


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
    architecture = KNOWN[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    notes = [*add_settings(writer, config), *add_vocabulary(writer, config, tokenizer), *ends(plain, tokenizer)]
    quantized: dict[str, str] = {}
    dense: dict[str, str] = {}
    sizes: dict[str, int] = {}
    worst = 0.0  # relative error of a scale in float16

    one_table = config.tie_word_embeddings or _shared(plain)  # a file without a head says that the embedding is it
    names = [name for name in plain.skeleton.state_dict() if not (name == "lm_head.weight" and one_table)]
    for name in track(names, "Writing tensors", len(names)):
        module, _, leaf = name.rpartition(".")
        heads = (config.num_attention_heads, config.num_key_value_heads, head_dim(config))
        order = row_order(module, *heads) if architecture.rotates_neighbours else None
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
            values = tensor.detach()
            if architecture.norm_offset and module.endswith("norm"):
                values = values.float() + architecture.norm_offset
            stored = _dense(values, order, plain.dtype)
            if tensor.dim() == 2:
                dense[module] = f"{stored.kind}: not quantized by the recipe"
        sizes[stored.kind] = sizes.get(stored.kind, 0) + stored.data.nbytes
        raw = None if stored.kind in ("F32", "F16") else gguf.GGMLQuantizationType[stored.kind]
        writer.add_tensor(f"{gguf_name(module, architecture)}.{leaf}", stored.data, raw_dtype=raw)

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


def gguf_name(module: str, architecture: GgufArchitecture) -> str:
    """The name of a module's tensors: 'model.layers.3.mlp.up_proj' -> 'blk.3.ffn_up'. Raises ExportError for others."""
    if module in OUTSIDE:
        return OUTSIDE[module]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if found is None or found[2] not in architecture.blocks:
        raise ExportError(f"{module}: llama.cpp has no place for it in this architecture; keep the model another way.")
    return f"blk.{found[1]}.{architecture.blocks[found[2]]}"


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
