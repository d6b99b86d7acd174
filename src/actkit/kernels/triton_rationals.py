"""`rational` in Triton, forward and backward, for GPUs: a tile of a group's channels at a time, in registers.

x is read as it is stored, so that 16 bits stay 16 bits in memory, and computed with in the coefficients' dtype. The
backward pass forms all sums of a tile while it is in registers, and writes them beside those of the other tiles; torch
adds them up. No atomics: the same bits twice. Only this file and `triton_polynomials` need the package `triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, WIDEST = 1024, 128  # values of a tile, and columns


@triton.jit
def _horner(x, coefficients, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A polynomial, constant first, and its derivative."""
    value, slope = tl.zeros_like(x), tl.zeros_like(x)
    for i in tl.static_range(LENGTH):
        slope = slope * x + value
        value = value * x + tl.load(coefficients + (LENGTH - 1 - i))
    return value, slope


@triton.jit
def _places(rows, width, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the values of a tile lie, and which of them there are: [ROWS, WIDTH]."""
    lines = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    at = lines[:, None] * channels + (tl.program_id(1) * width + columns)[None, :]
    return at, (lines < rows)[:, None] & (columns < width)[None, :]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, a, b, y, rows, width, channels, a_step, b_step,
    A: tl.constexpr, B: tl.constexpr, ABSOLUTE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at, there = _places(rows, width, channels, ROWS, WIDTH)
    values = tl.load(x + at, mask=there, other=0).to(a.dtype.element_ty)
    base = tl.abs(values) if ABSOLUTE else values
    top, _ = _horner(values, a + tl.program_id(1) * a_step, A)
    bottom, _ = _horner(base, b + tl.program_id(1) * b_step, B)
    if not ABSOLUTE:
        bottom = 1 + tl.abs(bottom)
    tl.store(y + at, top / bottom, mask=there)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, x, a, b, dx, sums, rows, width, channels, a_step, b_step,
    A: tl.constexpr, B: tl.constexpr, ABSOLUTE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at, there = _places(rows, width, channels, ROWS, WIDTH)
    values = tl.load(x + at, mask=there, other=0).to(a.dtype.element_ty)
    g = tl.load(grad + at, mask=there, other=0).to(a.dtype.element_ty)  # 0 outside: adds nothing to the sums
    base = tl.abs(values) if ABSOLUTE else values
    top, slope = _horner(values, a + tl.program_id(1) * a_step, A)
    bottom, bent = _horner(base, b + tl.program_id(1) * b_step, B)
    sign = tl.where(bottom >= 0, 1.0, -1.0).to(a.dtype.element_ty)  # 1 of kind A
    if ABSOLUTE:
        bent = tl.where(values > 0, bent, tl.where(values < 0, -bent, 0.0))
    else:
        bottom = 1 + tl.abs(bottom)
        bent = bent * sign
    share, value = g / bottom, top / bottom
    tl.store(dx + at, share * (slope - value * bent), mask=there)
    tile = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    out = sums + tile.to(tl.int64) * (A + B - 1)
    power = share
    for i in tl.static_range(A):
        tl.store(out + i, tl.sum(power))
        power = power * values
    power = -share * value * sign
    for i in tl.static_range(B - 1):
        power = power * base
        tl.store(out + (A + i), tl.sum(power))


def rational(x: Tensor, numerator: Tensor, below: Tensor, absolute: bool) -> Tensor:
    """Evaluate it.

    Args:
        x: [..., channels], contiguous, not empty; its last dimension is split into groups.
        numerator: [groups or 1, m + 1], contiguous, constant first.
        below: [groups or 1, n + 1], as `rationals._below` gives it.
        absolute: kind A.

    Returns:
        A tensor like x.
    """
    y, (grid, sizes) = torch.empty_like(x), _sizes(x, numerator, below)
    _forward[grid](x, numerator, below, y, *sizes[:5], A=numerator.shape[1], B=below.shape[1], ABSOLUTE=absolute,
                   ROWS=sizes[5], WIDTH=sizes[6])  # fmt: skip
    return y


def rational_backward(
    grad: Tensor, x: Tensor, numerator: Tensor, below: Tensor, absolute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute its gradients.

    Args:
        grad: of the output, contiguous, of the shape of x.
        x: as above, and so the others.
        numerator: as above.
        below: as above.
        absolute: as above.

    Returns:
        That of x, and by group those of the numerator and of what `below` holds behind its constant.
    """
    dx, (grid, sizes) = torch.empty_like(x), _sizes(x, numerator, below)
    tops = numerator.shape[1]
    sums = numerator.new_empty((*grid, tops + below.shape[1] - 1))
    _backward[grid](grad, x, numerator, below, dx, sums, *sizes[:5], A=tops, B=below.shape[1], ABSOLUTE=absolute,
                    ROWS=sizes[5], WIDTH=sizes[6])  # fmt: skip
    total = sums.sum((0, 2))
    return dx, total[:, :tops], total[:, tops:]


def _sizes(x: Tensor, numerator: Tensor, below: Tensor) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """The grid (tiles of rows, groups, tiles of channels), and rows, width, channels, steps of a and b, tile."""
    channels, groups = x.shape[-1], max(len(numerator), len(below))
    rows, width = x.numel() // channels, channels // groups
    columns = min(triton.next_power_of_2(width), WIDEST)
    lines = max(1, TILE // columns)
    steps = (numerator.shape[1] if len(numerator) > 1 else 0, below.shape[1] if len(below) > 1 else 0)
    return (triton.cdiv(rows, lines), groups, triton.cdiv(width, columns)), (
        rows, width, channels, *steps, lines, columns,
    )  # fmt: skip
