"""A Llama of any size with random weights, made in a second or two: for measurements at a size that need no text.

Imports torch and transformers only, so that a benchmark's other environments can use it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

SPREAD = 0.02  # of the random weights, as transformers initialises a Llama
BLOCK = 1 << 22  # random numbers that are drawn; every matrix is pieced together of these


def random_llama(shape: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Make a LlamaForCausalLM in evaluation mode. shape: of its LlamaConfig; embeddings are tied if it says so."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig.from_dict({**shape, "dtype": str(dtype).removeprefix("torch.")})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()  # which initialising would have done
    source = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).mul_(SPREAD).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            for part, start in _parts(len(flat), len(source), shift=7919 * number):
                flat[part.start : part.stop] = source[start : start + len(part)]
    return model.eval()


def matrix_sizes(shape: Mapping[str, Any]) -> int:
    """Parameters of the matrices of a Llama of this shape, each once."""
    hidden, share = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    block = hidden * hidden * (2 + 2 * share) + 3 * hidden * shape["intermediate_size"]
    ends = 1 if shape.get("tie_word_embeddings") else 2
    return int(block * shape["num_hidden_layers"] + ends * hidden * shape["vocab_size"])


def _parts(length: int, available: int, shift: int) -> Iterator[tuple[range, int]]:
    """Pieces of a matrix, each with where its values start; no two matrices begin at the same place."""
    at, start = 0, shift % (available // 2)
    while at < length:
        count = min(length - at, available - start)
        yield range(at, at + count), start
        at, start = at + count, (start + 104729) % (available // 2)
