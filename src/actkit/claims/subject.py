"""The subjects of experiments: models of the zoo with the text that they are calibrated and measured on.

Calibration and measurement never share a document: they read different splits of the embedded text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from statistics import mean
from typing import Any

import torch
from torch import nn

from actkit import zoo
from actkit.core.edit.edits import Edit, Replace, temporarily
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.forward.hooks import evaluating
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.recipe.seen import Seen
from actkit.core.recipe.transform import Transform
from actkit.core.watch.capture import record
from actkit.data import Batches, Split, load_data
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.r_sparse.r_sparse import RSparse, cached
from actkit.sparsity.teal import Teal

LENGTH = 256  # tokens per row, in calibration and measurement
BATCH = 16


REAL = ("smollm2", "gemma3")  # real models from packages of their own, on which claims are tested again


THRESHOLDS = (Teal, Cats, RSparse)  # what they need of the text is the same at every setting


class Subject:
    """A model, calibration text by seed, held-out text. Rows have 256 tokens; those of an encoder are sentences.

    Args:
        name: of the tokenizer, and of the model if none is given (in float32, a real one in bf16, as it is stored).
        calibration: rows of `split`.
        split: where the calibration text is from.
        held_out: rows of the test split.
        model: another model than the one of that name.
    """

    def __init__(
        self, name: str, *, calibration: int, split: Split, held_out: int, model: nn.Module | None = None
    ) -> None:
        if model is None:
            model = zoo.load(name, dtype=torch.bfloat16) if name in REAL else zoo.load(name)
        self.model = model
        self.name, self._tokenizer = name, zoo.tokenizer(name)
        self._rows, self._split, self._held_out = calibration, split, held_out
        self._calibrations: dict[int, Batches] = {}
        self._perplexities: dict[tuple[str, int], float] = {}
        self._seen: dict[tuple[Any, ...], dict[Site, Any]] = {}
        self.factors = cached(0.0)  # R-Sparse's, of every rank that some sparsity needs

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
        """Measure the perplexity on the held-out text, after a recipe calibrated with that seed.

        It is measured once and remembered; the recipe is undone after.

        Args:
            recipe: None for the model as it is.
            seed: of the calibration text.
        """
        if recipe is None:
            return self._remembered("original", 0, lambda: self._perplexity())
        recipe = Recipe.of(recipe)

        def measure() -> float:
            with self.changed(recipe, seed):
                return self._perplexity()

        return self._remembered(repr(recipe.dump()), seed, measure)

    @contextmanager
    def changed(self, recipe: Any, seed: int = 0) -> Iterator[None]:
        """Put the model under a recipe calibrated with that seed; undo it at the end."""
        recipe = Recipe.of(recipe)
        only = recipe.transforms[0] if len(recipe.transforms) == 1 else None
        if isinstance(only, THRESHOLDS) and getattr(only, "allocation", "uniform") == "uniform":
            with temporarily(self.model, self.edits(only, seed)):
                yield
            return
        applied = apply(self.model, recipe, self.calibration(seed), undo="memory", progress=False)
        try:
            yield
        finally:
            applied.undo()

    def edits(self, method: Transform, seed: int) -> list[Edit]:
        """Make the edits that `apply` would make, for one of THRESHOLDS.

        These calibrate on the original model, so that one recording of a seed serves all their settings, and R-Sparse's
        decompositions are kept.

        Args:
            method: the transform.
            seed: of the calibration text.

        Returns:
            The edits.
        """
        if method == type(method).identity():
            return []
        view = anatomy(self.model)
        blocks = [view.block(block.index) for block in view.blocks]
        key = (type(method), getattr(method, "norms", None), seed)
        if key not in self._seen:
            wanted = {site: each for block in blocks for site, each in method.observe(block).items()}
            batches = self.calibration(seed)
            self._seen[key] = dict(record(self.model, wanted, batches, anatomy=view, progress=False))
        seen = self._seen[key]
        if isinstance(method, RSparse):
            linears = [linear for block in blocks for linear in method.targets(block)]
            sites = [Site("layer.input", path=linear.path) for linear in linears]
            return [
                Replace(x.path, method.layer(x, method.alpha_of(x.path), seen[site], self.factors))
                for x, site in zip(linears, sites, strict=True)
            ]
        name = type(method).__name__
        found = (each for block in blocks for each in method.edit(block, Seen(name, method.tags, None, block, seen)))
        return [each for each in found if isinstance(each, Edit)]

    def edited_perplexity(self, edits: Iterable[Edit]) -> float:
        """Measure the perplexity on the held-out text under edits, which are undone after."""
        with temporarily(self.model, edits):
            return self._perplexity()

    def edited_distance(self, edits: Iterable[Edit]) -> float:
        """Measure 1 - mean cosine between the held-out sentences' embeddings under edits and before them."""
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


def moved_by(published: Subject, twin: Subject) -> float:
    """The largest difference of a twin's logits over the largest logit, on a batch of held-out text."""
    outputs = []
    for subject in (published, twin):
        with evaluating(subject.model):
            outputs.append(first_tensor(forward(subject.model, published.held_out[0])))
    return float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max())


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Format values as '31.20 (31.10 to 31.30)': the mean, and the range if there are several values."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
