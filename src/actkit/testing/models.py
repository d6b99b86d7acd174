"""Tiny random models of every family and batches for them: what to run a method's checks on.

for kind in KINDS:
    check_transform(MyMethod(), tiny_model(kind), tiny_batches(kind))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

KINDS = ("llama", "gemma", "mixtral", "gpt2", "bert", "vit", "mlp")
HIDDEN, INNER, HEADS, VOCABULARY = 16, 24, 4, 40
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
ENCODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}


class TinyMlp(nn.Module):
    """A model that no library knows, so that it is traced: [..., 16] -> [..., 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(HIDDEN, INNER), nn.ReLU(), nn.Linear(INNER, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


def tiny_model(kind: str, **changes: Any) -> Any:
    """A float32 model in evaluation mode with two blocks ('mlp': two linear layers) and random weights.

    kind: one of KINDS. llama has grouped-query attention and tied embeddings, mlp is traced. Norms and biases are drawn
    too, so that a forgotten one shows. changes: entries of the config. Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} was given, allowed are {', '.join(KINDS)}.")
    torch.manual_seed(0)
    if kind == "llama":  # grouped-query attention, tied embeddings
        model: Any = LlamaForCausalLM(LlamaConfig(**{**DECODER, "tie_word_embeddings": True, **changes}))
    elif kind == "gemma":
        model = GemmaForCausalLM(GemmaConfig(**{**DECODER, "head_dim": 4, **changes}))
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**{**DECODER, "num_local_experts": 4, **changes}))
    elif kind == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": HEADS}
        model = GPT2LMHeadModel(GPT2Config(**{**sizes, "n_positions": 32, **changes}))
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(**{**ENCODER, "vocab_size": VOCABULARY, **changes}))
    elif kind == "vit":
        model = ViTForImageClassification(ViTConfig(**{**ENCODER, "image_size": 8, "patch_size": 4, **changes}))
    else:
        model = TinyMlp()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(0.0 if name.endswith("bias") or kind == "gemma" else 1.0)
    return model.eval()


def tiny_batches(kind: str, *, seed: int = 1, lengths: tuple[tuple[int, ...], ...] = ((9, 4, 6), (7, 2))) -> list[Any]:
    """One batch per entry of `lengths`, with a row per number in it: so many token ids, padded on the right.

    Images and vectors take the number of rows only.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return [{"pixel_values": torch.randn(len(rows), 3, 8, 8, generator=generator)} for rows in lengths]
    if kind == "mlp":
        return [torch.randn(8 * len(rows), HIDDEN, generator=generator) for rows in lengths]
    found = []
    for rows in lengths:
        ids = torch.randint(1, VOCABULARY, (len(rows), max(rows)), generator=generator)
        mask = (torch.arange(max(rows)) < torch.tensor(rows)[:, None]).long()
        found.append({"input_ids": ids, "attention_mask": mask})
    return found
