"""What keeps codes for the backward pass in place of tensors: functions, and modules that stand in for others.

    coded_slopes(call, x, code)        y = f(x) exactly;  dx = level[code(x)] dy
    coded_inputs(call, codes, ...)     y = g(x, ...) exactly;  backward through g at the x that the codes stand for
    coded_softmax(x, axis, codes)      y exactly;  dx = y~ (dy - sum dy y~), y~ what the codes of y stand for
    redrawn_dropout(x, p)              y exactly;  the mask is drawn again from the state of the random numbers
    frozen_norm(x, ...)                a batch norm in evaluation mode;  dx = a dy, d bias = sum dy, nothing is kept

Forward passes are those of what they stand for, to the bit. Under gradient checkpointing the codes are made again as
tensors are; autocast holds in the backward pass as it did in the forward pass. Compiled models run these functions
uncompiled, between compiled parts. A second derivative is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.activation_function import ActivationFunction, Axis
from actkit.core.layers.activations import record_of
from actkit.core.layers.packed_codes import AffineCodes, DerivativeCode

Call = Callable[..., Tensor]


def _refuse_second() -> None:
    if torch.is_grad_enabled():  # create_graph=True
        raise UnsupportedModelError(
            "backward: a second derivative was asked for (create_graph=True), and codes stand for the first one only; "
            "detach the rule that codes activations, or ask for first derivatives."
        )


# -- elementwise functions ---------------------------------------------------------------------------------------------


class _CodedSlopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, code: DerivativeCode) -> Tensor:
        ctx.save_for_backward(code.encode(x))
        ctx.code, ctx.shape = code, x.shape
        return call(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _refuse_second()
        (packed,) = ctx.saved_tensors
        return gradient * ctx.code.decode(packed, ctx.shape, gradient.dtype), None, None


@torch.compiler.disable
def coded_slopes(call: Call, x: Tensor, code: DerivativeCode) -> Tensor:
    """Compute an element-wise function, of which the codes of its slope are kept.

    Args:
        call: the function; it does not work in place.
        x: of any shape.
        code: of its slope.

    Returns:
        What the call gives.
    """
    return _CodedSlopes.apply(x, call, code)


# -- anything, through its inputs --------------------------------------------------------------------------------------


class _CodedInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, codes: AffineCodes, coded: int, draws: bool, *tensors: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for x in tensors[:coded]:
            kept += codes.encode(x)
        state = _random_state(tensors[0].device) if draws else []
        ctx.save_for_backward(*kept, *tensors[coded:], *state)
        ctx.call, ctx.codes, ctx.draws = call, codes, len(state)
        ctx.known = [(x.shape, x.dtype) for x in tensors[:coded]]
        ctx.device = tensors[0].device
        kind = ctx.device.type
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return call(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _refuse_second()
        saved = list(ctx.saved_tensors)
        state = [saved.pop() for _ in range(ctx.draws)][::-1]
        tensors = []
        for shape, dtype in ctx.known:
            tensors.append(ctx.codes.decode(saved[: ctx.codes.parts], shape, dtype))
            saved = saved[ctx.codes.parts :]
        needs = ctx.needs_input_grad[4:]
        inputs = [
            each.detach().requires_grad_() if need else each
            for each, need in zip([*tensors, *saved], needs, strict=True)
        ]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device.type, dtype=dtype, enabled=enabled), _drawing(state, ctx):
            output = ctx.call(*inputs)
        wanted = [each for each, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
        return None, None, None, None, *(next(found) if need else None for need in needs)


@torch.compiler.disable
def coded_inputs(
    call: Call, codes: AffineCodes, coded: Sequence[Tensor], kept: Sequence[Tensor] = (), draws: bool = False
) -> Tensor:
    """Compute a function, of whose inputs codes are kept.

    Args:
        call: of the coded tensors and then the kept ones, to one tensor; called again in the backward pass.
        codes: how the coded inputs are kept.
        coded: inputs, of which codes are kept.
        kept: inputs that are kept as they are: parameters, masks.
        draws: the call draws random numbers, which are to be the same again.

    Returns:
        What the call gives.
    """
    return _CodedInputs.apply(call, codes, len(coded), draws, *coded, *kept)  # type: ignore[no-any-return]


def _random_state(device: torch.device) -> list[Tensor]:
    """What random numbers on a device come from; a few kilobytes."""
    return [torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()]


class _drawing:  # used as a context
    """Draw random numbers from an earlier state; those of others are not touched. No state: nothing is done."""

    def __init__(self, state: list[Tensor], ctx: Any) -> None:
        self.state, self.device = state, ctx.device
        self.forked: Any = None

    def __enter__(self) -> None:
        if self.state:
            cuda = self.device.type == "cuda"
            self.forked = torch.random.fork_rng(devices=[self.device] if cuda else [])
            self.forked.__enter__()
            (state,) = self.state
            if cuda:
                torch.cuda.set_rng_state(state, self.device)
            else:
                torch.set_rng_state(state)

    def __exit__(self, *error: Any) -> None:
        if self.forked is not None:
            self.forked.__exit__(*error)


# -- softmax, dropout, frozen batch norms ------------------------------------------------------------------------------


class _CodedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, codes: AffineCodes) -> Tensor:
        y = x.softmax(axis)
        ctx.save_for_backward(*codes.encode(y))
        ctx.codes, ctx.axis, ctx.shape = codes, axis, y.shape
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _refuse_second()
        y = ctx.codes.decode(list(ctx.saved_tensors), ctx.shape, gradient.dtype)
        return y * (gradient - (gradient * y).sum(ctx.axis, keepdim=True)), None, None


@torch.compiler.disable
def coded_softmax(x: Tensor, axis: int, codes: AffineCodes) -> Tensor:
    """Compute softmax, of whose output codes are kept.

    Args:
        x: of any shape.
        axis: along which it sums to 1.
        codes: how the output is kept.
    """
    return _CodedSoftmax.apply(x, axis, codes)


class _RedrawnDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(*_random_state(x.device))
        ctx.share, ctx.layout, ctx.device = share, (x.shape, x.stride(), x.dtype), x.device
        return F.dropout(x, share, True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _refuse_second()
        shape, strides, dtype = ctx.layout
        ones = torch.empty_strided(shape, strides, dtype=dtype, device=ctx.device).fill_(1)  # drawn in the same order
        with _drawing(list(ctx.saved_tensors), ctx):
            mask = F.dropout(ones, ctx.share, True)
        return gradient * mask.to(gradient.dtype), None


@torch.compiler.disable
def redrawn_dropout(x: Tensor, share: float) -> Tensor:
    """Drop values at random; the mask is not kept but drawn again.

    Args:
        x: of any shape.
        share: of values that are dropped.
    """
    return _RedrawnDropout.apply(x, share)  # type: ignore[no-any-return]


class _FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(variance, *(() if weight is None else (weight,)))
        ctx.eps, ctx.dtype = eps, None if bias is None else bias.dtype
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _refuse_second()
        variance, *weight = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        for each in weight:
            scale = scale * each
        shape = [1, -1] + [1] * (gradient.dim() - 2)
        dx = gradient * scale.view(shape).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        shift = None
        if ctx.needs_input_grad[4]:
            shift = gradient.sum([axis for axis in range(gradient.dim()) if axis != 1], dtype=ctx.dtype)
        return dx, None, None, None, shift, None


@torch.compiler.disable
def frozen_norm(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise by running statistics, with a scale that does not train; nothing of x is kept.

    Args:
        x: [batch, channels, ...].
        mean: of the channels.
        variance: of the channels.
        weight: the scale, or None; it gets no gradient.
        bias: the shift, or None.
        eps: added to the variance.
    """
    return _FrozenNorm.apply(x, mean, variance, weight, bias, eps)  # type: ignore[no-any-return]


