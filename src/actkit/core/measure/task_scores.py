"""What a model reaches on a task of questions, and paired with its original: one row per task and metric.

A value's interval is the mean -+ 1.96 standard errors over the items, as lm-eval states it. The interval of the
difference resamples items, each with both models' results (a paired bootstrap), so what both find hard cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actkit.core.ground.estimate import Estimate
from actkit.core.measure.quality import CONFIDENCE, resampled_totals

if TYPE_CHECKING:
    from rich.table import Table


NORMAL = 1.96  # standard errors on either side of a mean: 95 %


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task.

    Attributes:
        task: its name.
        metric: its name.
        value: of the model.
        original: of the original; None without one.
        difference: value - original over the same items; None without an original, or if the metric is no mean over
            items.
        items: how many.
        by: what scored it, with its version.
    """

    task: str
    metric: str
    value: Estimate
    original: Estimate | None
    difference: Estimate | None
    items: int
    by: str

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        estimates = {name: getattr(self, name) for name in ("value", "original", "difference")}
        return {
            **vars(self),
            **{name: None if each is None else each.to_dict() for name, each in estimates.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TaskScore:
        """Read what `to_dict` gave, also after a way through JSON."""
        estimates = {name: _estimate(content[name]) for name in ("value", "original", "difference")}
        return cls(**{**content, **estimates})


def _estimate(content: Mapping[str, float | None] | None) -> Estimate | None:
    if content is None:
        return None
    ends = {"value": math.nan, "low": -math.inf, "high": math.inf}
    return Estimate(*(default if content[name] is None else content[name] for name, default in ends.items()))  # type: ignore[arg-type]


def score(
    task: str,
    metric: str,
    values: Tensor,
    others: Tensor | None = None,
    *,
    by: str,
    resamples: int = 1000,
    seed: int = 0,
) -> TaskScore:
    """Score a metric that is a mean over items.

    Args:
        task: its name.
        metric: its name.
        values: of each item, float64 [items].
        others: the original's, of the same items in the same order.
        by: what scored it.
        resamples: of the paired bootstrap.
        seed: of the paired bootstrap.

    Returns:
        The score, with the original's and the difference if `others` are given.
    """
    difference = None if others is None else paired_difference(values, others, resamples=resamples, seed=seed)
    original = None if others is None else mean(others)
    return TaskScore(task, metric, mean(values), original, difference, len(values), by)


def mean(values: Tensor) -> Estimate:
    """Return the mean of float64 [items] -+ 1.96 standard errors."""
    middle, count = float(values.mean()), len(values)
    margin = NORMAL * float(values.std()) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(middle, middle - margin, middle + margin)


def paired_difference(values: Tensor, others: Tensor, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Return the mean of values - others, with the 95 % interval of a bootstrap over items.

    Args:
        values: float64 [items].
        others: float64 [items], of the same items in the same order.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The difference; its interval is not known for fewer than 2 items.
    """
    apart = values - others
    middle = float(apart.mean())
    if len(apart) < 2:
        return Estimate(middle, -math.inf, math.inf)
    drawn = resampled_totals(apart[:, None], resamples, seed)[:, 0] / len(apart)
    low, high = torch.quantile(drawn, drawn.new_tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])).tolist()
    return Estimate(middle, low, high)


def scores_table(scores: Sequence[TaskScore]) -> Table:
    """Show one row per task and metric, for a terminal."""
    from rich import box

    from actkit.core.ground.tables import PlainTable

    paired = any(each.original is not None for each in scores)
    about = ", ".join(dict.fromkeys(each.by for each in scores))
    table = PlainTable(title=f"Tasks (95 % intervals; scored by {about})", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "original", "difference") if paired else ("value",):
        table.add_column(name, justify="right")
    table.add_column("items", justify="right", no_wrap=True)
    for each in scores:
        found = [level(each.value)]
        if paired:
            found.append("" if each.original is None else level(each.original))
            found.append("" if each.difference is None else words(each.difference))
        table.add_row(each.task, each.metric, *found, f"{each.items:,}")
    return table


def level(estimate: Estimate) -> str:
    """Say '0.512 ±0.044': a value and how far its interval goes to either side, if that is known."""
    margin = f" ±{estimate.high - estimate.value:.3f}" if math.isfinite(estimate.high) else ""
    return f"{estimate.value:.3f}{margin}"


def words(estimate: Estimate) -> str:
    """Say '0.012 (-0.008 to 0.030)', without the interval if it is not known."""
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    return f"{estimate.value:.3f}" + (f" ({estimate.low:.3f} to {estimate.high:.3f})" if known else "")
