"""Finite posets: up-sets, series and parallel composition, order polytopes (2024, arXiv:2412.06097).

    up-set F:   i in F and i <= j  ->  j in F
    order polytope:   O(P) = {t in [0, 1]^n : t_i <= t_j if i <= j},   vertices = indicators of up-sets

The 16 posets on four points are numbered as in the paper's repository, whose order is by run time in its table and
means nothing mathematical; a, b, c, d are the points of a 2 x 2 window, row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations, permutations
from typing import Any

import numpy as np

MOST = 20  # points whose up-sets are listed: there may be 2^n
LETTERS = "abcdefghijklmnopqrst"
FOUR = (  # what is below what, by the numbers of the repository
    *("a<d b<d c<d", "", "a<b", "a<c b<c c<d", "a<c b<c", "a<b a<c", "a<b c<d", "a<b b<c b<d"),
    *("a<b b<c", "a<b a<c a<d", "a<b a<c c<d", "a<c a<d b<c b<d", "a<b c<b c<d", "a<b b<c c<d"),
    *("a<b a<c b<d c<d", "a<c b<d c<d"),
)
NAMES = {"antichain": 1, "N": 12, "chain": 13, "diamond": 14}  # of posets on four points

Tree = int | tuple[str, "Tree", "Tree"]  # a point, ("union", P, Q) or ("sum", below, above)


@dataclass(frozen=True)
class OrderPolytope:
    """The order polytope of a poset, both ways.

    Attributes:
        vertices: int8 [up-sets, n], an indicator each.
        matrix: int8 [facets, n].
        bounds: int8 [facets]; t is inside if matrix t <= bounds.
    """

    vertices: np.ndarray[Any, Any]
    matrix: np.ndarray[Any, Any]
    bounds: np.ndarray[Any, Any]

    def contains(self, point: Sequence[float], tolerance: float = 1e-9) -> bool:
        """Say whether a point [n] is inside."""
        return bool((self.matrix @ np.asarray(point, dtype=float) <= self.bounds + tolerance).all())


@dataclass(frozen=True)
class Poset:
    """A partial order of the points 0 to n - 1; relations are closed by transitivity.

    Attributes:
        n: how many points.
        relations: pairs (i, j) with i < j in the order.

    Raises:
        ValueError: a relation names a point that is not there, or the relations go around in a circle.
    """

    n: int
    relations: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n: {self.n} was given; give 1 or more points.")
        pairs = {(int(low), int(high)) for low, high in self.relations}
        for low, high in pairs:
            if not (0 <= low < self.n and 0 <= high < self.n):
                raise ValueError(f"relations: ({low}, {high}) was given; the points are 0 to {self.n - 1}.")
        above: list[set[int]] = [{high for low, high in pairs if low == point} for point in range(self.n)]
        for middle in range(self.n):
            for point in range(self.n):
                if middle in above[point]:
                    above[point] |= above[middle]
        circle = next((point for point in range(self.n) if point in above[point]), None)
        if circle is not None:
            raise ValueError(f"relations: they go around in a circle, {_circle(pairs, circle)}; take one of them out.")
        object.__setattr__(self, "relations", frozenset((low, high) for low in range(self.n) for high in above[low]))

    @classmethod
    def of(cls, given: Poset | int | str | Sequence[Sequence[int]], n: int = 4) -> Poset:
        """Read a poset: a number or a name of the 16 on four points, letters such as 'a<b c<d', or pairs.

        Args:
            given: see above; a poset is returned as it is.
            n: how many points letters or pairs are about.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(given, Poset):
            return given
        if isinstance(given, str) and given in NAMES:
            given = NAMES[given]
        if isinstance(given, int):
            if not 0 <= given < len(FOUR):
                raise ValueError(f"poset: {given} was given; the posets on four points are 0 to {len(FOUR) - 1}.")
            return cls.of(FOUR[given])
        if isinstance(given, str):
            parts = [each.split("<") for each in given.split()]
            if any(len(part) < 2 or any(p not in LETTERS or len(p) != 1 for p in part) for part in parts):
                names = ", ".join(NAMES)
                raise ValueError(f"poset: {given!r} was given; give {names}, 0 to {len(FOUR) - 1}, or 'a<b c<d'.")
            pairs = [(part[k], part[k + 1]) for part in parts for k in range(len(part) - 1)]
            return cls(n, frozenset((LETTERS.index(low), LETTERS.index(high)) for low, high in pairs))
        return cls(n, frozenset((int(low), int(high)) for low, high in given))

    @staticmethod
    def all(n: int) -> tuple[Poset, ...]:
        """Return one poset of each isomorphism class; those on four points as the repository numbers them.

        Args:
            n: 1 to 5 points (1, 2, 5, 16 and 63 classes).

        Raises:
            ValueError: there are more points.
        """
        if not 1 <= n <= 5:
            raise ValueError(f"n: {n} was given; classes are listed for 1 to 5 points.")
        return tuple(Poset.of(number) for number in range(len(FOUR))) if n == 4 else _classes(n)

    # -- composing -----------------------------------------------------------------------------------------------------

    def union(self, other: Poset) -> Poset:
        """Both side by side, the other's points behind: the polytope is the product of the two."""
        moved = {(low + self.n, high + self.n) for low, high in other.relations}
        return Poset(self.n + other.n, self.relations | moved)

    def ordinal_sum(self, other: Poset) -> Poset:
        """Both, every point of this one below every point of the other."""
        between = {(low, high + self.n) for low in range(self.n) for high in range(other.n)}
        return Poset(self.n + other.n, self.union(other).relations | between)

    def relabelled(self, order: Sequence[int]) -> Poset:
        """The same with point i called order[i].

        Args:
            order: a permutation of the points.

        Raises:
            ValueError: it is none.
        """
        if sorted(order) != list(range(self.n)):
            raise ValueError(f"perm: {list(order)} was given; give each of 0 to {self.n - 1} once.")
        return Poset(self.n, frozenset((order[low], order[high]) for low, high in self.relations))

    # -- what it is ----------------------------------------------------------------------------------------------------

    def cover(self) -> tuple[tuple[int, int], ...]:
        """The relations that no others imply, in order."""
        between = {(a, c) for a, b in self.relations for b2, c in self.relations if b == b2}
        return tuple(sorted(self.relations - between))

    def upsets(self) -> tuple[tuple[int, ...], ...]:
        """All up-sets by size, the empty one first; within a size in the order of their points.

        Raises:
            ValueError: there are more than 20 points.
        """
        if self.n > MOST:
            raise ValueError(
                f"n: {self.n} points may have 2^{self.n} up-sets, which are listed for {MOST} at most; a "
                f"series-parallel poset is evaluated without them."
            )
        return self._listed

    @cached_property
    def _listed(self) -> tuple[tuple[int, ...], ...]:
        return tuple(sorted(_upsets(self), key=lambda each: (len(each), each)))

    @cached_property
    def tree(self) -> Tree | None:
        """How it is made of points by union and ordinal sum; None if it is not series-parallel."""
        return _tree(self.relations, tuple(range(self.n)))

    def is_series_parallel(self) -> bool:
        """Say whether it is made of points by union and ordinal sum; of four points all are but N."""
        return self.tree is not None

    def isomorphic(self, other: Poset) -> bool:
        """Say whether renaming points makes one the other.

        Args:
            other: to compare with.
        """
        if self.n != other.n or sorted(self._degrees()) != sorted(other._degrees()):
            return False
        mine, theirs = self._degrees(), other._degrees()

        def extend(chosen: tuple[int, ...]) -> bool:
            point = len(chosen)
            if point == self.n:
                return True
            for image in range(self.n):
                if image in chosen or mine[point] != theirs[image]:
                    continue
                fits = all(
                    ((point, known) in self.relations) == ((image, chosen[known]) in other.relations)
                    and ((known, point) in self.relations) == ((chosen[known], image) in other.relations)
                    for known in range(point)
                )
                if fits and extend((*chosen, image)):
                    return True
            return False

        return extend(())

    def _degrees(self) -> list[tuple[int, int]]:
        return [
            (sum(low == point for low, _ in self.relations), sum(high == point for _, high in self.relations))
            for point in range(self.n)
        ]

    def chain_antichain_counts(self) -> dict[str, tuple[int, ...]]:
        """How many chains and antichains of 0, 1, 2 ... points there are; there are as many antichains as up-sets."""
        comparable = self.relations | {(high, low) for low, high in self.relations}
        chains, antichains = [0] * (self.n + 1), [0] * (self.n + 1)
        for size in range(self.n + 1):
            for points in combinations(range(self.n), size):
                related = [pair in comparable for pair in combinations(points, 2)]
                chains[size] += all(related)
                antichains[size] += not any(related)
        return {"chains": _trimmed(chains), "antichains": _trimmed(antichains)}

    def order_polytope(self) -> OrderPolytope:
        """The order polytope: its vertices, and its facets."""
        rows = []
        lows, highs = {low for low, _ in self.relations}, {high for _, high in self.relations}
        for point in range(self.n):
            if point not in highs:
                rows.append(({point: -1}, 0))  # 0 <= t of what nothing is below
            if point not in lows:
                rows.append(({point: 1}, 1))
        rows += [({low: 1, high: -1}, 0) for low, high in self.cover()]
        matrix = np.zeros((len(rows), self.n), dtype=np.int8)
        for row, (entries, _) in enumerate(rows):
            for point, value in entries.items():
                matrix[row, point] = value
        return OrderPolytope(self.indicators(), matrix, np.array([bound for _, bound in rows], dtype=np.int8))

    def indicators(self) -> np.ndarray[Any, Any]:
        """int8 [up-sets, n], a row per up-set in the order of `upsets`."""
        found = np.zeros((len(upsets := self.upsets()), self.n), dtype=np.int8)
        for row, points in enumerate(upsets):
            found[row, list(points)] = 1
        return found

    def spec(self) -> list[list[int]]:
        """The covers, as JSON takes them and `of` reads them."""
        return [list(pair) for pair in self.cover()]

    def __str__(self) -> str:
        named = LETTERS if self.n <= len(LETTERS) else [f"x{point}" for point in range(self.n)]
        said = " ".join(f"{named[low]}<{named[high]}" for low, high in self.cover())
        return said or f"antichain of {self.n}"


