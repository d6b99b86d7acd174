"""What the kernels compute, in plain torch: the oracle of the tests, and the way without Numba.

    y[o] = sum over active j of float32(W[o, j]) * x_j

Cost: a copy of the active rows in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actkit.kernels.packing import in_order
from actkit.kernels.quantized import Layout, decode, outputs_of
from actkit.kernels.quantized_rows import RowLayout, decode_rows


def mask(x: Tensor, score: Tensor | None, threshold: float, k: int) -> Tensor:
    """Mark the active inputs of x float32 [rows, in]: bool [rows, in]. A negative threshold or k is unused."""
    scored = x.abs() if score is None else x.abs() * score
    if k >= 0:
        order = scored.argsort(dim=-1, descending=True, stable=True)[:, :k]
        return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order, True)
    if threshold >= 0:
        return ~(scored <= threshold)
    return torch.ones_like(x, dtype=torch.bool)


def compact(x: Tensor, score: Tensor | None, threshold: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return active indices int32 and values float32 of x, [rows, in], zero-filled; and their counts int32 [rows]."""
    x = x.float()
    active = mask(x, score, threshold, k)
    indices = torch.zeros(x.shape, dtype=torch.int32)
    values = torch.zeros(x.shape)
    for row, keep in enumerate(active):
        chosen = keep.nonzero()[:, 0]
        indices[row, : len(chosen)] = chosen.int()
        values[row, : len(chosen)] = x[row, chosen]
    return indices, values, active.sum(-1, dtype=torch.int32)


def active_linear(indices: Tensor, values: Tensor, counts: Tensor, packed: Tensor) -> Tensor:
    """Multiply with a packed weight [n_tiles, in, tile]: float32 [rows, n_tiles * tile]."""
    out = torch.zeros(len(counts), packed.shape[0] * packed.shape[2])
    for row, count in enumerate(counts.tolist()):
        rows = in_order(packed[:, indices[row, :count].long()]).float()
        out[row] = (values[row, :count] @ rows).flatten()
    return out


def sparse_linear(
    x: Tensor, score: Tensor | None, threshold: float, k: int, packed: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Do both of the above, and add the bias: [rows, out_features]."""
    y = active_linear(*compact(x, score, threshold, k), packed)[:, :out_features]
    return (y if bias is None else y + bias).to(x.dtype)


def dense_linear(x: Tensor, packed: Tensor) -> Tensor:
    """Multiply all inputs of x [rows, in]: float32 [rows, n_tiles * tile]."""
    return (x.float() @ in_order(packed).float()).transpose(0, 1).flatten(1)


def quantized_active_linear(
    indices: Tensor,
    values: Tensor,
    counts: Tensor,
    buffer: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    layout: Layout,
) -> Tensor:
    """Multiply with an integer weight as `quantized.pack_quantized` stores it: float32 [rows, n_tiles * tile]."""
    out = torch.zeros(len(counts), layout.n_tiles * layout.tile)
    for row, count in enumerate(counts.tolist()):
        chosen = indices[row, :count].long()
        out[row] = (values[row, :count] @ decode(buffer, scale, zero, layout, chosen)).flatten()
    return out


def quantized_dense_linear(
    x: Tensor, buffer: Tensor, scale: Tensor | None, zero: Tensor | None, layout: Layout
) -> Tensor:
    """Multiply all inputs of x [rows, in]: float32 [rows, n_tiles * tile]."""
    return (x.float() @ decode(buffer, scale, zero, layout)).transpose(0, 1).flatten(1)


def quantized_linear(
    x: Tensor,
    score: Tensor | None,
    threshold: float,
    k: int,
    buffer: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    layout: Layout,
    bias: Tensor | None,
) -> Tensor:
    """Do selection, product and bias: [rows, out_features]."""
    columns = quantized_active_linear(*compact(x, score, threshold, k), buffer, scale, zero, layout)
    y = outputs_of(columns, layout)
    return (y if bias is None else y + bias).to(x.dtype)


def output_rows(x: Tensor, buffer: Tensor, rows: Tensor) -> Tensor:
    """Multiply some rows of a weight as `output_rows.pack_rows` stores it with x [n, width]: float32 [n, rows]."""
    return x @ in_order(buffer[rows.long()]).float().t()


def quantized_output_rows(x: Tensor, buffer: Tensor, rows: Tensor, layout: RowLayout) -> Tensor:
    """Multiply some rows of a weight, as `pack_quantized_rows` stores it, with x [n, in]: float32 [n, rows]."""
    return x @ decode_rows(buffer[rows.long()], layout).t()
