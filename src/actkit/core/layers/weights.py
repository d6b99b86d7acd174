"""How the weight of a changed layer is stored: as it is, or as codes and scales.

A way to store weights is a class below `WeightStorage`, registered by its `kind` under the entry-point group
`actkit.weights`; a checkpoint names the kind. What knows a kind of its own (the kernels, the decoder, the exporters)
takes it as such, and everything else computes with what `dequantize` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.grids.floats import FloatGrid
from actkit.core.grids.grid import Choose, Grid
from actkit.core.grids.half_integers import HalfIntegerGrid
from actkit.core.grids.integers import IntegerGrid
from actkit.core.grids.packing import pack_codes, packed_width, unpack_codes
from actkit.core.grids.scales import holds, power_of_two, read_scale, stored_scale
from actkit.core.ground import registry
from actkit.core.layers.keeps_dtype import KeepsDtype

if TYPE_CHECKING:
    from actkit.kernels import PackedWeight, QuantizedWeight

WIDENED = 1 << 18  # weights that are dequantized at a time


class WeightStorage(KeepsDtype):
    """A stored weight [out, in]. Its parameters and buffers are what a checkpoint keeps.

    Attributes:
        kind: the registered name.
        in_training: whether it is a stand-in while a model is trained; `frozen` gives what is stored then.
        shape: (out, in).
        dtype: of what `dequantize` gives.
        nbytes: what it takes in storage.
    """

    kind: ClassVar[str]
    in_training: ClassVar[bool] = False
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

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply inputs in plain torch.

        Args:
            x: [..., in].
            bias: [out], or None.

        Returns:
            [..., out].
        """
        return F.linear(x, self.dequantize(), bias)

    def look_up(self, rows: Tensor) -> Tensor:
        """Return some rows, in the dtype of the layer.

        Args:
            rows: int64 [n].

        Returns:
            [n, in].
        """
        return self.dequantize()[rows]

    def frozen(self) -> WeightStorage:
        """What is stored in place of a weight in training, of the same values; any other one is itself."""
        return self

    def as_others_read(self) -> WeightStorage:
        """The same values as a format that other programs read holds them; itself if there is nothing to rewrite."""
        return self

    @property
    def row_scale(self) -> Tensor | None:
        """The scales [out] of codes that `kernels.int8_linear` takes; None if there are none."""
        return None

    def packed(self, selects: bool) -> PackedWeight | QuantizedWeight | None:
        """Return the buffer of a kernel that multiplies it, or None.

        Args:
            selects: whether inputs are left out.
        """
        return None

    def product(self, x: Tensor, packed: Any, bias: Tensor | None, **chosen: Any) -> Tensor:
        """Return the kernel's product of x [rows, in] with what `packed` gave."""
        raise NotImplementedError

    def bytes_read(self, density: float) -> float:
        """Return the bytes that are read for one token.

        Args:
            density: share of the inputs that are active.
        """
        return self.nbytes * density


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


