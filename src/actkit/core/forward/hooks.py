"""How activations are watched: one way to call a model on a batch, one way to hook its modules.

Hooks read; what actkit changes for good, it changes by replacing modules. Only `core.watch.intervene` replaces what
passes by, as long as its context lasts. Hooks are removed when their context ends, also after an exception.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actkit.core.forward.example import DECODER_TOKENS, is_encoder_decoder, vocabulary_size
from actkit.core.forward.limits import context_length, first_position, has_position_table
from actkit.core.forward.named_functions import check_mask
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.ground.offload import device_of
from actkit.core.layers.known_layers import INTERVENES

# The keywords that hold a batch's examples, the likeliest first, and those that say something about them.
FIRST = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")
BESIDE = ("attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask", "position_ids", "token_type_ids")

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


class StopForward(Exception):
    """Raised by a hook to end a forward pass once what is wanted was seen."""


@contextmanager
def hooked(
    model: nn.Module,
    *,
    before: Mapping[str, Before] | None = None,
    after: Mapping[str, After] | None = None,
    replacing: bool = False,
) -> Iterator[None]:
    """Call `before[path](module, args, kwargs)` and `after[path](module, args, kwargs, output)` around those modules.

    Args:
        model: any module that is neither compiled nor sharded.
        before: by path.
        after: by path.
        replacing: what a hook returns, if not None, takes the place of (args, kwargs) or of the output; otherwise it
            is dropped.

    Raises:
        UnsupportedModelError: the model is compiled or sharded, so that hooks would not fire or would see shards.
    """
    refuse_compiled_or_sharded(model)
    with ExitStack() as handles:
        for path, hook in (before or {}).items():
            call: Any = _marked(hook) if replacing else _silent_before(hook)
            handles.callback(model.get_submodule(path).register_forward_pre_hook(call, with_kwargs=True).remove)
        for path, reader in (after or {}).items():
            call = _marked(reader) if replacing else _silent_after(reader)
            handles.callback(model.get_submodule(path).register_forward_hook(call, with_kwargs=True).remove)
        yield


def _marked(hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return hook(*arguments)

    setattr(call, INTERVENES, True)
    return call


def _silent_before(hook: Before) -> Before:
    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hook(module, args, kwargs)  # what it returns is dropped: a returned value would replace the arguments

    return call


def _silent_after(hook: After) -> After:
    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hook(module, args, kwargs, output)

    return call


def refuse_compiled_or_sharded(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model that is compiled, sharded (FSDP, tensor parallel) or wrapped (DDP)."""
    for name, module in model.named_modules():
        kind, where = type(module).__name__, name or "it"
        compiled = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None) is not None
        if kind == "OptimizedModule" or module._compiled_call_impl is not None or compiled:
            raise UnsupportedModelError(
                f"model: {where} is compiled (torch.compile or model.compile()), so hooks do not fire and replaced "
                f"modules are not seen. Give the model as it was before: transform first, compile after."
            )
        if kind.startswith("FSDP") or kind == "FullyShardedDataParallel":
            raise UnsupportedModelError(
                f"model: {where} is sharded ({kind}), so its weights are in pieces. Give the whole model: transform "
                f"first, shard after. Several processes can share the batches instead (core.ground.processes.together)."
            )
        if kind in ("DistributedDataParallel", "DataParallel"):
            raise UnsupportedModelError(f"model: {where} is wrapped in {kind}; give what is inside: its .module.")
        for parameter, tensor in module._parameters.items():
            if type(tensor).__name__ == "DTensor":
                raise UnsupportedModelError(
                    f"model: {parameter} of {where} is in pieces over several processes (a DTensor, as tensor "
                    f"parallelism makes them). Load the whole model."
                )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's training flag is restored after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call that a batch stands for: a dict gives keywords, anything else the one argument. Labels are dropped, but
    for an encoder-decoder that makes its decoder_input_ids of them.

    Tensors are moved to the device of the model, floats (images, features) to its dtype; a decoder is told not to keep
    a cache. If padding stands before tokens, the positions are counted from the mask (`positions_from_mask`).
    """
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    device = first.device if first.device.type != "meta" else device_of(model)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, first.dtype) if value.is_floating_point() else value.to(device)

    if not isinstance(batch, Mapping):
        return tuple(map(move, batch if isinstance(batch, tuple) else (batch,))), {}
    if _shifts_labels(model, batch):
        make: Any = model.prepare_decoder_input_ids_from_labels
        batch = {**batch, DECODER_TOKENS: make(labels=batch["labels"])}
    kwargs = {key: move(value) for key, value in positions_from_mask(model, batch).items() if key != "labels"}
    if getattr(getattr(model, "config", None), "use_cache", None) is not None:
        kwargs["use_cache"] = False
    return (), kwargs


def positions_from_mask(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with `position_ids` int64 [batch, length] if padding stands before tokens: models count from the row's
    first column, and would see each token of such a row at another place than without padding.

    Raises DataError for a model that looks positions up and takes no position_ids.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or "position_ids" in batch:
        return batch
    real = mask.bool()
    if not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return batch  # all padding stands behind the tokens
    if "position_ids" not in inspect.signature(model.forward).parameters:
        if has_position_table(model):
            raise DataError(
                f"attention_mask: padding stands before the tokens of a row, and {type(model).__name__} looks up "
                f"positions and takes no position_ids; pad on the right (tokenizer.padding_side = 'right')."
            )
        return batch
    return {**batch, "position_ids": first_position(model) + (real.long().cumsum(1) - 1).clamp(min=0)}


def forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on one batch (see `arguments`)."""
    args, kwargs = arguments(model, batch)
    return model(*args, **kwargs)


