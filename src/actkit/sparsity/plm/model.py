"""PLM: a decoder with latent attention and an ungated MLP of squared ReLU (2025, arXiv:2503.12167).

    h = x + attention(norm(x)),   y = h + mlp(norm(h)),   mlp(x) = down(relu(up x)^2)

with `latent_attention` (in the model that was published 576 cached numbers per token and layer for 5,120) and
embeddings that are tied to the head. `PLMConfig()` has the sizes of the 1.8 B model: 1,825,458,176 parameters.

When to use it: to train a model from scratch that decodes on phones and small boards, and to run the published ones.
Their MLP is exactly 0 at many units, whose rows of the down projection are never read by the decoder.
Cost: a pass costs as much as one of Llama with as many weights; a step reads a cache that is 8.9 times smaller.
Settled here: the embedding is tied, although the published configuration's default is not: only so there are 1.8 B
parameters, and the published file has no room for a head (3.65 GB in bfloat16). ReLU is squared in the dtype of the
layer, bit for bit as transformers' `relu2`; that overflows in float16 above 256, and nowhere near it in bfloat16.
Our own reading: the paper itself was not read; architecture and sizes are those of the published configuration and
modeling code. The preference learning of the paper (ARIES) is not here: its update rule is in no source that we read;
trl's DPO is what comes near.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from actkit.core.ground.errors import CheckpointError
from actkit.core.store import checkpoint, pretrained
from actkit.sparsity.plm.latent_attention import CacheForm, LatentAttention, check_sizes

PRESETS: dict[str, dict[str, Any]] = {"1.8b": {}}


@strict
class PLMConfig(PreTrainedConfig):
    """Sizes of a PLM, by the names of the published configuration; the defaults are those of the 1.8 B model.

    Attributes:
        vocab_size: words.
        hidden_size: of the residual stream.
        intermediate_size: units of an MLP.
        num_hidden_layers: blocks.
        num_attention_heads: of a block.
        num_key_value_heads: as many; None for that.
        kv_lora_rank: as in `LatentAttention`.
        q_lora_rank: as in `LatentAttention`.
        qk_nope_head_dim: as in `LatentAttention`.
        qk_rope_head_dim: as in `LatentAttention`.
        v_head_dim: as in `LatentAttention`.
        hidden_act: activation of the MLP.
        max_position_embeddings: the context.
        initializer_range: deviation of the weights that are drawn.
        rms_norm_eps: of all norms.
        rope_parameters: as in transformers.
        rope_interleave: whether neighbouring features turn together.
        attention_bias: of the attention's layers that read or write hidden states.
        attention_cache: what is cached, 'latent' or 'expanded'.
        tie_word_embeddings: whether the head is the embedding.
        use_cache: as in transformers.
        pad_token_id: as in transformers.
        bos_token_id: as in transformers.
        eos_token_id: as in transformers.

    Raises:
        ValueError: sizes do not fit.
    """

    model_type = "plm"
    keys_to_ignore_at_inference: ClassVar[Any] = ["past_key_values"]
    default_theta = 100_000.0

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    hidden_act: str = "relu2"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: Any = None
    rope_interleave: bool = True
    attention_bias: bool = False
    attention_cache: str = "latent"
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(
            self.hidden_size,
            self.num_attention_heads,
            self.kv_lora_rank,
            self.qk_nope_head_dim,
            self.qk_rope_head_dim,
            self.v_head_dim,
            self.q_lora_rank,
        )
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} was given; all heads read one latent, give "
                f"{self.num_attention_heads}, or None."
            )
        self.num_key_value_heads = self.num_attention_heads
        self.head_dim = self.qk_rope_head_dim  # of what turns
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: Literal["1.8b"] = "1.8b", **changes: Any) -> Self:
        """Return the configuration of a published model.

        Args:
            name: its size.
            changes: entries that are to be others.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in PRESETS:
            raise ValueError(f"name: {name!r} was given, allowed are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})


class SquaredReLUMLP(nn.Module):
    """down(relu(up x)^2): no gate.

    Args:
        hidden_size: width of the hidden states.
        intermediate_size: units.
        activation: another one of transformers, by name.
    """

    decodes_as: ClassVar[str] = "row"

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "relu2") -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it to x [..., hidden]; the shape stays."""
        return self.down_proj(self.act_fn(self.up_proj(x)))


class LatentCache(DynamicCache):
    """A cache of transformers; what latent attention keeps in it is c as the key, and the turned k as the value.

    It grows by what is appended, and can be cropped and reordered for a beam search, as in transformers.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        layers: Any = self.layers
        return sum(each.nbytes for layer in layers for each in (layer.keys, layer.values) if each is not None)


