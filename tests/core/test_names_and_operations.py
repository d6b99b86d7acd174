"""What torch calls a function, and how many operations it takes: against torch's modules, counted in formulas."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_activation_function import OTHERS
from torch import nn

from actkit.core.layers import known_functions as known
from actkit.core.layers.activation_function import thresholded
from actkit.core.layers.activations import activation_function, flops_of, function_names, record_of
from actkit.core.univariate.fit_rational import RationalFit
from actkit.functions.crrelu.crrelu import CRReLU
from actkit.functions.kat.group_rational import GroupRational
from actkit.functions.pangu_pi.series import SeriesActivation
from actkit.functions.polycom.polynomials import PolyNorm, PolyReLU
from actkit.functions.selu.selu import ScaledElu

# -- names elsewhere, and operations -----------------------------------------------------------------------------------


def named_in_torch(name: str) -> nn.Module:
    """The module that a `torch_name` names: a class, and settings in parentheses."""
    call = ast.parse(name if name.endswith(")") else f"{name}()", mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    made: nn.Module = getattr(nn, call.func.id)(*map(ast.literal_eval, call.args))
    return made


ALL = {name: activation_function(name) for name in function_names()} | OTHERS


@pytest.mark.parametrize("name", [name for name, each in ALL.items() if each.torch_name is not None])
def test_what_torch_calls_them(name: str) -> None:
    """torch's module of that name and those settings computes the function, and is known by the same record."""
    found = ALL[name]
    assert found.torch_name is not None
    module, x = named_in_torch(found.torch_name), torch.linspace(-8, 8, 402, dtype=torch.float64)
    known_as = record_of(module)
    assert torch.equal(module(x), found.function(x)) and known_as is not None and known_as.name == found.name


def test_every_activation_of_torch_has_a_name_here() -> None:
    """But those that are random, or learned, or made for attention."""
    theirs = {name for name in nn.modules.activation.__all__ if "Softm" not in name} | {"Identity"}
    known_here = {each.torch_name.partition("(")[0] for each in ALL.values() if each.torch_name is not None}
    assert theirs - known_here == {"MultiheadAttention", "PReLU", "RReLU"}
    prelu = record_of(nn.PReLU(init=0.1))
    assert prelu is not None and prelu.torch_name == "PReLU" and prelu.flops == 2


class Counted:
    """A number that counts what is done with it and with all that came of it."""

    def __init__(self, value: float, done: list[str]) -> None:
        self.value, self.done = value, done

    def _made(self, what: str, value: float) -> Counted:
        self.done.append(what)
        return Counted(value, self.done)

    def __add__(self, other: Any) -> Counted:
        return self._made("+", self.value + _plain(other))

    def __sub__(self, other: Any) -> Counted:
        return self._made("-", self.value - _plain(other))

    def __mul__(self, other: Any) -> Counted:
        return self._made("*", self.value * _plain(other))

    def __truediv__(self, other: Any) -> Counted:
        return self._made("/", self.value / _plain(other))

    def __rtruediv__(self, other: Any) -> Counted:
        return self._made("/", _plain(other) / self.value)

    def __neg__(self) -> Counted:
        return self._made("-", -self.value)

    def __gt__(self, other: Any) -> bool:
        self.done.append(">")
        return self.value > _plain(other)

    def at_least(self, other: float) -> Counted:
        return self._made("max", max(self.value, other))

    def at_most(self, other: float) -> Counted:
        return self._made("min", min(self.value, other))

    def of(self, function: Any) -> Counted:
        return self._made(function.__name__, function(self.value))

    __radd__, __rmul__ = __add__, __mul__


def _plain(value: Any) -> float:
    return value.value if isinstance(value, Counted) else float(value)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + (-x).of(math.exp))


def horner(x: Any, *coefficients: float) -> Any:
    """Constant first."""
    found: Any = coefficients[-1]
    for each in coefficients[-2::-1]:
        found = found * x + each
    return found


