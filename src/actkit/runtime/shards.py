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

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.low_rank_weight import LowRankWeight
from actkit.core.layers.weights import IntegerWeight, WeightStorage
from actkit.kernels.packing import COLUMNS, PackedWeight, pack
from actkit.kernels.quantized import PIECES, QuantizedWeight, pack_quantized


@dataclass(frozen=True)
class Kind:
    """How a part of a weight is stored.

    Attributes:
        dtype: of a dense one.
        bits: of codes.
        axis: along which weights share a scale.
        group: outputs or inputs that share a scale.
        zeros: whether there are zero points.
        factored: there is no matrix, but two factors, whose products are added as those of a correction are.
    """

    dtype: torch.dtype | None = None
    bits: int = 0
    axis: str = ""
    group: int = 0
    zeros: bool = False
    factored: bool = False

    def joins(self, other: Kind) -> bool:
        """Whether two parts with the same inputs can become one matrix."""
        alike = replace(self, group=0) == replace(other, group=0)
        return alike and (self.axis != "input" or self.group == other.group)

    def transposed(self) -> Kind:
        """That of the transposed matrix, with groups that a kernel reads; floats if there are none."""
        if self.dtype is not None:
            return self
        if self.axis == "output":
            return replace(self, axis="input")
        piece = next((piece for piece in reversed(PIECES) if self.group % piece == 0), 0)
        return replace(self, axis="output", group=piece) if piece else Kind(torch.float32)

    def joined(self, other: Kind) -> Kind:
        """That of the matrix: groups of outputs are pieces, which divide each other."""
        return replace(self, group=min(self.group, other.group))


