"""From the tensor of a site to rows of a statistic: which rows are real, and which token each one is.

- One vector per token: one row per real token (padding is left out), its heads side by side: [batch, heads, length,
  head_dim] -> [tokens, heads * head_dim].
- One vector per sequence: one row per sequence.
- An image or the output of a convolution [batch, channels, ...]: one row per position.
- Inside an expert: one row per token that was sent there.
- Attention weights [batch, heads, query, key]: one row per real query with heads * key channels (padded keys included,
  which are 0) if all batches are known to have one length; else one row per value with one channel, of real queries
  and real keys, the zeros above a causal diagonal included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from actkit.core.forward.batch import BatchContext
from actkit.core.ground.errors import DataError, NonFiniteError
from actkit.core.model.sites import Site, Tap
from actkit.core.watch.streaming import Rows


def channels_last(tap: Tap, value: Tensor) -> Tensor:
    """Lay out a tensor as [..., channels], the rows as they were: heads side by side, pixels one after another."""
    if tap.layout in ("heads", "weights"):
        return value.transpose(1, 2).flatten(2)
    return value.flatten(2).transpose(1, 2) if tap.layout == "channels_first" and value.dim() > 2 else value


def as_rows(
    site: Site,
    tap: Tap,
    value: Tensor,
    keys: Keys,
    tokens: Tensor | None = None,
    equal_lengths: bool = False,
) -> Iterator[tuple[Tensor, Rows]]:
    """Yield the real rows of a tensor with their keys, in one or more parts.

    Args:
        site: for errors.
        tap: of the site.
        value: in the tap's layout.
        keys: of the batch.
        tokens: flat indices [n] of the rows, inside an expert.
        equal_lengths: all batches are known to have sequences of one length.

    Yields:
        Rows [n, channels], and which tokens they are.

    Raises:
        DataError: there is padding and the rows cannot be told apart; they are never miscounted silently.
    """
    if tap.layout == "weights" and not equal_lengths:
        yield from _weights(site, value, keys)
        return
    value = channels_last(tap, value)
    real, rows = keys.locate(site, value.shape[:-1]) if tokens is None else keys.choose(site, tokens)
    x = value.reshape(-1, value.shape[-1])
    yield (x if real is None else x[real]), rows


class Keys:
    """Which tokens of a batch are real, and their keys, flat; sizes with padding are known by the mask.

    Made once per batch, so that its sites share the keys of the tokens and what is computed from them.

    Args:
        context: of the batch.
        device: of the tensors that are read.
    """

    def __init__(self, context: BatchContext, device: torch.device) -> None:
        self.batch, self.first_row, mask = context.batch_size, context.first_row, context.mask
        self.length = context.length if mask is None else mask.shape[1]
        size = (self.batch, self.length or 1)
        self.documents, self.positions = context.documents.to(device), context.positions.to(device)
        if self.documents.dim() == 1:
            self.documents = self.documents[:, None].expand(size)
        if self.positions.dim() == 1:
            self.positions = torch.arange(size[1], device=device).expand(size)
        sequences = torch.arange(self.first_row, self.first_row + self.batch, device=device)
        self.sequences = sequences[:, None].expand(size)
        self.places = self.positions if context.places is None else context.places.to(device)
        ids = context.token_ids
        self.token_ids = torch.full((1, 1), -1, device=device).expand(size) if ids is None else ids.to(device).long()
        self.mask = None if mask is None or bool(mask.all()) else mask.to(device)  # no padding, nothing to leave out
        self.real = None if self.mask is None else self.mask.flatten().nonzero().flatten()
        rows = Rows(*(key.flatten() for key in self._each()))
        self.tokens = rows if self.real is None else rows[self.real]

    def locate(self, site: Site, shape: tuple[int, ...]) -> tuple[Tensor | None, Rows]:
        """Which rows of a tensor [*shape, channels] are real (indices; None: all), and the keys of those."""
        b, length = self.batch, self.length
        lengths = (*shape[:1], *(n for n in shape[1:] if n > 1))  # one head for all: [batch, 1, length]
        if length is not None and any(found in ((b, length), (b * length,)) for found in (shape, lengths)):
            return self.real, self.tokens
        if shape == (b,):  # one vector per sequence has the key of its first real token
            first = torch.zeros(b, dtype=torch.int64, device=self.documents.device)
            if self.mask is not None:
                first = self.mask.long().argmax(1)
            each = (torch.arange(b, device=first.device), first)
            return None, Rows(*(key[each] for key in self._each()))
        if self.mask is not None:
            raise DataError(
                f"{site}: its tensor has the shape {[*shape, 'channels']}, which is neither one row per token of "
                f"{[b, length]} nor one per sequence, so padding cannot be left out. Record it without padding: give "
                f"batches of sequences of equal length, or choose another site."
            )
        n = math.prod(shape)
        index = torch.arange(n, device=self.documents.device)
        if n and shape[0] % b == 0:  # so many rows per example: patches, pixels, windows
            example, place = index // (n // b), index % (n // b)
            return None, Rows(self.documents[example, 0], place, self.sequences[example, 0])
        return None, self._unknown(index)

    def choose(self, site: Site, tokens: Tensor) -> tuple[Tensor | None, Rows]:
        """As `locate`, for rows that are the tokens with these flat indices."""
        if self.length is None:
            return None, self._unknown(tokens)
        if len(tokens) and int(tokens.max()) >= self.batch * self.length:
            raise DataError(
                f"{site}: an expert was given token {int(tokens.max())} of a batch of {[self.batch, self.length]}, so "
                f"its rows are not the batch's tokens and padding cannot be left out; choose another site."
            )
        real = None if self.mask is None else self.mask.flatten()[tokens].nonzero().flatten()
        tokens = tokens if real is None else tokens[real]
        return real, Rows(*(key.flatten()[tokens] for key in self._each()))

    def _each(self) -> tuple[Tensor, ...]:
        """The keys in the order of `Rows`, each [batch, length]."""
        return self.documents, self.positions, self.sequences, self.places, self.token_ids

    def _unknown(self, index: Tensor) -> Rows:
        """The keys of rows whose sequence cannot be known; all are real. They are counted from the batch's first."""
        return Rows(torch.full_like(index, -1), index, torch.full_like(index, self.first_row))


