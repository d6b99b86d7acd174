"""How the weight of a changed layer is stored: as it is, or as codes and scales.

A way to store weights is a class below `WeightStorage`, registered by its `kind` under the entry-point group
`actkit.weights`; a checkpoint names the kind. What knows a kind of its own (the kernels, the decoder, the exporters)
takes it as such, and everything else computes with what `dequantize` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.packing import pack_nibbles, unpack_nibbles
from actkit.core.layers.keeps_dtype import KeepsDtype

if TYPE_CHECKING:
    from actkit.kernels import PackedWeight, QuantizedWeight

WIDENED = 1 << 18  # weights that are dequantized at a time


class WeightStorage(KeepsDtype):
    """A stored weight [out, in]. Its parameters and buffers are what a checkpoint keeps.

    Attributes:
        kind: the registered name.
        shape: (out, in).
        dtype: of what `dequantize` gives.
        nbytes: what it takes in storage.
    """

    kind: ClassVar[str]
    shape: Any
    dtype: Any
    nbytes: Any
    _widened: Tensor | None = None  # see `widened`

    def dequantize(self) -> Tensor:
        """The weight [out, in] that is multiplied, in the dtype of the layer."""
        return self._values() if self._widened is None else self._widened

    def _values(self) -> Tensor:
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, `kind` among them, as a checkpoint keeps them."""
        return {"kind": self.kind}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Self:
        """A weight of the right structure whose values come from a file."""
        raise NotImplementedError

    def describe(self) -> str:
        """A few words for tables."""
        return self.kind

    def packed(self, selects: bool) -> PackedWeight | QuantizedWeight | None:
        """Return the buffer of a kernel that multiplies it, or None.

        Args:
            selects: whether inputs are left out.
        """
        return None

    def product(self, x: Tensor, packed: Any, bias: Tensor | None, **chosen: Any) -> Tensor:
        """Return the kernel's product of x [rows, in] with what `packed` gave."""
        raise NotImplementedError