@dataclass(frozen=True)
class NoMatrix:
    """Stands where the matrix of a layer would that is kept as two factors: its product is 0.

    Attributes:
        out_features: of the layer, or of this part.
        in_features: the same.
    """

    out_features: int
    in_features: int

    @property
    def buffer(self) -> Tensor:
        """Nothing."""
        return torch.empty(0)

    @property
    def nbytes(self) -> int:
        """None."""
        return 0

    @property
    def tile(self) -> int:
        """How many outputs are set to 0: whole cache lines."""
        return -(-self.out_features // COLUMNS) * COLUMNS


@dataclass(frozen=True)
class Part:
    """Some rows or columns of a weight.

    Attributes:
        kind: how they are stored.
        dense: float32 or bfloat16 [out, in]; None for integers.
        codes: uint8 [out, in].
        scale: as in `pack_quantized`.
        zero: as in `pack_quantized`.
    """

    kind: Kind
    dense: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None

    def regrouped(self, group: int) -> Part:
        """With smaller groups, which must divide those there are."""
        if self.scale is None or group == self.kind.group:
            return self
        times, dim = self.kind.group // group, 0 if self.kind.axis == "output" else 1
        zero = None if self.zero is None else self.zero.repeat_interleave(times, dim)
        scale = self.scale.repeat_interleave(times, dim)
        return replace(self, scale=scale, zero=zero, kind=replace(self.kind, group=group))

    def transposed(self) -> Part:
        """The transposed matrix, as `Kind.transposed` says."""
        kind = self.kind.transposed()
        if self.dense is not None:
            return replace(self, dense=self.dense.t().contiguous())
        assert self.codes is not None and self.scale is not None
        if kind.dtype is None:
            part = self.regrouped(kind.group) if kind.axis == "output" else self
            zero = None if part.zero is None else part.zero.t().contiguous()
            return Part(kind, None, self.codes.t().contiguous(), part.scale.t().contiguous(), zero)  # type: ignore[union-attr]
        zero = 2 ** (self.kind.bits - 1) if self.zero is None else self.zero.repeat_interleave(self.kind.group, 1)
        floats = (self.codes.float() - zero) * self.scale.repeat_interleave(self.kind.group, 1)
        return Part(kind, floats.t().contiguous())


def kind_of(module: nn.Module, outputs: range | None = None, inputs: range | None = None) -> Kind:
    """Return how some outputs or some inputs of the weight of a linear layer are stored.

    Args:
        module: nn.Linear or ActLinear.
        outputs: None for all.
        inputs: None for all.

    Raises:
        UnsupportedModelError: the module is another.
    """
    if isinstance(module, ActLinear):
        return kind_of_stored(module.storage, outputs, inputs)
    if type(module) is nn.Linear:  # a subclass may compute something else
        return Kind(held(module.weight.dtype))
    raise UnsupportedModelError(
        f"model: a {type(module).__name__} stands where the decoder reads a linear layer; undo what replaced it."
    )


def kind_of_stored(weight: WeightStorage, outputs: range | None = None, inputs: range | None = None) -> Kind:
    """Return how the decoder keeps some outputs or some inputs of a stored weight.

    Args:
        weight: any.
        outputs: None for all.
        inputs: None for all.
    """
    if isinstance(weight, IntegerWeight):
        return _integer_kind(weight, outputs, inputs)
    return Kind(held(weight.dtype), factored=isinstance(weight, LowRankWeight))


def held(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the decoder holds floats of a dtype."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def _integer_kind(stored: IntegerWeight, outputs: range | None, inputs: range | None) -> Kind:
    grid, (n_out, n_in) = stored.grid, stored.shape
    by_input = grid.group_axis == "input"
    cut, length = (inputs or range(n_in), n_in) if by_input else (outputs or range(n_out), n_out)
    old = grid.size(length)
    ends = list(range(old * (cut.start // old + 1), cut.stop, old))
    group = reduce(gcd, [end - cut.start for end in (*ends, cut.stop)])
    if not by_input:
        group = next((piece for piece in reversed(PIECES) if group % piece == 0), 0)
        if group == 0:  # groups that no kernel reads: the weight as it is multiplied
            return Kind(held(stored.dtype))
    return Kind(None, grid.bits, grid.group_axis, group, stored.zero is not None)


def part_of(module: nn.Module, outputs: range | None = None, inputs: range | None = None) -> Part:
    """Some outputs or some inputs of a linear layer, stored as `kind_of` says, which see for what is raised."""
    if isinstance(module, ActLinear):
        return part_of_stored(module.storage, outputs, inputs)
    kind = kind_of(module, outputs, inputs)
    return dense_part(module.weight.detach(), kind, outputs, inputs)  # type: ignore[union-attr, operator, arg-type]


def dense_part(weight: Tensor, kind: Kind, outputs: range | None = None, inputs: range | None = None) -> Part:
    """Some outputs or some inputs of a matrix [out, in], as floats of a kind."""
    weight = weight if outputs is None else weight[outputs.start : outputs.stop]
    weight = weight if inputs is None else weight[:, inputs.start : inputs.stop]
    assert kind.dtype is not None
    return Part(kind, weight.to(kind.dtype))


def part_of_stored(stored: WeightStorage, outputs: range | None = None, inputs: range | None = None) -> Part:
    """Some outputs or some inputs of a stored weight, as `kind_of_stored` says."""
    kind = kind_of_stored(stored, outputs, inputs)
    if kind.factored:
        raise UnsupportedModelError("model: a weight that is kept as two factors is read here as one matrix.")
    if kind.dtype is not None:
        return dense_part(stored.dequantize().detach(), kind, outputs, inputs)
    assert isinstance(stored, IntegerWeight)
    grid, (n_out, n_in) = stored.grid, stored.shape
    outputs, inputs = outputs or range(n_out), inputs or range(n_in)
    by_input = grid.group_axis == "input"
    cut, length = (inputs, n_in) if by_input else (outputs, n_out)
    old = grid.size(length)
    codes = stored.integers()[outputs.start : outputs.stop, inputs.start : inputs.stop]
    chosen = torch.arange(cut.start, cut.stop, kind.group) // old

    def parameters(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if by_input:
            return values[outputs.start : outputs.stop][:, chosen]
        return values[chosen][:, inputs.start : inputs.stop]

    return Part(kind, None, codes, parameters(stored.scales()), parameters(stored.zero))


def joined(parts: Sequence[Part]) -> Part:
    """Parts with the same inputs, whose kinds join, as one matrix."""
    if len(parts) == 1:
        return parts[0]
    kind = reduce(Kind.joined, [part.kind for part in parts])
    if kind.dtype is not None:
        return Part(kind, torch.cat([part.dense for part in parts]))  # type: ignore[misc]
    parts = [part.regrouped(kind.group) for part in parts]
    zero = torch.cat([part.zero for part in parts]) if kind.zeros else None  # type: ignore[misc]
    codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])  # type: ignore[misc]
    return Part(kind, None, codes, scale, zero)


def packed(part: Part) -> PackedWeight | QuantizedWeight:
    """A part for one thread."""
    if part.dense is not None:
        return pack(part.dense, threads=1)
    assert part.codes is not None and part.scale is not None
    codes = part.codes
    if part.kind.bits <= 4:
        padded = nn.functional.pad(codes, (0, codes.shape[1] % 2))
        codes = padded[:, ::2] | (padded[:, 1::2] << 4)
    return pack_quantized(
        codes,
        part.scale.float().contiguous(),
        part.zero,
        bits=part.kind.bits,
        group_axis=part.kind.axis,  # type: ignore[arg-type]
        in_features=part.codes.shape[1],
        threads=1,
    )
