"""The records of the activation functions of torch and transformers, and which module computes which.

A name without settings (`LEAKY_RELU`) is registered in the entry-point group `actkit.functions`; a function such as
`leaky_relu(0.2)` gives the record at other settings. Antiderivatives of SiLU, quick-GELU, softplus and
log-sigmoid need the dilogarithm, which torch does not have; those of Mish and of GELU's tanh form have no closed form;
nor has an inverse of GELU, SiLU, quick-GELU, Mish and tanhshrink. These fields are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.layers.activation_function import (
    ActivationFunction,
    Break,
    Function,
    Piece,
    piecewise_polynomial,
)

INF = math.inf
THEIRS = "transformers.activations"


def _named(name: str, *settings: float, usual: tuple[float, ...]) -> str:
    return name if settings == usual else f"{name}({', '.join(f'{value:g}' for value in settings)})"


def _rising(inverse: Function | None = None) -> tuple[Piece, ...]:
    return (Piece(-INF, INF, 1, inverse),)


def _valley(lowest: float) -> tuple[Piece, ...]:
    """Falls to its lowest output and rises from there; no inverse in closed form."""
    return (Piece(-INF, lowest, -1), Piece(lowest, INF, 1))


# -- polynomials between knots -----------------------------------------------------------------------------------------

IDENTITY = piecewise_polynomial("identity", lambda x: x, (), ((0.0, 1.0),), "linear", torch_name="Identity", flops=0)
RELU = piecewise_polynomial("relu", F.relu, (0.0,), ((0.0,), (0.0, 1.0)), "relu", torch_name="ReLU", flops=1)
RELU6 = piecewise_polynomial(
    "relu6", F.relu6, (0.0, 6.0), ((0.0,), (0.0, 1.0), (6.0,)), "relu6", torch_name="ReLU6", flops=2
)
RELU2 = piecewise_polynomial("relu2", lambda x: F.relu(x).square(), (0.0,), ((0.0,), (0.0, 0.0, 1.0)), "relu2", flops=2)
HARDSIGMOID = piecewise_polynomial(
    "hardsigmoid",
    F.hardsigmoid,
    (-3.0, 3.0),
    ((0.0,), (0.5, 1 / 6), (1.0,)),
    torch_name="Hardsigmoid",
    flops=4,
)
HARDSWISH = piecewise_polynomial(
    "hardswish",
    F.hardswish,
    (-3.0, 3.0),
    ((0.0,), (0.0, 0.5, 1 / 6), (0.0, 1.0)),
    "hardswish",
    torch_name="Hardswish",
    flops=5,
)


@lru_cache
def leaky_relu(slope: float = 0.01) -> ActivationFunction:
    """x if x > 0, else slope * x; also a PReLU with one slope."""
    name = _named("leaky_relu", slope, usual=(0.01,))
    lines = ((0.0, slope), (0.0, 1.0))
    return piecewise_polynomial(
        name,
        lambda x: F.leaky_relu(x, slope),
        (0.0,),
        lines,
        "leaky_relu",
        torch_name=_named("LeakyReLU", slope, usual=(0.01,)),
        flops=2,
    )


@lru_cache
def shifted_relu(shift: float) -> ActivationFunction:
    """max(x - shift, 0)."""
    name = _named("shifted_relu", shift, usual=())
    return piecewise_polynomial(name, lambda x: F.relu(x - shift), (shift,), ((0.0,), (-shift, 1.0)), flops=2)


@lru_cache
def hardtanh(low: float = -1.0, high: float = 1.0) -> ActivationFunction:
    """x, clamped to [low, high]."""
    name = _named("hardtanh", low, high, usual=(-1.0, 1.0))
    theirs = _named("Hardtanh", low, high, usual=(-1.0, 1.0))
    lines = ((low,), (0.0, 1.0), (high,))
    return piecewise_polynomial(name, lambda x: x.clamp(low, high), (low, high), lines, torch_name=theirs, flops=2)


@lru_cache
def hardshrink(size: float = 0.5) -> ActivationFunction:
    """x if |x| > size, else 0."""
    name = _named("hardshrink", size, usual=(0.5,))
    lines = ((0.0, 1.0), (0.0,), (0.0, 1.0))
    theirs = _named("Hardshrink", size, usual=(0.5,))
    return piecewise_polynomial(name, lambda x: F.hardshrink(x, size), (-size, size), lines, torch_name=theirs, flops=2)


@lru_cache
def softshrink(size: float = 0.5) -> ActivationFunction:
    """x moved towards 0 by size, and 0 if |x| <= size."""
    name = _named("softshrink", size, usual=(0.5,))
    lines = ((size, 1.0), (0.0,), (-size, 1.0))
    theirs = _named("Softshrink", size, usual=(0.5,))
    return piecewise_polynomial(name, lambda x: F.softshrink(x, size), (-size, size), lines, torch_name=theirs, flops=3)


@lru_cache
def threshold(at: float, value: float) -> ActivationFunction:
    """x if x > at, else value."""
    name = _named("threshold", at, value, usual=())
    theirs, lines = _named("Threshold", at, value, usual=()), ((value,), (0.0, 1.0))
    return piecewise_polynomial(name, lambda x: F.threshold(x, at, value), (at,), lines, torch_name=theirs, flops=1)


LEAKY_RELU, HARDTANH, HARDSHRINK, SOFTSHRINK = leaky_relu(), hardtanh(), hardshrink(), softshrink()


# -- exponential below 0 -----------------------------------------------------------------------------------------------


def _exponential(
    name: str, torch_name: str, function: Function, scale: float, depth: float, width: float, flops: int
) -> ActivationFunction:
    """scale * x above 0, scale * depth * (exp(x / width) - 1) below."""

    def sides(above: Callable[[Tensor], Tensor], below: Callable[[Tensor], Tensor]) -> Function:
        return lambda x: torch.where(x > 0, above(x), below(x.clamp(max=0)))

    bottom = scale * depth
    return ActivationFunction(
        name=name,
        function=function,
        derivative=sides(lambda x: torch.full_like(x, scale), lambda x: bottom / width * (x / width).exp()),
        second_derivative=sides(torch.zeros_like, lambda x: bottom / width**2 * (x / width).exp()),
        antiderivative=sides(lambda x: scale * x**2 / 2, lambda x: bottom * (width * torch.expm1(x / width) - x)),
        breaks=(Break(0.0, 2 if depth == width else 1),),
        pieces=_rising(sides(lambda y: y / scale, lambda y: width * torch.log1p(y / bottom))),
        limits=(-bottom, INF),
        torch_name=torch_name,
        flops=flops,
    )


@lru_cache
def elu(alpha: float = 1.0) -> ActivationFunction:
    """x if x > 0, else alpha * (exp(x) - 1), alpha > 0."""
    name, theirs = (_named(each, alpha, usual=(1.0,)) for each in ("elu", "ELU"))
    return _exponential(name, theirs, lambda x: F.elu(x, alpha), 1.0, alpha, 1.0, flops=4)


@lru_cache
def celu(alpha: float = 1.0) -> ActivationFunction:
    """x if x > 0, else alpha * (exp(x / alpha) - 1), alpha > 0."""
    name, theirs = (_named(each, alpha, usual=(1.0,)) for each in ("celu", "CELU"))
    return _exponential(name, theirs, lambda x: F.celu(x, alpha), 1.0, alpha, alpha, flops=5)


ELU, CELU = elu(), celu()
SELU = _exponential("selu", "SELU", F.selu, 1.0507009873554805, 1.6732632423543772, 1.0, flops=5)


# -- sigmoids and what is made of them ---------------------------------------------------------------------------------


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + torch.log1p((-2 * x.abs()).exp()) - math.log(2)


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


SIGMOID = ActivationFunction(
    name="sigmoid",
    function=torch.sigmoid,
    derivative=_sigmoid_slope,
    second_derivative=lambda x: _sigmoid_slope(x) * (1 - 2 * torch.sigmoid(x)),
    antiderivative=lambda x: x.clamp(min=0) + torch.log1p((-x.abs()).exp()),
    inflections=(0.0,),
    pieces=_rising(torch.logit),
    limits=(0.0, 1.0),
    config_name="sigmoid",
    torch_name="Sigmoid",
    flops=4,
)
TANH = ActivationFunction(
    name="tanh",
    function=torch.tanh,
    derivative=lambda x: 1 / torch.cosh(x) ** 2,
    second_derivative=lambda x: -2 * torch.tanh(x) / torch.cosh(x) ** 2,
    antiderivative=_log_cosh,
    inflections=(0.0,),
    pieces=_rising(torch.atanh),
    limits=(-1.0, 1.0),
    config_name="tanh",
    torch_name="Tanh",
    flops=1,
)
TANHSHRINK = ActivationFunction(
    name="tanhshrink",
    function=F.tanhshrink,
    derivative=lambda x: torch.tanh(x) ** 2,
    second_derivative=lambda x: 2 * torch.tanh(x) / torch.cosh(x) ** 2,
    antiderivative=lambda x: x**2 / 2 - _log_cosh(x),
    inflections=(0.0,),
    pieces=_rising(),
    limits=(-INF, INF),
    torch_name="Tanhshrink",
    flops=2,
)
SOFTSIGN = ActivationFunction(
    name="softsign",
    function=F.softsign,
    derivative=lambda x: 1 / (1 + x.abs()) ** 2,
    second_derivative=lambda x: -2 * x.sign() / (1 + x.abs()) ** 3,
    antiderivative=lambda x: x.abs() - torch.log1p(x.abs()),
    breaks=(Break(0.0, 2),),
    inflections=(0.0,),
    pieces=_rising(lambda y: y / (1 - y.abs())),
    limits=(-1.0, 1.0),
    torch_name="Softsign",
    flops=3,
)
LOG_SIGMOID = ActivationFunction(
    name="log_sigmoid",
    function=F.logsigmoid,
    derivative=lambda x: torch.sigmoid(-x),
    second_derivative=lambda x: -_sigmoid_slope(x),
    pieces=_rising(lambda y: y - torch.log(-torch.expm1(y))),
    limits=(-INF, 0.0),
    torch_name="LogSigmoid",
    flops=5,
)


@lru_cache
def softplus(beta: float = 1.0) -> ActivationFunction:
    """log(1 + exp(beta * x)) / beta, beta > 0. torch's is x itself from beta * x = 20 on, which differs by 2e-9."""
    return ActivationFunction(
        name=_named("softplus", beta, usual=(1.0,)),
        function=lambda x: F.softplus(x, beta),
        derivative=lambda x: torch.sigmoid(beta * x),
        second_derivative=lambda x: beta * _sigmoid_slope(beta * x),
        pieces=_rising(lambda y: y + torch.log(-torch.expm1(-beta * y)) / beta),
        limits=(0.0, INF),
        torch_name=_named("Softplus", beta, usual=(1.0,)),
        flops=5,
    )


