"""Fixed bases that have a kernel: their kinds, and what a kernel must know of one.

A kernel evaluates all functions of a basis in one pass:

splines, bells, tanh bells, bumps:  f_m(x) = f(u),  u = (x - first) per_unit - m step
polynomials:  f_n = (scale_n x + shift_n) f_(n-1) - before_n f_(n-2)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actkit.kernels.operators import has_numba, plain

SPLINES, BELLS, TANH_BELLS, BUMPS, POLYNOMIALS = range(5)
VANISH, CLAMPED, SQUASHED = range(3)


@dataclass(frozen=True, eq=False)
class KernelBasis:
    """A basis as the kernels read it.

    Attributes:
        kind: `SPLINES` to `POLYNOMIALS`.
        outside: of the domain, `VANISH` to `SQUASHED`.
        domain: its ends, float32 [2].
        size: how many functions.
        numbers: float32; first, per_unit, step, and of splines the order; of polynomials scale, shift and before of
            each degree, three numbers for degree 0 too.
    """

    kind: int
    outside: int
    domain: np.ndarray
    size: int
    numbers: np.ndarray

    def values(self, x: Tensor) -> Tensor:
        """Compute the functions of x.

        Args:
            x: float32 [...], on the CPU.

        Returns:
            [..., size].
        """
        from actkit.kernels import numba_bases

        found = numba_bases.values(self.kind, self.outside, self.domain, self.numbers, self.size, plain(x))
        return found.view(*x.shape, self.size)

    def pulled(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Compute the gradient of x from that of the values.

        Args:
            gradient: float32 [..., size].
            x: float32 [...], on the CPU.

        Returns:
            [...].
        """
        from actkit.kernels import numba_bases

        return numba_bases.pulled(self.kind, self.outside, self.domain, self.numbers, plain(gradient), plain(x))


def serves(x: Tensor) -> bool:
    """Say whether kernels compute what is asked of x: they are for float32 on the CPU, and need Numba."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and has_numba()
