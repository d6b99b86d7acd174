"""Outputs of a linear layer that are known to be wanted, and no others: the operator `actkit::output_rows`.

    packed = pack_rows(up.weight)
    active = gate.nonzero()[:, 0]                        behind a sparse gate, the units that are not 0
    up = output_rows(x, packed, active)                  float32 [len(active)]

To skip outputs a projection needs its weight as it is, one row per output, and dot products; the other kernels of this
package skip inputs. Rows are padded with zeros to whole cache lines. In bfloat16 inputs c and c + 16 of each block of
32 share a word, as outputs do in `packing`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.kernels import reference
from actkit.kernels.operators import check_gradient, has_numba, plain, register
from actkit.kernels.packing import COLUMNS, HALF, PAGE, WEIGHT_DTYPES, allocate, in_order

MOST_ROWS = 8  # of x


@dataclass(frozen=True, eq=False)
class PackedRows:
    """A weight, row by row.

    Attributes:
        buffer: float32 or bfloat16 [out, width], the width padded, on the CPU.
        in_features: columns of the weight.
    """

    buffer: Tensor
    in_features: int

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.buffer.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, padding included."""
        return self.buffer.nbytes

    def dense(self) -> Tensor:
        """Return the weight [out, in]."""
        return in_order(self.buffer)[:, : self.in_features]


def pack_rows(weight: Tensor) -> PackedRows:
    """Copy a weight [out, in]. Raises ValueError for one that the kernel cannot read."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight: shape {tuple(weight.shape)} was given; give a non-empty [out, in].")
    if weight.dtype not in WEIGHT_DTYPES or weight.device.type != "cpu":
        raise ValueError(f"weight: {weight.dtype} on {weight.device}; give float32 or bfloat16 on the CPU.")
    out_features, in_features = weight.shape
    width = blocks_of(in_features)
    if width * weight.element_size() % PAGE == 0:  # rows at this distance share their cache sets
        width += COLUMNS
    buffer = allocate((1, out_features, width), weight.dtype)[0]
    _store(buffer, F.pad(weight.detach(), (0, width - in_features)))
    return PackedRows(buffer, in_features)


@dataclass(frozen=True, eq=False)
class BundledUnits:
    """The units of an MLP, each one's row of the up projection and column of the down projection side by side.

    Behind a sparse gate that makes one run of memory per active unit, and one list of them.

    Attributes:
        buffer: float32 or bfloat16 [units, width], on the CPU: a row, padded to `down_at`, a column, padded.
        inputs: of the up projection.
        outputs: of the down projection.
        down_at: where the column begins.
    """

    buffer: Tensor
    inputs: int
    outputs: int
    down_at: int

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, padding included."""
        return self.buffer.nbytes

    def up(self) -> Tensor:
        """Return the weight of the up projection: [units, inputs]."""
        return in_order(self.buffer[:, : self.down_at])[:, : self.inputs]

    def down(self) -> Tensor:
        """Return the weight of the down projection, transposed: [units, outputs]."""
        width = blocks_of(self.outputs)
        return in_order(self.buffer[:, self.down_at : self.down_at + width])[:, : self.outputs]


def bundle_units(up: Tensor, down: Tensor) -> BundledUnits:
    """Copy the weights up [units, in] and down [out, units]. Raises ValueError if they do not belong together."""
    if up.dim() != 2 or down.dim() != 2 or len(up) != down.shape[1] or up.dtype != down.dtype:
        raise ValueError(
            f"up {up.dtype} {tuple(up.shape)} and down {down.dtype} {tuple(down.shape)} were given; give "
            f"[units, in] and [out, units] of one dtype."
        )
    inputs, outputs = up.shape[1], down.shape[0]
    down_at = blocks_of(inputs)
    width = down_at + blocks_of(outputs)
    if width * up.element_size() % PAGE == 0:  # rows at this distance share their cache sets
        width += COLUMNS
    buffer = allocate((1, len(up), width), up.dtype)[0]
    both = torch.cat((F.pad(up.detach(), (0, down_at - inputs)), down.detach().t()), 1)
    _store(buffer, F.pad(both, (0, width - both.shape[1])))
    return BundledUnits(buffer, inputs, outputs, down_at)


def blocks_of(width: int) -> int:
    """Return the width in whole blocks of columns."""
    return -(-width // COLUMNS) * COLUMNS


def _store(buffer: Tensor, rows: Tensor) -> None:
    """Write rows [n, width] in the order in which kernels read them."""
    if buffer.dtype == torch.bfloat16:
        buffer.unflatten(1, (-1, HALF, 2)).copy_(rows.unflatten(1, (-1, 2, HALF)).transpose(2, 3))
    else:
        buffer.copy_(rows)


def output_rows(x: Tensor, packed: PackedRows, rows: Tensor) -> Tensor:
    """Compute x W[rows].T. Sums are taken in float32, in a fixed order.

    Args:
        x: [..., in] with at most 8 rows.
        packed: from `pack_rows`.
        rows: int32 [n], any of the outputs.

    Returns:
        float32 [..., n].

    Raises:
        ValueError: an argument is outside of this.
        RuntimeError: a gradient would be needed.
    """
    return torch.ops.actkit.output_rows(x, packed.buffer, rows, packed.in_features)


def _check(x: Tensor, buffer: Tensor, rows: Tensor, in_features: int) -> None:
    if buffer.dim() != 2 or buffer.dtype not in WEIGHT_DTYPES or not buffer.is_contiguous():
        raise ValueError(f"packed: {buffer.dtype} {tuple(buffer.shape)} was given; give what pack_rows(weight) made.")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x: shape {tuple(x.shape)} was given; the packed weight has {in_features} inputs.")
    if x.shape[:-1].numel() > MOST_ROWS:
        raise ValueError(f"x: it has {x.shape[:-1].numel()} rows, at most {MOST_ROWS} are taken; use a dense product.")
    if rows.dim() != 1 or rows.dtype != torch.int32:
        raise ValueError(f"rows: {rows.dtype} {tuple(rows.shape)} was given; give int32 [n].")


def _output_rows(x: Tensor, buffer: Tensor, rows: Tensor, in_features: int) -> Tensor:
    _check(x, buffer, rows, in_features)
    check_gradient(x, buffer)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(buffer):  # the kernel checks no bounds
        raise ValueError(
            f"rows: {int(rows.min())} to {int(rows.max())} was given; the layer has {len(buffer)} outputs."
        )
    given = F.pad(plain(x).view(-1, in_features).float(), (0, buffer.shape[1] - in_features))
    if has_numba():
        from actkit.kernels.numba_rows import output_rows as compute
    else:
        compute = reference.output_rows
    return compute(given, plain(buffer), plain(rows)).view(*x.shape[:-1], len(rows))


def _fake_output_rows(x: Tensor, buffer: Tensor, rows: Tensor, in_features: int) -> Tensor:
    _check(x, buffer, rows, in_features)
    return x.new_empty(*x.shape[:-1], rows.shape[0], dtype=torch.float32)


register(
    "output_rows(Tensor x, Tensor packed, Tensor rows, int in_features) -> Tensor", _output_rows, _fake_output_rows
)