class DenseWeight(WeightStorage):
    """A weight kept as it is.

    Args:
        tensor: [out, in]; becomes a Parameter.
    """

    kind = "dense"

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=tensor.requires_grad)
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensor."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.nbytes

    def dequantize(self) -> Tensor:
        """The weight [out, in]."""
        return self.tensor

    @classmethod
    def from_spec(cls, spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> DenseWeight:
        return cls(nn.Parameter(torch.empty(shape, dtype=dtype)))

    def packed(self, selects: bool) -> PackedWeight | None:
        from actkit import kernels

        served = selects and self.dtype in (torch.float32, torch.bfloat16)  # read whole it is left to torch
        return kernels.pack(self.tensor.detach()) if served and self.tensor.device.type == "cpu" else None

    def product(self, x: Tensor, packed: Any, bias: Tensor | None, **chosen: Any) -> Tensor:
        from actkit import kernels

        return kernels.sparse_linear(x, packed, bias=bias, **chosen)


class IntegerWeight(WeightStorage):
    """Codes and scales of a quantized weight.

    Args:
        codes: uint8 [out, in], or [out, ceil(in / 2)] with two codes per byte for 4 bits and less.
        scale: float32, shaped as `IntegerGrid.quantize` returns it.
        zero: uint8 of that shape, or None.
        dtype: what `dequantize` returns.
        shape: (out, in).
        grid: that the codes are of.
    """

    kind = "integer"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self,
        grid: IntegerGrid,
        shape: tuple[int, int],
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.grid, self.shape, self.dtype = grid, shape, dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @classmethod
    def quantize(cls, weight: Tensor, grid: IntegerGrid) -> IntegerWeight:
        """Round a weight [out, in] to the grid.

        Args:
            weight: [out, in].
            grid: to round to.

        Raises:
            ValueError: the groups do not fit.
        """
        weight, grid = weight.detach(), grid.of(*weight.shape)
        codes, scale, zero = grid.quantize(weight)
        if grid.bits <= 4:
            codes = pack_nibbles(codes)
        return cls(grid, (weight.shape[0], weight.shape[1]), codes, scale, zero, weight.dtype)

    @classmethod
    def empty(cls, shape: tuple[int, int], grid: IntegerGrid, dtype: torch.dtype) -> IntegerWeight:
        """Make a weight [out, in] of zeros, whose values come from a file.

        Args:
            shape: (out, in).
            grid: of the codes.
            dtype: what `dequantize` returns.

        Raises:
            ValueError: the groups do not fit.
        """
        codes = torch.zeros(shape[0], ceil(shape[1] / 2) if grid.bits <= 4 else shape[1], dtype=torch.uint8)
        parameters = grid.parameter_shape(*shape)
        zero = None if grid.symmetric else torch.zeros(parameters, dtype=torch.uint8)
        return cls(grid, shape, codes, torch.ones(parameters), zero, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(buffer.nbytes for buffer in (self.codes, self.scale, self.zero) if buffer is not None)

    def _values(self) -> Tensor:
        # Widened some rows at a time, so that they stay in a cache.
        group = 1 if self.grid.group_axis == "input" else self.shape[0] // len(self.scale)  # rows that share a scale
        groups = max(1, WIDENED // (group * self.shape[1]))
        if groups * group >= self.shape[0] or torch.compiler.is_compiling():  # a compiler unrolls loops, and fuses
            return self._piece(self.codes, self.scale, self.zero)
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        parameters = [None if each is None else each.split(groups) for each in (self.scale, self.zero)]
        for index, rows in enumerate(weight.split(groups * group)):
            scale, zero = (None if each is None else each[index] for each in parameters)
            start = index * groups * group
            rows.copy_(self._piece(self.codes[start : start + len(rows)], scale, zero))  # type: ignore[arg-type]
        return weight

    def _piece(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        codes = unpack_nibbles(codes, self.shape[1]) if self.grid.bits <= 4 else codes
        return self.grid.dequantize(codes, scale, zero).to(self.dtype)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        grid = self.grid
        return {
            "kind": self.kind,
            "bits": grid.bits,
            "group_size": grid.group_size,
            "group_axis": grid.group_axis,
            "symmetric": grid.symmetric,
            "convention": grid.convention,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> IntegerWeight:
        convention = spec.get("convention", "llm-awq")  # the only one of earlier versions
        grid = IntegerGrid(spec["bits"], spec["group_size"], spec["group_axis"], spec["symmetric"], convention)
        return cls.empty(shape, grid, dtype)

    def describe(self) -> str:
        grid = self.grid
        groups = "whole rows" if grid.group_size == -1 else f"groups of {grid.group_size} along the {grid.group_axis}"
        return f"{grid.bits}-bit, {groups}"

    def packed(self, selects: bool) -> QuantizedWeight | None:
        from actkit import kernels

        if self.dtype == torch.float64 or self.codes.device.type != "cpu":
            return None
        return kernels.pack_quantized(
            self.codes,
            self.scale,
            self.zero,
            bits=self.grid.bits,
            group_axis=self.grid.group_axis,
            in_features=self.shape[1],
        )

    def product(self, x: Tensor, packed: Any, bias: Tensor | None, **chosen: Any) -> Tensor:
        from actkit import kernels

        return kernels.quantized_linear(x, packed, bias=bias, **chosen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerWeight:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # codes stay; the layer computes in the new dtype
        super()._apply(fn, recurse)
        return self


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Keep what the integer weights of a model stand for while it is measured.

    Each is dequantized once, not for every batch. The values are those of `dequantize`, bit for bit; a copy of the
    weights in the dtype of the layers is held.

    Args:
        model: any model.
    """
    weights = [module for module in model.modules() if isinstance(module, IntegerWeight)]
    try:
        for weight in weights:
            weight._widened = weight.dequantize()
        yield
    finally:
        for weight in weights:
            weight._widened = None