def _circle(pairs: Iterable[tuple[int, int]], point: int) -> str:
    """A way from a point back to itself, such as '0 < 1 < 0'."""
    ways: list[tuple[int, ...]] = [(point,)]
    for way in ways:  # grows while it is read: breadth first
        for low, high in sorted(pairs):
            if low == way[-1] and high == point:
                return " < ".join(map(str, (*way, point)))
            if low == way[-1] and high not in way:
                ways.append((*way, high))
    return str(point)


def _upsets(poset: Poset) -> Iterator[tuple[int, ...]]:
    above = [sum(1 << high for low, high in poset.relations if low == point) for point in range(poset.n)]
    for mask in range(1 << poset.n):
        if all(above[point] & ~mask == 0 for point in range(poset.n) if mask >> point & 1):
            yield tuple(point for point in range(poset.n) if mask >> point & 1)


def _tree(relations: frozenset[tuple[int, int]], points: tuple[int, ...]) -> Tree | None:
    """Split points where nothing is related, or where everything is."""
    if len(points) == 1:
        return points[0]
    for kind in ("union", "sum"):
        parts = _components(relations, points, related=kind == "union")
        if len(parts) == 1:
            continue
        if kind == "sum":  # what is below comes first
            parts.sort(key=lambda part: sum((low, part[0]) in relations for low in points))
        found: Tree | None = None
        for part in parts:
            inside = _tree(relations, part)
            if inside is None:
                return None
            found = inside if found is None else (kind, found, inside)
        return found
    return None