def first_tensor(output: Any) -> Tensor:
    """Logits where a model gives them, else its first output tensor."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is not None:
        return logits
    return first_tensor(next(iter(output.values())) if isinstance(output, Mapping) else output[0])


def check_batch(model: nn.Module, batch: Any, name: str = "data") -> None:
    """Raise DataError for a batch that the model cannot be called with: no tensor, no token, sequences beyond the
    model's context, tokens beyond its vocabulary, a mask of another shape, padding that its attention would read.
    name: of the batches, in the text."""
    ids = main_input(batch)
    if is_encoder_decoder(model):
        _check_two_sequences(model, batch, name)
    if not is_tokens(ids):
        return
    if ids.numel() == 0:
        raise DataError(f"{name}: a batch of shape {list(ids.shape)} holds no token; leave it out.")
    limit, length = context_length(model), ids.shape[1]
    if limit is not None and length > limit:
        raise DataError(
            f"{name}: a batch has sequences of {length} tokens, the model's context is {limit}; cut them to at most "
            f"{limit}."
        )
    vocabulary, low, high = vocabulary_size(model), int(ids.min()), int(ids.max())
    if vocabulary is not None and not 0 <= low <= high < vocabulary:
        raise DataError(
            f"model and tokenizer vocabulary mismatch: the {name} hold token {low if low < 0 else high}, the model "
            f"embeds 0 to {vocabulary - 1}; use the model's own tokenizer."
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.dim() == 2 and mask.shape != ids.shape:
        raise DataError(
            f"attention_mask: shape {list(mask.shape)}, but input_ids has {list(ids.shape)}; make them equal."
        )
    check_mask(model, mask, name)


def _check_two_sequences(model: nn.Module, batch: Any, name: str) -> None:
    kind = type(model).__name__
    batch = batch if isinstance(batch, Mapping) else {}
    if not batch.keys() & {DECODER_TOKENS, "decoder_inputs_embeds"} and not _shifts_labels(model, batch):
        raise DataError(
            f"{name}: {kind} is an encoder-decoder, and a batch has no {DECODER_TOKENS}; give them, or the labels of a "
            f"model that makes them of labels."
        )
    for key in ("attention_mask", "decoder_attention_mask"):
        if isinstance(batch.get(key), Tensor) and not bool(batch[key].bool().all()):
            raise DataError(
                f"{key}: a batch is padded, and inside an encoder-decoder ({kind}) the padding of the two sequences "
                f"cannot be told apart; give batches of sequences of equal length."
            )


def _shifts_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the decoder's tokens are made of the labels, as transformers' training does."""
    missing = not batch.keys() & {DECODER_TOKENS, "decoder_inputs_embeds"}
    return missing and "labels" in batch and hasattr(model, "prepare_decoder_input_ids_from_labels")


