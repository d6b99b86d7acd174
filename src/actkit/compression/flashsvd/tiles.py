"""The products of FlashSVD: an MLP some units at a time, attention some heads at a time (2025, arXiv:2508.01506).

    MLP, units D of a tile:   P = x R_up^T,  H = act(P L_up[D]^T + b[D]),  S += H R_down[:, D]^T,  y = S L_down^T
    attention, heads h:       q, k, v = x R_h^T L_h^T + b_h,  S += softmax(q k^T / sqrt(d)) v R_out[:, h]^T

What is between two layers is there for one tile only; from tile to tile goes what is as wide as a rank. A layer that is
not kept as factors takes part as it is, with its inputs in place of P, or its outputs in place of S.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.forward.hooks import StopForward
from actkit.core.layers.keeps_dtype import SHORT
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.low_rank_weight import LowRankWeight


class Thin:
    """A linear layer as two matrices, in the dtype that they are multiplied in: x -> (x right^T) left^T + bias.

    Args:
        layer: nn.Linear, Conv1D or ActLinear; of one that is not kept as factors `right` is None, of a layer that feeds
            others, or `left`, of one that gathers.
        gathers: whether the layer stands behind the tiles.

    Attributes:
        left: [out, rank].
        right: [heads * rank, in].
        heads: whose factors are apart.
        bias: [out], or None.
    """

    def __init__(self, layer: Any, gathers: bool = False) -> None:
        self.left: Tensor | None
        self.right: Tensor | None
        storage = layer.storage if isinstance(layer, ActLinear) else None
        self.bias: Tensor | None = layer.bias
        self.heads = 1
        if isinstance(storage, LowRankWeight) and (storage.heads == 1 or not gathers):
            self.left, self.right, self.heads = storage.left.dequantize(), storage.right.dequantize(), storage.heads
            return
        weight = layer.weight if storage is None else storage.dequantize()
        weight = weight if isinstance(layer, nn.Linear | ActLinear) else weight.t()
        self.left, self.right = (None, weight) if gathers else (weight, None)

    def narrow(self, x: Tensor) -> Tensor:
        """Return what the left matrix reads, of inputs [..., in]; of a factor for all heads alike."""
        return x if self.right is None else F.linear(x, self.right)

    def rows(self, x: Tensor, narrow: Tensor | None, outputs: range) -> Tensor:
        """Return some outputs [..., n].

        Args:
            x: [..., in].
            narrow: what `narrow` gave of it; None if each head has its own factor.
            outputs: of whole heads, if these have factors of their own.
        """
        assert self.left is not None
        bias = None if self.bias is None else self.bias[outputs.start : outputs.stop]
        left = self.left[outputs.start : outputs.stop]
        if narrow is not None:
            return F.linear(narrow, left, bias)
        assert self.right is not None
        size, rank = len(self.left) // self.heads, self.left.shape[1]
        own = range(outputs.start // size, outputs.stop // size)
        inner = F.linear(x, self.right[own.start * rank : own.stop * rank])
        if len(own) == 1:
            return F.linear(inner, left, bias)
        flat = inner.reshape(-1, len(own), rank).transpose(0, 1)
        y = torch.bmm(flat, left.unflatten(0, (len(own), size)).mT).transpose(0, 1).reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    def outputs(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the outputs [rows, out] of a layer that gathered.

        Args:
            total: [rows, rank], or [rows, out] of one that is not kept as factors.
            dtype: of the layer.
        """
        total = total.to(dtype)
        if self.left is not None:
            return F.linear(total, self.left, self.bias)
        return total if self.bias is None else total + self.bias


class Gathered:
    """A sum over tiles of what a layer makes of some of its inputs.

    Args:
        layer: that reads all tiles.
    """

    def __init__(self, layer: Thin) -> None:
        self._layer, self._total = layer, None

    _total: Tensor | None

    def add(self, x: Tensor, inputs: range) -> None:
        """Add what the layer makes of some inputs.

        Args:
            x: [..., n].
            inputs: which of the layer's these are.
        """
        assert self._layer.right is not None
        right = self._layer.right[:, inputs.start : inputs.stop]
        rows = x.reshape(-1, x.shape[-1])
        if self._total is None:
            first = F.linear(rows, right)
            self._total = first.float() if first.dtype in SHORT else first  # sums over tiles are not rounded to 16 bits
        elif self._total.dtype == rows.dtype:
            self._total.addmm_(rows, right.t())
        else:
            self._total.add_(F.linear(rows, right))

    @property
    def total(self) -> Tensor:
        """What was added so far: [rows, rank], of a layer that is not kept as factors [rows, out]."""
        assert self._total is not None
        return self._total


def by_rows(function: Callable[..., Tensor], rows: int, *given: Tensor) -> Tensor:
    """Apply a function of single tokens to some rows after the others, so that what it makes in between is small.

    Args:
        function: of tensors [n, ...], the same rows of each.
        rows: at a time.
        given: [..., channels] each, with the same rows.

    Returns:
        What it gives, in the shape of the first.
    """
    flat, shape = [each.reshape(-1, each.shape[-1]) for each in given], given[0].shape[:-1]
    count, out = len(flat[0]), None
    if count <= rows:
        whole = function(*flat)
        return whole.view(*shape, whole.shape[-1])
    for start in range(0, count, rows):
        part = function(*(each[start : start + rows] for each in flat))
        out = part.new_empty(count, part.shape[-1]) if out is None else out
        out[start : start + rows] = part
        del part  # before the next rows are computed
    assert out is not None
    return out.view(*shape, out.shape[-1])


