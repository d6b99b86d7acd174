"""The rows of the families that came before Llama: GPT-2 and its kin, encoders of text and of images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from actkit.core.ground.errors import CoverageError
from actkit.core.model.architecture_rows import Architecture, AttentionRow, MlpRow, NormRow

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
    parallel="use_parallel_residual",
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
    model_types=("vit", "deit", "class_token_vit"),
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

# Attention and MLP stand side by side behind one norm. Each attention has rotary tables of its own, so that no call
# says how query and key are turned.
GPTJ = Architecture(
    name="gptj",
    model_types=("gptj",),
    blocks="h",
    stem=("wte", "drop"),
    head=("ln_f",),
    norms=(NormRow("ln_1", "both"),),
    attention=AttentionRow(
        "attn",
        query="attn.q_proj",
        key="attn.k_proj",
        value="attn.v_proj",
        output="attn.out_proj",
        rotary=True,
        readable=False,
    ),
    mlp=MlpRow("mlp", up="mlp.fc_in", down="mlp.fc_out", activation="mlp.act"),
)

GPT_NEO = Architecture(
    name="gpt_neo",
    model_types=("gpt_neo",),
    blocks="h",
    stem=("wte", "wpe", "drop"),
    head=("ln_f",),
    norms=(NormRow("ln_1", "attention"), NormRow("ln_2", "mlp")),
    attention=AttentionRow(
        "attn.attention",
        query="attn.attention.q_proj",
        key="attn.attention.k_proj",
        value="attn.attention.v_proj",
        output="attn.attention.out_proj",
    ),
    mlp=MlpRow("mlp", up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act"),
)


def _bloom_where_configured(row: Architecture, config: Any, index: int) -> Architecture:
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise CoverageError(
            f"slow_but_exact: with pretraining_tp={config.pretraining_tp} this model multiplies slices of its layers' "
            f"weights by hand, past the layers. Set config.slow_but_exact = False: it computes the same sums."
        )
    if not config.apply_residual_connection_post_layernorm:
        return row
    return replace(row, norms=tuple(replace(norm, feeds_residual=True) for norm in row.norms))


# Attention and MLP add the residual stream themselves; what they add to it is what their last layers give.
BLOOM = Architecture(
    name="bloom",
    model_types=("bloom",),
    blocks="h",
    stem=("word_embeddings", "word_embeddings_layernorm"),
    head=("ln_f",),
    norms=(NormRow("input_layernorm", "attention"), NormRow("post_attention_layernorm", "mlp")),
    attention=AttentionRow(
        "self_attention",
        query_key_value="self_attention.query_key_value",
        layout="by_head",
        output="self_attention.dense",
        added="self_attention.dense",
    ),
    mlp=MlpRow(
        "mlp", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", activation="mlp.gelu_impl", added="mlp.dense_4h_to_h"
    ),
    adapt=_bloom_where_configured,
)


def _falcon_where_configured(row: Architecture, config: Any, index: int) -> Architecture:
    grouped = config.new_decoder_architecture
    norms: tuple[NormRow, ...] = (NormRow("input_layernorm", "both"),)
    if not config.parallel_attn:
        norms = (NormRow("input_layernorm", "attention"), NormRow("post_attention_layernorm", "mlp"))
    elif grouped and config.num_ln_in_parallel_attn == 2:
        norms = (NormRow("ln_attn", "attention"), NormRow("ln_mlp", "mlp"))
    assert isinstance(row.attention, AttentionRow)
    return replace(
        row,
        norms=norms,
        parallel=config.parallel_attn,
        attention=replace(row.attention, rotary=not config.alibi),
        key_value_heads=config.num_kv_heads if grouped else 1 if config.multi_query else config.num_attention_heads,
    )


# Three generations: side by side behind one norm with one key-value head, behind two norms with several, or one after
# the other with as many. The model adds attention's output to the MLP's in place.
FALCON = Architecture(
    name="falcon",
    model_types=("falcon",),
    blocks="h",
    stem=("word_embeddings", "rotary_emb"),
    head=("ln_f",),
    norms=(),
    attention=AttentionRow(
        "self_attention",
        query_key_value="self_attention.query_key_value",
        layout="by_head",
        output="self_attention.dense",
    ),
    mlp=MlpRow("mlp", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", activation="mlp.act", overwritten=True),
    adapt=_falcon_where_configured,
)

ROWS = (GPT2, GPT_NEOX, GPTJ, GPT_NEO, BLOOM, FALCON, OPT, BERT, VIT)
