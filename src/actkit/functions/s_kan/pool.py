"""The bases that an S-KAN chooses from, as in its authors' layers (2024, arXiv:2408.08338; SeriYann/KANConv2d).

As in the release: grids, orders, widths, what stands beside a basis, and how coefficients begin.
Settled here: Chebyshev polynomials by recurrence, as arccos has no finite slope at the ends; no norm over a layer's
outputs (jacobi, gram and wavelet have one there), as no node could be taken out of it; `gram` is Legendre's, as the
release's formula has another precedence of operators than it means.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from actkit.core.univariate.bases import Bells, BSplines, Polynomials
from actkit.core.univariate.edge_functions import Wavelets
from actkit.core.univariate.kan_linear import KanLinear
from actkit.core.univariate.shifted_pairs import ShiftedPairs

Branch = KanLinear | Wavelets


def _bspline(d: int, o: int) -> Branch:
    layer = KanLinear(d, o, BSplines(5, 3), base="silu", bias=False)
    nn.init.normal_(layer.coefficients.weight, std=0.1 / math.sqrt(d))
    return layer


def _rbf(d: int, o: int) -> Branch:
    layer = KanLinear(d, o, Bells(8, (-2.0, 2.0)), bias=False)
    nn.init.normal_(layer.coefficients.weight, std=0.1)
    return layer


def _fastkan(d: int, o: int) -> Branch:
    layer = KanLinear(d, o, Bells(8, (-2.0, 2.0)), base="silu", bias=False, norm=True)
    nn.init.trunc_normal_(layer.coefficients.weight, std=0.1)
    return layer


def _fasterkan(d: int, o: int) -> Branch:
    layer = KanLinear(d, o, Bells(8, (-1.2, 0.2), 2.0, "tanh"), bias=False, norm=True)
    nn.init.xavier_uniform_(layer.coefficients.weight)
    return layer


def _cheby(d: int, o: int) -> Branch:
    layer = KanLinear(d, o, Polynomials(4), bias=False)
    nn.init.normal_(layer.coefficients.weight, std=1 / (5 * d))
    return layer


def _jacobi(d: int, o: int) -> Branch:
    layer = KanLinear(d, o, Polynomials(4, (1.0, 1.0), "squashed"), base="silu", bias=False)
    nn.init.normal_(layer.coefficients.weight, std=1 / (5 * d))
    return layer


def _gram(d: int, o: int) -> Branch:
    layer = KanLinear(d, o, Polynomials(3, (0.0, 0.0), "squashed"), base="silu", bias=False)
    nn.init.normal_(layer.coefficients.weight, std=1 / (4 * d))
    return layer


def _wavelet(d: int, o: int) -> Branch:
    return Wavelets(d, o, base="silu")


def _relukan(d: int, o: int) -> Branch:
    return KanLinear(d, o, ShiftedPairs(5, 3, "relu", channels=d, scale=(4 * 5**2 / 4**2) ** 2))


POOL: dict[str, Callable[[int, int], Branch]] = {
    "bspline": _bspline,
    "rbf": _rbf,
    "fastkan": _fastkan,
    "fasterkan": _fasterkan,
    "cheby": _cheby,
    "jacobi": _jacobi,
    "gram": _gram,
    "wavelet": _wavelet,
    "relukan": _relukan,
}


def check_pool(pool: tuple[str, ...]) -> None:
    """Raise ValueError for a pool that is empty, names a basis twice or one that is unknown.

    Args:
        pool: names of `POOL`.
    """
    if not pool or len(set(pool)) < len(pool) or not set(pool) <= set(POOL):
        raise ValueError(f"pool: {list(pool)} was given; name one basis at least, each once, of {', '.join(POOL)}.")
