"""SELU, alpha dropout and their constants for any fixed point (Klambauer et al. 2017, arXiv:1706.02515).

    selu(x)        = scale x  if x > 0,  else  scale alpha (exp(x) - 1)
    alpha dropout  = a (x, or -scale alpha with probability p) + b       a, b: mean and variance stay what they were
    weights        ~ N(0, 1 / inputs), biases 0                          (of LeCun, a gain of 1)

With alpha = 1.6733 and scale = 1.0507 a layer of such weights hands on mean 0 and variance 1 as they are, and draws
near what is close to them, so that deep networks need no norm. `constants` gives both for another mean and variance.

When to use it: in deep networks of linear layers or convolutions without norms or shortcuts, as for tables; SELU, its
dropout and its initialisation belong together. `swap(model, "relu", "selu")` puts the function alone into a model;
`self_normalize` makes the network, and `self_normalizing` says layer by layer whether it is one.
Cost: that of ELU. Alpha dropout: that of dropout, and a product and a sum.
Settled here: torch's `calculate_gain("selu")` is 3/4, which halves the variance with every layer; the gain here is 1.
torch's own SELU and AlphaDropout are those of mean 0 and variance 1; these take any.
Our own reading: the paper gives the map of moments; the constants of another fixed point follow from it by a quadratic
equation, and the reference finds them by a search.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from scipy.special import erfcx
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.layers.activation_function import ActivationFunction, Axis, Break, Piece
from actkit.core.layers.keeps_dtype import at_least_float32, check_floats
from actkit.core.layers.known_functions import SELU

ALPHA, SCALE = 1.6732632423543772, 1.0507009873554805  # those of mean 0 and variance 1


def constants(mean: float = 0.0, variance: float = 1.0) -> tuple[float, float]:
    """Find alpha and scale for which a layer hands on a mean and a variance, at weights of mean 0 and variance 1 / n.

    Args:
        mean: of the activations.
        variance: of the activations, above 0.

    Returns:
        Alpha and scale.

    Raises:
        ValueError: a variance that is not above 0, or a mean that no alpha and scale above 0 reach.
    """
    _check_variance(variance)
    # z ~ N(0, variance): E selu = scale (a + alpha b), E selu^2 = scale^2 (variance / 2 + alpha^2 c)
    deviation = math.sqrt(variance)
    tail = _tail(deviation)
    a, b, c = deviation / math.sqrt(2 * math.pi), tail - 0.5, _tail(2 * deviation) - 2 * tail + 0.5
    if mean == 0:
        alpha = -a / b
        return alpha, math.sqrt(variance / (variance / 2 + alpha**2 * c))
    second = mean**2 + variance
    square, linear, rest = mean**2 * c - second * b**2, -2 * second * a * b, mean**2 * variance / 2 - second * a**2
    inside = linear**2 - 4 * square * rest
    roots = [(-linear + sign * math.sqrt(inside)) / (2 * square) for sign in (-1, 1)] if inside >= 0 else []
    found = [(alpha, mean / (a + alpha * b)) for alpha in roots]
    fitting = [pair for pair in found if pair[0] > 0 and pair[1] > 0]
    if not fitting:
        raise ValueError(
            f"mean, variance: {mean} and {variance} were given, which no SELU hands on; give a mean nearer to 0."
        )
    return min(fitting, key=lambda pair: abs(pair[0] - ALPHA))


def _tail(deviation: float) -> float:
    """E exp(z) over z < 0 for z ~ N(0, deviation^2), without overflow: erfcx(deviation / sqrt 2) / 2."""
    return float(erfcx(deviation / math.sqrt(2))) / 2


def moment_map(
    mean: float, variance: float, omega: float = 0.0, tau: float = 1.0, alpha: float = ALPHA, scale: float = SCALE
) -> tuple[float, float]:
    """Map mean and variance of a layer's inputs to those of its outputs, in closed form.

    Args:
        mean: of the inputs.
        variance: of the inputs, above 0.
        omega: the sum of a unit's weights.
        tau: the sum of their squares, above 0.
        alpha: of the SELU.
        scale: of the SELU.

    Returns:
        Mean and variance of the outputs; that of any function is `core/layers/moments.py`.

    Raises:
        ValueError: a variance or a tau that is not above 0.
    """
    _check_variance(variance)
    _check_variance(tau, "tau")
    m, v = mean * omega, variance * tau
    root, s = math.sqrt(v), math.sqrt(2 * v)
    bell = math.exp(-(m**2) / (2 * v))  # e^(k m + k^2 v / 2) erfc((m + k v) / s) = bell erfcx((m + k v) / s)
    one, two = (float(bell * erfcx((m + k * v) / s)) for k in (1, 2))
    below, density = math.erfc(m / s), math.sqrt(2 / math.pi) * root * bell
    first = scale / 2 * (m * math.erf(m / s) + alpha * one - alpha * below + density + m)
    second = scale**2 / 2 * ((m**2 + v) * (2 - below) + alpha**2 * (-2 * one + two + below) + m * density)
    return first, second - first**2


def _check_variance(value: float, name: str = "variance") -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: {value} was given; give a number above 0.")


class ScaledElu(nn.Module):
    """A SELU of any alpha and scale.

    Args:
        alpha: what it goes to far below 0, over the scale, with the sign turned.
        scale: the slope above 0.

    Raises:
        ValueError: one that is not above 0.
    """

    mixes: ClassVar[tuple[Axis, ...]] = ()

    def __init__(self, alpha: float = ALPHA, scale: float = SCALE) -> None:
        super().__init__()
        _check_variance(alpha, "alpha")
        _check_variance(scale, "scale")
        self.alpha, self.scale = float(alpha), float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape."""
        check_floats(x)
        if (self.alpha, self.scale) == (ALPHA, SCALE):
            return F.selu(x)
        return self.scale * F.elu(x, self.alpha)

    def record(self) -> ActivationFunction:
        """What is known of it."""
        return SELU if (self.alpha, self.scale) == (ALPHA, SCALE) else record_at(self.alpha, self.scale)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return {"alpha": self.alpha, "scale": self.scale}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> ScaledElu:
        """The function that `spec` described."""
        return cls(**spec)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:.6g}, scale={self.scale:.6g}"


