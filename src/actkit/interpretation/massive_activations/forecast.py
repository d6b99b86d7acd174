"""Forecast the law's five parameters of a planned model from its shape alone.

    features of layer l of L: l/L, (l/L)^2, (l/L)^3, sqrt(l/L), heads/d, d_ff/d, d/L, heads/L, ln d, l L
    targets: log1p of A, lambda, gamma, t0; Yeo-Johnson of K; each standardised

From "Hidden Dynamics of Massive Activations in Transformer Training" (2025, arXiv:2508.03616), which fits 188 layers of
nine Pythia models: K well (R2 0.82 to 0.85 for trees), the others badly.
When to use it: with laws fitted to many trained models of several shapes; ten layers of one model foretell nothing.
Cost: seconds.
Settled here: `score` holds out whole models. The paper's random split of layers leaks, as layers of one model share all
of its features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from actkit.core.ground.errors import DataError
from actkit.interpretation.massive_activations.law import Array

TARGETS = ("A", "lambda", "gamma", "t0", "K")
Learner = Literal["forest", "ridge", "lasso", "boosting"]


@dataclass(frozen=True)
class Shape:
    """What is known of a transformer before it is trained.

    Attributes:
        layers: blocks.
        hidden: width of the residual stream.
        heads: of attention.
        intermediate: width of the MLPs.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """The shape that a transformers config describes.

        Args:
            config: with num_hidden_layers, hidden_size, num_attention_heads and intermediate_size.

        Raises:
            DataError: it lacks one of them.
        """
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        missing = [name for name in names if not isinstance(getattr(config, name, None), int)]
        if missing:
            raise DataError(f"config: it has no {missing[0]}; give Shape(layers, hidden, heads, intermediate).")
        return cls(*(getattr(config, name) for name in names))

    def features(self, layer: int) -> list[float]:
        """What a layer is described by.

        Args:
            layer: its number, from 0.
        """
        depth = (layer + 1) / self.layers
        return [
            depth,
            depth**2,
            depth**3,
            math.sqrt(depth),
            self.heads / self.hidden,
            self.intermediate / self.hidden,
            self.hidden / self.layers,
            self.heads / self.layers,
            math.log(self.hidden),
            (layer + 1) * self.layers,
        ]


class Forecast:
    """A predictor of the law's parameters.

    Args:
        learner: 'forest', 'ridge', 'lasso' or 'boosting', of scikit-learn.
        seed: of the learner.

    Raises:
        ImportError: scikit-learn (the extra `interpretation`) is missing.
        ValueError: another learner was given.
    """

    def __init__(self, learner: Learner = "forest", seed: int = 0) -> None:
        self.learner, self.seed = learner, seed
        self._fitted: dict[str, Any] = {}
        _learner(learner, seed, "K")

    def fit(self, rows: Sequence[tuple[Shape, int]], parameters: Sequence[Mapping[str, float]]) -> Self:
        """Learn from fitted laws.

        Args:
            rows: (shape of the model, number of the layer).
            parameters: of the law there: A, lambda, gamma, t0, K.

        Returns:
            Itself.

        Raises:
            DataError: fewer than 10 rows, or not as many rows as laws.
        """
        described, values = _arrays(rows, parameters)
        for index, name in enumerate(TARGETS):
            self._fitted[name] = _learner(self.learner, self.seed, name).fit(described, values[:, index])
        return self

    def predict(self, rows: Sequence[tuple[Shape, int]]) -> list[dict[str, float]]:
        """The parameters of layers.

        Args:
            rows: as in `fit`.

        Raises:
            DataError: it was not fitted.
        """
        if not self._fitted:
            raise DataError("forecast: it was not fitted; call fit(rows, parameters) first.")
        described = np.array([shape.features(layer) for shape, layer in rows])
        found = {name: self._fitted[name].predict(described) for name in TARGETS}
        return [{name: float(found[name][index]) for name in TARGETS} for index in range(len(rows))]

    def score(
        self, rows: Sequence[tuple[Shape, int]], parameters: Sequence[Mapping[str, float]], folds: int = 5
    ) -> dict[str, float]:
        """R2 of each parameter, over models that were held out in turns.

        Args:
            rows: as in `fit`; layers of equal shapes are held out together.
            parameters: as in `fit`.
            folds: groups of models.

        Raises:
            DataError: as `fit`, or fewer shapes than folds.
        """
        from sklearn.metrics import r2_score
        from sklearn.model_selection import GroupKFold, cross_val_predict

        described, values = _arrays(rows, parameters)
        shapes = list(dict.fromkeys(shape for shape, _ in rows))
        if len(shapes) < folds:
            raise DataError(
                f"folds: {folds} were given for {len(shapes)} shapes; give at most as many, and at least 2."
            )
        groups = [shapes.index(shape) for shape, _ in rows]
        scores = {}
        for index, name in enumerate(TARGETS):
            learner = _learner(self.learner, self.seed, name)
            guessed = cross_val_predict(learner, described, values[:, index], groups=groups, cv=GroupKFold(folds))
            scores[name] = float(r2_score(values[:, index], guessed))
        return scores


def _arrays(rows: Sequence[tuple[Shape, int]], parameters: Sequence[Mapping[str, float]]) -> tuple[Array, Array]:
    if len(rows) != len(parameters) or len(rows) < 10:
        raise DataError(
            f"forecast: {len(rows)} rows and {len(parameters)} laws were given; give one law per row, 10 or more."
        )
    described = np.array([shape.features(layer) for shape, layer in rows])
    return described, np.array([[each[name] for name in TARGETS] for each in parameters], dtype=float)


def _learner(kind: str, seed: int, target: str) -> Any:
    """A learner with the transformation of its target."""
    try:
        from sklearn.compose import TransformedTargetRegressor
        from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
        from sklearn.linear_model import Lasso, Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer, PowerTransformer, StandardScaler
    except ImportError as error:
        raise ImportError("forecast: scikit-learn is missing; pip install 'actkit[interpretation]'.") from error
    made = {
        "forest": lambda: RandomForestRegressor(200, random_state=seed),
        "ridge": lambda: make_pipeline(StandardScaler(), Ridge()),
        "lasso": lambda: make_pipeline(StandardScaler(), Lasso(0.01)),
        "boosting": lambda: GradientBoostingRegressor(random_state=seed),
    }
    if kind not in made:
        raise ValueError(f"learner: {kind!r} was given; give {', '.join(made)}.")
    if target == "K":
        scaled = PowerTransformer("yeo-johnson")
    else:
        scaled = make_pipeline(FunctionTransformer(np.log1p, np.expm1, check_inverse=False), StandardScaler())
    return TransformedTargetRegressor(made[kind](), transformer=scaled)
