"""The packages that interpretation is compared with, in `.venv-interpretation` (`make interpretation-peers`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch


def add_peers() -> None:
    """Let packages of that environment be imported, behind those of this one."""
    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # it takes its kernels wherever triton is installed
    environment = Path(__file__).resolve().parent.parent / ".venv-interpretation"
    site = next(environment.glob("lib/python*/site-packages"), None)
    if site is not None and str(site) not in sys.path:
        sys.path.append(str(site))


def hooked_transformer(model: Any) -> Any:
    """The same weights in TransformerLens, unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights

    own = model.config
    settings: dict[str, Any] = {
        "n_layers": own.num_hidden_layers,
        "d_model": own.hidden_size,
        "n_heads": own.num_attention_heads,
        "d_head": own.hidden_size // own.num_attention_heads,
        "n_ctx": min(512, own.max_position_embeddings),
        "d_vocab": own.vocab_size,
    }
    if own.model_type == "llama":
        settings |= {"act_fn": "silu", "gated_mlp": True, "d_mlp": own.intermediate_size, "eps": own.rms_norm_eps}
        settings |= {"normalization_type": "RMS", "final_rms": True, "positional_embedding_type": "rotary"}
        settings |= {"rotary_dim": settings["d_head"], "rotary_adjacent_pairs": False}
        settings |= {"rotary_base": own.rope_parameters["rope_theta"], "n_key_value_heads": own.num_key_value_heads}
    else:
        settings |= {"act_fn": "gelu_new", "d_mlp": own.n_inner or 4 * own.hidden_size, "eps": own.layer_norm_epsilon}
        settings |= {"normalization_type": "LN", "positional_embedding_type": "standard"}
    hooked = HookedTransformer(HookedTransformerConfig(**settings))
    convert = convert_llama_weights if own.model_type == "llama" else convert_gpt2_weights
    weights = {name: weight.detach() for name, weight in convert(model, hooked.cfg).items()}
    off = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    hooked.load_and_process_state_dict(weights, **dict.fromkeys(off, False))
    return hooked.eval()