class CodedWeight(WeightStorage):
    """Codes of a grid, and their scales.

    Args:
        grid: that the codes are of.
        shape: (out, in).
        codes: uint8 [out, ceil(in * stored_bits / 8)], as `pack_codes` puts them.
        scale: as `stored_scale` keeps what `Grid.quantize` returns.
        zero: uint8 of that shape, or None.
        dtype: what `dequantize` returns.
        stored_bits: that a code takes; None for those of the grid.
        whole: the scale of the tensor, float32 [1], for scales in "e4m3".
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    whole: Tensor | None

    def __init__(
        self,
        grid: Any,
        shape: tuple[int, int],
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        dtype: torch.dtype,
        stored_bits: int | None = None,
        whole: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.shape, self.dtype = grid, shape, dtype
        self.stored_bits = grid.bits if stored_bits is None else stored_bits
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("whole", whole)

    @classmethod
    def quantize(cls, weight: Tensor, grid: Any, choose: Choose | None = None) -> Self:
        """Round a weight [out, in] to the grid.

        Args:
            weight: [out, in].
            grid: to round to. If 16 bits cannot hold its scales (below 6e-5 for float16), they stay float32.
            choose: gives the range of each group; None for the choice of the grid's kind.

        Raises:
            ValueError: the groups do not fit.
        """
        weight, grid = weight.detach(), grid.of(*weight.shape)

        def quantized(grid: Any) -> tuple[Tensor, Tensor, Tensor | None]:
            found = () if choose is None else grid.parameters(weight, choose)
            return grid.quantize(weight, *found)

        codes, scale, zero = quantized(grid)
        if not holds(scale, grid.scale_dtype):
            grid = replace(grid, scale_dtype="float32")
            codes, scale, zero = quantized(grid)
        return cls.of_codes(codes, scale, zero, grid, weight.dtype, grid.whole(weight.float()))

    @classmethod
    def of_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        grid: Any,
        dtype: torch.dtype,
        whole: Tensor | None = None,
    ) -> Self:
        """Store codes that were found before.

        Args:
            codes: uint8 [out, in].
            scale: float32, as `Grid.quantize` returns it, of numbers that the grid's `scale_dtype` holds.
            zero: uint8 of that shape, or None.
            grid: that the codes are of, its group size a number.
            dtype: what `dequantize` returns.
            whole: what `Grid.whole` says of the weight.
        """
        shape = (codes.shape[0], codes.shape[1])
        if grid.scope == "tensor":  # kept by row, as all others read it
            grid = replace(grid, scope="group", group_size=-1, group_axis="input")
            scale = scale.expand(shape[0], 1).contiguous()
            zero = None if zero is None else zero.expand(shape[0], 1).contiguous()
        kept = stored_scale(scale, grid.scale_dtype, whole)
        return cls(grid, shape, pack_codes(codes, grid.bits), kept, zero, dtype, whole=whole)

    @classmethod
    def empty(cls, shape: tuple[int, int], grid: Any, dtype: torch.dtype, stored_bits: int | None = None) -> Self:
        """Make a weight [out, in] of zeros, whose values come from a file.

        Args:
            shape: (out, in).
            grid: of the codes.
            dtype: what `dequantize` returns.
            stored_bits: that a code takes; None for those of the grid.

        Raises:
            ValueError: the groups do not fit.
        """
        width = packed_width(shape[1], grid.bits if stored_bits is None else stored_bits)
        parameters = grid.parameter_shape(*shape)
        ones, whole = torch.ones(parameters), torch.ones(1) if grid.scale_dtype == "e4m3" else None
        zero = torch.zeros(parameters, dtype=torch.uint8) if grid.has_zeros else None
        scale = stored_scale(ones, grid.scale_dtype, whole)
        return cls(grid, shape, torch.zeros(shape[0], width, dtype=torch.uint8), scale, zero, dtype, stored_bits, whole)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def integers(self) -> Tensor:
        """The codes, one in a byte: uint8 [out, in]."""
        return unpack_codes(self.codes, self.shape[1], self.stored_bits)

    def scales(self) -> Tensor:
        """The scales, float32."""
        return read_scale(self.scale, self.grid.scale_dtype, self.whole)

    def rescaled(self, scale: Tensor) -> Self:
        """Return the same codes with other scales, float32."""
        grid = replace(self.grid, scale_dtype="float32")
        return type(self)(grid, self.shape, self.codes, scale, self.zero, self.dtype, self.stored_bits)

    def rows(self, chosen: slice) -> Tensor:
        """Some rows of the weight, in the dtype of the layer.

        Args:
            chosen: whole groups, if groups lie along the outputs.
        """
        size = 1 if self.grid.group_axis == "input" else self.shape[0] // len(self.scale)  # rows that share a scale
        of_rows = slice(chosen.start // size, ceil(chosen.stop / size))
        scale = read_scale(self.scale[of_rows], self.grid.scale_dtype, self.whole)
        codes = unpack_codes(self.codes[chosen], self.shape[1], self.stored_bits)
        return self.grid.dequantize(codes, scale, None if self.zero is None else self.zero[of_rows]).to(self.dtype)

    def look_up(self, rows: Tensor) -> Tensor:
        if self.grid.group_axis == "output" or self._widened is not None:
            return super().look_up(rows)
        codes = unpack_codes(self.codes[rows], self.shape[1], self.stored_bits)
        scale = read_scale(self.scale[rows], self.grid.scale_dtype, self.whole)
        return self.grid.dequantize(codes, scale, None if self.zero is None else self.zero[rows]).to(self.dtype)

    def tiles(self) -> list[slice]:
        """Rows that are widened at a time, so that they stay in a cache: whole groups, of `WIDENED` weights or so."""
        size = 1 if self.grid.group_axis == "input" else self.shape[0] // len(self.scale)
        step = size * max(1, WIDENED // (size * self.shape[1]))
        return [slice(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step)]

    def _values(self) -> Tensor:
        tiles = self.tiles()
        if len(tiles) == 1 or torch.compiler.is_compiling():  # a compiler unrolls loops, and fuses
            return self.rows(slice(0, self.shape[0]))
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        for tile in tiles:
            weight[tile] = self.rows(tile)
        return weight

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        tiles = self.tiles()
        whole = len(tiles) == 1 or self._widened is not None or torch.is_grad_enabled()
        if whole or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return super().linear(x, bias)
        # A tile is multiplied as soon as it is widened, while it lies in a cache; the whole weight is never there.
        parts = [F.linear(x, self.rows(tile), None if bias is None else bias[tile]) for tile in tiles]
        return torch.cat(parts, dim=-1)

    def describe(self) -> str:
        return self.grid.describe()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # codes stay; the layer computes in the new dtype
        super()._apply(fn, recurse)
        return self


class IntegerWeight(CodedWeight):
    """Codes and scales of a weight on an integer grid; arguments as those of `CodedWeight`."""

    kind = "integer"
    grid: IntegerGrid

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {**self.grid.spec(), "kind": self.kind, "stored_bits": self.stored_bits}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> IntegerWeight:
        settings = {name: value for name, value in spec.items() if name not in ("kind", "stored_bits")}
        settings.setdefault("convention", "llm-awq")  # the only one of earlier versions
        grid = IntegerGrid(**settings)
        # Earlier versions kept 2 and 3 bits in 4, and 5 to 7 in a byte, and did not say so.
        return cls.empty(shape, grid, dtype, spec.get("stored_bits", 4 if grid.bits <= 4 else 8))

    def kernel_codes(self) -> Tensor:
        """The codes as `kernels.pack_quantized` reads them: two in a byte for 4 bits and less, else one."""
        width = 4 if self.grid.bits <= 4 else 8
        return self.codes if self.stored_bits == width else pack_codes(self.integers(), width)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply inputs; few rows, as a model that writes has them, by a kernel that reads the codes as they are."""
        if not self._is_read_as_stored(x):
            return super().linear(x, bias)
        from actkit import kernels

        settings = {"bits": self.stored_bits, "middle": 2 ** (self.grid.bits - 1)}
        return kernels.stored_linear(x, self.codes, self.scales(), self.zero, bias=bias, **settings)

    def _is_read_as_stored(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return False
        if self.grid.group_axis == "output" or self._widened is not None or x.device.type != "cpu":
            return False
        from actkit.kernels import stored_codes

        few = 0 < x.numel() <= stored_codes.ROWS * self.shape[1] and x.dtype != torch.float64
        return few and stored_codes.serves(self.shape[1], self.scale.shape[1], self.stored_bits)

    @property
    def row_scale(self) -> Tensor | None:
        grid = self.grid
        rows = grid.bits == 8 and grid.symmetric and grid.group_axis == "input" and self.scale.shape[1:] == (1,)
        return self.scales()[:, 0] if rows else None

    def packed(self, selects: bool) -> QuantizedWeight | None:
        from actkit import kernels

        if self.dtype == torch.float64 or self.codes.device.type != "cpu":
            return None
        return kernels.pack_quantized(
            self.kernel_codes(),
            self.scales(),
            self.zero,
            bits=self.grid.bits,
            group_axis=self.grid.group_axis,
            in_features=self.shape[1],
        )

    def product(self, x: Tensor, packed: Any, bias: Tensor | None, **chosen: Any) -> Tensor:
        from actkit import kernels

        return kernels.quantized_linear(x, packed, bias=bias, **chosen)


class HalfIntegerWeight(CodedWeight):
    """Codes and scales of a weight on a grid of half-integers; arguments as those of `CodedWeight`.

    Kernels and other programs read them as odd integers of half the scale, which take 4 bits for up to 3, else 8.
    """

    kind = "half_integer"
    grid: HalfIntegerGrid

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"kind": self.kind, "grid": self.grid.spec()}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> HalfIntegerWeight:
        return cls.empty(shape, Grid.from_spec(spec["grid"]), dtype)

    def as_others_read(self) -> IntegerWeight:
        bits = 4 if self.grid.bits <= 3 else 8
        given = self.grid
        grid = IntegerGrid(bits, given.group_size, given.group_axis, symmetric=True, scale_dtype=given.scale_dtype)
        odd = 2 * self.integers() + (grid.middle + 1 - 2 * given.half)
        return IntegerWeight.of_codes(odd, self.scales() / 2, None, grid, self.dtype)

    def packed(self, selects: bool) -> QuantizedWeight | None:
        return self.as_others_read().packed(selects)

    def product(self, x: Tensor, packed: Any, bias: Tensor | None, **chosen: Any) -> Tensor:
        from actkit import kernels

        return kernels.quantized_linear(x, packed, bias=bias, **chosen)


