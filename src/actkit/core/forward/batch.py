"""What a batch is, and how a model is called on one: the only place that reads one.

A batch is one of

    a dict of the model's keywords     {"input_ids": ..., "attention_mask": ..., "labels": ...}
    a tuple of its arguments, in order (x, edge_index)
    a tensor                           its only argument

What is to be learned or compared with stands under "labels" of a dict and nowhere else; the model is not called with
it. So (x, y) are two inputs, and are refused if the model takes one. A list is several batches.

The main input is the one whose rows are the examples: the model's `main_input_name` if it states one, else the first
parameter of its `forward` that the batch holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actkit.core.forward.limits import (
    DECODER_TOKENS,
    TOKENS,
    check_length,
    first_position,
    has_position_table,
    is_encoder_decoder,
    vocabulary_size,
)
from actkit.core.forward.named_functions import check_mask
from actkit.core.ground.errors import DataError
from actkit.core.ground.offload import device_of

LABELS = "labels"
# The keywords that hold a batch's examples, the likeliest first, and those that say something about them.
FIRST = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")
BESIDE = ("attention_mask", LABELS, DECODER_TOKENS, "decoder_attention_mask", "position_ids", "token_type_ids")


# -- what it holds -----------------------------------------------------------------------------------------------------


def as_batches(given: Any, name: str = "batches") -> Iterable[Any]:
    """Batches from one batch or several.

    Args:
        given: a batch, or an iterable of batches, which is left as it is.
        name: of the parameter, for errors.

    Raises:
        DataError: a tuple of tensors is one batch or several, nobody knows.
    """
    if isinstance(given, Mapping | Tensor):
        return [given]
    if isinstance(given, tuple) and given and all(isinstance(each, Tensor) for each in given):
        raise DataError(
            f"{name}: a tuple of {len(given)} tensors was given, which may be one batch or several; give a list: one "
            f"batch of several arguments is [(x, y)], several are [x, y]."
        )
    return given


def sequence_of(given: Any, name: str = "batches") -> Sequence[Any]:
    """Batches that can be read several times, from one batch or several; an iterator is read once and kept.

    Args:
        given: a batch, or an iterable of batches.
        name: of the parameter, for errors.

    Raises:
        DataError: what `as_batches` raises.
    """
    batches = as_batches(given, name)
    return batches if isinstance(batches, Sequence) else list(batches)


def main_input(batch: Any, model: nn.Module | None = None) -> Tensor:
    """The tensor whose rows are the examples.

    Args:
        batch: a dict, tuple or tensor.
        model: that is called on it; without one the name of the input is guessed.

    Raises:
        DataError: there is none, or a list stands in its place.
    """
    return _main(batch, model)[1]


def _main(batch: Any, model: nn.Module | None) -> tuple[Any, Tensor]:
    """The main input with its keyword or place."""
    items = _items(batch)
    for key, value in items.items():
        if isinstance(value, list | np.ndarray) and (isinstance(key, int) or key in (*FIRST, *BESIDE)):
            what = "a batch" if isinstance(key, int) else key
            raise DataError(
                f"data: {what} is a {type(value).__name__}; give a tensor, as in torch.tensor(...), a tuple of the "
                f"model's arguments, or a dict of its keywords with labels under 'labels'."
            )
    for key in (*_stated(model), *FIRST, *(key for key in items if key not in BESIDE)):
        value = items.get(key)
        if isinstance(value, Tensor) and value.dim():
            return key, value
    raise DataError(
        f"data: a batch is a {type(batch).__name__} without a tensor of examples; give a tensor, a tuple of tensors or "
        f"a dict of the model's keywords."
    )


def _stated(model: nn.Module | None) -> list[str]:
    """The names of inputs as the model states them, the main one first."""
    if model is None:
        return []
    name = getattr(model, "main_input_name", None)
    if isinstance(name, str):
        return [name]
    return [parameter for parameter in inspect.signature(model.forward).parameters if parameter not in BESIDE]


def _items(batch: Any) -> dict[Any, Any]:
    """What a batch holds, by keyword or by place."""
    return (
        dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, tuple) else [batch]))
    )


def is_tokens(batch: Any, model: nn.Module | None = None) -> bool:
    """Whether the main input holds token ids [batch, length].

    Whole numbers of that shape are, if they are called "input_ids", are the only argument, or the model embeds tokens.

    Args:
        batch: a dict, tuple or tensor.
        model: as in `main_input`; without one any whole numbers [batch, length] are tokens.
    """
    key, tensor = _main(batch, model)
    if tensor.dim() != 2 or tensor.dtype not in (torch.int64, torch.int32):
        return False
    return key == TOKENS or isinstance(batch, Tensor) or model is None or vocabulary_size(model) is not None


def labels_of(batch: Any) -> Tensor | None:
    """What stands under "labels"; None if nothing does."""
    labels = batch.get(LABELS) if isinstance(batch, Mapping) else None
    return labels if isinstance(labels, Tensor) else None


def mask_of(batch: Any, device: torch.device | None = None) -> Tensor | None:
    """The attention mask of a batch, [batch, length]; None if it has none.

    Args:
        batch: a dict, tuple or tensor.
        device: to put it on; None leaves it there.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None else mask.to(device)


