"""Quantized folders of others, read as the numbers that their codes stand for.

`config.json` says how a folder's weights are quantized. Three kinds are read, from the tensors' own names:

    compressed-tensors  X.weight_packed (integer codes in int32) or X.weight (int8, float8), X.weight_scale,
                        X.weight_zero_point, X.weight_g_idx         w = (code - zero) * scale
    fp8                 X.weight (float8), X.weight_scale_inv        w = code * scale, per block
    mxfp4               X_blocks (two 4-bit floats a byte), X_scales w = code * 2^(scale - 127), per 32 values

Packed codes of 3, 5, 6 and 7 bits lie side by side, across the words, as versions of compressed-tensors from 0.18 on
write them, or 32 // bits in each word, as earlier ones do. Both are read: which one it is, the number of words says, or
for a few short rows the version in the config.

Products are computed in float32 and rounded once, to the dtype of the tensors that are not quantized. What the format's
own readers compute besides, rounded activations above all, is not a weight: it is left out, noted in the grid that
comes back, and said. Every other format is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from actkit.core.edit.changes import SourceGrid
from actkit.core.grids.packing import unpack_codes
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.progress import track

READ = ("compressed-tensors", "fp8", "mxfp4")
CODES = ("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_g_idx")
ROUNDING = ("input_scale", "input_zero_point", "activation_scale", "output_scale", "output_zero_point", "k_scale",
            "v_scale")  # fmt: skip
SIDE_BY_SIDE = (0, 18)  # the first version of compressed-tensors whose codes lie across the words
ADAPTER = "adapter"  # the folder inside of an export of ours that holds what a peft adapter adds
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def quantization_of(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a config.json that says how the weights are quantized, or None."""
    for part in (settings, settings.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), dict):
                return part[key]
    return None


def method_of(quantization: Mapping[str, Any]) -> str:
    """The name of the method, such as 'compressed-tensors' or 'bitsandbytes'."""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "bitsandbytes"
    return str(quantization.get("quant_method"))


def is_code(name: str) -> bool:
    """Whether a tensor of a quantized folder, by its name, is no weight of its own."""
    leaf = name.rpartition(".")[2]
    return leaf in (*CODES, *ROUNDING) or leaf.endswith(("_scales", "_blocks"))


