"""Tiny random models of every family and batches for them: what to run a method's checks on.

for kind in KINDS:
    check_transform(MyMethod(), tiny_model(kind), tiny_batches(kind))

KINDS has one model of each structure, ARCHITECTURES one of every model type that has a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.store.pretrained import find_class

HIDDEN, INNER, HEADS, VOCABULARY = 16, 24, 4, 40
ENCODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
WORDS = {**ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
DECODER = {**WORDS, "num_key_value_heads": 2}
IMAGES = {**ENCODER, "image_size": 8, "patch_size": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": HEADS, "n_positions": 32}
# kind -> the first word of its classes, what its model is for, its config
SETTINGS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("Llama", "CausalLM", {**DECODER, "tie_word_embeddings": True}),
    "mistral": ("Mistral", "CausalLM", {**DECODER, "sliding_window": 4}),
    "qwen2": ("Qwen2", "CausalLM", DECODER),
    "qwen3": ("Qwen3", "CausalLM", {**DECODER, "head_dim": 8}),
    "granite": (
        "Granite",
        "CausalLM",
        {
            **DECODER,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    "ernie4_5": ("Ernie4_5", "CausalLM", {**DECODER, "head_dim": 8, "use_bias": True}),
    "olmo": ("Olmo", "CausalLM", {**DECODER, **SPECIAL, "clip_qkv": 0.5}),
    "starcoder2": ("Starcoder2", "CausalLM", {**DECODER, **SPECIAL, "sliding_window": 4}),
    "nemotron": ("Nemotron", "CausalLM", {**DECODER, **SPECIAL, "head_dim": 8, "partial_rotary_factor": 0.5}),
    "phi": ("Phi", "CausalLM", {**DECODER, **SPECIAL, "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "stablelm": ("StableLm", "CausalLM", {**DECODER, **SPECIAL, "partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "cohere": ("Cohere", "CausalLM", {**DECODER, **SPECIAL, "use_qk_norm": True, "logit_scale": 0.5}),
    "cohere2": ("Cohere2", "CausalLM", {**DECODER, **SPECIAL, **WINDOWS}),
    "smollm3": ("SmolLM3", "CausalLM", {**DECODER, **SPECIAL, "no_rope_layers": [1, 0]}),
    "phi3": ("Phi3", "CausalLM", {**DECODER, **SPECIAL, "partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2", "CausalLM", {**DECODER, **SPECIAL}),
    "exaone4": ("Exaone4", "CausalLM", {**DECODER, **SPECIAL, **WINDOWS, "head_dim": 8, "sliding_window_pattern": 2}),
    "glm4": ("Glm4", "CausalLM", {**DECODER, **SPECIAL, "head_dim": 8, "attention_bias": True}),
    "lfm2": (
        "Lfm2",
        "CausalLM",
        {
            **DECODER,
            **SPECIAL,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "conv_bias": True,
        },
    ),
    "gemma": ("Gemma", "CausalLM", {**DECODER, "head_dim": 4}),
    "gemma2": ("Gemma2", "CausalLM", {**DECODER, **WINDOWS, "head_dim": 4}),
    "gemma3_text": ("Gemma3", "CausalLM", {**DECODER, **WINDOWS, "head_dim": 4}),
    "mixtral": ("Mixtral", "CausalLM", {**DECODER, "num_local_experts": 4}),
    "olmoe": (
        "Olmoe",
        "CausalLM",
        {**DECODER, **SPECIAL, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5, "norm_topk_prob": False},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        "CausalLM",
        {
            **DECODER,
            "mlp_only_layers": [0],
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        "CausalLM",
        {
            **DECODER,
            "head_dim": 4,
            "mlp_only_layers": [0],
            "moe_intermediate_size": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "gpt_oss": (
        "GptOss",
        "CausalLM",
        {
            **DECODER,
            **WINDOWS,
            "head_dim": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 2.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        "CausalLM",
        {
            **WORDS,
            "num_key_value_heads": HEADS,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
        },
    ),
    "plm": (
        "PLM",
        "CausalLM",
        {
            **WORDS,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 4,
            "kv_lora_rank": 8,
        },
    ),
    "gpt2": ("GPT2", "LMHeadModel", {**GPT2, "vocab_size": VOCABULARY}),
    "gpt_neox": ("GPTNeoX", "CausalLM", {**WORDS, "rotary_pct": 0.5}),
    "gptj": ("GPTJ", "CausalLM", {**GPT2, "vocab_size": VOCABULARY, "rotary_dim": 2}),
    "gpt_neo": (
        "GPTNeo",
        "CausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_layers": 2,
            "num_heads": HEADS,
            "max_position_embeddings": 32,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "bloom": ("Bloom", "CausalLM", {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 2, "n_head": HEADS}),
    "falcon": (
        "Falcon",
        "CausalLM",
        {
            **WORDS,
            "ffn_hidden_size": INNER,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": True,
            "activation": "gelu",
        },
    ),
    "opt": ("OPT", "CausalLM", {**WORDS, "ffn_dim": INNER}),
    "bert": ("Bert", "SequenceClassification", {**ENCODER, "vocab_size": VOCABULARY}),
    "roberta": ("Roberta", "SequenceClassification", {**ENCODER, "vocab_size": VOCABULARY, "pad_token_id": 0}),
    "vit": ("ViT", "ImageClassification", IMAGES),
    "deit": ("DeiT", "ImageClassification", IMAGES),
    "class_token_vit": ("ClassTokenViT", "ImageClassification", {**IMAGES, "num_labels": 3}),
}
ARCHITECTURES = tuple(SETTINGS)
KINDS = ("llama", "gemma", "mixtral", "gpt2", "bert", "vit", "mlp")


class TinyMlp(nn.Module):
    """A model that no library knows, so that it is traced: [..., 16] -> [..., 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(HIDDEN, INNER), nn.ReLU(), nn.Linear(INNER, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


def tiny_model(kind: str, **changes: Any) -> Any:
    """Make a float32 model in evaluation mode with two blocks ('mlp': two linear layers) and random weights.

    Decoders that can have it use grouped-query attention; llama also has tied embeddings; mlp is traced. If a family
    mixes kinds of blocks, the two are one of each. Norms and biases are drawn too, so that a forgotten one shows.

    Args:
        kind: one of KINDS or ARCHITECTURES (model types).
        changes: entries of the config.

    Returns:
        The model; for the same arguments the same weights.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in (*KINDS, *ARCHITECTURES):
        raise ValueError(f"kind: {kind!r} was given, allowed are {', '.join(dict.fromkeys((*KINDS, *ARCHITECTURES)))}.")
    torch.manual_seed(0)
    if kind == "mlp":
        model: Any = TinyMlp()
    else:
        name, task, settings = SETTINGS[kind]
        cls: Any = find_class(f"{name}{'For' * (kind != 'gpt2')}{task}")
        model = cls(cls.config_class(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(0.0 if name.endswith("bias") or kind.startswith("gemma") else 1.0)
    return model.eval()


def tiny_batches(kind: str, *, seed: int = 1, lengths: tuple[tuple[int, ...], ...] = ((9, 4, 6), (7, 2))) -> list[Any]:
    """Make one batch per entry of `lengths`, with a row for each number in it: so many token ids, padded on the right.

    Args:
        kind: as in `tiny_model`.
        seed: of the values.
        lengths: tokens of each row of each batch; images and vectors take the number of rows only.

    Returns:
        Batches as the model takes them.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind in ("vit", "deit", "class_token_vit"):
        return [{"pixel_values": torch.randn(len(rows), 3, 8, 8, generator=generator)} for rows in lengths]
    if kind == "mlp":
        return [torch.randn(8 * len(rows), HIDDEN, generator=generator) for rows in lengths]
    found = []
    for rows in lengths:
        ids = torch.randint(1, VOCABULARY, (len(rows), max(rows)), generator=generator)
        mask = (torch.arange(max(rows)) < torch.tensor(rows)[:, None]).long()
        found.append({"input_ids": ids, "attention_mask": mask})
    return found