def main_first(batch: Any, model: nn.Module) -> Any:
    """The batch with its main input in front, so that it is found without the model too.

    Args:
        batch: a dict, tuple or tensor.
        model: as in `main_input`.
    """
    if not isinstance(batch, Mapping):
        return batch
    key, value = _main(batch, model)
    return {key: value, **batch}


def has_rows(batch: Any, model: nn.Module | None = None) -> bool:
    """Whether every tensor has one entry per example, so that a batch can be cut; the edges of a graph have not."""
    size = len(main_input(batch, model))
    return all(len(each) == size for each in _items(batch).values() if isinstance(each, Tensor) and each.dim())


def first_rows(batch: Any, rows: int, model: nn.Module | None = None) -> Any:
    """The first examples of a batch.

    Args:
        batch: a dict, tuple or tensor.
        rows: how many.
        model: as in `main_input`.

    Raises:
        DataError: a tensor does not have one entry per example (`has_rows`).
    """
    if not has_rows(batch, model):
        size = len(main_input(batch, model))
        found = {key: list(each.shape) for key, each in _items(batch).items() if isinstance(each, Tensor)}
        raise DataError(
            f"data: {rows} rows of a batch were asked for, and not every tensor has {size}, one per example ({found}); "
            f"give whole batches."
        )
    return _cut(batch, slice(rows))


def pieces(batch: Any, rows: int, model: nn.Module | None = None) -> list[Any]:
    """The same examples in batches of so many rows; the batch itself if it cannot be cut (`has_rows`).

    Args:
        batch: a dict, tuple or tensor.
        rows: of each piece; the last may be shorter.
        model: as in `main_input`.
    """
    size = len(main_input(batch, model))
    if size <= rows or not has_rows(batch, model):
        return [batch]
    return [_cut(batch, slice(first, first + rows)) for first in range(0, size, rows)]


def _cut(batch: Any, rows: slice) -> Any:
    cut = {key: each[rows] if isinstance(each, Tensor) and each.dim() else each for key, each in _items(batch).items()}
    if isinstance(batch, Mapping):
        return cut
    return tuple(cut.values()) if isinstance(batch, tuple) else cut[0]


def first_tokens(batches: Iterable[Any], tokens: int | None, model: nn.Module | None = None) -> list[Any]:
    """The first batches, cut at the row that reaches so many real tokens (or rows, without tokens).

    Args:
        batches: dicts, tuples or tensors.
        tokens: None for all.
        model: as in `main_input`.
    """
    chosen: list[Any] = []
    left = tokens
    for batch in batches:
        if left is not None:
            if left <= 0:
                break
            per_row = BatchContext.of(batch, model).tokens_per_row
            enough = (per_row.cumsum(0) >= left).nonzero()
            if len(enough) and has_rows(batch, model):
                batch = first_rows(batch, int(enough[0]) + 1, model)
            left -= int(per_row.sum())
        chosen.append(batch)
    return chosen


# -- calling a model on it ---------------------------------------------------------------------------------------------


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call that a batch stands for: positional arguments and keywords.

    A dict gives keywords; its labels are dropped, but an encoder-decoder makes its decoder_input_ids of them. Tensors
    are moved to the device of the model, floats (images, features) to its dtype; a decoder is told not to keep a cache.
    If padding stands before tokens, the positions are counted from the mask (`positions_from_mask`).

    Args:
        model: that is called.
        batch: a dict, tuple or tensor.
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
    """The batch with `position_ids` int64 [batch, length] if padding stands before tokens.

    Models count from a row's first column, and would see each token of such a row at another place than without
    padding.

    Args:
        model: that is called.
        batch: of its keywords.

    Raises:
        DataError: the model looks positions up and takes no position_ids.
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
    """Logits if a model gives them, else its first output tensor."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is not None:
        return logits
    return first_tensor(next(iter(output.values())) if isinstance(output, Mapping) else output[0])


def reads_beyond(batches: Any) -> bool:
    """Say whether batches may be longer than a model's context: `load_data` was told so (`beyond_context`).

    Args:
        batches: any.
    """
    return bool(getattr(batches, "beyond_context", False))


