"""What a GGUF file's settings and tensors are called in transformers, by architecture.

The reader is strict: a setting of the architecture that nothing here reads may change what the model computes, so
it is an error, and so is a tensor without a place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actkit.core.ground.errors import CheckpointError

REQUIRED = object()
ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
IN_BLOCKS = {**ATTENTION, **MLP, "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
IN_GEMMA_BLOCKS = {
    **ATTENTION,
    **MLP,
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROPE_FACTORS = "rope_freqs.weight"


class Settings:
    """The settings of one architecture, which remember what was read."""

    def __init__(self, path: Path, architecture: str, settings: Mapping[str, Any]) -> None:
        self.path, self.architecture = path, architecture
        self._left = {
            name.removeprefix(f"{architecture}."): value
            for name, value in settings.items()
            if name.startswith(f"{architecture}.")
        }

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """Take a setting by its name without the architecture. Raises CheckpointError if it is missing and required."""
        value = self._left.pop(name, default)
        if value is REQUIRED:
            raise CheckpointError(f"{self.path}: the setting {self.architecture}.{name} is missing; convert it anew.")
        return value

    def expect(self, name: str, *allowed: Any) -> Any:
        """Take a setting that may be missing (the first value then), or hold one of some values."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise CheckpointError(
                f"{self.path}: the setting {self.architecture}.{name} is {value}, actkit reads models with "
                f"{' or '.join(map(str, allowed))} only; load the model's original checkpoint."
            )
        return value

    def finish(self) -> None:
        """Raise CheckpointError for a setting that nothing read."""
        if self._left:
            raise CheckpointError(
                f"{self.path}: actkit does not know what {', '.join(sorted(self._left))} of the architecture "
                f"{self.architecture} means; load the model's original checkpoint."
            )


@dataclass(frozen=True)
class GgufArchitecture:
    """How one architecture of GGUF is built in transformers.

    Attributes:
        model_type: of transformers.
        model_class: of transformers.
        config: settings -> the config's entries.
        blocks: module in a block -> its name in the file.
        rotates_neighbours: whether query and key rotate neighbouring channels; transformers rotates halves.
        norm_offset: what the file's norms hold more than transformers'.
    """

    model_type: str
    model_class: str
    config: Callable[[Settings], dict[str, Any]]
    blocks: Mapping[str, str]
    rotates_neighbours: bool = False
    norm_offset: float = 0.0

    def module(self, name: str) -> str | None:
        """The module of a tensor's name without its last part: 'blk.3.ffn_up' -> 'model.layers.3.mlp.up_proj'."""
        outside = {there: here for here, there in OUTSIDE.items()}
        if name in outside:
            return outside[name]
        found = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        inside = {there: here for here, there in self.blocks.items()}
        return f"model.layers.{found[1]}.{inside[found[2]]}" if found and found[2] in inside else None


def row_order(module: str, heads: int, key_value_heads: int, size: int) -> Tensor | None:
    """Return which row of query or key of transformers comes where, if neighbouring channels rotate.

    Args:
        module: name of the layer in a block.
        heads: of the query.
        key_value_heads: of the key.
        size: channels per head.

    Returns:
        int64 [rows]; None for other layers.
    """
    leaf = module.rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj"):
        return None
    count = heads if leaf == "q_proj" else key_value_heads
    return torch.arange(count * size).reshape(count, 2, size // 2).transpose(1, 2).flatten()


def _decoder(settings: Settings) -> dict[str, Any]:
    """What all of these decoders say."""
    take = settings.take
    heads, hidden = take("attention.head_count"), take("embedding_length")
    size = take("attention.key_length", hidden // heads)
    settings.expect("attention.value_length", size)
    settings.expect("rope.dimension_count", size)
    settings.expect("expert_count", 0)
    settings.expect("expert_used_count", 0)
    take("vocab_size", None)  # the embedding says it too
    return {
        "hidden_size": hidden,
        "num_hidden_layers": take("block_count"),
        "intermediate_size": take("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": take("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": take("context_length"),
        "rms_norm_eps": _plain(take("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(settings),
    }


def _rope(settings: Settings) -> dict[str, Any]:
    kind = settings.expect("rope.scaling.type", "none", "linear", "yarn")
    found = {"rope_type": kind, "rope_theta": _plain(settings.take("rope.freq_base", 10000.0))}
    factor = settings.take("rope.scaling.factor", 1.0)
    original = settings.take("rope.scaling.original_context_length", None)
    if kind == "none":
        return {**found, "rope_type": "default"}
    found["factor"] = _plain(factor)
    return found if kind == "linear" else {**found, "original_max_position_embeddings": original}


def _plain(value: float) -> float:
    """The shortest number that is this one in float32, such as 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _llama(settings: Settings) -> dict[str, Any]:
    settings.take("attention.sliding_window", None)  # of Mistral's; llama.cpp attends to all in this architecture
    return _decoder(settings)


def _gemma3(settings: Settings) -> dict[str, Any]:
    settings._left.setdefault("rope.freq_base", 1e6)
    window = settings.take("attention.sliding_window")
    settings.expect("attention.sliding_window_pattern", 6)
    settings.expect("final_logit_softcapping", 0.0)
    settings.expect("attn_logit_softcapping", 0.0)
    found = _decoder(settings)
    shape = tuple(found[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim"))
    local = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        **found,
        "rope_parameters": {"full_attention": found["rope_parameters"], "sliding_attention": local},
        "layer_types": gemma3_windows(shape[0]),
        "sliding_window": window,
        "query_pre_attn_scalar": gemma3_attention_scale(*shape),
    }


def gemma3_windows(blocks: int) -> list[str]:
    """Return which blocks of Gemma 3 attend to all tokens: every sixth; the others to a window."""
    return [("full" if (at + 1) % 6 == 0 else "sliding") + "_attention" for at in range(blocks)]


def gemma3_attention_scale(blocks: int, hidden: int, heads: int, size: int) -> int:
    """Return the number by whose root llama.cpp divides the products of query and key; no setting of a file says it.

    Args:
        blocks: of the model.
        hidden: its channels.
        heads: of the query.
        size: channels per head.
    """
    return hidden // heads if blocks == 62 else size  # the model of 27 billion scales by its hidden size


ARCHITECTURES = {
    "llama": GgufArchitecture("llama", "LlamaForCausalLM", _llama, IN_BLOCKS, rotates_neighbours=True),
    "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM", _decoder, IN_BLOCKS),
    "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM", _decoder, IN_BLOCKS),
    "gemma3": GgufArchitecture("gemma3_text", "Gemma3ForCausalLM", _gemma3, IN_GEMMA_BLOCKS, norm_offset=1.0),
}
