"""One GGUF file to one plain checkpoint, as transformers reads it, and a record of how its weights were stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from actkit.core.edit.changes import SourceGrid
from actkit.core.ground.errors import CheckpointError
from actkit.core.ground.progress import track
from actkit.gguf.architectures import ARCHITECTURES, ROPE_FACTORS, GgufArchitecture, Settings, row_order
from actkit.gguf.file import FLOATS, GgufFile, TensorEntry
from actkit.gguf.tokenizer import build_tokenizer, end_tokens

SHARD = 4 * 10**9  # bytes
ELSEWHERE = "load the model's original checkpoint"
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p"}


def convert(path: Path, folder: Path, dtype: torch.dtype) -> SourceGrid:
    """Write the checkpoint of a GGUF file into an empty folder.

    Args:
        path: the file.
        folder: an empty folder.
        dtype: of the tensors; each is dequantized to float32 and rounded once.

    Returns:
        How the file's weights were stored.

    Raises:
        CheckpointError: something cannot be read: the error names the architecture, setting, tensor or tokenizer; or
            what `GgufFile` raises.
    """
    file = GgufFile(path)
    architecture, config, tied = read_config(file)
    places = _places(file, architecture, config, tied)
    tokenizer = build_tokenizer(file)
    config.dtype = dtype
    config.save_pretrained(folder)
    _save_generation(file, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _save_tensors(file, architecture, config, places, folder, dtype)
    layers = {
        name.rpartition(".")[0]: entry.kind
        for name, entry in places.items()
        if entry.kind not in FLOATS and len(entry.shape) > 1
    }
    return SourceGrid("gguf", layers)


def read_config(file: GgufFile) -> tuple[GgufArchitecture, Any, bool]:
    """The architecture of a file, its config of transformers, and whether the head is the embedding."""
    import transformers

    name = file.settings.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: its architecture is {name!r}, and actkit reads {', '.join(ARCHITECTURES)} from GGUF; "
            f"{ELSEWHERE}."
        )
    kind = file.settings.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{file.path}: it holds a {kind}, not a language model; {ELSEWHERE}.")
    architecture = ARCHITECTURES[name]
    settings = Settings(file.path, name, file.settings)
    found = architecture.config(settings)
    settings.finish()
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: the tensor token_embd.weight is missing; download or copy the file again.")
    tied = "output.weight" not in file.tensors
    if ROPE_FACTORS in file.tensors:
        found["rope_parameters"] |= _llama3_factors(file, found)
    tokens = {name: file.settings.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    extra: dict[str, Any] = {}
    if architecture.model_type == "llama":  # the only one of them that may have them or not
        extra = {name: tensor in file.tensors for name, tensor in biases.items()}
    config_class: Any = type(transformers.AutoConfig.for_model(architecture.model_type))
    return (
        architecture,
        config_class(
            **found,
            **extra,
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            tie_word_embeddings=tied,
            bos_token_id=tokens["bos"],
            eos_token_id=tokens["eos"],
            pad_token_id=file.settings.get("tokenizer.ggml.padding_token_id"),
            architectures=[architecture.model_class],
        ),
        tied,
    )


def _places(file: GgufFile, architecture: GgufArchitecture, config: Any, tied: bool) -> dict[str, TensorEntry]:
    """The tensors by transformers' names; every one must have its place, and every place its tensor."""
    import transformers

    with torch.device("meta"):
        skeleton = getattr(transformers, architecture.model_class)(config)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in skeleton.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    found: dict[str, TensorEntry] = {}
    problems = []
    for name, entry in file.tensors.items():
        stem, _, leaf = name.rpartition(".")
        module = architecture.module(stem)
        target = f"{module}.{leaf}"
        if name == ROPE_FACTORS:
            continue
        if module is None or target not in expected:
            problems.append(f"{name} has no place in {architecture.model_class}")
        elif entry.shape != expected[target]:
            problems.append(f"{name} is {list(entry.shape)}, {target} is {list(expected[target])}")
        else:
            found[target] = entry
    problems += [f"{name} is missing" for name in expected if name not in found]
    if problems:
        raise CheckpointError(
            f"{file.path}: its tensors do not fit its settings: {'; '.join(problems[:8])}. Download or copy the file "
            f"again, or {ELSEWHERE}."
        )
    return found


def _save_tensors(
    file: GgufFile,
    architecture: GgufArchitecture,
    config: Any,
    places: dict[str, TensorEntry],
    folder: Path,
    dtype: torch.dtype,
) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, entry in places.items():
        needed = int(np.prod(entry.shape)) * dtype.itemsize
        if size and size + needed > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + needed, total + needed
    weight_map: dict[str, str] = {}

    def values() -> Iterator[tuple[str, Tensor]]:
        for name in track(places, "Dequantizing", len(places)):
            yield name, _tensor(file, architecture, config, name, places[name]).to(dtype)

    stream = values()
    for index, names in enumerate(shards, start=1):
        title = "model" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}"
        save_file(dict(next(stream) for _ in names), folder / f"{title}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(names, f"{title}.safetensors")
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / "model.safetensors.index.json").write_text(index_text, encoding="utf-8")


def _tensor(file: GgufFile, architecture: GgufArchitecture, config: Any, name: str, entry: TensorEntry) -> Tensor:
    """The values of a tensor as transformers computes with them, float32."""
    found = torch.from_numpy(np.ascontiguousarray(file.values(entry)))
    module = name.rpartition(".")[0]
    if architecture.rotates_neighbours:
        order = row_order(module, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        if order is not None:
            found = found[order.argsort()]
    if architecture.norm_offset and module.endswith("norm"):
        found = found - architecture.norm_offset
    return found.contiguous()


def _save_generation(file: GgufFile, folder: Path) -> None:
    """How texts begin and end, and how the file's makers sample."""
    from transformers import GenerationConfig

    sampling = {
        there: file.settings[f"general.sampling.{here}"]
        for here, there in SAMPLING.items()
        if f"general.sampling.{here}" in file.settings
    }
    ends = end_tokens(file)
    GenerationConfig(
        bos_token_id=file.settings.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=ends or None,
        pad_token_id=file.settings.get("tokenizer.ggml.padding_token_id"),
        **({"do_sample": True, **sampling} if sampling else {}),
    ).save_pretrained(folder)


def _llama3_factors(file: GgufFile, found: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling of the rotation, which the file holds as its result: one factor per pair of channels."""
    given = file.values(file.tensors[ROPE_FACTORS])
    half = found["head_dim"] // 2
    wavelength = 2 * np.pi * found["rope_parameters"]["rope_theta"] ** (np.arange(half) / half)
    low, high, original = 1.0, 4.0, 8192
    for factor in (8.0, 32.0):
        smooth = (original / wavelength - low) / (high - low)
        factors = 1 / ((1 - smooth) / factor + smooth)
        factors = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, factors))
        if given.shape == factors.shape and np.allclose(given, factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(
        f"{file.path}: {ROPE_FACTORS} scales the rotation by factors that are not Llama 3's; {ELSEWHERE}."
    )
