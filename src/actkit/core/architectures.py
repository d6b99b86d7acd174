"""One declarative row per architecture family: where its norms, linear layers and nonlinearities are.

Paths in a row are relative: those of `blocks`, `stem` and `head` to the base model, all others to one block. A
model_type is listed only where its modeling file has exactly this layout and a test reads every site of it. What
depends on the configuration or differs between the blocks of a model is a small function beside the row (`adapt`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from actkit.core.fused import FusedLayout

Role = Literal["attention", "mlp", "other"]


@dataclass(frozen=True)
class NormRow:
    """A norm. role: what reads it. offset: added to its weight before use. feeds_residual: the residual stream reads
    it too (post-norm), so that no scale can be moved out of it."""

    path: str
    role: Role
    offset: float = 0.0
    feeds_residual: bool = False


@dataclass(frozen=True)
class AttentionRow:
    """Attention. Either query, key and value, or one fused query_key_value.

    layout: of the rows of query_key_value (`core/fused.py`); None where it is not known, and then query, key and value
    cannot be read and no scale moves out of value. query_norm, key_norm: norms before the rotary embedding, of each
    head or of all side by side. heads_first: these norms are called on [batch, heads, length, head_dim]. rotary: the
    first features of query and key are turned, as many as the tables have. single_angles: the tables have each angle
    once, not twice. added: the module whose output is added to the residual stream, where that is not the attention
    module.
    """

    path: str
    output: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    query_key_value: str | None = None
    layout: FusedLayout | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    heads_first: bool = False
    rotary: bool = False
    single_angles: bool = False
    added: str | None = None


@dataclass(frozen=True)
class LayersRow:
    """A part that computes in a way of its own, of which only the linear layers are described.

    path: its module. linear_inputs: (site, layers) pairs, of the layers that read one tensor: the site's, or with None
    one that has no name. Layers are named inside the module; those that a model does not have are left out.
    """

    path: str
    linear_inputs: tuple[tuple[str | None, tuple[str, ...]], ...]


@dataclass(frozen=True)
class MlpRow:
    """An MLP: down(activation(up)), or down(activation(gate) * up).

    path: the module that is the MLP; where there is none, the one whose output shows what changed inputs do. Either
    up, or gate_up: one layer whose rows are first the gate's, then up's. flat: the layers are called on
    [batch * length, channels]. added: as in AttentionRow.
    """

    path: str
    down: str
    activation: str
    up: str | None = None
    gate: str | None = None
    gate_up: str | None = None
    flat: bool = False
    added: str | None = None


@dataclass(frozen=True)
class ExpertsRow:
    """Gated experts kept as 3-D parameters, one matrix per expert.

    module: what the block calls (its input and output are those of the MLP). path, router: inside the block. The
    other names are attributes of the experts' module. transposed: matrices are [in, out], not [out, in]. interleaved:
    gate and up alternate, instead of first all gates, then all ups. bias: parameters with the suffix `_bias` exist.
    limit: attribute with the bound to which gate (from above) and up (both sides) are clamped. alpha: attribute with
    the slope of x * sigmoid(alpha * x), for experts that have no activation module. up_offset: added to up.
    """

    module: str
    path: str
    router: str
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    activation: str | None = "act_fn"
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    limit: str | None = None
    alpha: str | None = None
    up_offset: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """A family. model_types: values of `config.model_type`. heads, key_value_heads: names in the config.

    Where both mlp and experts are given, a block has experts if it has a module at `experts.path`, else the MLP.
    shared: what every token goes through beside the experts. adapt: (row, config, index) -> the row of that block, for
    what the configuration decides.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    stem: tuple[str, ...]
    head: tuple[str, ...]
    norms: tuple[NormRow, ...]
    attention: AttentionRow | LayersRow | None = None
    mlp: MlpRow | None = None
    experts: ExpertsRow | None = None
    shared: LayersRow | None = None
    heads: str = "num_attention_heads"
    key_value_heads: str = "num_key_value_heads"
    adapt: Callable[[Architecture, Any, int], Architecture] | None = None

    def of_block(self, config: Any, index: int) -> Architecture:
        """The row of one block."""
        return self if self.adapt is None else self.adapt(self, config, index)


_rows: dict[str, Architecture] = {}


def register_architecture(row: Architecture) -> None:
    """Make a family known. Raises ValueError for a model_type that another row describes already."""
    for model_type in row.model_types:
        if _rows.get(model_type, row) != row:
            raise ValueError(f"model_types: {model_type!r} is described already by the row {_rows[model_type].name!r}.")
    _rows.update(dict.fromkeys(row.model_types, row))


def find_architecture(model_type: str | None) -> Architecture | None:
    """The row of a model_type; a model changed by actkit ('actkit_llama') has the row of its base."""
    return _rows.get((model_type or "").removeprefix("actkit_"))


