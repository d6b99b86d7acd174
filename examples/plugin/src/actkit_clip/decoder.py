"""The form of a decoder: the model's own forward pass, with transformers' cache.

It is no faster than `model.generate`, and is registered under no name. To be used, a decoder must be in the entry-point
group `actkit.decoders`, and its layers must say `decodes_as`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from actkit.core.ground.errors import DataError, MemoryLimitError, UnsupportedModelError


class ClippedDecoder:
    """Decodes Llamas, clipped or not, until it is closed.

    Args:
        model: a Llama.
        capacity: tokens that the cache may hold.
        decode_only: not used, as it keeps no weights of its own.
    """

    nbytes = 0  # the weights are those of the model

    def __init__(self, model: nn.Module, *, capacity: int, decode_only: bool = False) -> None:
        reason = self.supports(model)
        if reason is not None:
            raise UnsupportedModelError(f"model: {type(model).__name__} cannot be decoded here: {reason}.")
        self.model: Any = model
        self.capacity, self.threads = capacity, torch.get_num_threads()
        config = self.model.config
        width = config.num_key_value_heads * config.head_dim
        self.cache_bytes = 2 * config.num_hidden_layers * width * capacity * self.model.dtype.itemsize
        if self.cache_bytes > psutil.virtual_memory().available:
            raise MemoryLimitError(f"capacity: {capacity} tokens take {self.cache_bytes} bytes; give a smaller one.")
        self.reset()

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        """Return why it cannot decode a model, or None."""
        return None if isinstance(model, LlamaForCausalLM) else "it is no Llama"

    def reset(self) -> None:
        """Forget all tokens."""
        self.cache, self.position = DynamicCache(), 0

    @torch.no_grad()
    def __call__(self, new: Sequence[int]) -> Tensor:
        """Return the logits of the token after some more tokens: float32 [vocabulary]."""
        if self.model is None:
            raise ValueError("decoder: it was closed; build another one.")
        if not new or not 0 <= min(new) <= max(new) < self.model.config.vocab_size:
            raise DataError(f"new: {list(new)} was given; give tokens below {self.model.config.vocab_size}.")
        if self.position + len(new) > self.capacity:
            raise DataError(f"capacity: {self.capacity} tokens fit, {self.position + len(new)} were given; reset() it.")
        output = self.model(input_ids=torch.tensor([list(new)]), past_key_values=self.cache, use_cache=True)
        self.position += len(new)
        return output.logits[0, -1].float()

    def close(self) -> None:
        """Give the cache back; it decodes no more. More than once is fine."""
        self.model = self.cache = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
