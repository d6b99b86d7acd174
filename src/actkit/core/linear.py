"""ActLinear: the one linear layer that methods make, y = W select(x) + bias + correction(x).

Three slots that stack: `weight` (dense, or integer codes with scales), `select` (which inputs to read) and
`correction` (low rank). A method fills a slot and leaves the others as they are, so a sparsity method over a
quantizer is still one module, and whatever runs or exports models knows this module only.

The weight slot is held in `storage`; `weight` answers a tensor, as that of every linear layer does.
The logical layout is the state that is saved. `pack()` builds the input-major buffer that the sparse kernel reads; it
is never saved. With gradients, with more rows than the kernel takes (two, or eight where an integer weight is read
whole), under torch.export or without `pack()` the layer computes in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.errors import CoverageError
from actkit.core.known_layers import why_unread
from actkit.core.layer_weight import LayerWeight
from actkit.core.quantizer import QuantizationGrid, pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    from actkit.kernels import PackedWeight, QuantizedWeight

OLD_STORAGE = "weight"  # what the module that stores the weight was called until it was `storage`
KERNEL_ROWS = 2  # above it a dense product wins: two independent masks at 50 % already need 75 % of the weight
INTEGER_ROWS = 8  # as many as the kernel for integer weights takes where no input is skipped
WIDENED = 1 << 18  # weights that are dequantized at a time


class KeepsDtype(nn.Module):
    """A module whose buffers keep their dtype under `.to(dtype)`, `.half()` and the like; devices still move."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtype:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


# -- the weight slot ---------------------------------------------------------------------------------------------------


class DenseWeight(nn.Module):
    """A weight kept as it is. tensor: Parameter [out, in]."""

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

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"kind": "dense"}


class IntegerWeight(KeepsDtype):
    """Codes and scales of a quantized weight.

    codes: uint8 [out, in], or [out, ceil(in / 2)] with two codes per byte for 4 bits and less. scale: float32 and
    zero: uint8 or None, shaped as `QuantizationGrid.quantize` returns them. dtype: what `dequantize` returns.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self,
        grid: QuantizationGrid,
        shape: tuple[int, int],
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.grid, self.shape, self.dtype = grid, shape, dtype
        self._widened: Tensor | None = None  # see `widened`
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @classmethod
    def quantize(cls, weight: Tensor, grid: QuantizationGrid) -> IntegerWeight:
        """Round a weight [out, in] to the grid. Raises ValueError where the groups do not fit."""
        weight = weight.detach()
        codes, scale, zero = grid.quantize(weight)
        if grid.bits <= 4:
            codes = pack_nibbles(codes)
        return cls(grid, (weight.shape[0], weight.shape[1]), codes, scale, zero, weight.dtype)

    @classmethod
    def empty(cls, shape: tuple[int, int], grid: QuantizationGrid, dtype: torch.dtype) -> IntegerWeight:
        """A weight [out, in] of zeros, whose values come from a file. Raises ValueError where the groups do not fit."""
        codes = torch.zeros(shape[0], ceil(shape[1] / 2) if grid.bits <= 4 else shape[1], dtype=torch.uint8)
        parameters = grid.parameter_shape(*shape)
        zero = None if grid.symmetric else torch.zeros(parameters, dtype=torch.uint8)
        return cls(grid, shape, codes, torch.ones(parameters), zero, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(buffer.nbytes for buffer in (self.codes, self.scale, self.zero) if buffer is not None)

    def dequantize(self) -> Tensor:
        """The weight [out, in] in the dtype of the layer, widened some rows at a time, so that they stay in a cache."""
        if self._widened is not None:
            return self._widened
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
            "kind": "integer",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "group_axis": grid.group_axis,
            "symmetric": grid.symmetric,
            "convention": grid.convention,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerWeight:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # codes stay; the layer computes in the new dtype
        super()._apply(fn, recurse)
        return self


WeightStorage = DenseWeight | IntegerWeight


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Keep what the integer weights of a model stand for while it is measured: each is dequantized once, not for every
    batch. The values are those of `dequantize`, bit for bit; a copy of the weights in the dtype of the layers is held.
    """
    weights = [module for module in model.modules() if isinstance(module, IntegerWeight)]
    try:
        for weight in weights:
            weight._widened = weight.dequantize()
        yield
    finally:
        for weight in weights:
            weight._widened = None