def _weights(site: Site, value: Tensor, keys: Keys) -> Iterator[tuple[Tensor, Rows]]:
    """Attention weights [batch, heads, query, key] value by value; a part per head, as they are large."""
    b, heads, queries, others = value.shape
    if keys.mask is not None and (b, queries, others) != (keys.batch, keys.length, keys.length):
        raise DataError(
            f"{site}: weights {list(value.shape)} are not those of {[keys.batch, keys.length]} tokens among "
            f"themselves, so padding cannot be left out. Record them without padding: sequences of equal length."
        )
    for i in range(b):
        real = torch.arange(queries, device=value.device) if keys.mask is None else keys.mask[i].nonzero().flatten()
        seen = torch.arange(others, device=value.device) if keys.mask is None else real
        known = (b, queries) == (keys.batch, keys.length)
        document = keys.documents[i, real] if known else torch.full_like(real, -1)
        place, token = (keys.places[i, real], keys.token_ids[i, real]) if known else (real, torch.full_like(real, -1))
        for head in range(heads):
            positions = ((real * heads + head) * others)[:, None] + seen
            of_query = (each[:, None].expand_as(positions).reshape(-1) for each in (document, place, token))
            documents, places, token_ids = of_query
            positions = positions.reshape(-1)
            rows = Rows(documents, positions, torch.full_like(positions, keys.first_row + i), places, token_ids)
            yield value[i, head][real][:, seen].reshape(-1, 1), rows


def check_finite(site: Site, x: Tensor, rows: Rows) -> None:
    """Refuse NaN and Inf.

    Args:
        site: for the error.
        x: [n, channels].
        rows: which tokens they are.

    Raises:
        NonFiniteError: x holds some; the site and the first such row are named.
    """
    total = x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None)
    if bool(torch.isfinite(total)):
        return  # a sum with NaN or Inf in it is one of them; that of large numbers may be too
    finite = torch.isfinite(x)
    if finite.all():
        return
    row, channel = (~finite).nonzero()[0].tolist()
    raise NonFiniteError(
        f"{site}: NaN or Inf in document {int(rows.documents[row])} at position {int(rows.positions[row])}, channel "
        f"{channel}; check that input, and the model's dtype (float16 overflows above 65504: load it in bfloat16)."
    )
