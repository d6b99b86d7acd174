"""Bases: a few fixed functions of one variable, whose sums with coefficients make other functions.

    basis(x):  x [..., channels] -> [..., channels, size]

A basis has a domain, on which it is meant to be used, and says what becomes of inputs outside of it: they are `clamped`
to the nearest end (so that no gradient reaches them), `squashed` by tanh into it (then the domain is the whole line),
or the functions `vanish` there, or `repeat`, by themselves. Values are scaled as the class says; those of inputs in 16
bits are computed in float32. `fit` finds the coefficients of a given function; `KanLinear` (`kan_linear.py`) is a basis
with a linear layer behind it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from actkit.core.layers.keeps_dtype import KeepsDtype, at_least_float32
from actkit.kernels.bases import CLAMPED, SQUASHED, VANISH, KernelBasis, serves

Outside = Literal["clamped", "squashed", "vanish", "repeat"]
MANY = 0.05  # of the inputs are outside, and it is said
POINTS = 1001  # on the domain, of a fit to a function
CODES: dict[str, int] = {"vanish": VANISH, "clamped": CLAMPED, "squashed": SQUASHED}


@dataclass(frozen=True, eq=False)
class BasisFit:
    """Coefficients of a function in a basis.

    Attributes:
        coefficients: float64 [size].
        largest_error: of the points that it was fitted on.
        at: the input at which it is.
    """

    coefficients: Tensor
    largest_error: float
    at: float


class Basis(KeepsDtype):
    """Some functions of one variable; subclasses give `evaluate` and `slopes`, and may have parameters.

    Args:
        size: how many functions.
        domain: the inputs that it is meant for.
        outside: what becomes of other inputs.

    Raises:
        ValueError: an empty domain, or `outside` is not what the class can do.
    """

    allowed: ClassVar[tuple[Outside, ...]] = ("vanish", "clamped", "squashed")

    def __init__(self, size: int, domain: tuple[float, float] = (-1.0, 1.0), outside: Outside = "clamped") -> None:
        super().__init__()
        low, high = domain
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"domain: {domain} was given; give two finite ends, the lower one first.")
        if outside not in self.allowed:
            raise ValueError(f"outside: {outside!r} was given, allowed are {', '.join(self.allowed)}.")
        self.size, self.domain, self.outside = size, (float(low), float(high)), outside
        self.noticed = False  # whether inputs were looked at

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels] -> [..., channels, size], in the dtype of x."""
        return self.evaluate(self.inside(at_least_float32(x))).to(x.dtype)

    def derivative(self, x: Tensor) -> Tensor:
        """The derivative of each function by x [..., channels]: [..., channels, size]."""
        wide = at_least_float32(x)
        found = self.slopes(self.inside(wide))
        low, high = self.domain
        if self.outside == "clamped":
            found = found * ((x >= low) & (x <= high)).to(found.dtype).unsqueeze(-1)
        elif self.outside == "squashed":
            found = found * ((high - low) / 2 * (1 - torch.tanh(wide) ** 2)).unsqueeze(-1)
        return found.to(x.dtype)

    def evaluate(self, x: Tensor) -> Tensor:
        """The functions at x [..., channels], which `inside` has brought into the domain: [..., channels, size]."""
        raise NotImplementedError

    def slopes(self, x: Tensor) -> Tensor:
        """Their derivatives, as `evaluate`."""
        raise NotImplementedError

    @torch.no_grad()
    def values(self, x: Tensor) -> Tensor:
        """What `forward` gives, without a graph, and by a kernel if there is one.

        Args:
            x: [..., channels].

        Returns:
            [..., channels, size].
        """
        kernel = self.kernel() if serves(x) else None
        return self(x) if kernel is None else kernel.values(x)

    @torch.no_grad()
    def pulled(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Pull a gradient of the values back to x, by a kernel if there is one.

        Args:
            gradient: [..., channels, size].
            x: [..., channels].

        Returns:
            [..., channels].
        """
        kernel = self.kernel() if serves(x) else None
        return (gradient * self.derivative(x)).sum(-1) if kernel is None else kernel.pulled(gradient, x)

    def kernel(self) -> KernelBasis | None:
        """The basis as kernels read it, or None if there is no kernel for it."""
        return None

    def _kernel(self, kind: int, numbers: list[float]) -> KernelBasis:
        ends, given = np.array(self.domain, np.float32), np.array(numbers, np.float32)
        return KernelBasis(kind, CODES[self.outside], ends, self.size, given)

    def inside(self, x: Tensor) -> Tensor:
        """x [..., channels] as the functions read it."""
        low, high = self.domain
        if self.outside == "clamped":
            return x.clamp(low, high)
        if self.outside == "squashed":
            return low + (high - low) / 2 * (torch.tanh(x) + 1)
        return x

    def share_outside(self, x: Tensor) -> float:
        """The share of the values of x [...] that are outside of the domain; 0 if inputs are squashed into it."""
        low, high = self.domain
        if self.outside == "squashed" or not x.numel():
            return 0.0
        return float(((x < low) | (x > high)).double().mean())

    def notice(self, x: Tensor) -> None:
        """Warn if many inputs are outside of the domain; of the first inputs alone.

        Args:
            x: [...], inputs of a layer; a program that is compiled or exported is not looked at.
        """
        if self.noticed or type(x) not in (Tensor, nn.Parameter) or x.is_meta or torch.compiler.is_compiling():
            return
        self.noticed = True
        share = 0.0 if self.outside == "repeat" else self.share_outside(x.detach())
        if share > MANY:
            low, high = self.domain
            warnings.warn(
                f"x: {share:.0%} of the inputs are outside of {low:g} to {high:g}, the domain of {type(self).__name__} "
                f"(outside={self.outside!r}); scale them, or take a wider domain or outside='squashed'. This is said "
                f"once.",
                stacklevel=2,
            )

    @torch.no_grad()
    def fit(self, function: Callable[[Tensor], Tensor] | tuple[Tensor, Tensor]) -> BasisFit:
        """Fit coefficients, by least squares in float64.

        Args:
            function: [k] -> [k], fitted on the domain (on [-3, 3] if inputs are squashed); or samples, inputs [k] and
                outputs [k].

        Returns:
            The coefficients and the largest error on the points.

        Raises:
            ValueError: fewer samples than coefficients, or inputs and outputs that do not match.
        """
        if isinstance(function, tuple):
            x, y = (each.detach().double().flatten() for each in function)
        else:
            low, high = (-3.0, 3.0) if self.outside == "squashed" else self.domain
            x = torch.linspace(low, high, POINTS, dtype=torch.float64)
            y = function(x).double()
        if len(x) != len(y) or len(x.unique()) < self.size:
            raise ValueError(
                f"function: {len(x)} inputs ({len(x.unique())} different) and {len(y)} outputs were given for "
                f"{self.size} coefficients; give as many outputs as inputs, and at least {self.size} different inputs."
            )
        matrix = self(x.unsqueeze(-1)).squeeze(-2).double()  # [k, size]
        coefficients = torch.linalg.lstsq(matrix, y.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        errors = (matrix @ coefficients - y).abs()
        worst = int(errors.argmax())
        return BasisFit(coefficients, float(errors[worst]), float(x[worst]))

    def settings(self) -> dict[str, Any]:
        """Its arguments as JSON takes them, without its name."""
        return {"domain": list(self.domain), "outside": self.outside}

    def extra_repr(self) -> str:
        return f"size={self.size}, domain={self.domain}, outside={self.outside!r}"
