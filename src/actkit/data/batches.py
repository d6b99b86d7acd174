"""Batches of model inputs, with the document that every token came from kept beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import is_tokens, main_input, mask_of
from actkit.core.ground.errors import DataError

Batch = Any  # a dict of the model's keywords, or a tensor (or tuple of tensors) that is its argument


class Batches(Sequence[Batch]):
    """An immutable sequence of batches: iterate it as often as you like.

    Args:
        items: the batches, on the CPU; dicts such as {"input_ids": int64 [batch, length], "attention_mask": the same}
            or {"pixel_values": float32 [batch, channels, height, width], "labels": int64 [batch]}.
        document_ids: per batch, int64 [batch, length] (tokens; -1 on padding) or [batch] (everything else): which
            document each came from, for intervals that resample documents. They stay out of the batches, so out of the
            model's call. Without them every row counts as a document.
        description: one line for reports.
        model: that is called on them, which says what the main input is; needed for inputs of unusual names.
        beyond_context: sequences may be longer than a model's context.
    """

    def __init__(
        self,
        items: Sequence[Batch],
        document_ids: Sequence[Tensor] | None = None,
        description: str = "batches",
        model: nn.Module | None = None,
        beyond_context: bool = False,
    ) -> None:
        if not items:
            raise DataError("data: 0 batches were given; give at least one.")
        self.items = tuple(items)
        self.description, self.beyond_context = description, beyond_context
        self.document_ids = tuple(document_ids) if document_ids is not None else _rows_as_documents(self.items, model)
        if len(self.document_ids) != len(self.items):
            raise DataError(
                f"document_ids: {len(self.document_ids)} tensors were given for {len(self.items)} batches; "
                "give one per batch."
            )

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> Batch | Batches:
        if isinstance(index, slice):
            cut = self.items[index], self.document_ids[index], self.description
            return Batches(*cut, beyond_context=self.beyond_context)
        return self.items[index]

    @property
    def rows(self) -> int:
        """How many sequences, images or other examples there are."""
        return sum(len(ids) for ids in self.document_ids)

    @property
    def tokens(self) -> int:
        """How many tokens are not padding; the number of rows if there are no tokens."""
        return sum(int((ids >= 0).sum()) for ids in self.document_ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes, types and values of all tensors: the same data give the same fingerprint."""
        digest = hashlib.sha256()
        for batch in self.items:
            named = sorted(batch.items()) if isinstance(batch, Mapping) else list(enumerate(_tuple(batch)))
            for name, value in named:
                digest.update(f"{name} ".encode())
                if isinstance(value, Tensor):
                    digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
                    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
                else:
                    digest.update(repr(value).encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Batches({self.description}; {len(self)} batches, {self.rows} rows, {self.tokens} tokens)"


def _tuple(batch: Batch) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def _rows_as_documents(items: Sequence[Batch], model: nn.Module | None) -> tuple[Tensor, ...]:
    first, found = 0, []
    for batch in items:
        main = main_input(batch, model)
        ids = torch.arange(first, first + len(main))
        first += len(main)
        if is_tokens(batch, model):
            ids = ids[:, None].expand(main.shape).clone()
            mask = mask_of(batch)
            if mask is not None and mask.shape == main.shape:
                ids[mask.cpu() == 0] = -1
        found.append(ids)
    return tuple(found)
