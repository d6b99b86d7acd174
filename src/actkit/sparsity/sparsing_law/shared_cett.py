"""Let all layers drop neurons up to one CETT, and search the largest that the loss allows (2024, arXiv:2411.02335).

This is what `perplexity_sparsity.py` applies and `ppl_sparsity.py` reports.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actkit.core.edit.edits import Replace, temporarily
from actkit.core.forward.batch import BatchContext, sequence_of
from actkit.core.forward.hooks import evaluating
from actkit.core.ground.errors import CoverageError, DataError, NonFiniteError
from actkit.core.ground.progress import track
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.model.anatomy import Anatomy, Linear, Site, anatomy
from actkit.core.train.objective import Loss, Objective
from actkit.core.watch.capture import observe, opened_experts, record
from actkit.core.watch.statistics import Density, Sample, Statistic
from actkit.sparsity.sparsing_law.cett import CettCurve, Method

RESOLUTION = 1e-6  # of the shared CETT
TRIES = 20  # of false position; then bisection, which no noise can hold up


def sequence(batches: Any) -> Sequence[Any]:
    """Return batches that can be passed over several times. Raises DataError if there are none."""
    batches = sequence_of(batches)
    if not len(batches):
        raise DataError("batches: 0 were given; pass at least one.")
    return batches


@contextmanager
def in_float32(model: nn.Module, example: Any = None) -> Iterator[Anatomy]:
    """Give the anatomy of the model, or of a float32 copy if it has 16-bit parameters; its experts stand opened.

    Args:
        model: the model, which stays as it is.
        example: a batch, to trace a model whose architecture is not known.

    Raises:
        CoverageError: the model has no MLP that can be read.
    """
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        model = copy.deepcopy(model).float()
    view = anatomy(model, example)
    with opened_experts(view):
        if not output_layers(view):
            raise CoverageError(
                f"model: no MLP was found in {type(model).__name__} ({view.architecture}); its neurons are not known."
            )
        yield view


def output_layers(view: Anatomy) -> dict[Site, Linear]:
    """Find the output layer of every MLP and opened expert, by the site of its input."""
    blocks = [view.block(block.index) for block in view.blocks]  # as they are now
    return {Site("mlp.hidden", block.index, expert): mlp.down for block in blocks for expert, mlp in block.mlps()}


def measure(
    view: Anatomy, batches: Sequence[Any], objective: Objective, wanted: Mapping[Site, Statistic]
) -> tuple[float, dict[Site, Any]]:
    """Measure the mean loss over all labels, and the statistics, in one pass over the batches.

    Args:
        view: the model's anatomy.
        batches: what to run.
        objective: the loss.
        wanted: the statistics, by site.

    Returns:
        The loss in nats per label, and the statistics.

    Raises:
        DataError: the model has no loss on the batches.
        NonFiniteError: the loss is NaN or Inf.
    """
    total, count, row = 0.0, 0, 0
    with evaluating(view.model), observe(view, wanted) as observer:
        for batch in batches:
            context = BatchContext.of(batch, view.model, first_row=row)
            row += context.batch_size
            observer.begin(context)
            labels = objective.labels(batch)
            total, count = total + float(objective(view.model, batch)) * labels, count + labels
    if not math.isfinite(total):
        raise NonFiniteError(f"loss: it is {total} on these batches; check the weights and the data.")
    return total / count, observer.statistics


@dataclass(frozen=True)
class Sparse:
    """A model at one shared CETT.

    Attributes:
        cett: shared by all layers.
        dense_loss: without thresholds, in nats.
        rise: above it, in nats.
        ratio: share of the neurons that are active, over all layers and tokens.
        ratios: of each layer.
        per_token: 5th, 50th and 95th percentile over tokens, of each layer.
    """

    cett: float
    dense_loss: float
    rise: float
    ratio: float
    ratios: dict[str, float]
    per_token: dict[str, tuple[float, float, float]]


class SharedCett:
    """A model whose layers all drop neurons up to one CETT, on its calibration batches.

    Args:
        view: from `in_float32`, and used inside that context.
        batches: what thresholds and loss are computed on.
        method: 'sort' is exact, 'grid' takes the release's candidates.
        sample: tokens per layer that thresholds are computed from.
        loss: of (model, batch), a mean over the batch, if the model has none of its own.
        progress: show a bar.

    Raises:
        ActkitError: what `measure` raises.
    """

    def __init__(
        self,
        view: Anatomy,
        batches: Sequence[Any],
        *,
        method: Method = "sort",
        sample: int = 1024,
        loss: Loss | None = None,
        progress: bool = True,
    ) -> None:
        self.view, self.batches, self.objective = view, batches, Objective(view.model, loss)
        self.layers = output_layers(view)
        seen = record(
            view.model, {site: Sample(sample) for site in self.layers}, batches, anatomy=view, progress=progress
        )
        self.layers = {site: down for site, down in self.layers.items() if seen[site].count}  # experts may see nothing
        self._curves = {
            site: CettCurve.of(seen[site].rows, down.weight, method)
            for site, down in track(self.layers.items(), "Sorting contributions", len(self.layers), progress)
        }
        self._sizes = {site: seen[site].count * down.in_features for site, down in self.layers.items()}
        self._dense: float | None = None
        self._rises: dict[float, float] = {}

    @property
    def dense_loss(self) -> float:
        """The loss in nats per label, on the calibration batches."""
        if self._dense is None:
            self._dense = measure(self.view, self.batches, self.objective, {})[0]
        return self._dense

    def thresholds(self, cett: float) -> dict[str, float]:
        """Return the eps of every layer, by its path."""
        return {down.path: self._curves[site].threshold(cett) for site, down in self.layers.items()}

    def rise(self, cett: float) -> float:
        """Return the rise of the loss on the calibration batches, in nats; it is measured once."""
        if cett not in self._rises:
            dense = self.dense_loss  # before the edits
            with temporarily(self.view.model, self._edits(self._selections(cett))):
                self._rises[cett] = measure(self.view, self.batches, self.objective, {})[0] - dense
        return self._rises[cett]

    def at(self, cett: float, batches: Sequence[Any] | None = None, dense_loss: float | None = None) -> Sparse:
        """Measure the rise and the active neurons, on the calibration batches or others.

        Args:
            cett: shared by all layers.
            batches: others than the calibration batches.
            dense_loss: on those, if known.

        Returns:
            What was measured.
        """
        if batches is None:
            batches, dense_loss = self.batches, self.dense_loss
        dense = measure(self.view, batches, self.objective, {})[0] if dense_loss is None else dense_loss
        selections = self._selections(cett)
        wanted = {site: Density(select.mask) for site, select in selections.items()}
        with temporarily(self.view.model, self._edits(selections)):
            loss, seen = measure(self.view, batches, self.objective, wanted)
        densities = {down.path: seen[site] for site, down in self.layers.items() if seen[site].count}
        return Sparse(cett, dense, loss - dense, *ratios(densities))

    def cett_for(self, ratio: float) -> float:
        """Return the shared CETT at which a share `ratio` of the neurons is active on the dense model's states."""
        low, high = 0.0, 1.0
        while high - low > RESOLUTION:
            middle = (low + high) / 2
            eps = {site: curve.threshold(middle) for site, curve in self._curves.items()}
            dropped = sum(self._curves[site].dropped_at(eps[site]) * size for site, size in self._sizes.items())
            low, high = (middle, high) if dropped < (1 - ratio) * sum(self._sizes.values()) else (low, middle)
        return high

    def _selections(self, cett: float) -> dict[Site, Threshold]:
        eps = self.thresholds(cett)
        return {site: selection(down, eps[down.path]) for site, down in self.layers.items()}

    def _edits(self, selections: Mapping[Site, Threshold]) -> list[Replace]:
        return [Replace(down.path, ActLinear.of(down, select=selections[s])) for s, down in self.layers.items()]


