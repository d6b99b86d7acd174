"""Integer weights in the order in which the sparse kernel reads them: one record per input, in column tiles.

    W[o, i] = (code[o, i] - zero) * scale

The layout is that of `packing`: an input's row is one contiguous run of codes within a tile, a tile belongs to one
thread. Codes of 4 bits and less take half a byte, others a byte; each block of 128 outputs has the order of
`vectors`, so that shifts alone bring the outputs out in sequence. What shares a scale decides where the scale lies:

- groups of *outputs* (one scale per input and group of outputs): scales, and zeros if there are any, follow the
  codes in the input's record. A skipped input skips its scales, and a scale multiplies the input once for a whole
  group. A scale is kept for each 16, 64 or 128 columns: groups are padded to a multiple of that, and longer ones
  repeat their scale.
- groups of *inputs* (one scale per output and group of inputs, as AWQ makes them; any group size): scales and zeros are
  arrays beside the codes, read once per group.

Cost: 4.25 bits per weight for 4 bits at groups of 128, and 0.06 for zeros. A second copy of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.kernels.packing import WIDEST_TILE, allocate

BLOCK = 128  # columns; a tile is a whole number of them
LANES = 16  # columns that lie side by side
LINE = 64  # bytes
PIECES = (16, 64, 128)  # columns that may share a scale

GroupAxis = Literal["input", "output"]


class Layout(NamedTuple):
    """What the operators must know of a packed weight, as integers.

    Attributes:
        stored_bits: 4 or 8.
        by_input: whether scales are shared by groups of inputs.
        zeros: whether there are zero points.
        middle: the zero of all, if there are none.
        group: inputs or outputs that share a scale.
        piece: outputs per stored scale (groups of outputs only).
        padded: columns of a group of outputs.
        tile: columns of a tile.
        in_features: columns of the weight.
        out_features: rows of the weight.
    """

    stored_bits: int
    by_input: int
    zeros: int
    middle: int
    group: int
    piece: int
    padded: int
    tile: int
    in_features: int
    out_features: int

    @property
    def code_bytes(self) -> int:
        """Bytes of a record's codes, behind which the scales begin."""
        return self.tile * self.stored_bits // 8

    @property
    def zeros_at(self) -> int:
        """Where the zeros of a record begin."""
        return self.code_bytes + 4 * (self.tile // self.piece)

    @property
    def record_bytes(self) -> int:
        """Bytes from one record to the next: whole cache lines, and no multiple of 512, where cache sets repeat."""
        used = self.code_bytes
        if not self.by_input:
            used = self.zeros_at + (self.tile // self.piece if self.zeros else 0)
        lines = ceil(used / LINE)
        return LINE * (lines + (lines % 8 == 0))

    @property
    def n_tiles(self) -> int:
        """How many tiles hold its columns."""
        return ceil(self.columns / self.tile)

    @property
    def columns(self) -> int:
        """Outputs with the padding inside of groups."""
        return ceil(self.out_features / self.group) * self.padded if not self.by_input else self.out_features

    @property
    def n_groups(self) -> int:
        """Groups of inputs."""
        return ceil(self.in_features / self.group) if self.by_input else 1


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """An integer weight in column tiles, on the CPU.

    Attributes:
        buffer: uint8 [n_tiles, in_features, record bytes].
        scale: float32 [n_tiles, groups, tile] for groups of inputs, else None.
        zero: uint8 [n_tiles, groups, record bytes], laid out as the codes, for groups of inputs with zero points, else
            None.
        layout: what the operators must know.
    """

    buffer: Tensor
    scale: Tensor | None
    zero: Tensor | None
    layout: Layout

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.layout.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.layout.out_features

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, padding included."""
        return sum(part.nbytes for part in (self.buffer, self.scale, self.zero) if part is not None)

    def dense(self) -> Tensor:
        """Return the weight float32 [out_features, in_features] that codes and parameters stand for."""
        rows = decode(self.buffer, self.scale, self.zero, self.layout)
        return outputs_of(rows.permute(1, 0, 2).flatten(1), self.layout).t()


def pack_quantized(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    bits: int,
    group_axis: GroupAxis,
    in_features: int | None = None,
    threads: int | None = None,
) -> QuantizedWeight:
    """Copy integer codes and their parameters into column tiles.

    Args:
        codes: uint8 [out, in], or for 4 bits and less [out, ceil(in / 2)] with the first of two codes in the low half.
        scale: float32, [out, groups] for group_axis "input" and [groups, in] for "output"; groups have equal size.
        zero: uint8, of the same shape; None for 2^(bits - 1).
        bits: 2 to 8.
        group_axis: along which weights share a scale.
        in_features: only needed if 4-bit codes of an odd number of inputs have groups along the input.
        threads: as in `pack`.

    Returns:
        The copy.

    Raises:
        ValueError: an argument is outside of this.
    """
    codes, scale, zero, in_features = _checked(codes, scale, zero, bits, group_axis, in_features)
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads: {threads} was given; give 1 or more.")
    out_features = codes.shape[0]
    if group_axis == "output":
        group = out_features // scale.shape[0]
        piece = next((piece for piece in PIECES if piece >= group), BLOCK)
        padded = ceil(group / piece) * piece
        columns = ceil(out_features / group) * padded
    else:
        group, piece, padded, columns = in_features // scale.shape[1], BLOCK, out_features, out_features
    shares = threads * ceil(columns / (threads * WIDEST_TILE))
    tile = ceil(columns / (shares * BLOCK)) * BLOCK
    layout = Layout(
        stored_bits=4 if bits <= 4 else 8,
        by_input=int(group_axis == "input"),
        zeros=int(zero is not None),
        middle=2 ** (bits - 1),
        group=group,
        piece=piece,
        padded=padded,
        tile=tile,
        in_features=in_features,
        out_features=out_features,
    )
    buffer = allocate((layout.n_tiles, in_features, layout.record_bytes), torch.uint8)
    _store_records(buffer, columns_of(codes.t(), layout), layout)
    if group_axis == "input":
        scales = allocate((layout.n_tiles, layout.n_groups, tile), torch.float32)
        scales.copy_(_tiles(scale.t(), layout))
        zeros = None
        if zero is not None:
            zeros = allocate((layout.n_tiles, layout.n_groups, layout.record_bytes), torch.uint8)
            _store_records(zeros, zero.t(), layout)
        return QuantizedWeight(buffer, scales, zeros, layout)
    repeats = padded // piece
    _store_parameters(buffer, scale.t().repeat_interleave(repeats, 1), layout, layout.code_bytes)
    if zero is not None:
        _store_parameters(buffer, zero.t().repeat_interleave(repeats, 1), layout, layout.zeros_at)
    return QuantizedWeight(buffer, None, None, layout)


def _checked(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_axis: str, in_features: int | None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Return codes [out, in] one per byte, scale and zero, checked; and the number of inputs."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: {bits} was given, allowed are 2 to 8.")
    if group_axis not in ("input", "output"):
        raise ValueError(f"group_axis: {group_axis!r} was given, allowed are 'input' and 'output'.")
    if codes.dim() != 2 or codes.numel() == 0 or codes.dtype != torch.uint8:
        raise ValueError(f"codes: {codes.dtype} {tuple(codes.shape)} was given; give non-empty uint8 [out, in].")
    for name, given in (("codes", codes), ("scale", scale), ("zero", zero)):
        if given is not None and given.device.type != "cpu":
            raise ValueError(f"{name}: it is on {given.device}; the kernel runs on the CPU, use .cpu().")
    if scale.dim() != 2 or scale.dtype != torch.float32 or scale.numel() == 0:
        raise ValueError(f"scale: {scale.dtype} {tuple(scale.shape)} was given; give float32, two axes, not empty.")
    if not scale.isfinite().all():
        raise ValueError("scale: it has entries that are not finite; an input of zero would give NaN.")
    width = codes.shape[1] * (2 if bits <= 4 else 1)
    if in_features is None:
        in_features = scale.shape[1] if group_axis == "output" else width
    if not width - (bits <= 4) <= in_features <= width:
        raise ValueError(f"in_features: {in_features} with codes {tuple(codes.shape)} of {bits} bits; they do not fit.")
    if bits <= 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, :in_features]
    if int(codes.max()) >= 2**bits:
        raise ValueError(f"codes: the largest is {codes.max()}, more than {bits} bits.")
    shape = (codes.shape[0], scale.shape[1]) if group_axis == "input" else (scale.shape[0], in_features)
    length, groups = (in_features, shape[1]) if group_axis == "input" else (codes.shape[0], shape[0])
    if tuple(scale.shape) != shape or length % groups:
        raise ValueError(
            f"scale: shape {tuple(scale.shape)} was given for [{codes.shape[0]}, {in_features}]; give "
            f"{'[out, groups]' if group_axis == 'input' else '[groups, in]'} with groups of equal size."
        )
    if zero is not None and (zero.shape != scale.shape or zero.dtype != torch.uint8 or int(zero.max()) >= 2**bits):
        raise ValueError(
            f"zero: {zero.dtype} {tuple(zero.shape)} was given; give uint8 {tuple(scale.shape)}, below {2**bits}."
        )
    return codes, scale.detach(), zero, in_features


# -- the order of codes ------------------------------------------------------------------------------------------------


def columns_of(rows: Tensor, layout: Layout) -> Tensor:
    """Return rows over outputs [..., out] with each group padded to whole pieces: [..., columns]."""
    if layout.by_input or layout.padded == layout.group:
        return rows
    return F.pad(rows.unflatten(-1, (-1, layout.group)), (0, layout.padded - layout.group)).flatten(-2)


def outputs_of(columns: Tensor, layout: Layout) -> Tensor:
    """Invert `columns_of`, with the padding of tiles cut off: [..., n_tiles * tile] to [..., out]."""
    columns = columns[..., : layout.columns]
    if layout.by_input or layout.padded == layout.group:
        return columns
    return columns.unflatten(-1, (-1, layout.padded))[..., : layout.group].flatten(-2)


def _tiles(rows: Tensor, layout: Layout, width: int | None = None) -> Tensor:
    """Cut [n, columns] into [n_tiles, n, width], width being that of a tile, zero-padded."""
    width = layout.tile if width is None else width
    rows = F.pad(rows, (0, layout.n_tiles * width - rows.shape[1]))
    return rows.unflatten(1, (layout.n_tiles, width)).transpose(0, 1)


def _store_records(buffer: Tensor, codes: Tensor, layout: Layout) -> None:
    """Write codes [n, columns] into the records uint8 [n_tiles, n, record bytes], and zeros into the rest of them."""
    for stored, rows in zip(buffer, _tiles(codes, layout)):
        packed = interleave(rows, layout.stored_bits)
        stored[:, : packed.shape[1]] = packed
        stored[:, packed.shape[1] :] = 0


def _store_parameters(buffer: Tensor, values: Tensor, layout: Layout, at: int) -> None:
    """Write scales or zeros [in, pieces] into the records from byte `at` on."""
    tiles = _tiles(values, layout, layout.tile // layout.piece).contiguous().view(torch.uint8)
    buffer[:, :, at : at + tiles.shape[2]] = tiles


def interleave(codes: Tensor, stored_bits: int) -> Tensor:
    """Put codes uint8 [n, whole blocks] in the order of `vectors`: uint8 [n, bytes]."""
    per_word = 32 // stored_bits
    words = codes.unflatten(1, (-1, per_word, LANES)).transpose(2, 3)  # [n, chunks, lane, place in the word]
    if stored_bits == 4:
        words = words[..., 0::2] | (words[..., 1::2] << 4)
    return words.flatten(1)


def in_sequence(packed: Tensor, stored_bits: int) -> Tensor:
    """Invert `interleave` for [..., bytes]: uint8 [..., columns]."""
    if stored_bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    per_word = 32 // stored_bits
    return packed.unflatten(-1, (-1, LANES, per_word)).transpose(-1, -2).flatten(-3)


def decode(
    buffer: Tensor, scale: Tensor | None, zero: Tensor | None, layout: Layout, chosen: Tensor | None = None
) -> Tensor:
    """Return records of the inputs `chosen` (all if None) as float32 [n_tiles, n, tile]."""
    if chosen is None:
        chosen = torch.arange(layout.in_features)
    records = buffer[:, chosen]
    codes = in_sequence(records[..., : layout.code_bytes], layout.stored_bits).float()
    offset = torch.tensor(float(layout.middle))
    if scale is not None:
        groups = chosen // layout.group
        scales = scale[:, groups]
        if zero is not None:
            offset = in_sequence(zero[:, groups, : layout.code_bytes], layout.stored_bits).float()
    else:
        scales = records[..., layout.code_bytes : layout.zeros_at].contiguous().view(torch.float32)
        scales = scales.repeat_interleave(layout.piece, -1)
        if layout.zeros:
            zeros = records[..., layout.zeros_at : layout.zeros_at + layout.tile // layout.piece]
            offset = zeros.float().repeat_interleave(layout.piece, -1)
    return (codes - offset) * scales