def known_model_types() -> tuple[str, ...]:
    """All model types that have a row, sorted."""
    return tuple(sorted(_rows))


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
assert isinstance(LLAMA.attention, AttentionRow) and LLAMA.mlp is not None
HEAD_NORMS = replace(LLAMA.attention, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")


def _rotary_where_configured(row: Architecture, config: Any, index: int) -> Architecture:
    assert isinstance(row.attention, AttentionRow)
    return replace(row, attention=replace(row.attention, rotary=bool(config.no_rope_layers[index])))


SMOLLM3 = replace(LLAMA, name="smollm3", model_types=("smollm3",), adapt=_rotary_where_configured)

QWEN3 = replace(LLAMA, name="qwen3", model_types=("qwen3",), attention=HEAD_NORMS)

MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    model_types=("mixtral",),
    mlp=None,
    experts=ExpertsRow("mlp", path="mlp.experts", router="mlp.gate"),
)

QWEN3_MOE = replace(QWEN3, name="qwen3_moe", model_types=("qwen3_moe",), experts=MIXTRAL.experts)

GPT_OSS = replace(
    LLAMA,
    name="gpt_oss",
    model_types=("gpt_oss",),
    attention=replace(LLAMA.attention, single_angles=True),
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
    shared=LayersRow("mlp.shared_experts", (("mlp.input", ("gate_proj", "up_proj")), (None, ("down_proj",)))),
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

GPT2 = Architecture(
    name="gpt2",
    model_types=("gpt2",),
    blocks="h",
    stem=("wte", "wpe", "drop"),
    head=("ln_f",),
    norms=(NormRow("ln_1", "attention"), NormRow("ln_2", "mlp")),
    attention=AttentionRow("attn", query_key_value="attn.c_attn", layout="parts", output="attn.c_proj"),
    mlp=MlpRow("mlp", up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act"),
)

# Attention and MLP read the same hidden states, or the MLP those after attention: the same layers, another sum.
GPT_NEOX = Architecture(
    name="gpt_neox",
    model_types=("gpt_neox",),
    blocks="layers",
    stem=("embed_in", "emb_dropout", "rotary_emb"),
    head=("final_layer_norm",),
    norms=(NormRow("input_layernorm", "attention"), NormRow("post_attention_layernorm", "mlp")),
    attention=AttentionRow(
        "attention",
        query_key_value="attention.query_key_value",
        layout="by_head",
        output="attention.dense",
        rotary=True,
    ),
    mlp=MlpRow("mlp", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", activation="mlp.act"),
)


def _norms_where_configured(row: Architecture, config: Any, index: int) -> Architecture:
    if config.do_layer_norm_before:
        return row
    post = (NormRow("self_attn_layer_norm", "mlp"), NormRow("final_layer_norm", "other"))
    return replace(row, norms=tuple(replace(norm, feeds_residual=True) for norm in post))


# No module is the whole MLP. The query's site is before OPT scales it by 1 / sqrt(head_dim).
OPT = Architecture(
    name="opt",
    model_types=("opt",),
    blocks="decoder.layers",
    stem=("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"),
    head=("decoder.final_layer_norm", "decoder.project_out"),
    norms=(NormRow("self_attn_layer_norm", "attention"), NormRow("final_layer_norm", "mlp")),
    attention=AttentionRow(
        "self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
    ),
    mlp=MlpRow("fc1", up="fc1", down="fc2", activation="activation_fn", flat=True, added="fc2"),
    adapt=_norms_where_configured,
)

# Post-norm: the norm after attention is read by the MLP and by the residual stream; the one after the MLP leaves the
# block. No module is the whole MLP; the row names the one with up projection and nonlinearity.
BERT = Architecture(
    name="bert",
    model_types=("bert", "roberta"),
    blocks="encoder.layer",
    stem=("embeddings",),
    head=("pooler",),
    norms=(
        NormRow("attention.output.LayerNorm", "mlp", feeds_residual=True),
        NormRow("output.LayerNorm", "other", feeds_residual=True),
    ),
    attention=AttentionRow(
        "attention",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        added="attention.output.dropout",
    ),
    mlp=MlpRow(
        "intermediate",
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        added="output.dropout",
    ),
)

# One dropout module serves attention and MLP, so it cannot be tapped: the sites are read just before it, which is the
# same in evaluation.
VIT = Architecture(
    name="vit",
    model_types=("vit", "deit"),
    blocks="layers",
    stem=("embeddings",),
    head=("layernorm", "pooler"),
    norms=(NormRow("layernorm_before", "attention"), NormRow("layernorm_after", "mlp")),
    attention=AttentionRow(
        "attention",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.o_proj",
    ),
    mlp=MlpRow("mlp", up="mlp.fc1", down="mlp.fc2", activation="mlp.activation_fn"),
)

for _row in (
    *(LLAMA, SMOLLM3, QWEN3, PHI3, OLMO2, GEMMA, GEMMA2, GEMMA3),
    *(MIXTRAL, QWEN3_MOE, GPT_OSS, DEEPSEEK_V3),
    *(GPT2, GPT_NEOX, OPT, BERT, VIT),
):
    register_architecture(_row)