def record_at(alpha: float, scale: float) -> ActivationFunction:
    """What is known of a SELU of these constants.

    Args:
        alpha: above 0.
        scale: above 0.
    """

    def either(x: Tensor, above: Tensor, below: Tensor) -> Tensor:
        return torch.where(x > 0, above, below)

    def small(x: Tensor) -> Tensor:
        return x.clamp(max=0)

    return ActivationFunction(
        name=f"scaled_elu({alpha:.6g}, {scale:.6g})",
        function=lambda x: scale * F.elu(x, alpha),
        derivative=lambda x: either(x, torch.full_like(x, scale), scale * alpha * small(x).exp()),
        second_derivative=lambda x: either(x, torch.zeros_like(x), scale * alpha * small(x).exp()),
        antiderivative=lambda x: either(x, scale * x**2 / 2, scale * alpha * (torch.expm1(small(x)) - x)),
        breaks=(Break(0.0, 2 if alpha == 1 else 1),),
        pieces=(
            Piece(
                -math.inf,
                math.inf,
                1,
                lambda y: either(y, y / scale, torch.log1p(y.clamp(-scale * alpha, 0) / (scale * alpha))),
            ),
        ),
        limits=(-scale * alpha, math.inf),
        flops=5,
    )


class AlphaDropout(nn.Module):
    """Dropout that leaves mean and variance as they are: what is dropped becomes -scale alpha, not 0.

    Args:
        p: the share that is dropped in training, 0 to below 1.
        mean: of the activations, which it keeps.
        variance: of the activations, which it keeps.
        alpha: of the SELU in front of it.
        scale: of the SELU in front of it.
        channels: drop whole channels of inputs [batch, channels, ...].

    Raises:
        ValueError: p outside of [0, 1), or a variance, alpha or scale that is not above 0.
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        mean: float = 0.0,
        variance: float = 1.0,
        alpha: float = ALPHA,
        scale: float = SCALE,
        channels: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p: {p} was given; give the share that is dropped, 0 to below 1.")
        for name, value in (("variance", variance), ("alpha", alpha), ("scale", scale)):
            _check_variance(value, name)
        self.p, self.mean, self.variance, self.alpha, self.scale = p, mean, variance, alpha, scale
        self.channels = channels

    @property
    def affine(self) -> tuple[float, float]:
        """The factor and the shift that bring mean and variance back."""
        kept, dropped = 1 - self.p, -self.scale * self.alpha
        spread = kept * (self.p * (dropped - self.mean) ** 2 + self.variance)
        factor = math.sqrt(self.variance / spread)
        return factor, self.mean - factor * (kept * self.mean + self.p * dropped)

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> the same shape; in evaluation mode as it is."""
        check_floats(x)
        if not self.training or self.p == 0:
            return x
        shape = x.shape if not self.channels else (*x.shape[:2], *[1] * (x.dim() - 2))
        kept = torch.rand(shape, device=x.device) >= self.p
        factor, shift = self.affine
        wide = at_least_float32(x)
        return (factor * torch.where(kept, wide, -self.scale * self.alpha) + shift).to(x.dtype)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        names = ("p", "mean", "variance", "alpha", "scale", "channels")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> AlphaDropout:
        """The module that `spec` described."""
        return cls(**spec)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


@torch.no_grad()
def lecun_normal_(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Give the linear layers and convolutions of a module weights of mean 0 and variance 1 / inputs, and biases of 0.

    Args:
        module: changed in place, with all that is inside.
        generator: of the numbers; None for torch's own.

    Returns:
        The module.
    """
    for each in module.modules():
        if isinstance(each, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            each.weight.normal_(0.0, each.weight[0].numel() ** -0.5, generator=generator)
            if each.bias is not None:
                each.bias.zero_()
    return module
