"""Streaming statistics of activations: bounded memory, any order of the rows, any number of shards.

A statistic reads rows x [n, channels] of any float dtype, as often as they come, and merges with others of its kind.
AbsMax, Range, Midpoints, Density, Quantiles, Histogram, Sample, Extremes and SequencePeaks give the same bits however
rows are ordered, sharded; Moments, Gram and Spectrum agree to the rounding of float64. Results are float64 on the
device of the rows, unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from actkit.core.watch.extremes import Extremes, SequencePeaks
from actkit.core.watch.histogram import Histogram
from actkit.core.watch.ranges import Midpoints, Range
from actkit.core.watch.sample import Sample
from actkit.core.watch.spectrum import Gram, Spectrum
from actkit.core.watch.streaming import Rows, Statistic

__all__ = [
    "AbsMax",
    "Density",
    "Extremes",
    "Gram",
    "Histogram",
    "Midpoints",
    "Moments",
    "Quantiles",
    "Range",
    "Rows",
    "Sample",
    "SequencePeaks",
    "Spectrum",
    "Statistic",
]


class Moments(Statistic):
    """Mean, variance, skewness and kurtosis per channel, by the pairwise formulas of Chan (1979) and Pébay (2008)."""

    _mean: Tensor
    _m2: Tensor
    _m3: Tensor
    _m4: Tensor
    _absolute: Tensor

    @property
    def kernel_name(self) -> str:
        return "moments"

    def kernel_state(self, dtype: torch.dtype) -> tuple[int, list[Tensor]]:
        return self.count, [getattr(self, f"_{name}") for name in self._fields]

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        names = ("mean", "m2", "m3", "m4", "absolute")
        return {name: torch.zeros(channels, dtype=torch.float64, device=device) for name in names}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        x = x.double()
        mean = x.mean(0)
        centred = x - mean
        square = centred.square()
        self._add(len(x), mean, square.sum(0), (square * centred).sum(0), square.square().sum(0), x.abs().sum(0))

    def _merge(self, other: Self) -> None:
        self._add(other.count, *(getattr(other, f"_{name}").to(self._device) for name in self._fields))

    def _add(self, nb: int, mean: Tensor, m2: Tensor, m3: Tensor, m4: Tensor, absolute: Tensor) -> None:
        na = self.count
        n = na + nb
        if nb == 0:
            return
        d = mean - self._mean
        self._m4 += (
            m4
            + d**4 * (na * nb * (na * na - na * nb + nb * nb) / n**3)
            + 6 * d**2 * (na * na * m2 + nb * nb * self._m2) / n**2
            + 4 * d * (na * m3 - nb * self._m3) / n
        )
        self._m3 += m3 + d**3 * (na * nb * (na - nb) / n**2) + 3 * d * (na * m2 - nb * self._m2) / n
        self._m2 += m2 + d**2 * (na * nb / n)
        self._mean += d * (nb / n)
        self._absolute += absolute

    @property
    def mean(self) -> Tensor:
        """Mean per channel: [channels]."""
        self._needs_rows()
        return self._mean

    @property
    def mean_abs(self) -> Tensor:
        """Mean of |x|: [channels]."""
        self._needs_rows()
        return self._absolute / self.count

    @property
    def variance(self) -> Tensor:
        """Variance per channel, divided by n (not n - 1): [channels]."""
        self._needs_rows()
        return self._m2 / self.count

    @property
    def std(self) -> Tensor:
        """The root of `variance`: [channels]."""
        return self.variance.sqrt()

    @property
    def skewness(self) -> Tensor:
        """E[(x - mean)^3] / std^3: [channels]; NaN if a channel is constant."""
        self._needs_rows()
        return self._standardised(self._m3, 3)

    @property
    def kurtosis(self) -> Tensor:
        """E[(x - mean)^4] / variance^2, 3 for a Gaussian: [channels]; NaN if a channel is constant."""
        self._needs_rows()
        return self._standardised(self._m4, 4)

    def _standardised(self, sums: Tensor, power: int) -> Tensor:
        noise = (torch.finfo(torch.float64).eps * self.mean).square()  # the variance that rounding gives a constant
        return torch.where(self.variance > noise, sums / self.count / self.variance ** (power / 2), torch.nan)


class AbsMax(Statistic):
    """The largest |x| of each channel, exact."""

    _largest: Tensor

    @property
    def kernel_name(self) -> str:
        return "largest"

    def kernel_state(self, dtype: torch.dtype) -> Tensor:
        return self._largest

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        return {"largest": torch.zeros(channels, dtype=torch.float64, device=device)}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        self._largest = torch.maximum(self._largest, x.abs().amax(0))

    def _merge(self, other: Self) -> None:
        self._largest = torch.maximum(self._largest, other._largest.to(self._device))

    @property
    def value(self) -> Tensor:
        """The largest |x| of each channel: [channels]."""
        self._needs_rows()
        return self._largest

    @property
    def overall(self) -> float:
        """The largest of all channels."""
        return float(self.value.max())


class Quantiles(Statistic):
    """Quantiles of |x|, or of |x| times a weight, over all rows and channels.

    Counts in fixed bins: the sign-free float32 pattern of the magnitude, cut to 8 exponent and 9 mantissa bits. A bin
    is
    1/512 of its lower edge wide, so that is the relative error; zero has a bin of its own. 1 MB for any site.

    Args:
        weight: [channels], a factor of the magnitudes; None for 1.
    """

    _settings = ("weight",)
    BINS: ClassVar[int] = 1 << 17
    _SHIFT: ClassVar[int] = 14  # mantissa bits dropped

    _bins: Tensor

    def __init__(self, weight: Tensor | None = None) -> None:
        if weight is not None and weight.dim() != 1:
            raise ValueError(f"weight: shape {list(weight.shape)} was given; give one score per channel.")
        self.weight = None if weight is None else weight.detach().float()

    @property
    def kernel_name(self) -> str | None:
        return "histogram" if self.weight is None else None

    def kernel_state(self, dtype: torch.dtype) -> tuple[int, Tensor]:
        return self._SHIFT, self._bins

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        if device.type == "cpu":  # numpy's pages take memory only once something is counted in them
            return {"bins": torch.from_numpy(np.zeros(self.BINS + 1, np.int64))}
        return {"bins": torch.zeros(self.BINS + 1, dtype=torch.int64, device=device)}  # the first counts exact zeros

    def _start(self, channels: int, device: torch.device) -> None:
        if self.weight is not None and len(self.weight) != channels:
            raise ValueError(f"weight: {len(self.weight)} scores were given for {channels} channels; give one each.")
        super()._start(channels, device)

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        magnitude = x.float().abs()
        if self.weight is not None:
            magnitude = (magnitude * self.weight.to(x.device)).abs()
        index = torch.where(magnitude == 0, 0, (magnitude.view(torch.int32) >> self._SHIFT) + 1)
        self._bins += torch.bincount(index.flatten(), minlength=self.BINS + 1)

    def _merge(self, other: Self) -> None:
        self._bins += other._bins.to(self._device)

    def quantile(self, p: float) -> float:
        """Return the magnitude that a share of the values does not exceed, linear inside its bin; 0 for p = 0.

        Args:
            p: the share, 0 to 1.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"p: {p} was given; it is a share, give 0 to 1.")
        self._needs_rows()
        cumulative = self._bins.cumsum(0)
        target = p * int(cumulative[-1])
        index = int(torch.searchsorted(cumulative, math.ceil(target)))
        if target == 0 or index == 0:
            return 0.0
        lower, upper = self._edges(index)
        inside = int(self._bins[index])
        return lower + (upper - lower) * (target - int(cumulative[index]) + inside) / inside

    def cdf(self, t: float) -> float:
        """Return the share of the values whose magnitude is at most `t`; the inverse of `quantile`.

        Args:
            t: a magnitude; linear inside its bin.
        """
        self._needs_rows()
        if t < 0:
            return 0.0
        index = (int(torch.tensor(t, dtype=torch.float32).view(torch.int32)) >> self._SHIFT) + 1 if t > 0 else 0
        below, inside = int(self._bins[:index].sum()), int(self._bins[index])
        lower, upper = self._edges(index)
        share = (t - lower) / (upper - lower) if upper > lower else 1.0
        return (below + inside * min(max(share, 0.0), 1.0)) / int(self._bins.sum())

    def _edges(self, index: int) -> tuple[float, float]:
        if index == 0:
            return 0.0, 0.0
        patterns = torch.tensor([index - 1, index], dtype=torch.int32) << self._SHIFT
        lower, upper = patterns.view(torch.float32).clamp(max=torch.finfo(torch.float32).max).tolist()
        return lower, upper