def _weight_from_spec(spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> WeightStorage:
    if spec["kind"] == "dense":
        return DenseWeight(nn.Parameter(torch.empty(shape, dtype=dtype)))
    if spec["kind"] == "integer":
        convention = spec.get("convention", "llm-awq")  # the only one of earlier versions
        grid = QuantizationGrid(spec["bits"], spec["group_size"], spec["group_axis"], spec["symmetric"], convention)
        return IntegerWeight.empty(shape, grid, dtype)
    raise ValueError(f"weight kind: {spec['kind']!r} was given, allowed are 'dense' and 'integer'.")


# -- the select slot ---------------------------------------------------------------------------------------------------


class Selection(KeepsDtype):
    """Which inputs are read: those with a large |x| * score. score: float32 [in], or None for 1."""

    score: Tensor | None

    def __init__(self, score: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("score", None if score is None else score.detach().float())

    def scored(self, x: Tensor) -> Tensor:
        """|x| * score in float32 (16-bit products under- and overflow), shape of x."""
        magnitude = x.detach().float().abs()
        return magnitude if self.score is None else magnitude * self.score

    def mask(self, x: Tensor) -> Tensor:
        """Which entries of x [..., in] are kept: bool, shape of x. NaN is kept, so that it is seen."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] with what is not selected set to zero."""
        return torch.where(self.mask(x), x, torch.zeros((), dtype=x.dtype, device=x.device))

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        raise NotImplementedError


class Threshold(Selection):
    """Keeps input i where |x_i| * score_i > threshold."""

    threshold: Tensor

    def __init__(self, threshold: float, score: Tensor | None = None) -> None:
        super().__init__(score)
        if not threshold >= 0:
            raise ValueError(f"threshold: {threshold} was given; it is a magnitude, give 0 or more.")
        self.register_buffer("threshold", torch.tensor(float(threshold), dtype=torch.float32))

    def mask(self, x: Tensor) -> Tensor:
        return ~(self.scored(x) <= self.threshold)

    def spec(self) -> dict[str, Any]:
        return {"kind": "threshold", "score": self.score is not None}


class TopK(Selection):
    """Keeps the k inputs of each row with the largest |x_i| * score_i; of equal ones the first."""

    def __init__(self, k: int, score: Tensor | None = None) -> None:
        super().__init__(score)
        if k < 0:
            raise ValueError(f"k: {k} was given; give 0 or more.")
        self.k = k

    def mask(self, x: Tensor) -> Tensor:
        channels = x.shape[-1]
        if self.k == 0 or self.k >= channels:
            return torch.full_like(x, self.k > 0, dtype=torch.bool)
        scored = self.scored(x).nan_to_num(nan=float("inf"), posinf=float("inf"))  # NaN is kept, so that it is seen
        least = scored.topk(self.k, dim=-1, sorted=False).values.amin(-1, keepdim=True)  # far cheaper than a sort
        larger, equal = scored > least, scored == least
        room = self.k - larger.sum(-1, keepdim=True, dtype=torch.int32)
        return larger | equal & (equal.cumsum(-1, dtype=torch.int32) <= room)

    def spec(self) -> dict[str, Any]:
        return {"kind": "top_k", "k": self.k, "score": self.score is not None}


def _selection_from_spec(spec: dict[str, Any], in_features: int) -> Selection:
    score = torch.ones(in_features) if spec["score"] else None
    if spec["kind"] == "threshold":
        return Threshold(0.0, score)
    if spec["kind"] == "top_k":
        return TopK(spec["k"], score)
    raise ValueError(f"select kind: {spec['kind']!r} was given, allowed are 'threshold' and 'top_k'.")


# -- the correction slot -----------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """Adds left @ right @ x. left: [out, rank], right: [rank, in]. of: 'all' inputs, or only the 'dropped' ones."""

    def __init__(self, left: Tensor, right: Tensor, of: Literal["all", "dropped"] = "all") -> None:
        super().__init__()
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"left {tuple(left.shape)} and right {tuple(right.shape)} do not share a rank.")
        self.left, self.right, self.of = nn.Parameter(left), nn.Parameter(right), of

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(F.linear(x, self.right), self.left)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"rank": self.left.shape[1], "of": self.of}


