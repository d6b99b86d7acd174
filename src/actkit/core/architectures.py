"""One declarative row per architecture family: where its norms, linear layers and nonlinearities are.

Paths in a row are relative: those of `blocks`, `stem` and `head` to the base model, all others to one block. A
model_type is listed only where its modeling file has exactly this layout and a test reads every site of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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
    """Attention. Either query, key and value, or one fused query_key_value whose output is their contiguous thirds.

    query_norm, key_norm: norms per head, before the rotary embedding. added: the module whose output is added to the
    residual stream, where that is not the attention module.
    """

    path: str
    output: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    query_key_value: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    rotary: bool = False
    added: str | None = None


@dataclass(frozen=True)
class MlpRow:
    """An MLP: down(activation(up)), or down(activation(gate) * up). added: as in AttentionRow."""

    path: str
    up: str
    down: str
    activation: str
    gate: str | None = None
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
    """A family. model_types: values of `config.model_type`. heads, key_value_heads: names in the config."""

    name: str
    model_types: tuple[str, ...]
    blocks: str
    stem: tuple[str, ...]
    head: tuple[str, ...]
    norms: tuple[NormRow, ...]
    attention: AttentionRow | None = None
    mlp: MlpRow | None = None
    experts: ExpertsRow | None = None
    heads: str = "num_attention_heads"
    key_value_heads: str = "num_key_value_heads"


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
assert LLAMA.attention is not None

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    model_types=("qwen3",),
    attention=replace(LLAMA.attention, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
)

GEMMA = replace(
    LLAMA,
    name="gemma",
    model_types=("gemma",),
    norms=tuple(replace(norm, offset=1.0) for norm in LLAMA.norms),
)

MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    model_types=("mixtral",),
    mlp=None,
    experts=ExpertsRow("mlp", path="mlp.experts", router="mlp.gate"),
)

GPT2 = Architecture(
    name="gpt2",
    model_types=("gpt2",),
    blocks="h",
    stem=("wte", "wpe", "drop"),
    head=("ln_f",),
    norms=(NormRow("ln_1", "attention"), NormRow("ln_2", "mlp")),
    attention=AttentionRow("attn", query_key_value="attn.c_attn", output="attn.c_proj"),
    mlp=MlpRow("mlp", up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act"),
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
    model_types=("vit",),
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

for _row in (LLAMA, QWEN3, GEMMA, MIXTRAL, GPT2, BERT, VIT):
    register_architecture(_row)
