"""Fixed inputs for a model: the same rows for the same seed, in this process and in a fresh one.

What a model takes (tokens of a vocabulary, images, features) is read off its configuration or its first layer, so that
a reload can be compared and a speed be measured without any data.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.limits import context_length, text_config
from actkit.core.ground.errors import DataError
from actkit.core.layers.linear import ActLinear

# The first input of a model of tokens, and the second one of an encoder-decoder, as transformers calls them.
TOKENS, DECODER_TOKENS = "input_ids", "decoder_input_ids"
ADDED = {"labels", "attention_mask", "decoder_attention_mask", "position_ids", "token_type_ids"}
LONGEST = 64  # tokens of a fixed sequence, unless told otherwise


@dataclass(frozen=True)
class Inputs:
    """What a model can be called with.

    vocabulary: how many tokens it embeds, None where it takes none. context: its longest sequence, None where its
    configuration states none. shape: of one image or feature vector, None where it takes tokens or does not say.
    keywords: the names its call knows among input_ids, pixel_values, attention_mask and decoder_input_ids. causal: it
    predicts the next token; not an encoder-decoder, which takes two sequences.
    """

    vocabulary: int | None
    context: int | None
    shape: tuple[int, ...] | None
    keywords: tuple[str, ...]
    causal: bool

    @classmethod
    def of(cls, model: nn.Module) -> Inputs:
        """Read off a model."""
        vocabulary = vocabulary_size(model)
        parameters = inspect.signature(model.forward).parameters.values()
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        named = {p.name for p in parameters}
        keys = (TOKENS, "pixel_values")
        beside = ("attention_mask", DECODER_TOKENS)
        keywords = tuple(key for key in keys if key in named or anything) + tuple(key for key in beside if key in named)
        can_generate: Any = getattr(model, "can_generate", None)
        writes = vocabulary is not None and can_generate is not None and bool(can_generate())
        causal = writes and DECODER_TOKENS not in named
        if (
            not writes and {TOKENS, "pixel_values"} <= named
        ):  # text and images (CLIP); a model that writes can do without
            return cls(None, None, None, keywords, causal)
        return cls(vocabulary, context_length(model), None if vocabulary else input_shape(model), keywords, causal)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Inputs:
        """What `to_dict` wrote, also after a way through JSON."""
        shape = content["shape"]
        return cls(**{**content, "shape": shape and tuple(shape), "keywords": tuple(content["keywords"])})

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)

    def batch(self, rows: int = 2, length: int | None = None, seed: int = 0) -> Any:
        """Fixed random rows, on the CPU.

        {"input_ids": int64 [rows, length], "attention_mask": ones}, also "decoder_input_ids" for an encoder-decoder, or
        uniform values in [0, 1) of the shape
        [rows, *shape], by keyword where the model's call knows it. length: of the sequences, min(64, context) where
        None. Raises ValueError beyond the context, DataError where the model does not say what it takes.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary is not None:
            length = min(LONGEST, self.context or LONGEST) if length is None else length
            if self.context is not None and length > self.context:
                raise ValueError(f"length: {length} tokens were asked for, the model's context is {self.context}.")
            ids = torch.randint(self.vocabulary, (rows, length), generator=generator)
            return self.of_tokens(ids, generator)
        if self.shape is None:
            raise DataError(
                "batch: the model does not say what it takes (no vocabulary, image size or input_shape); pass batch=, "
                "one batch that it can be called with."
            )
        return self.named("pixel_values", torch.rand((rows, *self.shape), generator=generator))

    def covers(self, batch: Any) -> bool:
        """Whether `batch` makes all that a batch of the user's holds, up to labels and what a model adds by itself."""
        if self.vocabulary is None and self.shape is None:
            return False
        made = {TOKENS, DECODER_TOKENS} if self.vocabulary is not None else {"pixel_values"}
        return not isinstance(batch, Mapping) or set(batch) <= made | ADDED

    def of_tokens(self, ids: Tensor, generator: torch.Generator) -> Any:
        """A batch of token ids int64 [batch, length]; with random ones for a decoder, if it takes another sequence."""
        batch = self.named(TOKENS, ids)
        if isinstance(batch, dict) and "attention_mask" in self.keywords:
            batch["attention_mask"] = torch.ones_like(ids)
        if isinstance(batch, dict) and DECODER_TOKENS in self.keywords:
            assert self.vocabulary is not None
            batch[DECODER_TOKENS] = torch.randint(self.vocabulary, ids.shape, generator=generator)
        return batch

    def named(self, key: str, tensor: Tensor) -> Any:
        """A dict if the model's call knows the keyword, else the bare tensor."""
        return {key: tensor} if key in self.keywords else tensor


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model takes two sequences: one to encode, one to decode. Its encoder alone does not."""
    return DECODER_TOKENS in inspect.signature(model.forward).parameters


def example_of(model: nn.Module, batches: Any, rows: int = 2) -> Any:
    """The first rows of the batches, for a model that fixed random rows do not do for; None if they do, or there are no
    batches to read twice."""
    if not isinstance(batches, Sequence) or not len(batches) or Inputs.of(model).covers(batches[0]):
        return None
    return first_rows(batches[0], rows)


def first_rows(batch: Any, rows: int) -> Any:
    """The first rows of a batch: tensors with a row of each of its examples are cut, all others stay."""
    tensors = list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else [batch]
    size = next((len(value) for value in tensors if isinstance(value, Tensor) and value.dim()), 0)

    def cut(value: Any) -> Any:
        return value[:rows] if isinstance(value, Tensor) and value.dim() and len(value) == size else value

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return tuple(map(cut, batch)) if isinstance(batch, tuple) else cut(batch)


def fit_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its float tensors in the model's dtype: images are float32, the weights may be 16-bit."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, tuple):
        return tuple(fit_dtype(item, dtype) for item in batch)
    return {key: fit_dtype(value, dtype) for key, value in batch.items()} if isinstance(batch, Mapping) else batch


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most bytes of the floating parameters have; float32 without any."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def unsaved_dtypes(model: nn.Module) -> dict[str, str]:
    """The dtypes of float buffers that no checkpoint holds (rotary tables), by name: a reload computes them anew."""
    found = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set and buffer.is_floating_point():
                found[f"{path}.{name}" if path else name] = str(buffer.dtype).removeprefix("torch.")
    return found


def vocabulary_size(model: nn.Module) -> int | None:
    """How many tokens the model embeds; None if it embeds none, or takes something else (audio, images)."""
    if getattr(model, "main_input_name", TOKENS) != TOKENS:
        return None
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if find is None else find()
    except NotImplementedError:  # a transformers model without tokens
        embedding = None
    count = getattr(embedding, "num_embeddings", None) or getattr(text_config(model), "vocab_size", None)
    if count is None:
        first = _first_layer(model)
        count = first.num_embeddings if isinstance(first, nn.Embedding) else None
    return count


def input_shape(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of one example of a model that takes no tokens, if the model says it."""
    stated: Any = getattr(model, "input_shape", None)
    if isinstance(stated, tuple | list):
        return tuple(int(size) for size in stated)
    config: Any = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return getattr(config, "num_channels", 3), height, width
    timm: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(timm, Mapping) and "input_size" in timm:
        return tuple(timm["input_size"])
    first = _first_layer(model) if config is None else None
    features = getattr(first, "in_features", None)  # nn.Linear or what replaced it
    return None if features is None else (int(features),)


def _first_layer(model: nn.Module) -> nn.Module | None:
    owners = (m for m in model.modules() if isinstance(m, ActLinear) or any(True for _ in m.parameters(recurse=False)))
    return next(owners, None)
