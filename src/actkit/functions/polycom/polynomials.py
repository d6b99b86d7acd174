"""PolyReLU and PolyNorm: activation functions that are learned polynomials, from PolyCom (2024, arXiv:2411.03884).

    PolyReLU(x) = b + sum_{i=1..r} a_i relu(x)^i
    PolyNorm(x) = b + sum_{i=1..r} a_i N(x^i),    N(u) = u / sqrt(mean_j(u_j^2) + eps)

The mean is over the hidden units of a token. r = 3, all a_i start at 1/3 and b at 0: four numbers per MLP, which all
its units share. `weight` holds a_r first, as the release does. A product of features, which a ReLU network has to
approximate, is one layer of these.

When to use it: in a language model that you train from scratch, in MLPs without a gate (`ungate` makes them of gated
ones with as many parameters); `swap` puts them in place of any activation function, also that of a gate, and a config
takes their names as `hidden_act`. Clip gradients and warm up: PolyReLU grows with the third power. PolyNorm's outputs
have no zeros, so that nothing can be skipped behind it; those of PolyReLU are 0 for negative inputs while b is 0.
Cost: forward and backward are one pass each over a row that stays in a cache (`kernels/polynomials.py`); of the forward
pass the input is kept, and three numbers per token for PolyNorm. The release keeps the powers, or computes them twice
by activation checkpointing, which is not needed here.
Settled here: the mean of squares under N, as in the release (the paper's formula divides by the norm, which is
smaller by the root of the width). Weight decay spares the coefficients (the release's two training codes disagree). A
bfloat16 or float16 model keeps them in float32, and powers are float32: x^3 exceeds float16 from 40 on.
Our own reading: any order, one polynomial per channel, and the starts `relu` and `relu2`, at which
PolyReLU is exactly that function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.polynomial import Polynomial as Coefficients
from torch import Tensor, nn
from torch.nn import functional as F

from actkit import kernels
from actkit.core.layers.activation_function import ActivationFunction, Axis, Break, Function, Piece
from actkit.core.layers.curve import COEFFICIENTS, Curve
from actkit.core.layers.keeps_dtype import KeepsDtype, at_least_float32

Init = Literal["paper", "relu", "relu2"]
INITS: tuple[Init, ...] = ("paper", "relu", "relu2")


class Polynomial(KeepsDtype):
    """What both share: a weight [order], highest power first, and a bias [1], which keep float32.

    Args:
        order: the highest power.
        init: "paper" for equal shares; of PolyReLU also "relu" (x itself) and "relu2" (its square).
        channels: a polynomial for each channel: weight [order, channels], bias [channels]; None for one in all.

    Raises:
        ValueError: an order or a number of channels below 1, or an unknown start.
    """

    keeps: ClassVar[tuple[str, ...]] = ("weight", "bias")
    weight_decay: ClassVar[bool] = False

    def __init__(self, order: int = 3, init: Init = "paper", channels: int | None = None) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"order: {order} was given; give the highest power, 1 or more (3 in the paper).")
        if channels is not None and channels < 1:
            raise ValueError(f"channels: {channels} was given; give how many there are, or None for one polynomial.")
        if init not in INITS or (init == "relu2" and order < 2):
            raise ValueError(f"init: {init!r} was given, allowed are {', '.join(INITS)}; relu2 from order 2 on.")
        start = torch.full((order,), 1 / order)
        if init != "paper":
            start = torch.zeros(order)
            start[order - (1 if init == "relu" else 2)] = 1
        self.order, self.channels = order, channels
        self.weight = nn.Parameter(start if channels is None else start[:, None].repeat(1, channels))
        self.bias = nn.Parameter(torch.zeros(1 if channels is None else channels))

    @property
    def groups(self) -> int:
        """How many polynomials it holds: one for each channel, or one."""
        return self.channels or 1

    def coefficients(self, channel: int | None = None) -> tuple[float, ...] | None:
        """b, a_1, a_2 ... as they are now; None on the meta device, or if channels have others each.

        Args:
            channel: None for all.
        """
        if self.weight.is_meta:
            return None
        rows = torch.cat((self.bias.detach()[None], self.weight.detach().view(self.order, -1).flip(0)))
        if channel is None and bool((rows != rows[:, :1]).any()):
            return None
        return tuple(rows[:, channel or 0].tolist())

    def spec(self) -> dict[str, Any]:
        """Return its JSON arguments, as a checkpoint keeps them; the values are in the weights file."""
        return {"order": self.order, "per_channel": self.channels is not None, "channels": self.channels}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Self:
        """Make it from what `spec()` gave."""
        return cls(**spec)

    def extra_repr(self) -> str:
        found = None if self.channels else self.coefficients()
        if found is None:
            return f"order={self.order}, channels={self.channels}"
        return ", ".join(f"{name}={value:.3g}" for name, value in zip(["b", *_names(self.order)], found, strict=True))


class PolyReLU(Polynomial):
    """b + sum_i a_i relu(x)^i, element by element: any shape -> the same.

    Args:
        order: as in `Polynomial`.
        init: as in `Polynomial`.
        per_channel: a polynomial for each of the channels, which are the last dimension; else one for all.
        channels: how many there are, needed if `per_channel`; `swap` tells it.

    Raises:
        ValueError: as `Polynomial`, or `per_channel` without `channels`.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()

    def __init__(
        self, order: int = 3, init: Init = "paper", per_channel: bool = False, channels: int | None = None
    ) -> None:
        if per_channel and channels is None:
            raise ValueError("channels: None was given with per_channel=True; give how many channels there are.")
        super().__init__(order, init, channels if per_channel else None)

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape and dtype; powers in float32 at least."""
        return kernels.poly_relu(x, self.weight, self.bias) if self.channels is None else self._by_channel(x)

    def curve(self) -> Curve | None:
        """Return what it computes now, for the CPU decoder; None above degree 9."""
        ascending = torch.cat((self.bias.detach()[None], self.weight.detach().view(self.order, -1).flip(0)))
        return Curve.of("poly_relu", ascending.t())

    def _by_channel(self, x: Tensor) -> Tensor:
        positive = at_least_float32(x).relu()
        y = self.weight[0].to(positive.dtype).expand_as(positive)
        for added in (*self.weight[1:], self.bias):
            y = y * positive + added
        return y.to(x.dtype)

    def record(self, group: int | None = None) -> ActivationFunction | None:
        """What is known of it at its present coefficients; None if channels have others each.

        Args:
            group: a channel; None for all.
        """
        found = self.coefficients(group)
        return None if found is None else polynomial_of_relu(found)


class PolyNorm(Polynomial):
    """b + sum_i a_i N(x^i), normalised over the channels, which are the last dimension: [..., channels] -> the same.

    Multiplying x by a positive number hardly changes it; near 0 `eps` holds it down, the highest power first.

    Args:
        order: as in `Polynomial`.
        eps: inside of the root, behind the mean.

    Raises:
        ValueError: as `Polynomial`, or an eps that is not above 0.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ("channels",)

    def __init__(self, order: int = 3, eps: float = 1e-6) -> None:
        super().__init__(order)
        if not 0 < eps < math.inf:
            raise ValueError(f"eps: {eps} was given; give a small number above 0, such as 1e-6.")
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels] -> the same shape and dtype; powers and means in float32 at least."""
        return kernels.poly_norm(x, self.weight, self.bias, self.eps)

    def curve(self) -> Curve | None:
        """Return what it computes now, for the CPU decoder; None above order 8."""
        last = torch.full((1, 1), self.eps, device=self.bias.device)
        ascending = torch.cat((self.bias.detach(), self.weight.detach().flip(0)))[None]
        if self.order >= COEFFICIENTS - 1:
            return None
        return Curve.of("poly_norm", torch.cat((F.pad(ascending, (0, COEFFICIENTS - 2 - self.order)), last), 1))

    def record(self) -> ActivationFunction | None:
        """The function at its present coefficients; as it mixes channels, no more is a number per input."""
        found = self.coefficients()
        if found is None:
            return None
        weight, bias, eps = torch.tensor(found[:0:-1]).double(), torch.tensor(found[:1]).double(), self.eps

        def function(x: Tensor) -> Tensor:
            return kernels.poly_norm(x, weight, bias, eps)

        # powers, their squares and sums of these, products with a number per row; a row's roots are hardly any
        flops = 5 * self.order - 1
        return ActivationFunction(name=_called("poly_norm", found), function=function, mixes=self.mixes, flops=flops)

    def spec(self) -> dict[str, Any]:
        return {"order": self.order, "eps": self.eps}


def polynomial_of_relu(coefficients: Sequence[float]) -> ActivationFunction:
    """The record of a polynomial of relu(x).

    Args:
        coefficients: of x^0, x^1, x^2 ...

    Returns:
        The record; pieces and inflections from the roots of the derivatives.
    """
    p = Coefficients(coefficients).trim()
    slope, curvature = p.deriv(), p.deriv(2)
    constant = not np.any(p.coef[1:])
    orders = [order for order, polynomial in ((1, slope), (2, curvature)) if polynomial(0.0) != 0]
    turns = [] if constant else _sign_changes(slope)
    edges = [0.0, *turns, math.inf]
    pieces = [Piece(-math.inf, math.inf if constant else 0.0, 0)]
    for start, end in () if constant else pairwise(edges):
        inside = start + 1 if math.isinf(end) else (start + end) / 2
        pieces.append(Piece(start, end, 1 if slope(inside) > 0 else -1))
    integral = p.integ()

    def antiderivative(x: Tensor) -> Tensor:
        return _horner(integral, x.clamp(min=0)) + p.coef[0] * x.clamp(max=0)

    return ActivationFunction(
        name=_called("poly_relu", coefficients),
        function=lambda x: _horner(p, x.relu()),
        derivative=_where_positive(slope),
        second_derivative=_where_positive(curvature),
        antiderivative=antiderivative,
        breaks=tuple(Break(0.0, order) for order in orders[:1]),
        inflections=tuple(_sign_changes(curvature)),
        pieces=tuple(pieces),
        limits=(float(p.coef[0]), float(p.coef[0]) if constant else math.copysign(math.inf, p.coef[-1])),
        flops=1 + 2 * p.degree(),
    )


def _sign_changes(p: Coefficients) -> list[float]:
    """The positive numbers at which a polynomial changes its sign, in order."""
    found = map(complex, p.roots())
    roots = sorted(root.real for root in found if abs(root.imag) < 1e-9 and root.real > 1e-12)
    ends = [0.0, *roots, (roots[-1] if roots else 0.0) + 2.0]
    signs = [float(np.sign(p((low + high) / 2))) for low, high in pairwise(ends)]
    return [root for root, before, after in zip(roots, signs[:-1], signs[1:], strict=True) if before * after < 0]


def _where_positive(p: Coefficients) -> Function:
    return lambda x: torch.where(x > 0, _horner(p, x), torch.zeros_like(x))


def _horner(p: Coefficients, x: Tensor) -> Tensor:
    wide = at_least_float32(x)
    y = torch.full_like(wide, float(p.coef[-1]))
    for coefficient in p.coef[-2::-1]:
        y = y * wide + float(coefficient)
    return y.to(x.dtype)


def _called(name: str, coefficients: Sequence[float]) -> str:
    return f"{name}({', '.join(f'{value:.4g}' for value in coefficients)})"


def _names(order: int) -> list[str]:
    return [f"a{power}" for power in range(1, order + 1)]
