"""Kernels of conditions, how alike two are, and how many dimensions one has.

    K = Z_c Z_c^T, Z_c centred over conditions
    CKA(K1, K2) = <K1, K2> / (|K1| |K2|)              Frobenius
    participation ratio = (tr K)^2 / tr(K^2)

Z [conditions, units] are means of noise-free activity. Centre always: the hidden states of ReLU are positive, and their
mean alone makes any two kernels alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actkit.core.ground.errors import DataError

Matrix = NDArray[np.float64]


def kernel(z: ArrayLike, *, centre: bool = True) -> Matrix:
    """Return the linear kernel of conditions: [conditions, conditions].

    Args:
        z: [conditions, units].
        centre: over conditions first.

    Raises:
        DataError: z is no matrix of at least two conditions, or not finite.
    """
    values = np.asarray(z, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
        raise DataError(
            f"z: {list(values.shape)} was given; give finite numbers [conditions, units] of two conditions or more."
        )
    if centre:
        values = values - values.mean(0)
    return values @ values.T


def cka(one: Matrix, other: Matrix, *, debiased: bool = False) -> float:
    """Return how alike two kernels of the same conditions are.

    Args:
        one: [conditions, conditions].
        other: the same.
        debiased: by the unbiased estimate of Song et al. (2012), which does not grow as units become many beside
            conditions; of kernels that were not centred, with four conditions or more. It may be below 0.

    Returns:
        0 to 1.

    Raises:
        DataError: shapes differ, or all states of one are the same, so that it has no shape.
    """
    if one.shape != other.shape or one.ndim != 2 or one.shape[0] != one.shape[1]:
        raise DataError(
            f"kernels: {list(one.shape)} and {list(other.shape)} were given; give two of the same conditions."
        )
    product = _unbiased if debiased else _inner
    if debiased and len(one) < 4:
        raise DataError(f"kernels: they have {len(one)} conditions, and the unbiased estimate needs 4 or more.")
    sizes = product(one, one), product(other, other)
    scale = [float(np.square(each).sum()) for each in (one, other)]
    if min(sizes) <= 1e-24 * max(1.0, *scale) or min(scale) <= 1e-24:
        raise DataError("kernels: all states of one are the same, so that it is like nothing; choose another site.")
    return product(one, other) / float(np.sqrt(sizes[0]) * np.sqrt(sizes[1]))


def _inner(one: Matrix, other: Matrix) -> float:
    return float((one * other).sum())


def _unbiased(one: Matrix, other: Matrix) -> float:
    """The unbiased estimate of HSIC, up to a factor that cancels."""
    a, b = (each - np.diag(np.diag(each)) for each in (one, other))
    n = len(a)
    sums = a.sum() * b.sum() / ((n - 1) * (n - 2))
    return float((a * b).sum() + sums - 2 / (n - 2) * (a.sum(0) @ b.sum(0)))


def participation_ratio(z: ArrayLike) -> float:
    """Return over how many dimensions the conditions spread: 1 to the smaller of conditions - 1 and units.

    Args:
        z: [conditions, units].

    Raises:
        DataError: all states are the same.
    """
    found = kernel(z)
    square = float(np.square(found).sum())
    if square <= 1e-24:
        raise DataError("z: all states are the same, so that they have no dimension; choose another site.")
    return float(np.trace(found)) ** 2 / square