SCALE, ALPHA = 1.0507009873554805, 1.6732632423543772
FORMULAS: dict[str, Any] = {  # as torch's documentation and the papers write them
    "celu": lambda x: x if x > 0 else 0.5 * ((x / 0.5).of(math.exp) - 1),
    "elu": lambda x: x if x > 0 else 2.0 * (x.of(math.exp) - 1),
    "gelu": lambda x: 0.5 * x * (1 + (x / math.sqrt(2)).of(math.erf)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))).of(math.tanh)),
    "hardshrink": lambda x: x if x.of(abs) > 0.5 else Counted(0, x.done),
    "hardsigmoid": lambda x: (x + 3).at_least(0).at_most(6) / 6,
    "hardswish": lambda x: x * ((x + 3).at_least(0).at_most(6) / 6),
    "hardtanh": lambda x: x.at_least(-0.5).at_most(2.0),
    "identity": lambda x: x,
    "leaky_relu": lambda x: x if x > 0 else -0.3 * x,
    "log_sigmoid": lambda x: -(1 + (-x).of(math.exp)).of(math.log),
    "mish": lambda x: x * (1 + x.of(math.exp)).of(math.log).of(math.tanh),
    "quick_gelu": lambda x: x / (1 + (-(1.702 * x)).of(math.exp)),
    "relu": lambda x: x.at_least(0),
    "relu2": lambda x: (lambda y: y * y)(x.at_least(0)),
    "relu6": lambda x: x.at_least(0).at_most(6),
    "selu": lambda x: SCALE * (x if x > 0 else ALPHA * (x.of(math.exp) - 1)),
    "shifted_relu": lambda x: (x - 0.4).at_least(0),
    "sigmoid": sigmoid,
    "silu": lambda x: x / (1 + (-x).of(math.exp)),
    "softplus": lambda x: (1 + (2.0 * x).of(math.exp)).of(math.log) / 2.0,
    "softshrink": lambda x: x - x.at_least(-0.5).at_most(0.5),
    "softsign": lambda x: x / (1 + x.of(abs)),
    "tanh": lambda x: x.of(math.tanh),
    "tanhshrink": lambda x: x - x.of(math.tanh),
    "threshold": lambda x: x if x > 0.5 else Counted(-1.0, x.done),
    "crrelu": lambda x: x.at_least(0) + 0.3 * (x * (x * x * -0.5).of(math.exp)),
    "scaled_elu": lambda x: 1.1 * (x if x > 0 else 1.5 * (x.of(math.exp) - 1)),
    "poly_relu": lambda x: horner(x.at_least(0), 0.1, 0.2, 0.3, 0.4),
    "fatrelu": lambda x: _if_large(x.at_least(0), 0.2),
    "rational": lambda x: horner(x, 1.0, 0.5, -0.2, 0.3, 0.1, 0.2) / horner(x.of(abs), 1.0, 0.4, 0.3, 0.2, 0.1),
    "series": lambda x: _silu(0.7 * x + 0.1) + _silu(1.2 * x + -0.3),
}
RATIONAL = RationalFit((1.0, 0.5, -0.2, 0.3, 0.1, 0.2), (0.4, 0.3, 0.2, 0.1), "A", 0.0, 0.0, 0.0, (-3.0, 3.0))


def _silu(x: Any) -> Any:
    return x / (1 + (-x).of(math.exp))


def _if_large(y: Any, threshold: float) -> Any:
    return Counted(0.0, y.done) if not y.of(abs) > threshold else y


def series() -> SeriesActivation:
    module = SeriesActivation("silu", 2)
    with torch.no_grad():
        module.scale.copy_(torch.tensor([[0.7], [1.2]]))
        module.shift.copy_(torch.tensor([[0.1], [-0.3]]))
    return module


def poly_relu() -> PolyReLU:
    module = PolyReLU(3)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.4, 0.3, 0.2]))
        module.bias.fill_(0.1)
    return module


def polynomial_norm(values: list[Any], weights: list[float], bias: float) -> list[Any]:
    """b + sum_i a_i x^i / rms(x^i), powers one from another."""
    powers = [values]
    for _ in weights[1:]:
        powers.append([power * x for power, x in zip(powers[-1], values, strict=True)])
    shares = [
        weight / math.sqrt(_plain(sum(x * x for x in power)) / len(power))
        for weight, power in zip(weights, powers, strict=True)
    ]
    return [sum((share * x for share, x in zip(shares, each, strict=True)), bias) for each in zip(*powers, strict=True)]


LEARNED: dict[str, nn.Module] = {
    "crrelu": CRReLU(0.3),
    "scaled_elu": ScaledElu(1.5, 1.1),
    "poly_relu": poly_relu(),
    "rational": GroupRational(2, 1, start=RATIONAL),
    "series": series(),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_operations_are_those_of_the_formula(name: str) -> None:
    """The formula computes the function, and does as much as is said on its costlier side."""
    known_here = ALL.get(name) if name not in LEARNED else None
    said = known_here.flops if known_here is not None else flops_of(LEARNED[name])
    function: Any = known_here.function if known_here is not None else LEARNED[name]
    most = 0
    for x in (-5.0, -0.7, -0.3, 0.1, 0.6, 1.7, 7.0):
        done: list[str] = []
        value = FORMULAS[name](Counted(x, done)).value
        with torch.no_grad():
            expected = function(torch.full((1, 2), x, dtype=torch.float64))[0, 0]
        assert value == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
        most = max(most, len(done))
    assert most == said


def test_every_registered_function_has_been_counted() -> None:
    mixing = {"softmax": 5, "glu": 5}  # a maximum, a difference, exp, a sum, a quotient; a product and a sigmoid
    counted = {name: activation_function(name).flops for name in function_names()}
    assert {name for name in counted if name not in FORMULAS} == set(mixing)
    assert {name: counted[name] for name in mixing} == mixing
    assert (
        thresholded(known.SILU, 0.2).flops == 6 and flops_of(nn.RReLU()) is None and flops_of(nn.Linear(1, 1)) is None
    )
    unknown = replace(known.SILU, flops=None)
    assert thresholded(unknown, 0.2).flops is None


def test_operations_of_what_mixes_channels() -> None:
    """For each output, as there are more and more of them."""
    done: list[str] = []
    x = torch.linspace(-2, 2, 500, dtype=torch.float64)
    outputs = polynomial_norm([Counted(float(each), done) for each in x], [1 / 3, 1 / 3, 1 / 3], 0.0)
    module = PolyNorm(3)
    assert torch.allclose(torch.tensor([each.value for each in outputs]), module(x[None])[0].float(), atol=1e-5)
    assert round(len(done) / len(x)) == flops_of(module) == 14
