"""Integer weights row by row, for outputs that are known to be wanted: what `quantized_output_rows` reads.

    packed = pack_quantized_rows(codes, scale, zero, bits=4, group=128)
    active = gate.nonzero()[:, 0]                        behind a sparse gate, the units that are not 0
    up = quantized_output_rows(x, packed, active)        float32 [len(active)]

As `output_rows.pack_rows`, for weights with one scale per output and group of inputs. A row is one run of memory: codes
in blocks of 128 inputs in the order of `vectors`, then a scale (float32) and, if there are any, a zero (uint8) for
each piece of a block. Groups are 16, 32 or 64 inputs, multiples of 128, or all inputs; longer ones than a block repeat
their scale.

Cost: 4.25 bits per weight for 4 bits at groups of 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.kernels.packing import allocate
from actkit.kernels.quantized import BLOCK, LINE, in_sequence, interleave

PIECES = (16, 32, 64, 128)  # inputs that may share a scale


class RowLayout(NamedTuple):
    """What the operator must know, as integers.

    Attributes:
        stored_bits: 4 or 8.
        zeros: whether there are zero points.
        middle: the zero of all, if there are none.
        piece: inputs per stored scale.
        in_features: columns of the weight.
    """

    stored_bits: int
    zeros: int
    middle: int
    piece: int
    in_features: int

    @property
    def blocks(self) -> int:
        """Blocks of codes in a row."""
        return ceil(self.in_features / BLOCK)

    @property
    def pieces(self) -> int:
        """Scales of a row."""
        return self.blocks * BLOCK // self.piece

    @property
    def scales_at(self) -> int:
        """Bytes from the start of a row to its scales."""
        return self.blocks * BLOCK * self.stored_bits // 8

    @property
    def zeros_at(self) -> int:
        """Bytes from the start of a row to its zero points."""
        return self.scales_at + 4 * self.pieces

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: whole cache lines, and no multiple of 512, where cache sets repeat."""
        lines = ceil((self.zeros_at + self.zeros * self.pieces) / LINE)
        return LINE * (lines + (lines % 8 == 0))


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """An integer weight, row by row.

    Attributes:
        buffer: uint8 [out, row bytes] on the CPU.
        layout: what the operator must know.
    """

    buffer: Tensor
    layout: RowLayout

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.layout.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.buffer.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, padding included."""
        return self.buffer.nbytes

    def dense(self) -> Tensor:
        """Return the weight float32 [out, in] that codes and parameters stand for."""
        return decode_rows(self.buffer, self.layout)


def piece_of(group: int, in_features: int) -> int | None:
    """Return the inputs per stored scale for groups of so many inputs; None if rows cannot hold them."""
    if group >= in_features or group % BLOCK == 0:
        return BLOCK
    return group if group in PIECES else None


def pack_quantized_rows(
    codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, bits: int, group: int
) -> QuantizedRows:
    """Copy integer codes and their parameters row by row.

    Args:
        codes: uint8 [out, in], one per byte.
        scale: float32 [out, groups].
        zero: uint8, of the same shape; None for 2^(bits - 1).
        bits: 2 to 8.
        group: inputs that share a scale; the last group may have fewer.

    Returns:
        The copy.

    Raises:
        ValueError: an argument is outside of this.
    """
    if codes.dim() != 2 or codes.numel() == 0 or codes.dtype != torch.uint8 or codes.device.type != "cpu":
        raise ValueError(
            f"codes: {codes.dtype} {tuple(codes.shape)} on {codes.device} was given; give non-empty uint8 [out, in] "
            f"on the CPU."
        )
    if not 2 <= bits <= 8 or int(codes.max()) >= 2**bits:
        raise ValueError(f"bits: {bits} was given for codes up to {codes.max()}; allowed are 2 to 8 that hold them.")
    n_out, n_in = codes.shape
    piece = piece_of(group, n_in) if group > 0 else None
    if piece is None:
        raise ValueError(f"group: {group} was given; give 16, 32, 64, a multiple of 128, or all {n_in} inputs.")
    shape = (n_out, ceil(n_in / group))
    if scale.dtype != torch.float32 or tuple(scale.shape) != shape or not scale.isfinite().all():
        raise ValueError(f"scale: {scale.dtype} {tuple(scale.shape)} was given; give finite float32 {shape}.")
    if zero is not None and (zero.dtype != torch.uint8 or tuple(zero.shape) != shape or int(zero.max()) >= 2**bits):
        raise ValueError(f"zero: {zero.dtype} {tuple(zero.shape)} was given; give uint8 {shape}, below {2**bits}.")
    layout = RowLayout(4 if bits <= 4 else 8, int(zero is not None), 2 ** (bits - 1), piece, n_in)
    buffer = allocate((1, n_out, layout.row_bytes), torch.uint8)[0]
    buffer.zero_()
    width = layout.blocks * BLOCK
    buffer[:, : layout.scales_at] = interleave(F.pad(codes, (0, width - n_in)), layout.stored_bits)
    of_piece = (torch.arange(layout.pieces) * piece).clamp(max=n_in - 1) // group
    scales = scale.detach()[:, of_piece].contiguous().view(torch.uint8)
    buffer[:, layout.scales_at : layout.zeros_at] = scales
    if zero is not None:
        buffer[:, layout.zeros_at : layout.zeros_at + layout.pieces] = zero[:, of_piece]
    return QuantizedRows(buffer, layout)


def decode_rows(buffer: Tensor, layout: RowLayout) -> Tensor:
    """Return rows uint8 [n, row bytes] as float32 [n, in]."""
    codes = in_sequence(buffer[:, : layout.scales_at], layout.stored_bits).float()
    scale = buffer[:, layout.scales_at : layout.zeros_at].contiguous().view(torch.float32)
    zero = torch.full_like(scale, float(layout.middle))
    if layout.zeros:
        zero = buffer[:, layout.zeros_at : layout.zeros_at + layout.pieces].float()
    wide = (codes - zero.repeat_interleave(layout.piece, 1)) * scale.repeat_interleave(layout.piece, 1)
    return wide[:, : layout.in_features]
