"""The subjects of experiments: models of the zoo with the text that they are calibrated and measured on.

Calibration and measurement never share a document: they read different splits of the embedded text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cached_property
from statistics import mean
from typing import Any

from torch import nn

from actkit import zoo
from actkit.core.edit.edits import Edit, temporarily
from actkit.core.measure.quality import measure_quality
from actkit.core.recipe.runner import apply
from actkit.core.recipe.transform import Recipe
from actkit.data import Batches, Split, load_data

LENGTH = 256  # tokens per row, in calibration and measurement
BATCH = 16


class Subject:
    """A float32 model, calibration text by seed, held-out text.

    name: of the tokenizer, and of the model where none is given. calibration: rows, of `split`. held_out: rows of the
    test split. Rows have 256 tokens; those of an encoder are sentences.
    """

    def __init__(
        self, name: str, *, calibration: int, split: Split, held_out: int, model: nn.Module | None = None
    ) -> None:
        self.model = zoo.load(name) if model is None else model
        self._tokenizer = zoo.tokenizer(name)
        self._rows, self._split, self._held_out = calibration, split, held_out
        self._calibrations: dict[int, Batches] = {}
        self._perplexities: dict[tuple[str, int], float] = {}

    def calibration(self, seed: int) -> Batches:
        """The calibration text of a seed: other documents for another seed."""
        if seed not in self._calibrations:
            self._calibrations[seed] = self._text(self._rows, seed, self._split)
        return self._calibrations[seed]

    @cached_property
    def held_out(self) -> Batches:
        """The text that qualities are measured on."""
        return self._text(self._held_out, 0, "test")

    def _text(self, rows: int, seed: int, split: Split) -> Batches:
        return load_data(
            None, self.model, self._tokenizer, sequences=rows, length=LENGTH, batch_size=BATCH, seed=seed, split=split
        )

    def perplexity(self, recipe: Any = None, seed: int = 0) -> float:
        """Of the model on the held-out text, after a recipe calibrated with that seed; measured once, undone after."""
        if recipe is None:
            return self._remembered("original", 0, lambda: self._perplexity())
        recipe = Recipe.of(recipe)

        def changed() -> float:
            applied = apply(self.model, recipe, self.calibration(seed), undo="memory", progress=False)
            try:
                return self._perplexity()
            finally:
                applied.undo()

        return self._remembered(repr(recipe.dump()), seed, changed)

    def edited_perplexity(self, edits: Iterable[Edit]) -> float:
        """Of the model on the held-out text under edits, which are undone after."""
        with temporarily(self.model, edits):
            return self._perplexity()

    def edited_distance(self, edits: Iterable[Edit]) -> float:
        """1 - mean cosine between the held-out sentences' embeddings under edits and before them."""
        original = copy.deepcopy(self.model)
        with temporarily(self.model, edits):
            quality = measure_quality(
                self.model, self.held_out, reference=original, task="embedding", resamples=1, progress=False
            )
        return 1 - quality.metrics["fidelity"].value

    def _perplexity(self) -> float:
        quality = measure_quality(self.model, self.held_out, task="language", resamples=1, progress=False)
        return quality.metrics["perplexity"].value

    def _remembered(self, key: str, seed: int, measure: Any) -> float:
        if (key, seed) not in self._perplexities:
            self._perplexities[key, seed] = measure()
        return self._perplexities[key, seed]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """'31.20 (31.10 to 31.30)': the mean, and the range where there are several values."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
