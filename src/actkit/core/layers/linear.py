"""ActLinear: the one linear layer that methods make, y = W q(select(x)) + bias + correction(q(select(x))).

Four slots that stack: `weight` (dense, or integer codes with scales), `select` (which inputs to read), `inputs` (how
what is read is rotated and rounded, q) and `correction` (low rank). A method fills a slot and leaves the others as they
are, so a sparsity method over a quantizer is still one module, and whatever runs or exports models knows this module
only.

The weight slot is held in `storage`; `weight` answers a tensor, as that of every linear layer does.
The logical layout is the state that is saved. `pack()` builds the input-major buffer that the sparse kernel reads; it
is never saved. With gradients, with more rows than the kernel takes (two, or eight if an integer weight is read
whole), under torch.export or without `pack()` the layer computes in plain torch; but a weight and inputs of 8 bits are
multiplied as integers (`kernels.int8_linear`), packed or not, and up to eight rows times codes of 4 or 8 bits are
computed from the codes as they are stored (`kernels.stored_linear`).

The correction reads what the weight reads, so that merging the two is exact; but beside a selection it reads all
inputs, or those that are dropped, and then no inputs are rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground import registry
from actkit.core.ground.errors import CoverageError
from actkit.core.layers.known_layers import why_unread
from actkit.core.layers.layer_weight import LayerWeight
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.selections import Selection, Threshold, TopK
from actkit.core.layers.weights import DenseWeight, WeightStorage

if TYPE_CHECKING:
    from actkit.kernels import PackedWeight, QuantizedWeight

OLD_STORAGE = "weight"  # what the module that stores the weight was called until it was `storage`
KERNEL_ROWS = 2  # above it a dense product wins: two independent masks at 50 % already need 75 % of the weight
INTEGER_ROWS = 8  # as many as the kernel for integer weights takes if no input is skipped


class LowRank(nn.Module):
    """A correction: adds left @ right @ x.

    Args:
        left: [out, rank]; a tensor, or stored in another way.
        right: [rank, in]; the same.
        of: 'all' inputs, or only the 'dropped' ones.

    Raises:
        ValueError: the two do not share a rank.
    """

    def __init__(
        self, left: Tensor | WeightStorage, right: Tensor | WeightStorage, of: Literal["all", "dropped"] = "all"
    ) -> None:
        super().__init__()
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"left {tuple(left.shape)} and right {tuple(right.shape)} do not share a rank.")
        self.left, self.right = (nn.Parameter(each) if isinstance(each, Tensor) else each for each in (left, right))
        self.of = of

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return what is multiplied: left [out, rank] and right [rank, in]."""
        left, right = (each if isinstance(each, Tensor) else each.dequantize() for each in (self.left, self.right))
        return left, right

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        left, right = self.factors()
        return F.linear(F.linear(x, right), left)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        stored = [None if isinstance(each, Tensor) else each.spec() for each in (self.left, self.right)]
        return {"rank": self.left.shape[1], "of": self.of} | ({"factors": stored} if any(stored) else {})

    @classmethod
    def of_structure(cls, spec: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> LowRank:
        """A correction of a layer [out, in] of the right structure, whose values come from a weights file."""
        shapes = (shape[0], spec["rank"]), (spec["rank"], shape[1])
        left, right = (
            torch.empty(each, dtype=dtype)
            if stored is None
            else registry.weight_class(stored["kind"]).from_spec(stored, each, dtype)
            for stored, each in zip(spec.get("factors", (None, None)), shapes, strict=True)
        )
        return cls(left, right, spec["of"])


class ActLinear(nn.Module):
    """A linear layer with four slots: y = W q(select(x)) + bias + correction(q(select(x))); [..., in] -> [..., out].

    Raises:
        ValueError: the slots do not fit each other.
    """

    def __init__(
        self,
        weight: WeightStorage,
        bias: Tensor | None = None,
        select: Selection | None = None,
        correction: LowRank | None = None,
        inputs: RoundedInputs | None = None,
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
        if inputs is not None:
            self._check_inputs(inputs, select, correction)
        self.storage = weight
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.select = select
        self.inputs = inputs
        self.correction = correction
        self._packed: PackedWeight | QuantizedWeight | None = None
        self._packed_threshold = 0.0  # a number: one read from a tensor would break a compiled graph in two

    def _check_inputs(self, inputs: RoundedInputs, select: Selection | None, correction: LowRank | None) -> None:
        """Raise ValueError if rounded inputs do not fit the layer or the other slots."""
        for name in ("shift", "divisor"):
            values = getattr(inputs, name)
            if values is not None and values.shape != (self.in_features,):
                raise ValueError(
                    f"inputs: their {name} has shape {tuple(values.shape)}, the layer {self.in_features} inputs."
                )
        if inputs.rotation is not None and inputs.rotation.size != self.in_features:
            raise ValueError(
                f"inputs: their rotation has {inputs.rotation.size} channels, the layer {self.in_features}."
            )
        if select is not None and inputs.rotation is not None:
            raise ValueError(
                "inputs: they are rotated, and some are selected: what is dropped would be mixed into all of them. Use "
                "one of the two."
            )
        if inputs.scale is not None and inputs.scale.dim() == 1 and len(inputs.scale) not in (1, self.in_features):
            raise ValueError(
                f"inputs: they have {len(inputs.scale)} scales, the layer {self.in_features} inputs; give one, or one "
                f"for each input."
            )
        if select is not None and inputs.moves_zero:
            raise ValueError(
                "inputs: they are shifted, and some are selected: a dropped one would become the shift. Use one of "
                "the two."
            )
        if correction is not None and (select is not None or correction.of == "dropped"):
            raise ValueError(
                "inputs: the layer selects inputs and corrects what that loses, from inputs that are not rounded. Use "
                "the selection and its correction, or rounded inputs."
            )

    @classmethod
    def of(
        cls,
        linear: Any,
        *,
        weight: WeightStorage | None = None,
        select: Selection | None = None,
        correction: LowRank | None = None,
        bias: Tensor | None = None,
        inputs: RoundedInputs | None = None,
    ) -> ActLinear:
        """Make a changed copy of a linear layer; slots that are not given stay as the layer had them.

        Dense weights and biases are shared with the source, not copied. A rotation of the inputs stays in front of
        inputs that are given without one: the weight is that of rotated inputs.

        Args:
            linear: an anatomy's Linear, nn.Linear, transformers' Conv1D or ActLinear.
            weight: how the weight is stored.
            select: which inputs are read.
            correction: what is added.
            bias: [out], in place of the layer's own.
            inputs: how what is read is rounded.

        Returns:
            The layer.

        Raises:
            ValueError: a slot does not fit the layer.
            CoverageError: a layer that may compute something else than its weight says.
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
            inputs = _behind_rotation(module.inputs, inputs)
        elif weight is None:
            tensor = module.weight
            is_linear = isinstance(module, nn.Linear)
            weight = DenseWeight(tensor if is_linear else nn.Parameter(tensor.t(), requires_grad=tensor.requires_grad))  # type: ignore[operator, arg-type]
        bias = module.bias if bias is None else bias  # type: ignore[assignment]
        return cls(weight, bias, select, correction, inputs).train(module.training)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], for code that reads it from outside; see `LayerWeight`."""
        return LayerWeight.of(self) if self.filled_slots else self.storage.dequantize()

    @property
    def filled_slots(self) -> tuple[str, ...]:
        """The slots that a method filled: a weight that is stored as it is fills none."""
        return (*(() if isinstance(self.storage, DenseWeight) else ("weight",)), *self.other_slots)

    @property
    def other_slots(self) -> dict[str, str]:
        """The filled slots besides the weight, each with what the layer does by it."""
        does = {
            "select": "selects inputs",
            "inputs": "" if self.inputs is None else self.inputs.does,
            "correction": "adds a correction",
        }
        return {name: what for name, what in does.items() if getattr(self, name) is not None}

    @property
    def in_training(self) -> bool:
        """Whether its weight or what rounds its inputs is a stand-in that is trained, for `frozen` to settle."""
        return self.storage.in_training or (self.inputs is not None and self.inputs.in_training)

    def frozen(self) -> ActLinear:
        """Make a copy that holds what is stored in place of what was trained; the same outputs, to rounding."""
        weight = self.storage.frozen()
        if self.inputs is None:
            return ActLinear.of(self, weight=weight)
        inputs, behind = self.inputs.frozen()
        bias = None
        if behind is not None:
            with torch.no_grad():
                added = weight.dequantize().double() @ behind.double()
                if self.correction is not None:
                    added += self.correction(behind.to(weight.dtype)).double()
                bias = (added if self.bias is None else self.bias.double() + added).to(weight.dtype)
        return ActLinear.of(self, weight=weight, inputs=inputs, bias=bias)

    def dequantized(self) -> Tensor:
        """The weight [out, in] that is multiplied, in the layer's dtype."""
        return self.storage.dequantize()

    def dense(self) -> nn.Linear:
        """Make a plain nn.Linear with the dequantized weight.

        Raises:
            ValueError: another slot would be lost.
        """
        if self.other_slots:
            slots = " or ".join(self.other_slots)
            raise ValueError(f"dense(): a plain linear layer cannot hold this layer's {slots} slot.")
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
        read = selected
        y = None
        if self.inputs is not None:
            y = self._integer_product(selected)
            read = read if y is not None and self.correction is None else self.inputs(selected)
        if y is None:
            y = self.storage.linear(read, self.bias)
        if self.correction is not None:
            given = read if self.select is None else x
            y = y + self.correction(given if self.correction.of == "all" else x - selected)
        return y

    def _integer_product(self, selected: Tensor) -> Tensor | None:
        """The product and the bias if weight and inputs are integers of 8 bits that a kernel multiplies; else None."""
        assert self.inputs is not None
        scale, half_range = self.storage.row_scale, self.inputs.half_range
        plain = torch.is_grad_enabled() or torch.compiler.is_exporting() or selected.device.type != "cpu"
        if scale is None or half_range is None or plain or selected.dtype == torch.float64:
            return None
        from actkit import kernels

        given = self.inputs.moved(self.inputs.rotated(selected))
        y = kernels.int8_linear(given, self.storage.codes, scale, self.inputs.scale, half_range, self.bias)  # type: ignore[arg-type]
        return y.to(selected.dtype)

    # -- decoding through the kernel

    def pack(self) -> bool:
        """Build the kernel's buffer, a second copy of the weight; return whether the kernel can serve this layer."""
        self._packed = self._kernel_weight()
        if self._packed is not None and isinstance(self.select, Threshold):
            self._packed_threshold = float(self.select.threshold)
        return self._packed is not None

    def _kernel_weight(self) -> PackedWeight | QuantizedWeight | None:
        """The buffer that serves this layer, or None."""
        if not isinstance(self.select, Threshold | TopK | None):
            return None
        if self.correction is not None and (self.select is not None or self.correction.of != "all"):
            return None
        return self.storage.packed(self.select is not None)

    def packed_tensors(self) -> tuple[Tensor, ...]:
        """List the tensors of the kernel's buffer, if there is one."""
        parts = (getattr(self._packed, name, None) for name in ("buffer", "scale", "zero"))
        return tuple(part for part in parts if part is not None)

    def unpack(self) -> None:
        """Drop the kernel's buffer; the layer computes in plain torch again."""
        self._packed = None

    def _decode(self, x: Tensor) -> Tensor:
        select = self.select
        chosen: dict[str, Any] = {} if select is None else {"score": select.score}
        if self.inputs is not None:  # what is not selected is 0 then, and stays 0
            x = self.inputs(x if select is None else select(x))
            chosen = {} if select is None else {"threshold": 0.0}
        elif isinstance(select, Threshold):
            chosen["threshold"] = self._packed_threshold
        elif isinstance(select, TopK):
            chosen["k"] = select.k
        y = self.storage.product(x, self._packed, self.bias, **chosen)
        return (
            y if self.correction is None else y + self.correction(x)
        )  # of all inputs: there is no selection beside it

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
        """Bytes that the weight, the correction and what rounds inputs take in storage."""
        return sum(each.nbytes for each in (self.storage, self.inputs, self.correction) if each is not None)

    def bytes_per_token(self, density: float = 1.0) -> float:
        """Weight bytes read for one token when a share `density` of the inputs is active."""
        score = 0 if self.select is None or self.select.score is None else self.select.score.nbytes
        others = self.weight_bytes - self.storage.nbytes
        return self.storage.bytes_read(density) + others + score

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
            "inputs": None if self.inputs is None else self.inputs.spec(),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> ActLinear:
        """A layer of the right structure whose values come from a weights file."""
        dtype = getattr(torch, spec["dtype"])
        shape = (spec["out_features"], spec["in_features"])
        bias = None
        if spec["bias"] is not None:
            bias = nn.Parameter(torch.empty(shape[0], dtype=getattr(torch, spec["bias"])))
        chosen, stored = spec["select"], spec["weight"]
        select = None if chosen is None else Selection.read(chosen, shape[1])
        weight = registry.weight_class(stored["kind"]).from_spec(stored, shape, dtype)
        correction = None
        if spec["correction"] is not None:
            correction = LowRank.of_structure(spec["correction"], shape, dtype)
        rounded = spec.get("inputs")  # folders of earlier versions say nothing of it
        inputs = None if rounded is None else registry.inputs_class(rounded["kind"]).from_spec(rounded, shape[1])
        return cls(weight, bias, select, correction, inputs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _behind_rotation(old: RoundedInputs | None, new: RoundedInputs | None) -> RoundedInputs | None:
    """The inputs of a layer that had `old` ones and is given `new` ones: a rotation stays in front."""
    if old is None or old.rotation is None or new is None or new.rotation is not None:
        return old if new is None else new
    if old.grid is None and (old.shift is not None or old.divisor is not None):
        raise ValueError("inputs: the layer rotates and scales its inputs, which cannot be rounded after that here.")
    new = copy.deepcopy(new)
    new.rotation = old.rotation
    return new


def pack_for_decode(model: nn.Module) -> int:
    """Build the kernel buffers of every ActLinear that a kernel can serve; returns how many."""
    return sum(module.pack() for module in model.modules() if isinstance(module, ActLinear))