def _components(
    relations: frozenset[tuple[int, int]], points: tuple[int, ...], *, related: bool
) -> list[tuple[int, ...]]:
    """The parts that hang together by being related, or by not being."""
    left, parts = set(points), []
    while left:
        part, waiting = set(), [min(left)]
        while waiting:
            point = waiting.pop()
            part.add(point)
            near = {q for q in left if (((point, q) in relations) or ((q, point) in relations)) == related}
            waiting += sorted(near - part - set(waiting) - {point})
        left -= part
        parts.append(tuple(sorted(part)))
    return parts


@cache
def _classes(n: int) -> tuple[Poset, ...]:
    """One poset per class: every class has one whose relations go from smaller to larger numbers."""
    pairs = list(combinations(range(n), 2))
    found: dict[tuple[tuple[int, int], ...], Poset] = {}
    for mask in range(1 << len(pairs)):
        chosen = {pair for bit, pair in enumerate(pairs) if mask >> bit & 1}
        if all((a, d) in chosen for a, b in chosen for c, d in chosen if b == c):
            least = min(
                tuple(sorted((order[low], order[high]) for low, high in chosen)) for order in permutations(range(n))
            )
            found.setdefault(least, Poset(n, frozenset(chosen)))
    return tuple(found[key] for key in sorted(found, key=lambda key: (len(key), key)))


def _trimmed(counts: list[int]) -> tuple[int, ...]:
    while len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    return tuple(counts)