# -- the layer ---------------------------------------------------------------------------------------------------------


class ActLinear(nn.Module):
    """A linear layer with three slots: y = W select(x) + bias + correction(x).

    Input [..., in], output [..., out]. Raises ValueError where the slots do not fit each other.
    """

    def __init__(
        self,
        weight: WeightStorage,
        bias: Tensor | None = None,
        select: Selection | None = None,
        correction: LowRank | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias: it has shape {tuple(bias.shape)}, the layer {self.out_features} outputs.")
        if select is not None and select.score is not None and select.score.shape != (self.in_features,):
            raise ValueError(
                f"select: its score has shape {tuple(select.score.shape)}, the layer {self.in_features} inputs."
            )
        if correction is not None:
            shape = (correction.left.shape[0], correction.right.shape[1])
            if shape != (self.out_features, self.in_features):
                raise ValueError(
                    f"correction: it maps {shape[::-1]}, the layer {(self.in_features, self.out_features)}."
                )
        self.storage = weight
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.select = select
        self.correction = correction
        self._packed: PackedWeight | QuantizedWeight | None = None
        self._packed_threshold = 0.0  # a number: one read from a tensor would break a compiled graph in two

    @classmethod
    def of(
        cls,
        linear: Any,
        *,
        weight: WeightStorage | None = None,
        select: Selection | None = None,
        correction: LowRank | None = None,
    ) -> ActLinear:
        """A changed copy of a linear layer; slots that are not given stay as the layer had them.

        linear: an anatomy's Linear, nn.Linear, transformers' Conv1D or ActLinear. Dense weights and biases are shared
        with the source, not copied. Raises ValueError where a slot does not fit the layer, CoverageError for a layer
        that may compute something else than its weight says.
        """
        module = linear if isinstance(linear, nn.Module) else linear.module
        reason = why_unread(module)
        if reason is not None:
            raise CoverageError(f"{getattr(linear, 'path', 'linear')}: it is not changed, as {reason}. Leave it out.")
        if weight is not None:
            stored = tuple(module.weight.shape)  # type: ignore[union-attr, arg-type]
            expected = stored if isinstance(module, nn.Linear | ActLinear) else stored[::-1]
            if tuple(weight.shape) != expected:
                raise ValueError(f"weight: {tuple(weight.shape)} was given, the layer has {expected}.")
        if isinstance(module, ActLinear):
            weight = module.storage if weight is None else weight
            select = module.select if select is None else select
            correction = module.correction if correction is None else correction
        elif weight is None:
            tensor = module.weight
            is_linear = isinstance(module, nn.Linear)
            weight = DenseWeight(tensor if is_linear else nn.Parameter(tensor.t(), requires_grad=tensor.requires_grad))  # type: ignore[operator, arg-type]
        return cls(weight, module.bias, select, correction).train(module.training)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], for code that reads it from outside; see `LayerWeight`."""
        plain = self.select is None and self.correction is None and isinstance(self.storage, DenseWeight)
        return self.storage.dequantize() if plain else LayerWeight.of(self)

    def dequantized(self) -> Tensor:
        """The weight [out, in] that is multiplied, in the layer's dtype."""
        return self.storage.dequantize()

    def dense(self) -> nn.Linear:
        """A plain nn.Linear with the dequantized weight. Raises ValueError where select or correction would be lost."""
        if self.select is not None or self.correction is not None:
            raise ValueError("dense(): a plain linear layer cannot hold this layer's select or correction slot.")
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantized().detach(), requires_grad=False)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear

    def forward(self, x: Tensor) -> Tensor:
        plain = self._packed is None or torch.is_grad_enabled() or torch.compiler.is_exporting()
        rows = INTEGER_ROWS if self.select is None else KERNEL_ROWS
        if not plain and x.numel() <= rows * self.in_features:
            return self._decode(x)
        selected = x if self.select is None else self.select(x)
        y = F.linear(selected, self.dequantized(), self.bias)
        if self.correction is not None:
            y = y + self.correction(x if self.correction.of == "all" else x - selected)
        return y

    # -- decoding through the kernel

    def pack(self) -> bool:
        """Build the kernel's buffer (a second copy of the weight). Returns whether the kernel can serve this layer."""
        self._packed = self._kernel_weight()
        if self._packed is not None and isinstance(self.select, Threshold):
            self._packed_threshold = float(self.select.threshold)
        return self._packed is not None

    def _kernel_weight(self) -> PackedWeight | QuantizedWeight | None:
        """The buffer that serves this layer, or None. A dense weight that is read whole is left to torch."""
        from actkit import kernels

        stored, select = self.storage, self.select
        if self.correction is not None or not isinstance(select, Threshold | TopK | None):
            return None
        if isinstance(stored, DenseWeight):
            served = select is not None and stored.dtype in (torch.float32, torch.bfloat16)
            return kernels.pack(stored.tensor.detach()) if served and stored.tensor.device.type == "cpu" else None
        if stored.dtype == torch.float64 or stored.codes.device.type != "cpu":
            return None
        grid = stored.grid
        return kernels.pack_quantized(
            stored.codes,
            stored.scale,
            stored.zero,
            bits=grid.bits,
            group_axis=grid.group_axis,
            in_features=self.in_features,
        )

    def packed_tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the kernel's buffer, none where there is none."""
        parts = (getattr(self._packed, name, None) for name in ("buffer", "scale", "zero"))
        return tuple(part for part in parts if part is not None)

    def unpack(self) -> None:
        """Drop the kernel's buffer; the layer computes in plain torch again."""
        self._packed = None

    def _decode(self, x: Tensor) -> Tensor:
        from actkit import kernels

        select = self.select
        chosen: dict[str, Any] = {} if select is None else {"score": select.score}
        if isinstance(select, Threshold):
            chosen["threshold"] = self._packed_threshold
        elif isinstance(select, TopK):
            chosen["k"] = select.k
        multiply: Any = kernels.sparse_linear if isinstance(self.storage, DenseWeight) else kernels.quantized_linear
        return multiply(x, self._packed, bias=self.bias, **chosen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActLinear:
        self.unpack()  # the buffer is of the weight as it was: another dtype or device needs another
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        for name in [name for name in state_dict if name.startswith(f"{prefix}{OLD_STORAGE}.")]:
            state_dict[f"{prefix}storage{name.removeprefix(prefix + OLD_STORAGE)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # -- cost

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weight and the correction take in storage."""
        return self.storage.nbytes + (0 if self.correction is None else self.correction.nbytes)

    def bytes_per_token(self, density: float = 1.0) -> float:
        """Weight bytes read for one token when a share `density` of the inputs is active."""
        score = 0 if self.select is None or self.select.score is None else self.select.score.nbytes
        return self.storage.nbytes * density + (0 if self.correction is None else self.correction.nbytes) + score

    # -- checkpoints

    def spec(self) -> dict[str, Any]:
        """The JSON arguments from which `from_spec` rebuilds the layer's structure."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": str(self.storage.dtype).removeprefix("torch."),
            "bias": None if self.bias is None else str(self.bias.dtype).removeprefix("torch."),
            "weight": self.storage.spec(),
            "select": None if self.select is None else self.select.spec(),
            "correction": None if self.correction is None else self.correction.spec(),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> ActLinear:
        """A layer of the right structure whose values come from a weights file."""
        dtype = getattr(torch, spec["dtype"])
        shape = (spec["out_features"], spec["in_features"])
        bias = None
        if spec["bias"] is not None:
            bias = nn.Parameter(torch.empty(shape[0], dtype=getattr(torch, spec["bias"])))
        select = None if spec["select"] is None else _selection_from_spec(spec["select"], shape[1])
        correction = None
        if spec["correction"] is not None:
            rank = spec["correction"]["rank"]
            left, right = torch.empty(shape[0], rank, dtype=dtype), torch.empty(rank, shape[1], dtype=dtype)
            correction = LowRank(left, right, spec["correction"]["of"])
        return cls(_weight_from_spec(spec["weight"], shape, dtype), bias, select, correction)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack_for_decode(model: nn.Module) -> int:
    """Build the kernel buffers of every ActLinear that a kernel can serve; returns how many."""
    return sum(module.pack() for module in model.modules() if isinstance(module, ActLinear))
