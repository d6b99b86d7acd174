"""The tropical polynomial of a poset: evaluated, written out, and composed (2024, arXiv:2412.06097).

    f_P(x) = max over up-sets F of sum_(i in F) x_i        the empty one gives the constant t, by default 0
    union:        f(x, y) = f_P(x) + f_Q(y)                 (of Minkowski sums)
    P below Q:    f(x, y) = max( f_Q(y), sum(y) + f_P(x) )

f_P is the support function of the order polytope, which is its Newton polytope. A composition is the support function
of the convex hull of Minkowski sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actkit.functions.posets.poset import LETTERS, Poset, Tree

ENUMERATED = 512  # up-sets that are compared at once; more, and a series-parallel poset is evaluated by its two rules
HELD = 1 << 24  # sums that are held at a time


def poset_eval(x: Tensor, poset: Poset, t: float = 0.0) -> Tensor:
    """Evaluate f_P on the last dimension; of equal sums the gradient goes to one up-set alone.

    Args:
        x: [..., n].
        poset: on n points.
        t: what the empty up-set gives; -inf leaves it out.

    Returns:
        [...].

    Raises:
        ValueError: x has another last dimension, or there are more than 20 points and the poset is not series-parallel.
        TypeError: x holds integers.
    """
    _check(x, poset)
    if poset.n > 9 and poset.tree is not None:
        rest = _by_rules(x, poset.tree)[0]
        return rest if t == -inf else _larger(torch.full_like(rest, t), rest)
    return best_sum(x, _rows(poset, x), t)


def best_sum(x: Tensor, rows: Tensor, t: float = 0.0) -> Tensor:
    """Return the largest sum of an up-set.

    Args:
        x: [..., n].
        rows: an indicator per up-set, the empty one first: [up-sets, n], of the dtype of x.
        t: as in `poset_eval`.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] * len(rows) <= HELD:
        return _scores(flat, rows, t).max(-1).values.view(x.shape[:-1])
    return torch.cat([_scores(part, rows, t).max(-1).values for part in _parts(x, len(rows))]).view(x.shape[:-1])


def poset_argmax(x: Tensor, poset: Poset, t: float = 0.0) -> Tensor:
    """Return the up-set that f_P chooses, as an indicator: the gradient of f_P, and a code of the linear region.

    Args:
        x: [..., n].
        poset: on n points.
        t: as in `poset_eval`.

    Returns:
        int8 [..., n]; of equal sums the smallest up-set, as `Poset.upsets` lists them.

    Raises:
        ValueError: as in `poset_eval`; and for more than 20 points.
        TypeError: x holds integers.
    """
    _check(x, poset)
    rows = _rows(poset, x)
    chosen = torch.cat([_scores(part, rows, t).max(-1).indices for part in _parts(x, len(rows))])
    return rows.to(torch.int8)[chosen].view(x.shape)


def _check(x: Tensor, poset: Poset) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: a tensor of {x.dtype} was given; give floating point numbers.")
    if x.shape[-1:] != (poset.n,):
        raise ValueError(f"x: the last dimension of {list(x.shape)} was given for a poset on {poset.n} points.")


def _rows(poset: Poset, x: Tensor) -> Tensor:
    return torch.from_numpy(poset.indicators()).to(x.device, x.dtype)


def _parts(x: Tensor, upsets: int) -> Sequence[Tensor]:
    return x.reshape(-1, x.shape[-1]).split(max(1, HELD // upsets))


def _scores(x: Tensor, rows: Tensor, t: float) -> Tensor:
    """The sum of every up-set, the empty one (which is the first) as t: [blocks, up-sets]."""
    found = x @ rows.T
    return found if t == 0 else torch.cat((torch.full_like(found[:, :1], t), found[:, 1:]), 1)


def _by_rules(x: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """The largest sum of an up-set that is not empty, and the sum of all points."""
    if isinstance(tree, int):
        return x[..., tree], x[..., tree]
    kind, first, second = tree
    (low, all_low), (high, all_high) = _by_rules(x, first), _by_rules(x, second)
    zero = torch.zeros_like(low)
    if kind == "union":
        return _larger(_larger(low, high), low + high), all_low + all_high
    return _larger(high, all_high + _larger(zero, low)), all_low + all_high


def _larger(a: Tensor, b: Tensor) -> Tensor:
    """The maximum, whose gradient goes to one of the two; `torch.maximum` would share it between equals."""
    return torch.where(a >= b, a, b)


# -- written out -------------------------------------------------------------------------------------------------------


def tropical(poset: Poset) -> str:
    """Write the polynomial: 'max(0, b, a + b)'.

    Args:
        poset: on at most 20 points.
    """
    terms = (" + ".join(LETTERS[point] for point in points) or "0" for points in poset.upsets())
    return f"max({', '.join(terms)})"


def newton_polytope(outer: Poset, inner: Sequence[Poset]) -> np.ndarray[Any, Any]:
    """Return the vertices of the Newton polytope of f_outer(f_1(x), ..., f_m(x)): two layers of units on the same x.

    Args:
        outer: on m points.
        inner: m posets on the same n points.

    Returns:
        int64 [vertices, n], sorted.

    Raises:
        ValueError: there are not m inner posets, or they have different numbers of points.
    """
    if len(inner) != outer.n or len({poset.n for poset in inner}) != 1:
        sizes = [poset.n for poset in inner]
        raise ValueError(f"inner: posets on {sizes} points were given; give {outer.n}, all on the same number.")
    points: set[tuple[int, ...]] = set()
    for upset in outer.upsets():
        sums = {(0,) * inner[0].n}
        for index in upset:
            corners = inner[index].indicators().tolist()
            sums = {tuple(a + b for a, b in zip(total, corner, strict=True)) for total in sums for corner in corners}
        points |= sums
    found = sorted(points)
    return np.array([point for point in found if _is_corner(point, found)], dtype=np.int64)


def _is_corner(point: tuple[int, ...], points: Sequence[tuple[int, ...]]) -> bool:
    """Whether a point is no mixture of the others."""
    from scipy.optimize import linprog

    others = np.array([other for other in points if other != point], dtype=float)
    if not len(others):
        return True
    equal = np.vstack((others.T, np.ones(len(others))))
    return linprog(np.zeros(len(others)), A_eq=equal, b_eq=[*point, 1.0], method="highs").status == 2  # infeasible