SOFTPLUS = softplus()


# -- an input times a share of it --------------------------------------------------------------------------------------


def _swish(name: str, function: Function, beta: float, torch_name: str | None) -> ActivationFunction:
    """x / (1 + exp(-beta * x)); transformers' name is ours."""

    def second(x: Tensor) -> Tensor:
        x = beta * x
        return beta * _sigmoid_slope(x) * (2 + x * (1 - 2 * torch.sigmoid(x)))

    return ActivationFunction(
        name=name,
        function=function,
        derivative=lambda x: torch.sigmoid(beta * x) * (1 + beta * x * torch.sigmoid(-beta * x)),
        second_derivative=second,
        inflections=(-2.3993572805154676678 / beta, 2.3993572805154676678 / beta),
        pieces=_valley(-1.2784645427610737951 / beta),
        limits=(0.0, INF),
        config_name=name,
        torch_name=torch_name,
        flops=4 if beta == 1 else 5,
    )


SILU = _swish("silu", F.silu, 1.0, "SiLU")
QUICK_GELU = _swish("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x), 1.702, None)


def _normal(x: Tensor) -> Tensor:
    """The standard normal density."""
    return torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


GELU = ActivationFunction(
    name="gelu",
    function=F.gelu,
    derivative=lambda x: torch.special.ndtr(x) + x * _normal(x),
    second_derivative=lambda x: _normal(x) * (2 - x**2),
    antiderivative=lambda x: ((x**2 - 1) * torch.special.ndtr(x) + x * _normal(x)) / 2,
    inflections=(-math.sqrt(2), math.sqrt(2)),
    pieces=_valley(-0.75179152469356445746),
    limits=(0.0, INF),
    config_name="gelu",
    torch_name="GELU",
    flops=5,
)

_WIDTH, _CUBE = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1 + tanh(u), 1 - tanh(u)^2, and two derivatives of u, which is GELU's cubic."""
    u = _WIDTH * (x + _CUBE * x**3)
    rest = 2 * torch.sigmoid(2 * u)  # 1 + tanh(u), without cancellation
    return rest, rest * (2 - rest), _WIDTH * (1 + 3 * _CUBE * x**2), _WIDTH * 6 * _CUBE * x


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    rest, bell, slope, _ = _gelu_tanh_parts(x)
    return rest / 2 + x / 2 * bell * slope


def _gelu_tanh_second(x: Tensor) -> Tensor:
    rest, bell, slope, curvature = _gelu_tanh_parts(x)
    return bell * slope + x / 2 * bell * (curvature - 2 * (rest - 1) * slope**2)


GELU_TANH = ActivationFunction(
    name="gelu_tanh",
    function=lambda x: F.gelu(x, approximate="tanh"),
    derivative=_gelu_tanh_derivative,
    second_derivative=_gelu_tanh_second,
    inflections=(-1.4185040087908283555, 1.4185040087908283555),
    pieces=_valley(-0.75246142207101625849),
    limits=(0.0, INF),
    config_name="gelu_pytorch_tanh",
    torch_name="GELU('tanh')",
    flops=9,
)


def _mish_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tanh(softplus(x)) and its two derivatives."""
    share, tanh = torch.sigmoid(x), torch.tanh(F.softplus(x))
    bell = 1 - tanh**2
    return tanh, bell * share, bell * (_sigmoid_slope(x) - 2 * tanh * share**2)


def _mish_derivative(x: Tensor) -> Tensor:
    tanh, first, _ = _mish_parts(x)
    return tanh + x * first


def _mish_second(x: Tensor) -> Tensor:
    _, first, second = _mish_parts(x)
    return 2 * first + x * second


MISH = ActivationFunction(
    name="mish",
    function=F.mish,
    derivative=_mish_derivative,
    second_derivative=_mish_second,
    inflections=(-2.25637639636079312, 1.4905711794854284593),
    pieces=_valley(-1.1924312145154952121),
    limits=(0.0, INF),
    config_name="mish",
    torch_name="Mish",
    flops=5,
)


# -- functions that mix ------------------------------------------------------------------------------------------------

SOFTMAX = ActivationFunction(
    name="softmax", function=lambda x: x.softmax(-1), mixes=("channels",), torch_name="Softmax(-1)", flops=5
)
GLU = ActivationFunction(name="glu", function=F.glu, mixes=("channels",), torch_name="GLU", flops=5)


# -- which module computes which ---------------------------------------------------------------------------------------


def _prelu(module: nn.PReLU, channel: int | None) -> ActivationFunction | None:
    """At its present slope; None if it has none yet, or others for each channel."""
    slopes = [] if module.weight.is_meta else module.weight.detach().tolist()
    if not slopes or (channel is None and len(set(slopes)) > 1):
        return None
    slope = slopes[channel or 0]
    return replace(leaky_relu(slope), name=f"prelu({slope:g})", config_name=None, torch_name="PReLU")


def _softplus(module: nn.Softplus) -> ActivationFunction | None:
    return softplus(float(module.beta)) if module.beta > 0 and module.threshold == 20 else None


_ALWAYS: dict[type[nn.Module], ActivationFunction] = {
    nn.Hardsigmoid: HARDSIGMOID,
    nn.Hardswish: HARDSWISH,
    nn.Identity: IDENTITY,
    nn.LogSigmoid: LOG_SIGMOID,
    nn.Mish: MISH,
    nn.ReLU: RELU,
    nn.ReLU6: RELU6,
    nn.SELU: SELU,
    nn.SiLU: SILU,
    nn.Sigmoid: SIGMOID,
    nn.Softsign: SOFTSIGN,
    nn.Tanh: TANH,
    nn.Tanhshrink: TANHSHRINK,
}
# By name, as importing them would cost every process 80 MB: whoever has such a module has imported its class.
_THEIRS: dict[str, ActivationFunction] = {
    "AccurateGELUActivation": GELU_TANH,  # the tanh forms are one function, though they round differently
    "FastGELUActivation": GELU_TANH,
    "GELUActivation": GELU,
    "GELUTanh": GELU_TANH,
    "LinearActivation": IDENTITY,
    "MishActivation": MISH,
    "NewGELUActivation": GELU_TANH,
    "QuickGELUActivation": QUICK_GELU,
    "ReLUSquaredActivation": RELU2,
    "SiLUActivation": SILU,
}
_BY_SETTINGS: dict[type[nn.Module], Callable[[Any], ActivationFunction | None]] = {
    nn.CELU: lambda module: celu(float(module.alpha)) if module.alpha > 0 else None,
    nn.ELU: lambda module: elu(float(module.alpha)) if module.alpha > 0 else None,
    nn.GELU: lambda module: GELU if module.approximate == "none" else GELU_TANH,
    nn.GLU: lambda module: GLU if module.dim == -1 else None,
    nn.Hardshrink: lambda module: hardshrink(float(module.lambd)),
    nn.Hardtanh: lambda module: hardtanh(float(module.min_val), float(module.max_val)),
    nn.LeakyReLU: lambda module: leaky_relu(float(module.negative_slope)),
    nn.Softmax: lambda module: SOFTMAX if module.dim == -1 else None,
    nn.Softplus: _softplus,
    nn.Softshrink: lambda module: softshrink(float(module.lambd)),
    nn.Threshold: lambda module: threshold(float(module.threshold), float(module.value)),
}
# of torch; a randomized ReLU computes no one function
ACTIVATION_CLASSES = (*_ALWAYS, *_BY_SETTINGS, nn.PReLU, nn.RReLU)


def of_class(module: nn.Module, channel: int | None = None) -> ActivationFunction | None:
    """The record of a module of torch or transformers at its settings; None for another class, or odd settings.

    Args:
        module: any module.
        channel: of a PReLU with a slope for each; None for all.
    """
    kind = type(module)
    if kind is nn.PReLU:
        return _prelu(module, channel)  # type: ignore[arg-type]
    if kind in _ALWAYS:
        return _ALWAYS[kind]
    if kind.__module__ == THEIRS:
        return _THEIRS.get(kind.__name__)
    found = _BY_SETTINGS.get(kind)
    return None if found is None else found(module)
