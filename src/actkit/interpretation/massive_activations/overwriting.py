"""Overwrite massive activations by their mean or by zero while a model runs.

    x[token, channel] <- m[channel] or 0    where |x| > threshold, for the channels that hold massive values
    threshold = max(100, 1000 x median |x|)

The intervention of Sun et al. (2024, arXiv:2402.17762), at one block: the mean over data changes next to nothing, zero
breaks the model, so that these values act as a constant bias.
When to use it: to see whether a model needs its massive activations, and whether a constant could stand for them.
Cost: nothing beside the forward pass.
Settled here: the entries are found in each pass by the definition, and only in channels in which calibration found
some; so the same entries are overwritten in either mode, at whatever position a sequence has them. The work before
names positions by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import sequence_of
from actkit.core.ground.errors import DataError
from actkit.core.model.sites import Site
from actkit.core.watch.capture import record
from actkit.core.watch.extremes import MASSIVE, MASSIVE_RATIO, Extremes
from actkit.core.watch.intervene import At, intervene
from actkit.core.watch.statistics import Quantiles

MOST = 4096  # entries that are kept for the means


@dataclass(frozen=True)
class MassiveValues:
    """The massive values behind one block.

    Attributes:
        site: where they stand.
        threshold: magnitudes beyond it are massive.
        means: by channel, over the massive values in it.
        deviations: by channel, their standard deviation.
        count: how many entries there were.
    """

    site: str
    threshold: float
    means: Mapping[int, float]
    deviations: Mapping[int, float]
    count: int


def massive_values(
    model: nn.Module, batches: Iterable[Any], *, block: int | None = None, progress: bool = True
) -> MassiveValues:
    """Find the massive values behind a block, by the strict definition.

    Args:
        model: neither compiled nor sharded.
        batches: dicts of the model's keywords, or tensors.
        block: its number; None for the first block that has any.
        progress: show a bar.

    Returns:
        Their channels and means.

    Raises:
        DataError: there are none.
        ActkitError: what `record` raises.
    """
    wanted = Site("block.output", block)
    seen = record(model, {wanted: [Extremes(MOST), Quantiles()]}, sequence_of(batches), progress=progress)
    for site, (extremes, quantiles) in seen.items():
        threshold = max(MASSIVE, MASSIVE_RATIO * quantiles.quantile(0.5))
        found: dict[int, list[float]] = {}
        for entry in extremes.entries:
            if abs(entry.value) > threshold:
                found.setdefault(entry.channel, []).append(entry.value)
        if found:
            values = {channel: torch.tensor(each, dtype=torch.float64) for channel, each in sorted(found.items())}
            means = {channel: float(each.mean()) for channel, each in values.items()}
            deviations = {channel: float(each.std(correction=0)) for channel, each in values.items()}
            return MassiveValues(str(site), threshold, means, deviations, sum(map(len, values.values())))
    where = "behind any block" if block is None else f"behind block {block}"
    raise DataError(
        f"block: no activation {where} exceeds {MASSIVE:g} and {MASSIVE_RATIO:g} times the median, so that there is "
        f"nothing to overwrite; look at massive_activations(model, batches)."
    )


@contextmanager
def overwritten(model: nn.Module, values: MassiveValues, mode: Literal["mean", "zero"]) -> Iterator[None]:
    """Run a model with its massive values behind one block overwritten.

    Args:
        model: that they were found in.
        values: what `massive_values` found.
        mode: 'mean' puts the mean of a channel's massive values in their place, 'zero' 0.

    Yields:
        Nothing.

    Raises:
        ValueError: another mode was given.
    """
    if mode not in ("mean", "zero"):
        raise ValueError(f"mode: {mode!r} was given; give 'mean' or 'zero'.")
    channels = torch.tensor(list(values.means))
    means = torch.tensor(list(values.means.values())) * (mode == "mean")

    def change(x: Tensor, at: At) -> Tensor:
        held = x[..., channels.to(x.device)]
        new = torch.where(held.abs() > values.threshold, means.to(x.device, x.dtype), held)
        return x.index_copy(-1, channels.to(x.device), new)

    with intervene(model, {values.site: change}):
        yield