class FloatWeight(CodedWeight):
    """Codes and scales of a weight on a grid of few-bit floats; arguments as those of `CodedWeight`.

    It is widened some rows at a time, and no kernel reads it: it takes less room, and is not faster.

    Attributes:
        shift: int8 [in], or None: what a column's exponents are lowered by, so that it stands for 2^-shift times
            what its codes do.
    """

    kind = "float"
    grid: FloatGrid
    shift: Tensor | None

    def __init__(self, *args: Any, shift: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("shift", shift)

    def shifted(self, shift: Tensor) -> FloatWeight:
        """Return the same codes with lower exponents.

        Args:
            shift: int8 [in], added to that which is there.
        """
        shift = shift.to(torch.int8) if self.shift is None else self.shift + shift
        same = (self.grid, self.shape, self.codes, self.scale, None, self.dtype, self.stored_bits, self.whole)
        return FloatWeight(*same, shift=shift)

    def rows(self, chosen: slice) -> Tensor:
        if self.shift is None:
            return super().rows(chosen)
        return super().rows(chosen) * power_of_two(-self.shift.int()).to(self.dtype)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"kind": self.kind, "grid": self.grid.spec(), "shifted": self.shift is not None}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> FloatWeight:
        weight = cls.empty(shape, Grid.from_spec(spec["grid"]), dtype)
        return weight.shifted(torch.zeros(shape[1], dtype=torch.int8)) if spec["shifted"] else weight


def rounded(weight: Tensor, grid: Grid) -> CodedWeight:
    """Round a weight [out, in] to a grid of any kind that weights are stored in.

    Args:
        weight: [out, in].
        grid: to round to.

    Raises:
        ValueError: the groups do not fit.
    """
    return registry.weight_class(grid.kind).quantize(weight, grid)


def stored_numbers(weight: WeightStorage) -> int:
    """Return how many numbers a stored weight consists of: outputs times inputs, or those of its parts.

    Args:
        weight: any.
    """
    parts = [module for module in weight.children() if isinstance(module, WeightStorage)]
    return sum(map(stored_numbers, parts)) if parts else weight.shape[0] * weight.shape[1]


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Keep what the coded weights of a model stand for while it is measured.

    Each is dequantized once, not for every batch. The values are those of `dequantize`, bit for bit; a copy of the
    weights in the dtype of the layers is held.

    Args:
        model: any model.
    """
    weights = [module for module in model.modules() if isinstance(module, CodedWeight)]
    try:
        for weight in weights:
            weight._widened = weight.dequantize()
        yield
    finally:
        for weight in weights:
            weight._widened = None