def refuse_unread(quantization: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError for a format that `read_dequantized` does not read."""
    method, format = method_of(quantization), _format(quantization)
    sparse = (quantization.get("sparsity_config") or {}).get("format", "dense")
    unread = None
    if method not in READ:
        unread = method
    elif method == "compressed-tensors" and not format <= {"pack-quantized", "int-quantized", "float-quantized",
                                                            "naive-quantized"}:  # fmt: skip
        unread = f"{method} as {', '.join(sorted(format))}"
    elif sparse != "dense":
        unread = f"{method} over {sparse} weights"
    elif quantization.get("transform_config"):
        unread = f"{method} with rotated activations (transform_config)"
    if unread is not None:
        raise CheckpointError(
            f"{folder}: its weights are quantized by {unread} (quantization_config in config.json), which is not read "
            f"here; read are compressed-tensors (integers, float8), fp8, mxfp4 and GGUF. Load the original weights, or "
            f"dequantize the model with the package that made it and save it (transformers: model.dequantize())."
        )


def _format(quantization: Mapping[str, Any]) -> set[str]:
    """The formats of a compressed-tensors folder's groups."""
    top = quantization.get("format", "dense")
    return {group.get("format") or top for group in (quantization.get("config_groups") or {}).values()} or {top}


def read_dequantized(
    files: list[Path], quantization: Mapping[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Tensor], SourceGrid]:
    """All tensors of a quantized folder by name, quantized weights as the numbers that they stand for.

    Args:
        files: the safetensors files.
        quantization: as `quantization_of` gives it, of a kind that `refuse_unread` lets through.
        dtype: what dequantized weights are rounded to.

    Returns:
        The tensors, and the grid that they lay on.

    Raises:
        CheckpointError: a layer is stored in a way that is not read; it is named.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, str] = {}
    with ExitStack() as stack:
        modules: dict[str, dict[str, Any]] = {}  # path -> the file of each of its tensors
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            for name in opened.keys():  # noqa: SIM118
                path, _, leaf = name.rpartition(".")
                modules.setdefault(path, {})[leaf] = opened
        for path, found in track(modules.items(), "Dequantizing the weights", len(modules)):
            prefix = f"{path}." if path else ""
            read = {leaf: opened.get_tensor(f"{prefix}{leaf}") for leaf, opened in found.items()}
            for leaf, value, how in _values(prefix, read, quantization):
                if how is not None:
                    layers[path if leaf == "weight" else f"{prefix}{leaf}"] = how
                tensors[f"{prefix}{leaf}"] = value.clone() if how is None else value.to(dtype)
    return tensors, SourceGrid(method_of(quantization), layers, tuple(_said(quantization, layers, files)))


def _values(
    prefix: str, read: dict[str, Tensor], quantization: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor, str | None]]:
    """The tensors of one module: local name, value, and how it was quantized, or None."""
    codes = {leaf: tensor for leaf, tensor in read.items() if leaf in CODES}
    if codes:
        if "weight" in read:
            codes["weight"] = read.pop("weight")
        strange = sorted(leaf for leaf in read if leaf.startswith("weight_") and leaf not in CODES)
        if strange:
            raise _unread(prefix, f"with {', '.join(strange)}")
        yield "weight", *_weight(prefix, codes, quantization)
    for leaf, tensor in read.items():
        plain = leaf.removesuffix("_blocks")
        if leaf != plain and f"{plain}_scales" in read:
            yield plain, mxfp4(tensor, read[f"{plain}_scales"]), "4-bit floats, groups of 32 inputs"
        elif leaf not in (*CODES, *ROUNDING) and f"{leaf.removesuffix('_scales')}_blocks" not in read:
            yield leaf, tensor, None


def _weight(prefix: str, parts: dict[str, Tensor], quantization: Mapping[str, Any]) -> tuple[Tensor, str]:
    """One layer's weight in float32 [out, in], and how it was stored."""
    scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
    stored, zero = parts.get("weight_packed", parts.get("weight")), parts.get("weight_zero_point")
    if scale is None or stored is None:
        raise _unread(prefix, f"as {', '.join(sorted(parts))} alone")
    scheme = _scheme(prefix.removesuffix("."), quantization)
    if "weight_packed" in parts:
        bits = int(scheme.get("num_bits", 0))
        if not 1 <= bits <= 8:
            raise _unread(prefix, f"packed with {bits} bits")
        rows, columns = (int(size) for size in parts["weight_shape"])
        middle = 2 ** (bits - 1)
        codes = unpack(stored, bits, columns, _across(prefix, stored, bits, columns, quantization)).float() - middle
        if zero is not None and zero.dtype == torch.int32:  # packed down the outputs
            words = zero.t()
            zero = unpack(words, bits, rows, _across(prefix, words, bits, rows, quantization)).t().float() - middle
        kind = f"{bits} bits"
    elif stored.dtype == torch.int8:
        codes, kind = stored.float(), "8 bits"
    elif stored.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes, kind = stored.float(), str(stored.dtype).removeprefix("torch.")
    else:
        raise _unread(prefix, f"as {stored.dtype} beside a scale")
    block, groups = _block(scheme, quantization, codes, scale)
    order = parts.get("weight_g_idx")
    if zero is not None:
        codes = codes - _spread(zero.float(), block, codes.shape, order)
    value = codes * _spread(exponent(scale), block, codes.shape, order)
    return value, f"{kind}, {groups}, {'symmetric' if zero is None else 'with zero points'}"


def _unread(path: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path.removesuffix('.')}: its weight is stored {how}, which is not read here; load the original "
        f"weights, or dequantize the model with the package that made it and save it."
    )


