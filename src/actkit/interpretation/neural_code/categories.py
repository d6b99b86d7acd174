"""How much of the class is in a code: K-nearest neighbours, K-means and logistic regression on plain bits.

    accuracy = share of test samples whose label simple algorithms find from bits alone

They are scikit-learn's (the extra `interpretation`), fitted on the codes of some samples and scored on others, as in
the paper: 9 neighbours by Hamming distance; as many clusters as classes, matched to them by the Hungarian method;
logistic regressions one against one. Bits that are constant over the samples they are fitted on are left out.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actkit.core.ground.errors import DataError
from actkit.interpretation.neural_code.codes import Codes, varying

Matching = Literal["hungarian", "greedy"]


def code_knn(train: Codes, test: Codes, *, k: int = 9) -> float:
    """Return the accuracy of the nearest neighbours by Hamming distance.

    Args:
        train: with labels.
        test: with labels.
        k: how many neighbours vote.

    Raises:
        DataError: labels are missing, or k is above the number of training samples.
        ImportError: scikit-learn is missing.
    """
    if not 1 <= k <= len(train):
        raise DataError(f"k: {k} was given, and there are {len(train)} training samples; give 1 to {len(train)}.")
    neighbours = _part("sklearn.neighbors").KNeighborsClassifier(k, metric="hamming", algorithm="brute")
    return _scored(neighbours, train, test)


def code_logistic(train: Codes, test: Codes, *, seed: int = 9) -> float:
    """Return the accuracy of logistic regressions, one against one.

    Args:
        train: with labels of two classes or more.
        test: with labels.
        seed: of the solver.

    Raises:
        DataError: labels are missing, or of one class.
        ImportError: scikit-learn is missing.
    """
    one = _part("sklearn.linear_model").LogisticRegression(max_iter=1000, random_state=seed)
    return _scored(_part("sklearn.multiclass").OneVsOneClassifier(one), train, test)


def code_kmeans(train: Codes, test: Codes, *, matching: Matching = "hungarian", seed: int = 9) -> float:
    """Return the accuracy of clusters that stand for classes.

    Args:
        train: whose codes are clustered, with labels that say what a cluster stands for.
        test: with labels.
        matching: 'hungarian': each cluster another class; 'greedy': the majority of each, which reads higher.
        seed: of the start.

    Raises:
        DataError: labels are missing.
        ValueError: an unknown matching.
        ImportError: scikit-learn is missing.
    """
    if matching not in ("hungarian", "greedy"):
        raise ValueError(f"matching: {matching!r} was given; give 'hungarian' or 'greedy'.")
    cluster, optimize = _part("sklearn.cluster"), _part("scipy.optimize")
    (x, labels), (other, wanted) = _pair(train, test)
    classes = np.unique(labels)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", _part("sklearn.exceptions").ConvergenceWarning
        )  # fewer different codes than classes: some stay empty
        clusters = cluster.KMeans(len(classes), n_init=10, random_state=seed).fit(x)
    table = np.array([[np.sum(labels[clusters.labels_ == c] == k) for k in classes] for c in range(len(classes))])
    matched = optimize.linear_sum_assignment(-table)[1] if matching == "hungarian" else table.argmax(1)
    return float(np.mean(classes[matched[clusters.predict(other)]] == wanted))


def _part(name: str) -> Any:
    """A module of scikit-learn, or of scipy, which comes with it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError("neural_code: scikit-learn is missing; pip install 'actkit[interpretation]'.") from error


def _scored(classifier: Any, train: Codes, test: Codes) -> float:
    (x, labels), (other, wanted) = _pair(train, test)
    return float(np.mean(classifier.fit(x, labels).predict(other) == wanted))


def _pair(train: Codes, test: Codes) -> tuple[tuple[NDArray[Any], NDArray[np.int64]], ...]:
    """Bits as float32 without the constant ones, with their labels."""
    kept = varying(train)
    if not kept.any():
        kept[:] = True  # nothing varies: a guess is a guess
    found = []
    for name, codes in (("train", train), ("test", test)):
        if codes.labels is None:
            raise DataError(f"{name}: its codes have no labels; give batches with labels, one for each sample.")
        found.append((codes.bits()[:, kept].astype(np.float32), codes.labels))
    if len(np.unique(found[0][1])) < 2:
        raise DataError("train: all labels are of one class; give samples of two or more.")
    return tuple(found)
