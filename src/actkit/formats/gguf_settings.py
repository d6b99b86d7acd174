"""The settings of a GGUF file, and which models llama.cpp computes as transformers does.

An architecture of llama.cpp fixes what transformers keeps in its config: the activation, the pattern of windows of
Gemma 3, its scale of attention. A model that has it otherwise is refused by the name of the setting. A scaled rotation
is written for Gemma 3 only, whose larger models have one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from actkit.core.ground.errors import ExportError
from actkit.core.store.pretrained import base_type
from actkit.formats.plain import Plain
from actkit.gguf.architectures import gemma3_attention_scale, gemma3_windows

ARCHITECTURES = {  # ours -> llama.cpp's
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GEMMA3_LOCAL = {"rope_type": "default", "rope_theta": 10000.0}


def refuse(plain: Plain) -> None:
    """Raise ExportError for what llama.cpp would compute another way, naming the setting."""
    config: Any = plain.skeleton.config
    kind = base_type(str(config.model_type))
    if kind not in ARCHITECTURES or not type(plain.skeleton).__name__.endswith("ForCausalLM"):
        raise ExportError(
            f"model: GGUF export knows the language models of {', '.join(ARCHITECTURES)}; this is a "
            f"{type(plain.skeleton).__name__}. Export it as compressed-tensors."
        )
    if kind == "gemma3_text":
        _refuse_gemma3(config)
    elif config.hidden_act not in ("silu", "swish"):
        raise ExportError(
            f"hidden_act: the model has {config.hidden_act!r}, and llama.cpp computes silu in these architectures."
        )
    if kind in ("qwen3", "gemma3_text") and config.attention_bias:
        raise ExportError(
            f"attention_bias: the model has biases in its attention, and llama.cpp's {ARCHITECTURES[kind]} has none."
        )
    rope = _rope(config).get("rope_type", "default")
    if rope not in (("default", "linear") if kind == "gemma3_text" else ("default",)):
        raise ExportError(
            f"rope_type: the model has {rope!r}; GGUF export writes 'default' only, of gemma3 'linear' too."
        )
    rounded = next((path for path, layer in plain.layers.items() if layer.inputs is not None), None)
    if rounded is not None:
        raise ExportError(
            f"{rounded}: it rounds its inputs, and GGUF does not say how; llama.cpp decides. Export the model as "
            f"compressed-tensors, or one on which only the weights were rounded."
        )
    if plain.caches:
        raise ExportError(
            f"{next(iter(plain.caches))}: its keys and values are rounded to fp8, and GGUF does not say so; llama.cpp "
            f"decides. Export the model as compressed-tensors, or leave quantize_cache out."
        )
    if plain.dtype not in DTYPES:
        raise ExportError(f"dtype: the model is {plain.dtype}; GGUF export writes float32, float16 and bfloat16.")


def _refuse_gemma3(config: Any) -> None:
    for name, given, taken in _fixed_in_gemma3(config):
        if given != taken:
            raise ExportError(
                f"{name}: the model has {given!r}, and llama.cpp's gemma3 computes with {taken!r}, whatever a file "
                f"says. Export it as compressed-tensors."
            )


def _fixed_in_gemma3(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Setting, what the model has, what llama.cpp takes."""
    yield "hidden_activation", config.hidden_activation, "gelu_pytorch_tanh"
    yield "layer_types", config.layer_types, gemma3_windows(config.num_hidden_layers)
    local = config.rope_parameters["sliding_attention"]
    yield "rope_parameters of sliding_attention", {name: local.get(name) for name in GEMMA3_LOCAL}, GEMMA3_LOCAL
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim)
    yield "query_pre_attn_scalar", config.query_pre_attn_scalar, gemma3_attention_scale(*shape)
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        yield name, getattr(config, name), None
    yield "use_bidirectional_attention", bool(config.use_bidirectional_attention), False


def unread(plain: Plain) -> str | None:
    """Why transformers' reader of GGUF cannot read a file that llama.cpp reads, or None."""
    config: Any = plain.skeleton.config
    if config.model_type == "qwen3" and head_dim(config) != 128:
        return "transformers takes 128 channels per head of a qwen3 GGUF, whatever the file says; llama.cpp reads it"
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        return "transformers leaves out the biases of a llama GGUF; llama.cpp reads them"
    if config.model_type == "gemma3_text" and config.query_pre_attn_scalar != 256:
        return "transformers scales attention by 256 channels per head in a gemma3 GGUF; llama.cpp reads it"
    if config.model_type == "gemma3_text" and _rope(config)["rope_type"] != "default":
        return "transformers leaves out the scaling of the rotation of a gemma3 GGUF; llama.cpp reads it"
    return None


def add_settings(writer: Any, config: Any) -> list[str]:
    """Write the settings of the architecture; return notes."""
    size = head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if _rope(config).get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(_rope(config)["factor"]))
    window = getattr(config, "sliding_window", None)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(window)
    elif window is not None and window < config.max_position_embeddings:
        return [f"the model attends to the last {window} tokens only; llama.cpp attends to all in this architecture"]
    return []


def ends(plain: Plain, tokenizer: Any) -> list[str]:
    """Return a note if transformers' `generate` stops at tokens that the file does not name."""
    stops = getattr(getattr(plain.skeleton, "generation_config", None), "eos_token_id", None)
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    others = [] if tokenizer is None else [str(token) for token in stops if token != tokenizer.eos_token_id]
    if not others:
        return []
    return [
        f"transformers' generate stops at token {', '.join(others)} too; the file names {tokenizer.eos_token_id} only"
    ]


def head_dim(config: Any) -> int:
    """The channels of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> dict[str, Any]:
    """How positions rotate, in Gemma 3 those of the blocks that attend to all tokens."""
    given = config.rope_parameters or {}
    return given["full_attention"] if config.model_type.endswith("gemma3_text") else given
