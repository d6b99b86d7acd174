"""Fixed inputs for a model: the same rows for the same seed, in this process and in a fresh one.

What a model takes (tokens of a vocabulary, images, features) is read off its configuration or its first layer, so that
a reload can be compared and a speed be measured without any data. A model that takes something else may have a method

    def example(self, rows: int, seed: int) -> batch

which gives a batch of as many random examples, the same for the same seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import first_rows, has_rows, main_first
from actkit.core.forward.limits import DECODER_TOKENS, TOKENS, context_length, input_shape, vocabulary_size
from actkit.core.ground.errors import DataError

ADDED = {"labels", "attention_mask", "decoder_attention_mask", "position_ids", "token_type_ids"}
LONGEST = 64  # tokens of a fixed sequence, unless told otherwise


@dataclass(frozen=True)
class Inputs:
    """What a model can be called with.

    Attributes:
        vocabulary: how many tokens it embeds, None if it takes none.
        context: its longest sequence, None if its configuration states none.
        shape: of one image or feature vector, None if it takes tokens or does not say.
        keywords: the names its call knows among input_ids, pixel_values, attention_mask and decoder_input_ids.
        causal: it predicts the next token; not an encoder-decoder, which takes two sequences.
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
        needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        # text and images (CLIP), which a model that writes can do without; or several inputs of any kind
        if (not writes and {TOKENS, "pixel_values"} <= named) or len(needed) > 1:
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

        Args:
            rows: how many.
            length: of the sequences; by default min(64, context).
            seed: of the values.

        Returns:
            {"input_ids": int64 [rows, length], "attention_mask": ones}, also "decoder_input_ids" for an
            encoder-decoder; or uniform values in [0, 1) of the shape [rows, *shape], by keyword if the model's call
            knows it.

        Raises:
            ValueError: the length is beyond the context.
            DataError: the model does not say what it takes.
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
                "batch: the model does not say what it takes (no vocabulary, image size or input_shape, or several "
                "inputs); pass batch=, one batch that it can be called with, or give the model example(rows, seed)."
            )
        return self.named("pixel_values", torch.rand((rows, *self.shape), generator=generator))

    def covers(self, batch: Any) -> bool:
        """Whether `batch` makes all that a batch of the user's holds, up to labels and what a model adds by itself.

        Args:
            batch: of the user.
        """
        if self.vocabulary is None and self.shape is None:
            return False
        made = {TOKENS, DECODER_TOKENS} if self.vocabulary is not None else {"pixel_values"}
        if isinstance(batch, tuple) and len(batch) > 1:
            return False
        return not isinstance(batch, Mapping) or set(batch) <= made | ADDED

    def of_tokens(self, ids: Tensor, generator: torch.Generator) -> Any:
        """A batch of token ids; with random ones for a decoder, if it takes another sequence.

        Args:
            ids: int64 [batch, length].
            generator: of the other sequence.
        """
        batch = self.named(TOKENS, ids)
        if isinstance(batch, dict) and "attention_mask" in self.keywords:
            batch["attention_mask"] = torch.ones_like(ids)
        if isinstance(batch, dict) and DECODER_TOKENS in self.keywords:
            assert self.vocabulary is not None
            batch[DECODER_TOKENS] = torch.randint(self.vocabulary, ids.shape, generator=generator)
        return batch

    def named(self, key: str, tensor: Tensor) -> Any:
        """A dict if the model's call knows the keyword, else the bare tensor.

        Args:
            key: the keyword.
            tensor: its value.
        """
        return {key: tensor} if key in self.keywords else tensor


def has_example(model: nn.Module) -> bool:
    """Whether a model makes examples itself, by `example(rows, seed)`."""
    return callable(getattr(model, "example", None))


def make_example(model: nn.Module, rows: int = 2, seed: int = 0) -> Any:
    """Fixed random examples that a model can be called with: its own `example(rows, seed)`, or what `Inputs` makes.

    Args:
        model: that is called.
        rows: how many examples.
        seed: of their values.

    Raises:
        DataError: the model does not say what it takes.
    """
    own: Any = model
    return own.example(rows, seed) if has_example(model) else Inputs.of(model).batch(rows, seed=seed)


def example_of(model: nn.Module, batches: Any, rows: int = 2) -> Any:
    """The first examples of the batches, for a model that fixed random ones do not do for.

    Args:
        model: that is called.
        batches: of which the first is looked at.
        rows: how many examples; a batch that cannot be cut is given whole.

    Returns:
        A batch; None if random ones do, or there are no batches to read twice.
    """
    if has_example(model):
        return make_example(model, rows)
    if not isinstance(batches, Sequence) or not len(batches) or Inputs.of(model).covers(batches[0]):
        return None
    batch = main_first(batches[0], model)
    return first_rows(batch, rows, model) if has_rows(batch, model) else batch


def fit_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its float tensors in the model's dtype: images are float32, the weights may be 16-bit.

    Args:
        batch: a dict, tuple or tensor.
        dtype: of the model.
    """
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
