"""Dichotomies of conditions: how parallel, how general, how decodable a division into two halves is.

    parallelism = max over pairings of mean over i < j of cos(v_i, v_j),   v_i = z_(positive i) - z_(its negative)
    CCGP = accuracy of a linear classifier on conditions that it was not trained on
    decodability = its accuracy on held-out samples of conditions that it was trained on

Parallelism is exact up to four pairs; beyond that the pairing comes from the linear assignment on squared distances, as
in the reference code. Classifiers are scikit-learn's LinearSVC (the extra `interpretation`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, permutations
from math import comb
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actkit.core.ground.errors import DataError

Dichotomy = NDArray[np.bool_]  # [conditions]
Pairing = Literal["exact", "assignment"]
EXACT = 4  # pairs up to which all pairings are tried


def balanced_dichotomies(conditions: int, limit: int | None = None, seed: int = 0) -> list[Dichotomy]:
    """List the divisions of conditions into two halves; one and its opposite are one.

    Args:
        conditions: an even number.
        limit: draw at most so many.
        seed: of the drawing.

    Raises:
        DataError: the number is odd or below 2, or there are too many to list without a limit.
    """
    if conditions < 2 or conditions % 2:
        raise DataError(f"conditions: {conditions} were given; give an even number, so that two halves are equal.")
    total = comb(conditions, conditions // 2) // 2
    if limit is None and total > 100_000:
        raise DataError(f"limit: there are {total:,} balanced dichotomies of {conditions} conditions; give a limit.")
    if limit is None or limit >= total:
        rest = combinations(range(1, conditions), conditions // 2 - 1)
        return [_of((0, *chosen), conditions) for chosen in rest]
    draw = random.Random(seed)
    found: set[tuple[int, ...]] = set()
    while len(found) < limit:
        found.add((0, *sorted(draw.sample(range(1, conditions), conditions // 2 - 1))))
    return [_of(each, conditions) for each in sorted(found)]


def _of(positive: Sequence[int], conditions: int) -> Dichotomy:
    found = np.zeros(conditions, dtype=bool)
    found[list(positive)] = True
    return found


class Parallelism(NamedTuple):
    """How parallel the differences of a dichotomy are.

    Attributes:
        score: -1 to 1.
        dropped: pairs whose states coincide, which have no direction and do not count.
    """

    score: float
    dropped: int


def parallelism(z: ArrayLike, dichotomy: Dichotomy, pairing: Pairing | None = None) -> Parallelism:
    """Measure how parallel the ways from one half to the other are.

    Args:
        z: [conditions, units].
        dichotomy: balanced.
        pairing: 'exact' or 'assignment'; None for exact up to four pairs.

    Raises:
        DataError: it is not balanced, has fewer than two conditions on a side, or fewer than two pairs differ.
        ValueError: an unknown pairing.
    """
    if pairing not in (None, "exact", "assignment"):
        raise ValueError(f"pairing: {pairing!r} was given; give 'exact' or 'assignment'.")
    values = np.asarray(z, dtype=np.float64)
    positive, negative = values[dichotomy], values[~dichotomy]
    if len(positive) != len(negative) or len(positive) < 2:
        raise DataError(
            f"dichotomy: it has {len(positive)} and {len(negative)} conditions; parallelism needs two equal halves of "
            f"2 or more."
        )
    if pairing == "assignment" or (pairing is None and len(positive) > EXACT):
        from scipy.optimize import linear_sum_assignment

        squares = np.square(positive[:, None] - negative[None]).sum(-1)
        return _parallel(positive - negative[linear_sum_assignment(squares)[1]])
    tried = [_parallel(positive - negative[list(order)], check=False) for order in permutations(range(len(negative)))]
    found = [each for each in tried if np.isfinite(each.score)]
    if not found:
        return _parallel(positive - negative)  # raises
    return max(found, key=lambda each: (each.score, -each.dropped))


def _parallel(differences: NDArray[np.float64], *, check: bool = True) -> Parallelism:
    lengths = np.linalg.norm(differences, axis=1)
    kept = lengths > 1e-12 * max(1.0, float(lengths.max(initial=0.0)))
    count = int(kept.sum())
    if count < 2:
        if check:
            raise DataError("z: fewer than two pairs of conditions differ, so that nothing is parallel; choose a site.")
        return Parallelism(float("nan"), len(kept) - count)
    units = differences[kept] / lengths[kept, None]
    total = float(np.square(units.sum(0)).sum())
    return Parallelism((total - count) / (count * (count - 1)), len(kept) - count)


def ccgp(
    x: ArrayLike, condition: ArrayLike, dichotomy: Dichotomy, *, splits: int = 10, seed: int = 0, samples: int = 1000
) -> float:
    """Measure cross-condition generalisation: half of the conditions of each side train, the others test.

    Args:
        x: activity of noisy samples [samples, units].
        condition: of each sample.
        dichotomy: of the conditions, with two or more on each side.
        splits: how many are drawn; all if there are fewer.
        seed: of the drawing.
        samples: of a fit, at most.

    Returns:
        Mean accuracy; 0.5 is chance.

    Raises:
        DataError: a side has fewer than two conditions, or a condition has no sample.
        ImportError: scikit-learn is missing.
    """
    values, owner = _samples(x, condition, dichotomy)
    sides = np.flatnonzero(dichotomy), np.flatnonzero(~dichotomy)
    if min(map(len, sides)) < 2:
        raise DataError(
            f"dichotomy: it has {len(sides[0])} and {len(sides[1])} conditions; CCGP needs 2 or more on each side, so "
            f"that some are left to test."
        )
    choices = [list(combinations(side, max(1, len(side) // 2))) for side in sides]
    pairs = [(one, other) for one in range(len(choices[0])) for other in range(len(choices[1]))]
    if len(pairs) > splits:
        pairs = random.Random(seed).sample(pairs, splits)
    scores = []
    for one, other in pairs:
        trained = np.isin(owner, (*choices[0][one], *choices[1][other]))
        scores.append(_score(values, dichotomy[owner], trained, seed, samples))
    return float(np.mean(scores))


def decodability(
    x: ArrayLike, condition: ArrayLike, dichotomy: Dichotomy, *, seed: int = 0, samples: int = 1000
) -> float:
    """Measure how well a linear classifier finds the side, trained on one half of the samples and tested on the other.

    Args:
        x: activity of noisy samples [samples, units].
        condition: of each sample.
        dichotomy: of the conditions.
        seed: of the halves.
        samples: of the fit, at most.

    Returns:
        Accuracy; 0.5 is chance.

    Raises:
        DataError: a side is empty, or a condition has no sample.
        ImportError: scikit-learn is missing.
    """
    values, owner = _samples(x, condition, dichotomy)
    trained = np.zeros(len(owner), dtype=bool)
    trained[np.random.default_rng(seed).permutation(len(owner))[: len(owner) // 2]] = True
    return _score(values, dichotomy[owner], trained, seed, samples)


def shattering(
    x: ArrayLike, condition: ArrayLike, *, trained: Sequence[Dichotomy] = (), limit: int = 16, seed: int = 0
) -> float:
    """Return the mean decodability of balanced dichotomies that were not trained.

    Args:
        x: activity of noisy samples [samples, units].
        condition: of each sample, from 0.
        trained: dichotomies that do not count.
        limit: how many are drawn.
        seed: of the drawing.

    Raises:
        DataError: no dichotomy is left, or what `decodability` raises.
    """
    conditions = int(np.max(np.asarray(condition))) + 1
    known = {tuple(each) for each in trained} | {tuple(~each) for each in trained}
    drawn = balanced_dichotomies(conditions, limit + len(known), seed)
    left = [each for each in drawn if tuple(each) not in known][:limit]
    if not left:
        raise DataError(f"trained: all balanced dichotomies of {conditions} conditions were trained; none is left.")
    return float(np.mean([decodability(x, condition, each, seed=seed) for each in left]))


def _samples(x: ArrayLike, condition: ArrayLike, dichotomy: Dichotomy) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    values, owner = np.asarray(x, dtype=np.float64), np.asarray(condition, dtype=np.int64)
    if values.ndim != 2 or len(values) != len(owner):
        raise DataError(
            f"x, condition: {list(values.shape)} and {list(owner.shape)} were given; give one for each row."
        )
    empty = sorted(set(range(len(dichotomy))) - set(owner.tolist()))
    if empty or owner.min() < 0 or owner.max() >= len(dichotomy):
        raise DataError(
            f"condition: conditions {empty[:5]} have no sample, of {len(dichotomy)}; give samples of each, numbered "
            f"from 0."
        )
    return values, owner


def _score(
    values: NDArray[np.float64], side: NDArray[np.bool_], trained: NDArray[np.bool_], seed: int, samples: int
) -> float:
    try:
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ImportError("dichotomies: scikit-learn is missing; pip install 'actkit[interpretation]'.") from error
    fitted = np.flatnonzero(trained)
    if len(fitted) > samples:
        fitted = np.random.default_rng(seed).choice(fitted, samples, replace=False)
    if len(np.unique(side[fitted])) < 2:
        raise DataError("dichotomy: all samples that are fitted are of one side; give conditions on both.")
    found = LinearSVC(random_state=seed, max_iter=5000).fit(values[fitted], side[fitted])
    return float(found.score(values[~trained], side[~trained]))
