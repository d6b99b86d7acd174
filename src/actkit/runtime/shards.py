"""The weights of a decoder: parts of linear layers, joined and packed for the thread that owns them.

A part is some outputs or some inputs of a layer. Integer codes stay as they are: only groups are cut, into the largest
ones that fit the part, and their scales repeated. Parts that are read with one selection of inputs and stored alike are
joined into one matrix, so that an input's row is as long as can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd

import torch
from torch import Tensor, nn

from actkit.core.errors import UnsupportedModelError
from actkit.core.linear import ActLinear, IntegerWeight
from actkit.core.quantizer import unpack_nibbles
from actkit.kernels.packing import PackedWeight, pack
from actkit.kernels.quantized import PIECES, QuantizedWeight, pack_quantized

SMALLEST_PIECE = PIECES[0]


@dataclass(frozen=True)
class Part:
    """Some rows or columns of a weight. dense: float32 or bfloat16 [out, in]; or codes uint8 [out, in], scale and zero
    as in `pack_quantized`, bits, axis and group (outputs or inputs that share a scale)."""

    dense: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    bits: int = 0
    axis: str = ""
    group: int = 0

    @property
    def outputs(self) -> int:
        given = self.dense if self.codes is None else self.codes
        return given.shape[0]  # type: ignore[union-attr]

    @property
    def kind(self) -> tuple[object, ...]:
        """What two parts must share to become one matrix."""
        return (None if self.dense is None else self.dense.dtype, self.bits, self.axis, self.zero is None)

    def regrouped(self, group: int) -> Part:
        """With smaller groups, which must divide those there are."""
        if self.scale is None or group == self.group:
            return self
        times, dim = self.group // group, 0 if self.axis == "output" else 1
        zero = None if self.zero is None else self.zero.repeat_interleave(times, dim)
        return replace(self, scale=self.scale.repeat_interleave(times, dim), zero=zero, group=group)


def part_of(module: nn.Module, outputs: range | None = None, inputs: range | None = None) -> Part:
    """Some outputs or some inputs of a linear layer (nn.Linear or ActLinear without a correction).

    Raises UnsupportedModelError for any other module.
    """
    if isinstance(module, ActLinear):
        if module.correction is not None:
            raise UnsupportedModelError("model: a layer has a low-rank correction, which the decoder does not compute.")
        if isinstance(module.weight, IntegerWeight):
            return _integer_part(module.weight, outputs, inputs)
        weight = module.dequantized().detach()
    elif isinstance(module, nn.Linear):
        weight = module.weight.detach()
    else:
        raise UnsupportedModelError(
            f"model: a {type(module).__name__} stands where the decoder reads a linear layer; undo what replaced it."
        )
    return Part(dense=_dense(weight, outputs, inputs))


def _dense(weight: Tensor, outputs: range | None, inputs: range | None) -> Tensor:
    weight = weight if outputs is None else weight[outputs.start : outputs.stop]
    weight = weight if inputs is None else weight[:, inputs.start : inputs.stop]
    return weight if weight.dtype == torch.bfloat16 else weight.float()


def _integer_part(stored: IntegerWeight, outputs: range | None, inputs: range | None) -> Part:
    grid, (n_out, n_in) = stored.grid, stored.shape
    outputs, inputs = outputs or range(n_out), inputs or range(n_in)
    cut, length = (inputs, n_in) if grid.group_axis == "input" else (outputs, n_out)
    old = length if grid.group_size == -1 else grid.group_size
    ends = list(range(old * (cut.start // old + 1), cut.stop, old))
    group = reduce(gcd, [end - cut.start for end in (*ends, cut.stop)])
    if grid.group_axis == "output":
        group = next((piece for piece in reversed(PIECES) if group % piece == 0), 0)
        if group == 0:  # groups that no kernel reads: the weight as it is multiplied
            return Part(dense=_dense(stored.dequantize().detach(), outputs, inputs))
    codes = unpack_nibbles(stored.codes, n_in) if grid.bits <= 4 else stored.codes
    codes = codes[outputs.start : outputs.stop, inputs.start : inputs.stop]
    chosen = torch.arange(cut.start, cut.stop, group) // old

    def parameters(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if grid.group_axis == "input":
            return values[outputs.start : outputs.stop][:, chosen]
        return values[chosen][:, inputs.start : inputs.stop]

    return Part(None, codes, parameters(stored.scale), parameters(stored.zero), grid.bits, grid.group_axis, group)


def join(parts: Sequence[Part]) -> list[Part]:
    """Parts with the same inputs as few matrices as possible, in order: one where all are stored alike."""
    joined: list[list[Part]] = []
    for part in parts:
        if joined and joined[-1][0].kind == part.kind and _same_groups(joined[-1][0], part):
            joined[-1].append(part)
        else:
            joined.append([part])
    return [_joined(some) for some in joined]


def _same_groups(a: Part, b: Part) -> bool:
    return a.axis != "input" or a.group == b.group


def _joined(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    if parts[0].dense is not None:
        return Part(dense=torch.cat([part.dense for part in parts]))  # type: ignore[misc]
    axis = parts[0].axis
    group = parts[0].group if axis == "input" else min(part.group for part in parts)  # pieces divide each other
    parts = [part.regrouped(group) for part in parts]
    zero = None if parts[0].zero is None else torch.cat([part.zero for part in parts])  # type: ignore[misc]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),  # type: ignore[misc]
        scale=torch.cat([part.scale for part in parts]),  # type: ignore[misc]
        zero=zero,
        group=group,
    )


def packed(part: Part, piece: int, zeros: bool) -> PackedWeight | QuantizedWeight:
    """A part for one thread. piece: outputs per scale of all matrices with groups of outputs; zeros: whether they all
    hold zeros."""
    if part.dense is not None:
        return pack(part.dense, threads=1)
    part = part if part.axis == "input" else part.regrouped(piece)
    assert part.codes is not None and part.scale is not None
    zero = part.zero
    if zero is None and zeros:
        zero = torch.full_like(part.scale, 2 ** (part.bits - 1), dtype=torch.uint8)
    codes = part.codes
    if part.bits <= 4:
        padded = nn.functional.pad(codes, (0, codes.shape[1] % 2))
        codes = padded[:, ::2] | (padded[:, 1::2] << 4)
    return pack_quantized(
        codes,
        part.scale.float().contiguous(),
        zero,
        bits=part.bits,
        group_axis=part.axis,  # type: ignore[arg-type]
        in_features=part.codes.shape[1],
        threads=1,
    )