class Density(Statistic):
    """How many values are active.

    Args:
        active: x [n, channels] -> a bool mask like it; None for |x| > threshold.
        threshold: a magnitude.
    """

    _settings = ("active", "threshold")

    _per_channel: Tensor
    _per_row: Tensor

    def __init__(self, active: Callable[[Tensor], Tensor] | None = None, threshold: float = 0.0) -> None:
        if not threshold >= 0:
            raise ValueError(f"threshold: {threshold} was given; it is a magnitude, give 0 or more.")
        if active is not None and threshold:
            raise ValueError(f"threshold: {threshold} was given beside active=, which decides alone; leave one out.")
        self.active, self.threshold = active, threshold

    @property
    def kernel_name(self) -> str | None:
        return "active" if self.active is None else None

    def kernel_state(self, dtype: torch.dtype) -> tuple[float, Tensor, Tensor]:
        threshold = float(torch.tensor(self.threshold, dtype=dtype))  # which torch rounds to compare it with x
        return threshold, self._per_channel, self._per_row

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        sizes = {"per_channel": channels, "per_row": channels + 1}
        return {name: torch.zeros(size, dtype=torch.int64, device=device) for name, size in sizes.items()}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        mask = x.abs() > self.threshold if self.active is None else self.active(x)
        if mask.shape != x.shape or mask.dtype != torch.bool:
            given = f"{mask.dtype} of shape {list(mask.shape)}"
            raise ValueError(f"active: it returned {given} for x {list(x.shape)}; return a bool mask like x.")
        self._per_channel += mask.sum(0)
        self._per_row += torch.bincount(mask.sum(1), minlength=x.shape[1] + 1)

    def _merge(self, other: Self) -> None:
        self._per_channel += other._per_channel.to(self._device)
        self._per_row += other._per_row.to(self._device)

    @property
    def density(self) -> float:
        """The share of all values that are active."""
        self._needs_rows()
        return int(self._per_channel.sum()) / (self.count * self._per_channel.numel())

    @property
    def per_channel(self) -> Tensor:
        """The share of the rows in which a channel is active: [channels]."""
        self._needs_rows()
        return self._per_channel.double() / self.count

    @property
    def dead(self) -> Tensor:
        """Which channels were never active: bool [channels]."""
        self._needs_rows()
        return self._per_channel == 0

    @property
    def per_row(self) -> Tensor:
        """How many rows had exactly k active channels: int64 [channels + 1]."""
        self._needs_rows()
        return self._per_row

    def spread(self, p: float) -> float:
        """The p-quantile over rows of a row's share of active channels: p of the rows do not exceed it."""
        if not 0 <= p <= 1:
            raise ValueError(f"p: {p} was given; it is a share, give 0 to 1.")
        self._needs_rows()
        rank = max(1, math.ceil(p * self.count))
        return int(torch.searchsorted(self._per_row.cumsum(0), rank)) / self._per_channel.numel()
