"""`poly_norm` in Triton, forward and backward, for GPUs: a row at a time, read once and held in registers.

x is read as it is stored, and computed with in the coefficients' dtype. Each row writes its own sums for the
coefficients; torch adds them up. No atomics: the same bits twice. Rows longer than `LONGEST` run in plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 1 << 16  # channels


@triton.jit
def _norm(x, weight, y, scales, bias, eps, channels, ORDER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """weight: lowest power first, then the bias."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = tl.load(x + row * channels + columns, mask=columns < channels, other=0).to(weight.dtype.element_ty)
    power, found = values, tl.zeros_like(values) + tl.load(bias)
    for i in tl.static_range(ORDER):
        scale = 1 / tl.sqrt(tl.sum(power * power) / channels + eps)
        tl.store(scales + row * ORDER + i, scale)
        found += tl.load(weight + i) * scale * power
        power = power * values
    tl.store(y + row * channels + columns, found, mask=columns < channels)


@triton.jit
def _norm_backward(grad, x, scales, weight, dx, sums, channels, ORDER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """sums [rows, 1 + order]: of the gradient, and of it times each normalised power."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = columns < channels
    values = tl.load(x + row * channels + columns, mask=there, other=0).to(weight.dtype.element_ty)
    g = tl.load(grad + row * channels + columns, mask=there, other=0).to(weight.dtype.element_ty)
    tl.store(sums + row * (ORDER + 1), tl.sum(g))
    before, found = tl.zeros_like(values) + 1, tl.zeros_like(values)  # before: the power below
    for i in tl.static_range(ORDER):
        scale = tl.load(scales + row * ORDER + i)
        normalised = before * values * scale
        along = tl.sum(g * normalised)
        tl.store(sums + row * (ORDER + 1) + (i + 1), along)
        found += tl.load(weight + i) * (i + 1) * scale * before * (g - normalised * (along / channels))
        before = before * values
    tl.store(dx + row * channels + columns, found, mask=there)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute it.

    Args:
        x: [rows, channels], contiguous, not empty, at most `LONGEST` channels.
        weight: [order], lowest power first, contiguous.
        bias: [1], of the same dtype.
        eps: inside of the root.

    Returns:
        A tensor like x, and the scales [rows, order].
    """
    y, scales = torch.empty_like(x), weight.new_empty(len(x), len(weight))
    _norm[(len(x),)](x, weight, y, scales, bias, eps, x.shape[1], **_sizes(x, weight))
    return y, scales


def norm_backward(grad: Tensor, x: Tensor, scales: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute its gradients.

    Args:
        grad: [rows, channels], contiguous.
        x: as above.
        scales: that `norm` gave.
        weight: as above.

    Returns:
        That of x, and [1 + order]: of the bias, and of the weight, lowest power first.
    """
    dx, sums = torch.empty_like(x), weight.new_empty(len(x), 1 + len(weight))
    _norm_backward[(len(x),)](grad, x, scales, weight, dx, sums, x.shape[1], **_sizes(x, weight))
    return dx, sums.sum(0)


def _sizes(x: Tensor, weight: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[1])
    return {"ORDER": len(weight), "BLOCK": block, "num_warps": min(16, max(4, block // 1024))}