def check_batch(model: nn.Module, batch: Any, name: str = "data", *, beyond_context: bool = False) -> None:
    """Refuse a batch that the model cannot be called with.

    Args:
        model: that is called.
        batch: a dict, tuple or tensor.
        name: of the batches, in the text.
        beyond_context: its sequences may be longer than the model's context (`reads_beyond`).

    Raises:
        DataError: too many arguments or too few, no tensor, no token, sequences beyond the model's context, tokens
            beyond its vocabulary, a mask of another shape, or padding that its attention would read.
    """
    ids = main_input(batch, model)
    _check_arguments(model, batch, name)
    if is_encoder_decoder(model):
        _check_two_sequences(model, batch, name)
    if not is_tokens(batch, model):
        return
    if ids.numel() == 0:
        raise DataError(f"{name}: a batch of shape {list(ids.shape)} holds no token; leave it out.")
    check_length(model, ids.shape[1], name, beyond_context=beyond_context)
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


def _check_arguments(model: nn.Module, batch: Any, name: str) -> None:
    """Refuse a batch that `forward` cannot be called with, such as a tuple of an input and its labels."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = {parameter.kind for parameter in parameters}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return
    takes = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    given = 0 if isinstance(batch, Mapping) else len(_items(batch))
    kind, names = type(model).__name__, ", ".join(each.name for each in takes)
    if given > len(takes):
        raise DataError(
            f"{name}: a batch is a tuple of {given}, and {kind} takes {len(takes)} ({names}): a tuple holds the "
            f"arguments of a call. Labels stand under 'labels' of a dict: {{{takes[0].name if takes else 'x'!r}: x, "
            f"'labels': y}}."
        )
    held = set(batch) if isinstance(batch, Mapping) else set()
    missing = [each.name for each in takes[given:] if each.default is each.empty and each.name not in held]
    if missing:
        what = f"holds {', '.join(map(str, batch))}" if held else f"is {'a tuple' if given > 1 else 'one tensor'}"
        raise DataError(
            f"{name}: a batch {what}, and {kind} also needs {', '.join(missing)}; give a dict of its keywords "
            f"({names})."
        )


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

    Attributes:
        batch_size: how many examples there are.
        length: of the sequences, in tokens; None without tokens.
        mask: bool [batch, length], which tokens are real, or None if all are.
        documents: int64 [batch, length] or [batch], keys that are the same in whatever order or shard a batch is seen.
        positions: the same, the columns of the tokens in their row, padding counted.
        first_row: the running number of the batch's first row among all batches.
        places: int64 [batch, length], how many real tokens stand before each in its row; None without tokens.
        token_ids: int64 [batch, length], which tokens they are; None if the model is given none.
    """

    batch_size: int
    length: int | None
    mask: Tensor | None
    documents: Tensor
    positions: Tensor
    first_row: int = 0
    places: Tensor | None = None
    token_ids: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many rows are real: tokens, or examples if there is no sequence."""
        if self.mask is not None:
            return int(self.mask.sum())
        return self.batch_size * (self.length or 1)

    @property
    def tokens_per_row(self) -> Tensor:
        """How many tokens of each row are real: int64 [batch]."""
        if self.mask is not None:
            return self.mask.sum(1)
        return torch.full((self.batch_size,), self.length or 1)

    def rows(self, start: int, stop: int) -> BatchContext:
        """The context of some consecutive rows."""
        chosen = slice(start, stop)
        return replace(
            self,
            batch_size=len(range(self.batch_size)[chosen]),
            mask=None if self.mask is None else self.mask[chosen],
            documents=self.documents[chosen],
            positions=self.positions[chosen],
            first_row=self.first_row + start,
            places=None if self.places is None else self.places[chosen],
            token_ids=None if self.token_ids is None else self.token_ids[chosen],
        )

    def counting(self, tokens: Tensor | None) -> BatchContext:
        """The context with only some of the real tokens. tokens: bool [batch, length], None for all."""
        return self if tokens is None else replace(self, mask=tokens if self.mask is None else self.mask & tokens)

    @classmethod
    def of(
        cls, batch: Any, model: nn.Module | None = None, *, first_row: int = 0, documents: Tensor | None = None
    ) -> BatchContext:
        """The context of a batch.

        Args:
            batch: a dict, tuple or tensor.
            model: as in `main_input`.
            first_row: the running number of its first row.
            documents: of its tokens or rows; by default the running number of the row.

        Raises:
            DataError: every token is masked.
        """
        main = main_input(batch, model)
        size = main.shape[0]
        length = main.shape[1] if is_tokens(batch, model) else None
        mask = mask_of(batch)
        mask = mask.bool() if mask is not None and mask.dim() == 2 else None
        if mask is not None and not mask.any():
            raise DataError("attention_mask: every token of a batch is masked; give at least one real token.")
        rows = torch.arange(first_row, first_row + size)
        if documents is None:
            documents = rows if length is None else rows[:, None].expand(size, length)
        positions = (
            torch.zeros(size, dtype=torch.int64) if length is None else torch.arange(length).expand(size, length)
        )
        places = positions if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)
        ids = main if length is not None and not main.is_floating_point() and main.dim() == 2 else None
        return cls(size, length, mask, documents, positions, first_row, None if length is None else places, ids)
