"""Small language models for experiments that train: the zoo's architecture at a fifth of its size, and text for them.

All read the tokens of the zoo's tokenizer (2048 words). Training goes through `core.train.training.train`, whose
validation split is not optional; what is reported is measured on the test split, which neither training nor validation
saw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actkit import zoo
from actkit.data import Batches, Split, load_data

LENGTH, BATCH = 128, 16  # tokens of a row, rows of a batch


def language_model(
    activation: str = "silu", *, hidden: int = 128, intermediate: int = 384, layers: int = 4, seed: int = 0, **more: Any
) -> nn.Module:
    """A Llama with gated MLPs, tied embeddings and random weights: 1.1 M parameters. more: entries of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            hidden_act=activation,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            **more,
        )
    )


def text(model: nn.Module, split: Split, rows: int | None, *, seed: int = 0, length: int = LENGTH) -> Batches:
    """Rows of the embedded text in batches of 16; None for all of the split. seed: which documents."""
    tokenizer = zoo.tokenizer("swiglu")
    return load_data(None, model, tokenizer, sequences=rows, length=length, batch_size=BATCH, seed=seed, split=split)
