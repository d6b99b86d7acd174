"""Small models of the families that the decoder takes."""

from __future__ import annotations

import torch
import transformers

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EVERYWHERE = {"sliding_window": None, "layer_types": ["full_attention", "full_attention"]}
BIASES = {"attention_bias": True, "mlp_bias": True}
MULTIPLIERS = {
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
EQUAL = {"num_key_value_heads": 4}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
# The families that are Llama's kin, and what their configurations can say: first word of the class, settings.
FAMILIES = {
    "granite": ("Granite", {**MULTIPLIERS, **BIASES}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 32, "use_bias": True}),
    "olmo": ("Olmo", {}),
    "olmo, clamped": ("Olmo", {"clip_qkv": 0.5}),
    "starcoder2": ("Starcoder2", {"sliding_window": 5}),
    "nemotron": ("Nemotron", {"head_dim": 32, "partial_rotary_factor": 0.5, **BIASES}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "stablelm, side by side": ("StableLm", {"use_parallel_residual": True}),
    "cohere": ("Cohere", {"logit_scale": 0.5, "attention_bias": True}),
    "cohere2": ("Cohere2", {**WINDOWS, "logit_scale": 0.5}),
    "smollm3": ("SmolLM3", {**WINDOWS, "no_rope_layers": [1, 0], "use_sliding_window": True}),
    "exaone4": ("Exaone4", {**WINDOWS, "sliding_window_pattern": 2, "head_dim": 32}),
    "exaone4, no windows": ("Exaone4", EVERYWHERE),
    "glm4": ("Glm4", {"head_dim": 32, "attention_bias": True}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5, "sliding_window": 5}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {**WINDOWS, **CAPS, "head_dim": 32, "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3Text", {**WINDOWS, "head_dim": 32, "query_pre_attn_scalar": 20, "final_logit_softcapping": 2.0}),
    "olmo2": ("Olmo2", {}),
    "gpt_neox": ("GPTNeoX", {**EQUAL, "rotary_pct": 0.25}),
    "gpt_neox, one after the other": ("GPTNeoX", {**EQUAL, "use_parallel_residual": False, "rope_parameters": PARTIAL}),
    "opt": ("OPT", {**EQUAL, "ffn_dim": 160}),
    "llama, biases": ("Llama", {**BIASES, "head_dim": 32, "hidden_act": "gelu_new", "rms_norm_eps": 1e-3}),
    "llama turns whole heads": ("Llama", {"rope_parameters": PARTIAL}),
    "qwen2, windows": ("Qwen2", {**WINDOWS, "use_sliding_window": True}),
    "qwen2, windows off": ("Qwen2", {"sliding_window": 5, "use_sliding_window": False}),
    "qwen3, windows": ("Qwen3", {**WINDOWS, "use_sliding_window": True, "attention_bias": True}),
}


def family(name, **changes):
    """Weights that make logits of about 1 to 10, in which every term counts."""
    kind, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **SPECIAL, **settings, **changes})
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(std=0.15)
            offset = (
                "norm" in path and path.endswith("weight") and kind not in ("Nemotron", "Gemma", "Gemma2", "Gemma3Text")
            )
            parameter.add_(1.0) if offset else None
    return model