def _scheme(path: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """What a compressed-tensors config says of a layer's weight: a target by name wins over one by class."""
    groups = [
        (target, group.get("weights") or {})
        for group in (quantization.get("config_groups") or {}).values()
        for target in group.get("targets") or ()
    ]
    for target, scheme in groups:
        named = re.match(target.removeprefix("re:"), path) if target.startswith("re:") else target == path
        if named:
            return scheme
    by_class = [scheme for target, scheme in groups if not target.startswith("re:") and "." not in target]
    if len({repr(sorted(scheme.items(), key=str)) for scheme in by_class}) > 1:
        raise _unread(path, "by one of several schemes that are given by class")
    return by_class[0] if by_class else {}


def _block(
    scheme: Mapping[str, Any], quantization: Mapping[str, Any], codes: Tensor, scale: Tensor
) -> tuple[tuple[int, int], str]:
    """(rows, columns) of the weights that share a scale, and that in words."""
    rows, columns = codes.shape[-2:]
    block = scheme.get("block_structure") or quantization.get("weight_block_size")
    if scale.numel() == 1:
        return (rows, columns), "one scale"
    if block is not None:
        return (int(block[0]), int(block[1])), f"blocks of {block[0]} x {block[1]}"
    if scale.dim() < 2 or scale.shape[-1] == 1:
        return (1, columns), "one scale per row"
    size = int(scheme.get("group_size") or ceil(columns / scale.shape[-1]))
    return (1, size), f"groups of {size} inputs"


def _spread(values: Tensor, block: tuple[int, int], shape: torch.Size, order: Tensor | None) -> Tensor:
    """Scales or zero points, one per block, repeated to the weight's shape; one alone is left as it is.

    order: for weights that were sorted, the group of each column, int [in].
    """
    if values.numel() == 1:
        return values.reshape(())
    values = values.reshape(*shape[:-2], ceil(shape[-2] / block[0]), -1)
    if order is not None:
        return values[..., order.long()]
    rows = values.repeat_interleave(block[0], -2)[..., : shape[-2], :]
    return rows.repeat_interleave(block[1], -1)[..., : shape[-1]]


def exponent(scale: Tensor) -> Tensor:
    """Scales as float32; bytes stand for powers of two, 2^(byte - 127)."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def unpack(words: Tensor, bits: int, count: int, across: bool) -> Tensor:
    """Read packed codes, the first in the lowest bits of a word.

    Args:
        words: int32 [rows, n].
        bits: of a code.
        count: codes of a row.
        across: whether codes lie across words; else a word holds 32 // bits of them.

    Returns:
        int32 [rows, count], without a sign.
    """
    if across:
        packed = words.flatten().view(torch.uint8).unflatten(0, (len(words), -1))
        return unpack_codes(packed, count, bits)[:, :count].to(torch.int32)
    shifts = bits * torch.arange(32 // bits)
    codes = (words.to(torch.int64).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :count].to(torch.int32)


def _across(path: str, words: Tensor, bits: int, count: int, quantization: Mapping[str, Any]) -> bool:
    """Whether codes lie across the words. Raises CheckpointError if nothing tells, or they fit in neither way."""
    given, across, apart = words.shape[1], ceil(count * bits / 32), ceil(count / (32 // bits))
    if given not in (across, apart):
        raise _unread(path, f"as {given} words for {count} codes of {bits} bits")
    if across != apart or 32 % bits == 0 or apart == 1:  # where both are the same, either reads it
        return given == across
    version = re.match(r"(\d+)\.(\d+)", str(quantization.get("version", "")))
    if version is None:
        raise _unread(
            path, f"in {given} words a row, packed with {bits} bits in one of two ways (the config says no version)"
        )
    return (int(version[1]), int(version[2])) >= SIDE_BY_SIDE


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode experts' weights to float32 [experts, in, out], as transformers keeps them.

    Args:
        blocks: uint8 [experts, out, groups, 16], two codes a byte, the first in the low half.
        scales: uint8 [experts, out, groups].
    """
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    values = torch.tensor(FP4)[codes] * exponent(scales).unsqueeze(-1)
    return values.flatten(-2).transpose(-1, -2).contiguous()


def _said(quantization: Mapping[str, Any], layers: Mapping[str, str], files: list[Path]) -> Iterator[str]:
    """What the format's own readers compute besides."""
    groups = list((quantization.get("config_groups") or {}).values())
    rounded = [group["input_activations"] for group in groups if group.get("input_activations")]
    notes = []
    if rounded:
        first = rounded[0]
        notes.append(f"to {first.get('num_bits')} bits ({first.get('type')}, per {first.get('strategy')})")
    elif method_of(quantization) == "fp8":
        notes.append("to float8")
    notes = [f"its own readers also round the inputs of quantized layers {how}; this model does not" for how in notes]
    if quantization.get("kv_cache_scheme"):
        notes.append("its own readers also round the key-value cache; this model does not")
    if any((file.parent / ADAPTER / "adapter_config.json").exists() for file in files[:1]):
        notes.append(f"a peft adapter in {ADAPTER}/ corrects its layers; this model is without it")
    yield from notes if layers else ()
