"""Small GGUF files for the tests, written by the package gguf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gguf

SIZES = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64}
HEADS = {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
BLOCK = {
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_gate": (64, 32),
    "ffn_up": (64, 32),
    "ffn_down": (32, 64),
    "attn_norm": (32,),
    "ffn_norm": (32,),
}


def small_tensors(vocabulary: int = 16) -> dict[str, np.ndarray]:
    """The tensors of a llama model with one block."""
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (vocabulary, 32), "output_norm": (32,)} | {f"blk.0.{n}": s for n, s in BLOCK.items()}
    return {f"{name}.weight": draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    settings: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    quantize: Callable[[str], str | None] = lambda name: None,
) -> Path:
    """Write a file. settings: added to the small model's, None leaves one out; full names hold a dot at the front.

    quantize: tensor name -> type, such as 'Q8_0'; None keeps float32.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in ({**SIZES, **HEADS} | (settings or {})).items():
        key = name[1:] if name.startswith(".") else f"{architecture}.{name}"
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, values in (small_tensors() if tensors is None else tensors).items():
        kind = quantize(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            named = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, named), raw_dtype=named)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