def ratios(
    densities: Mapping[str, Density],
) -> tuple[float, dict[str, float], dict[str, tuple[float, float, float]]]:
    """Return the ratio over all, by path, and percentiles over tokens by path, of densities that have seen rows."""
    size = {path: seen.count * int(seen.channels or 0) for path, seen in densities.items()}
    each = {path: seen.density for path, seen in densities.items()}
    overall = sum(each[path] * size[path] for path in each) / sum(size.values())
    spread = {path: tuple(seen.spread(share) for share in (0.05, 0.5, 0.95)) for path, seen in densities.items()}
    return overall, each, spread  # type: ignore[return-value]


def selection(down: Linear, eps: float) -> Threshold:
    """Make the threshold on column norms, in float32, of the dequantized weight."""
    return Threshold(eps, down.weight.detach().float().norm(dim=0))


@dataclass(frozen=True)
class Root:
    """Where the rise reaches its target.

    Attributes:
        low: of the last bracket; it is what is used, so the rise stays below.
        high: of the last bracket.
        reached: False if even `low` = 1, which drops every neuron, stays below.
        trace: (CETT, rise) in the order tried.
    """

    low: float
    high: float
    reached: bool
    trace: tuple[tuple[float, float], ...]


def largest_cett(rise: Callable[[float], float], p: float, tolerance: float = 0.01) -> Root:
    """Find the largest CETT in 0 to 1 under which the rise of the loss is at most ln(1 + p / 100) nats.

    If the rise is not monotone it is one of the crossings. If it jumps over the target (few tokens), the bracket
    shrinks to 1e-6.

    Args:
        rise: of the loss at a CETT, in nats.
        p: in percent.
        tolerance: how far below the target the rise may stay, as a share.

    Returns:
        The bracket, and what was tried.

    Raises:
        ValueError: p or tolerance is out of bounds.
    """
    for name, value, most in (("p", p, math.inf), ("tolerance", tolerance, 1.0)):
        if not 0 < value < most:
            raise ValueError(f"{name}: {value} was given; give a number above 0" + (", below 1." if most == 1 else "."))
    target = math.log1p(p / 100)
    aim = math.sqrt(target * (1 - tolerance / 2))
    trace: list[tuple[float, float]] = []

    def gap(cett: float) -> float:
        trace.append((cett, rise(cett)))
        return math.sqrt(max(trace[-1][1], 0.0)) - aim

    low, high, below, above, last = 0.0, 1.0, -aim, gap(1.0), 0
    if trace[0][1] <= target:
        return Root(1.0, 1.0, trace[0][1] >= target * (1 - tolerance), tuple(trace))
    while high - low > RESOLUTION:
        cett = (low * above - high * below) / (above - below) if len(trace) < TRIES else (low + high) / 2
        cett = min(max(cett, low + RESOLUTION / 2), high - RESOLUTION / 2)
        value = gap(cett)
        if abs(trace[-1][1] - target * (1 - tolerance / 2)) <= target * tolerance / 2:
            return Root(cett, high, True, tuple(trace))
        if value < 0:  # the end that stayed twice counts half, so that it moves (Illinois)
            low, below, above, last = cett, value, above / 2 if last < 0 else above, -1
        else:
            high, above, below, last = cett, value, below / 2 if last > 0 else below, 1
    return Root(low, high, True, tuple(trace))