class PLMLayer(LlamaDecoderLayer):
    """A block: as Llama's, with its own attention and MLP."""

    decodes_as: ClassVar[str] = "row"

    def __init__(self, config: PLMConfig, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        cache: CacheForm = config.attention_cache  # type: ignore[assignment]
        self.self_attn = LatentAttention(  # type: ignore[assignment]
            config.hidden_size,
            config.num_attention_heads,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            q_lora_rank=config.q_lora_rank,
            interleaved=config.rope_interleave,
            cache=cache,
            bias=config.attention_bias,
            epsilon=config.rms_norm_eps,
            layer_index=layer_idx,
            config=config,
        )
        self.mlp = SquaredReLUMLP(  # type: ignore[assignment]
            config.hidden_size, config.intermediate_size, config.hidden_act
        )
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class PLMPreTrainedModel(LlamaPreTrainedModel):
    """What both classes share."""

    decodes_as: ClassVar[str] = "row"
    config: PLMConfig  # type: ignore[assignment]
    config_class = PLMConfig
    _no_split_modules: ClassVar[Any] = ["PLMLayer"]  # type: ignore[misc]
    _can_record_outputs: ClassVar[Any] = {  # type: ignore[misc]
        "hidden_states": PLMLayer,
        "attentions": LatentAttention,
    }


class PLMModel(PLMPreTrainedModel, LlamaModel):
    """The decoder without its head."""

    def __init__(self, config: PLMConfig) -> None:
        PLMPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([PLMLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()


class PLMForCausalLM(PLMPreTrainedModel, LlamaForCausalLM):
    """PLM as a transformers model: `generate`, the Trainer, `actkit.train` and every verb take it.

    Args:
        config: its sizes.
    """

    def __init__(self, config: PLMConfig) -> None:
        PLMPreTrainedModel.__init__(self, config)
        self.model = PLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them."""
        return self.config.to_dict()

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """Make one with random weights."""
        return cls(PLMConfig.from_dict(spec))


def load_plm(
    source: str | Path, *, dtype: torch.dtype | str | None = None, cache: CacheForm = "latent"
) -> PLMForCausalLM:
    """Load a published PLM without running its repository's code; every tensor must match.

    `actkit.load` does the same, and takes other models too.

    Args:
        source: a local folder, or a hub id.
        dtype: default as stored.
        cache: as in `LatentAttention`.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: it is another kind of model, or tensors are missing or left over; they are listed.
    """
    folder = checkpoint.resolve(source)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not readable ({error}); download it again.") from error
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind != PLMConfig.model_type:
        raise CheckpointError(f"{folder}: its model_type is {kind!r}; give a PLM here, and others to actkit.load.")
    model: Any = checkpoint.load(folder, dtype=dtype)
    model.config.attention_cache = cache
    for layer in model.model.layers:
        layer.self_attn.cache = cache
    return model


AutoConfig.register(PLMConfig.model_type, PLMConfig, exist_ok=True)
AutoModel.register(PLMConfig, PLMModel, exist_ok=True)
AutoModelForCausalLM.register(PLMConfig, PLMForCausalLM, exist_ok=True)
pretrained.register((PLMConfig.model_type,))