def flashsvd_ffn(
    x: Tensor,
    up: Thin,
    down: Thin,
    act: Callable[[Tensor], Tensor],
    *,
    gate: Thin | None = None,
    up_rows: range | None = None,
    gate_rows: range | None = None,
    block: int = 128,
) -> Tensor:
    """Compute an MLP some units at a time.

    Args:
        x: [..., in].
        up: makes the units.
        down: reads them.
        act: element-wise, of the units, or of the gate's.
        gate: for act(gate) * up; it may be the same layer as `up`.
        up_rows: outputs of `up` that are the units; None for all.
        gate_rows: outputs of `gate` that are its units; None for all.
        block: units of a tile.

    Returns:
        [..., out].
    """
    assert down.right is not None
    units = down.right.shape[1]
    narrow = up.narrow(x) if up.heads == 1 else None
    other = narrow if gate is up else None if gate is None or gate.heads > 1 else gate.narrow(x)
    begin, of_gate = (0 if rows is None else rows.start for rows in (up_rows, gate_rows))
    gathered = Gathered(down)
    for start in range(0, units, block):
        tile = range(start, min(start + block, units))
        if gate is None:
            hidden = act(up.rows(x, narrow, range(begin + tile.start, begin + tile.stop)))
        else:
            hidden = act(gate.rows(x, other, range(of_gate + tile.start, of_gate + tile.stop)))
            hidden = hidden * up.rows(x, narrow, range(begin + tile.start, begin + tile.stop))
        gathered.add(hidden, tile)
        del hidden
    del narrow, other
    y = down.outputs(gathered.total, x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


class Turn:
    """Which query head has its turn.

    Args:
        heads: of the queries.
        key_heads: of keys and values.

    Attributes:
        number: of the query head, from 0.
    """

    def __init__(self, heads: int, key_heads: int) -> None:
        self.heads, self.key_heads, self.number = heads, key_heads, 0

    @property
    def key(self) -> int:
        """The key head that the query head reads."""
        return self.number // (self.heads // self.key_heads)

    @property
    def last(self) -> bool:
        """Whether no other query head comes."""
        return self.number + 1 == self.heads


class HeadRows(nn.Module):
    """Stands where query, key or value is computed: gives the outputs of the head whose turn it is.

    Keys and values are kept while the query heads that read them have their turns.

    Args:
        layer: the projection.
        turn: whose turn it is.
        size: of a head.
        parts: of the layer's outputs, one after the other: 'query', 'key' for a key or a value.
    """

    def __init__(self, layer: Thin, turn: Turn, size: int, parts: Sequence[Literal["query", "key"]]) -> None:
        super().__init__()
        self.layer, self.turn, self.size, self.parts = layer, turn, size, parts
        self._narrow: Tensor | None = None
        self._kept: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        turn, shared = self.turn, list(self.parts) == ["key"]
        if shared and self._kept is not None and self._kept[0] == turn.key:
            return self._kept[1]
        self._kept = None  # before the next ones are computed
        if self.layer.heads == 1 and self._narrow is None:
            self._narrow = self.layer.narrow(x)
        begin, found = 0, []
        for part in self.parts:
            number, count = (turn.number, turn.heads) if part == "query" else (turn.key, turn.key_heads)
            first = begin + number * self.size
            found.append(self.layer.rows(x, self._narrow, range(first, first + self.size)))
            begin += count * self.size
        y = found[0] if len(found) == 1 else torch.cat(found, -1)
        if shared and turn.heads > turn.key_heads:
            self._kept = turn.key, y
        return y


class HeadColumns(nn.Module):
    """Stands where attention's output is computed: gathers the heads, and ends the pass until the last ones came.

    Args:
        layer: the output layer.
        turn: whose turn it is.
        size: of a head.
        rows: tokens at a time, of what stands behind.
        behind: what is applied to the outputs, token by token, with `Outputs` in place of the layer; None for nothing.
    """

    def __init__(self, layer: Thin, turn: Turn, size: int, rows: int, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.turn, self.size, self.rows = layer, turn, size, rows
        self.gathered = Gathered(layer)
        self.behind = behind

    def forward(self, mixed: Tensor, *others: Tensor) -> Tensor:
        number, size = self.turn.number, self.size
        self.gathered.add(mixed, range(number * size, (number + 1) * size))
        if not self.turn.last:
            raise StopForward
        total, shape = self.gathered.total, mixed.shape[:-1]
        if self.behind is None:
            return self.layer.outputs(total, mixed.dtype).view(*shape, -1)
        return by_rows(self.behind, self.rows, total.view(*shape, -1), *others)


class Outputs(nn.Module):
    """Stands where a layer is that gathered: makes its outputs of the sums.

    Args:
        layer: that gathered.
        dtype: of its outputs.
    """

    def __init__(self, layer: Thin, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, total: Tensor) -> Tensor:
        return self.layer.outputs(total, self.dtype)