@dataclass(frozen=True)
class BatchContext:
    """What the rows of a batch are.

    mask: bool [batch, length], which tokens are real, or None where all are. documents, positions: int64
    [batch, length] or [batch] keys of the tokens, the same in whatever order or shard a batch is seen. first_row: the
    running number of the batch's first row among all batches.
    """

    batch_size: int
    length: int | None
    mask: Tensor | None
    documents: Tensor
    positions: Tensor
    first_row: int = 0

    @property
    def tokens(self) -> int:
        """How many rows are real: tokens, or images where there is no sequence."""
        if self.mask is not None:
            return int(self.mask.sum())
        return self.batch_size * (self.length or 1)

    @property
    def tokens_per_row(self) -> Tensor:
        """How many tokens of each row are real: int64 [batch]."""
        if self.mask is not None:
            return self.mask.sum(1)
        return torch.full((self.batch_size,), self.length or 1)

    def first_rows(self, count: int) -> BatchContext:
        """The context of the first `count` rows."""
        mask = None if self.mask is None else self.mask[:count]
        return replace(
            self, batch_size=count, mask=mask, documents=self.documents[:count], positions=self.positions[:count]
        )

    @classmethod
    def of(cls, batch: Any, *, first_row: int = 0, documents: Tensor | None = None) -> BatchContext:
        """The context of a batch; `documents` default to the running number of the row, from `first_row` on."""
        main = main_input(batch)
        size = main.shape[0]
        length = main.shape[1] if is_tokens(main) else None
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask = mask.bool() if mask is not None and mask.dim() == 2 else None
        if mask is not None and not mask.any():
            raise DataError("attention_mask: every token of a batch is masked; give at least one real token.")
        rows = torch.arange(first_row, first_row + size)
        if documents is None:
            documents = rows if length is None else rows[:, None].expand(size, length)
        positions = (
            torch.zeros(size, dtype=torch.int64) if length is None else torch.arange(length).expand(size, length)
        )
        return cls(size, length, mask, documents, positions, first_row)


def main_input(batch: Any) -> Tensor:
    """The tensor whose rows are the examples. Raises DataError if there is none, or a list stands in its place."""
    items = _items(batch)
    for key, value in items.items():
        if isinstance(value, list | np.ndarray) and (isinstance(key, int) or key in (*FIRST, *BESIDE)):
            what = "a batch" if isinstance(key, int) else key
            raise DataError(f"data: {what} is a {type(value).__name__}; give a tensor, as in torch.tensor(...).")
    for key in (*FIRST, *(key for key in items if key not in BESIDE)):
        value = items.get(key)
        if isinstance(value, Tensor) and value.dim():
            return value
    raise DataError(
        f"data: a batch is a {type(batch).__name__} without a tensor of examples; give a tensor, a tuple of tensors or "
        f"a dict of the model's keywords."
    )


def _items(batch: Any) -> dict[Any, Any]:
    """What a batch holds, by keyword or by place."""
    return (
        dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, tuple) else [batch]))
    )


def is_tokens(tensor: Tensor) -> bool:
    """Whether a main input holds token ids [batch, length]."""
    return tensor.dim() == 2 and tensor.dtype in (torch.int64, torch.int32)