# -- modules that stand in for others ----------------------------------------------------------------------------------


class StandIn(nn.Module):
    """Stands in for a module whose parameters, buffers and attributes it shares, under the same names.

    Args:
        inner: what it stands for.
    """

    inner: nn.Module

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        if getattr(inner, "inplace", False):  # what follows may keep its input; the values are the same
            inner = copy.copy(inner)
            inner.inplace = False  # type: ignore[assignment]
        self.__dict__["inner"] = inner  # not a child: the names of parameters stay what they are
        self._parameters, self._buffers, self._modules = inner._parameters, inner._buffers, inner._modules
        self.training = inner.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "inner" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self.__dict__["inner"], name)

    def train(self, mode: bool = True) -> StandIn:
        """Set the mode of both. mode: of training."""
        self.inner.train(mode)
        self.training = mode
        return self

    def extra_repr(self) -> str:
        return f"for {type(self.inner).__name__}"

    def _needs(self, x: Tensor) -> bool:
        """Whether there will be a backward pass through it."""
        trains = x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        return torch.is_grad_enabled() and trains


class CodedActivation(StandIn):
    """An element-wise activation that keeps the codes of its slope.

    Args:
        inner: the activation.
        code: of its slope.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()

    def __init__(self, inner: nn.Module, code: DerivativeCode) -> None:
        super().__init__(inner)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape."""
        return coded_slopes(self.inner, x, self.code) if self._needs(x) else self.inner(x)

    def record(self) -> ActivationFunction | None:
        """What is known of the function."""
        return record_of(self.inner)


class CodedInputs(StandIn):
    """A module of one input that keeps the codes of its input: a norm, a linear layer.

    Args:
        inner: the module; it draws no random numbers and keeps no state.
        codes: how its input is kept.
    """

    def __init__(self, inner: nn.Module, codes: AffineCodes) -> None:
        super().__init__(inner)
        self.codes = codes

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> what the module gives."""
        if not self._needs(x):
            return self.inner(x)
        own = dict(self.inner.named_parameters())

        def call(x: Tensor, *parameters: Tensor) -> Tensor:
            given = dict(zip(own, parameters, strict=True))
            return functional_call(self.inner, given, (x,))  # type: ignore[no-any-return]

        return coded_inputs(call, self.codes, [x], list(own.values()))


class CodedSoftmax(StandIn):
    """A softmax that keeps the codes of its output.

    Args:
        inner: the softmax.
        codes: how its output is kept.
    """

    def __init__(self, inner: nn.Module, codes: AffineCodes) -> None:
        super().__init__(inner)
        self.codes = codes

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape."""
        return coded_softmax(x, self.inner.dim, self.codes) if self._needs(x) else self.inner(x)  # type: ignore[arg-type]


class RedrawnDropout(StandIn):
    """A dropout whose mask is drawn again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape."""
        share: Any = self.inner.p
        return redrawn_dropout(x, share) if self.training and share and self._needs(x) else self.inner(x)


class FrozenNorm(StandIn):
    """A batch norm in evaluation mode, also while the model trains; only its shift can train.

    Args:
        inner: the batch norm, with running statistics.

    Raises:
        UnsupportedModelError: it has no running statistics.
    """

    def __init__(self, inner: nn.Module) -> None:
        if getattr(inner, "running_mean", None) is None:
            raise UnsupportedModelError(
                f"model: a {type(inner).__name__} keeps no running statistics (track_running_stats=False), so it "
                f"cannot be frozen; train it as it is, without this rule."
            )
        super().__init__(inner)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, channels, ...] -> the same shape."""
        norm: Any = self.inner
        return frozen_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
