"""The rows of the families built as Llama is, and of what grew out of it: other norms, experts, convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from actkit.core.model.architecture_rows import Architecture, AttentionRow, ExpertsRow, LayersRow, MlpRow, NormRow

LLAMA = Architecture(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
    blocks="layers",
    stem=("embed_tokens", "rotary_emb"),
    head=("norm",),
    norms=(NormRow("input_layernorm", "attention"), NormRow("post_attention_layernorm", "mlp")),
    attention=AttentionRow(
        "self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        rotary=True,
    ),
    mlp=MlpRow("mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", activation="mlp.act_fn"),
)
assert isinstance(LLAMA.attention, AttentionRow) and isinstance(LLAMA.mlp, MlpRow)
HEAD_NORMS = replace(LLAMA.attention, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
LAYER_NORMS = replace(LLAMA.attention, query_norm="self_attn.q_layernorm", key_norm="self_attn.k_layernorm")


def _rotary_where_configured(row: Architecture, config: Any, index: int) -> Architecture:
    assert isinstance(row.attention, AttentionRow)
    return replace(row, attention=replace(row.attention, rotary=bool(config.no_rope_layers[index])))


SMOLLM3 = replace(LLAMA, name="smollm3", model_types=("smollm3",), adapt=_rotary_where_configured)

# Multiplies embeddings, what is added to the residual stream, scores and logits by numbers of its configuration.
GRANITE = replace(LLAMA, name="granite", model_types=("granite",))

# Turns neighbouring features of query and key.
ERNIE4_5 = replace(
    LLAMA, name="ernie4_5", model_types=("ernie4_5",), attention=replace(LLAMA.attention, pairs="neighbours")
)


def _clamped_where_configured(row: Architecture, config: Any, index: int) -> Architecture:
    assert isinstance(row.attention, AttentionRow)
    return replace(row, attention=replace(row.attention, limit=config.clip_qkv))


# The norms have no weights.
OLMO = replace(LLAMA, name="olmo", model_types=("olmo",), adapt=_clamped_where_configured)

# An MLP without a gate, and norms that subtract the mean.
STARCODER2 = replace(
    LLAMA,
    name="starcoder2",
    model_types=("starcoder2",),
    mlp=MlpRow("mlp", up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act"),
)

# As Starcoder2; the norms multiply by 1 + weight, and a part of each head is turned.
NEMOTRON = replace(
    LLAMA,
    name="nemotron",
    model_types=("nemotron",),
    norms=tuple(replace(norm, offset=1.0) for norm in LLAMA.norms),
    mlp=MlpRow("mlp", up="mlp.up_proj", down="mlp.down_proj", activation="mlp.act_fn"),
)


def _norms_of_heads(row: Architecture, config: Any, index: int) -> Architecture:
    if not config.qk_layernorm:
        return row
    assert isinstance(row.attention, AttentionRow)
    query, key = LAYER_NORMS.query_norm, LAYER_NORMS.key_norm
    return replace(row, attention=replace(row.attention, query_norm=query, key_norm=key, heads_first=True))


# Attention and MLP stand side by side behind one norm.
PHI = replace(
    LLAMA,
    name="phi",
    model_types=("phi",),
    stem=("embed_tokens", "embed_dropout", "rotary_emb"),
    head=("final_layernorm",),
    norms=(NormRow("input_layernorm", "both"),),
    attention=replace(LLAMA.attention, output="self_attn.dense"),
    mlp=MlpRow("mlp", up="mlp.fc1", down="mlp.fc2", activation="mlp.activation_fn"),
    adapt=_norms_of_heads,
)


def _parallel_where_configured(row: Architecture, config: Any, index: int) -> Architecture:
    row = _norms_of_heads(row, config, index)
    return replace(row, norms=PHI.norms) if config.use_parallel_residual else row


STABLELM = replace(LLAMA, name="stablelm", model_types=("stablelm",), adapt=_parallel_where_configured)


def _norms_where_configured(row: Architecture, config: Any, index: int) -> Architecture:
    if not config.use_qk_norm:
        return row
    assert isinstance(row.attention, AttentionRow)
    query, key = HEAD_NORMS.query_norm, HEAD_NORMS.key_norm
    return replace(row, attention=replace(row.attention, query_norm=query, key_norm=key))


# As Phi, with a gate; neighbouring features are turned. Some layers of Cohere2 have no rotary embedding.
COHERE = replace(
    LLAMA,
    name="cohere",
    model_types=("cohere",),
    norms=PHI.norms,
    attention=replace(LLAMA.attention, angles="neighbours", pairs="neighbours"),
    adapt=_norms_where_configured,
)


def _rotary_in_windows(row: Architecture, config: Any, index: int) -> Architecture:
    assert isinstance(row.attention, AttentionRow)
    windows = config.sliding_window is not None
    slides = config.layer_types[index] == "sliding_attention"
    everywhere = row.name == "exaone4" and not windows
    return replace(row, attention=replace(row.attention, rotary=everywhere or (windows and slides)))


COHERE2 = replace(COHERE, name="cohere2", model_types=("cohere2",), adapt=_rotary_in_windows)

QWEN3 = replace(LLAMA, name="qwen3", model_types=("qwen3",), attention=HEAD_NORMS)

MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    model_types=("mixtral",),
    mlp=None,
    experts=ExpertsRow("mlp", path="mlp.experts", router="mlp.gate"),
)

# Beside the chosen experts every token goes through a shared one, whose output a number per token multiplies.
QWEN2_MOE = replace(
    LLAMA,
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    experts=MIXTRAL.experts,
    beside=LayersRow(
        "mlp",
        (("mlp.input", ("shared_expert.gate_proj", "shared_expert.up_proj")), (None, ("shared_expert.down_proj",))),
    ),
)

QWEN3_MOE = replace(QWEN3, name="qwen3_moe", model_types=("qwen3_moe",), experts=MIXTRAL.experts)

GPT_OSS = replace(
    LLAMA,
    name="gpt_oss",
    model_types=("gpt_oss",),
    attention=replace(LLAMA.attention, angles="once"),
    mlp=None,
    experts=ExpertsRow(
        "mlp",
        path="mlp.experts",
        router="mlp.router",
        activation=None,
        transposed=True,
        interleaved=True,
        bias=True,
        limit="limit",
        alpha="alpha",
        up_offset=1.0,
    ),
)


def _latent_norms_where_configured(row: Architecture, config: Any, index: int) -> Architecture:
    names = ("kv_a_layernorm",) if config.q_lora_rank is None else ("q_a_layernorm", "kv_a_layernorm")
    return replace(row, norms=(*row.norms, *(NormRow(f"self_attn.{name}", "other") for name in names)))


# Latent attention: queries, and keys and values, go through a narrow layer first; keys are put together of two parts.
DEEPSEEK_V3 = replace(
    LLAMA,
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    attention=LayersRow(
        "self_attn",
        (
            ("attention.input", ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")),
            (None, ("q_b_proj",)),
            (None, ("kv_b_proj",)),
            ("attention.mixed", ("o_proj",)),
        ),
    ),
    experts=MIXTRAL.experts,
    beside=LayersRow("mlp.shared_experts", (("mlp.input", ("gate_proj", "up_proj")), (None, ("down_proj",)))),
    adapt=_latent_norms_where_configured,
)

# Latent attention, and an MLP without a gate.
PLM = replace(
    LLAMA,
    name="plm",
    model_types=("plm",),
    attention=DEEPSEEK_V3.attention,
    mlp=NEMOTRON.mlp,
    adapt=_latent_norms_where_configured,
)

PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    attention=AttentionRow(
        "self_attn", query_key_value="self_attn.qkv_proj", layout="parts", output="self_attn.o_proj", rotary=True
    ),
    mlp=MlpRow("mlp", gate_up="mlp.gate_up_proj", down="mlp.down_proj", activation="mlp.activation_fn"),
)

# A second norm stands behind attention and behind the MLP: what leaves it is added to the residual stream.
OLMO2 = replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2",),
    norms=(
        NormRow("post_attention_layernorm", "other", feeds_residual=True),
        NormRow("post_feedforward_layernorm", "other", feeds_residual=True),
    ),
    attention=replace(HEAD_NORMS, added="post_attention_layernorm"),
    mlp=replace(LLAMA.mlp, added="post_feedforward_layernorm"),
)

# As Olmo2, with norms of query and key per head. Of a model with windows only the layers with a window are turned.
EXAONE4 = replace(
    OLMO2,
    name="exaone4",
    model_types=("exaone4",),
    attention=replace(HEAD_NORMS, heads_first=True, added="post_attention_layernorm"),
    adapt=_rotary_in_windows,
)

# Norms before and behind attention and MLP; half of each head is turned, in neighbouring features.
GLM4 = replace(
    PHI3,
    name="glm4",
    model_types=("glm4",),
    norms=(
        *LLAMA.norms,
        NormRow("post_self_attn_layernorm", "other", feeds_residual=True),
        NormRow("post_mlp_layernorm", "other", feeds_residual=True),
    ),
    attention=replace(LLAMA.attention, pairs="neighbours", added="post_self_attn_layernorm"),
    mlp=MlpRow(
        "mlp",
        gate_up="mlp.gate_up_proj",
        down="mlp.down_proj",
        activation="mlp.activation_fn",
        added="post_mlp_layernorm",
    ),
)

# Norms of query and key over all heads together; experts as Mixtral's.
OLMOE = replace(MIXTRAL, name="olmoe", model_types=("olmoe",), attention=HEAD_NORMS, adapt=_clamped_where_configured)

# The norms of Gemma multiply by 1 + weight.
GEMMA = replace(
    LLAMA,
    name="gemma",
    model_types=("gemma",),
    norms=tuple(replace(norm, offset=1.0) for norm in LLAMA.norms),
)

GEMMA2 = replace(
    OLMO2,
    name="gemma2",
    model_types=("gemma2",),
    norms=(
        NormRow("input_layernorm", "attention", 1.0),
        NormRow("pre_feedforward_layernorm", "mlp", 1.0),
        *(replace(norm, offset=1.0) for norm in OLMO2.norms),
    ),
    attention=replace(LLAMA.attention, added="post_attention_layernorm"),
)

GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    norms=(*GEMMA2.norms, NormRow("self_attn.q_norm", "other", 1.0), NormRow("self_attn.k_norm", "other", 1.0)),
    attention=replace(HEAD_NORMS, heads_first=True, added="post_attention_layernorm"),
)


def _convolution_where_configured(row: Architecture, config: Any, index: int) -> Architecture:
    if config.layer_types[index] != "conv":
        return row
    norms = tuple(replace(norm, role="other") if norm.role == "attention" else norm for norm in row.norms)
    layers = LayersRow("conv", ((None, ("in_proj",)), (None, ("out_proj",))))
    return replace(row, norms=norms, attention=None, beside=layers)


# Blocks with attention and blocks with a short convolution between two gates, of which the linear layers are known. The
# MLP calls its nonlinearity as a function, so that no module shows gate and preactivation.
LFM2 = replace(
    LLAMA,
    name="lfm2",
    model_types=("lfm2",),
    head=("embedding_norm",),
    norms=(NormRow("operator_norm", "attention"), NormRow("ffn_norm", "mlp")),
    attention=replace(LAYER_NORMS, output="self_attn.out_proj"),
    mlp=LayersRow("feed_forward", (("mlp.input", ("w1", "w3")), ("mlp.hidden", ("w2",)))),
    adapt=_convolution_where_configured,
)

ROWS = (
    *(LLAMA, SMOLLM3, GRANITE, ERNIE4_5, OLMO, STARCODER2, NEMOTRON, PHI, STABLELM, COHERE, COHERE2, QWEN3, PHI3),
    *(OLMO2, EXAONE4, GLM4, GEMMA, GEMMA2, GEMMA3, LFM2),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GPT_OSS, DEEPSEEK_V3, PLM),
)
