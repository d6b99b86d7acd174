"""How activations are watched: one way to call a model on a batch, one way to hook its modules.

Hooks are for reading only; whatever actkit changes, it changes by replacing modules. They are removed when the
context ends, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.errors import DataError, UnsupportedModelError
from actkit.core.offload import device_of

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@contextmanager
def hooked(
    model: nn.Module, *, before: Mapping[str, Before] | None = None, after: Mapping[str, After] | None = None
) -> Iterator[None]:
    """Call `before[path](module, args, kwargs)` and `after[path](module, args, kwargs, output)` around those modules.

    Raises UnsupportedModelError for a compiled or sharded model, whose hooks would not fire or would see shards.
    """
    refuse_compiled_or_sharded(model)
    with ExitStack() as handles:
        for path, hook in (before or {}).items():
            handle = model.get_submodule(path).register_forward_pre_hook(_silent_before(hook), with_kwargs=True)
            handles.callback(handle.remove)
        for path, reader in (after or {}).items():
            handle = model.get_submodule(path).register_forward_hook(_silent_after(reader), with_kwargs=True)
            handles.callback(handle.remove)
        yield


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
                f"first, shard after. Several processes can share the batches instead (core.processes.together)."
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
    """The call that a batch stands for: a dict gives keywords (labels dropped), anything else the one argument.

    Tensors are moved to the device of the model, floats (images, features) to its dtype; a decoder is told not to keep
    a cache.
    """
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    device = first.device if first.device.type != "meta" else device_of(model)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, first.dtype) if value.is_floating_point() else value.to(device)

    if not isinstance(batch, Mapping):
        return tuple(map(move, batch if isinstance(batch, tuple) else (batch,))), {}
    kwargs = {key: move(value) for key, value in batch.items() if key != "labels"}
    if getattr(getattr(model, "config", None), "use_cache", None) is not None:
        kwargs["use_cache"] = False
    return (), kwargs


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


def check_batch(model: nn.Module, batch: Any) -> None:
    """Raise DataError for sequences beyond the model's context, or tokens beyond its vocabulary."""
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    length = BatchContext.of(batch).length
    if limit is not None and length is not None and length > limit:
        raise DataError(
            f"calibration data: a batch has sequences of {length} tokens, the model's context "
            f"(config.max_position_embeddings) is {limit}; cut them."
        )
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    vocabulary = getattr(config, "vocab_size", None)
    if ids is None or vocabulary is None or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"input_ids: token {low if low < 0 else high} was given, the model's vocabulary has 0 to {vocabulary - 1}; "
            f"these are not the tokens of this model, use the tokenizer that it was trained with."
        )


@dataclass(frozen=True)
class BatchContext:
    """What the rows of a batch are.

    mask: bool [batch, length], which tokens are real, or None where all are. documents, positions: int64
    [batch, length] or [batch] keys of the tokens, the same in whatever order or shard a batch is seen.
    """

    batch_size: int
    length: int | None
    mask: Tensor | None
    documents: Tensor
    positions: Tensor

    @property
    def tokens(self) -> int:
        """How many rows are real: tokens, or images where there is no sequence."""
        if self.mask is not None:
            return int(self.mask.sum())
        return self.batch_size * (self.length or 1)

    @classmethod
    def of(cls, batch: Any, *, first_row: int = 0, documents: Tensor | None = None) -> BatchContext:
        """The context of a batch; `documents` default to the running number of the row, from `first_row` on."""
        main = _main_input(batch)
        size = main.shape[0]
        tokens = main.dtype in (torch.int64, torch.int32) and main.dim() == 2
        length = main.shape[1] if tokens else None
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
        return cls(size, length, mask, documents, positions)


def _main_input(batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        for key in ("input_ids", "pixel_values", "inputs_embeds"):
            if key in batch:
                return batch[key]
        for value in batch.values():
            if isinstance(value, Tensor):
                return value
    item = batch[0] if isinstance(batch, tuple) and batch else batch
    if isinstance(item, Tensor):
        return item
    raise DataError(
        f"data: a batch is a {type(batch).__name__}; give a tensor, a tuple of tensors or a dict of the model's "
        f"keywords."
    )
