"""Moments, largest magnitudes, active values and magnitude histograms of rows on the CPU, in Numba: one pass for all.

The plain torch reference is each statistic's own `_update` in `core/statistics.py`, with which the integers here agree
bit for bit and the moments to rounding. Rows are read in pieces that stay in the cache: the mean of a piece first, then
its central moments, which join those of the rows before by the pairwise formulas of Pébay (2008). A thread takes every
so-manieth strip of channels, and the strips are the same for any number of threads; so are all results.

Imported on first use, as everything that imports Numba.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.process import LOCK, compiled, follow_torch_threads

ROWS, STRIP = 256, 256  # of a piece: 256 KB of values, 10 KB of sums
SIGNLESS, INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)  # bits of a float32
SUMS = np.zeros(0)
COUNTS = np.zeros(0, np.int64)
LARGEST = np.zeros(0, np.int32)


@compiled(inner=True)
def _moments(values, before, top, bottom, left, right, mean, m2, m3, m4, absolute):  # type: ignore[no-untyped-def]
    """Add one piece to the five sums per channel; `before` rows are in them."""
    width = right - left
    own, magnitude, second, third, fourth = (
        np.zeros(width),
        np.zeros(width),
        np.zeros(width),
        np.zeros(width),
        np.zeros(width),
    )
    for r in range(top, bottom):
        row = values[r, left:right]
        for c in range(width):
            x = np.float64(row[c])
            own[c] += x
            magnitude[c] += abs(x)
    nb = np.float64(bottom - top)
    for c in range(width):
        own[c] /= nb
    for r in range(top, bottom):
        row = values[r, left:right]
        for c in range(width):
            d = np.float64(row[c]) - own[c]
            second[c] += d * d
            third[c] += d * d * d
        for c in range(width):  # apart: LLVM checks few arrays of a loop for overlaps, and gives up vectors beyond
            d = np.float64(row[c]) - own[c]
            fourth[c] += d * d * (d * d)
    na = np.float64(before)
    n = na + nb
    for c in range(width):
        k = left + c
        d = own[c] - mean[k]
        m4[k] += (
            fourth[c]
            + d * d * d * d * (na * nb * (na * na - na * nb + nb * nb) / (n * n * n))
            + 6 * d * d * (na * na * second[c] + nb * nb * m2[k]) / (n * n)
            + 4 * d * (na * third[c] - nb * m3[k]) / n
        )
        m3[k] += third[c] + d * d * d * (na * nb * (na - nb) / (n * n)) + 3 * d * (na * second[c] - nb * m2[k]) / n
        m2[k] += second[c] + d * d * (na * nb / n)
        mean[k] += d * (nb / n)
        absolute[k] += magnitude[c]


@compiled(inner=True)
def _largest(bits, top, bottom, left, right, largest):  # type: ignore[no-untyped-def]
    """largest: bits of the largest magnitude per channel; those of a NaN are above all others."""
    found = largest[left:right]
    for r in range(top, bottom):
        row = bits[r, left:right]
        for c in range(right - left):
            found[c] = max(found[c], row[c] & SIGNLESS)


@compiled(inner=True)
def _active(bits, top, bottom, left, right, above, per_channel, per_row):  # type: ignore[no-untyped-def]
    """Count magnitudes with more than the bits `above`, per channel and per row; a NaN is none."""
    found = per_channel[left:right]
    for r in range(top, bottom):
        row = bits[r, left:right]
        count = np.int32(0)
        for c in range(right - left):
            magnitude = row[c] & SIGNLESS
            active = np.int32((magnitude > above) & (magnitude <= INFINITY))
            found[c] += active
            count += active
        per_row[r] += count


@compiled(inner=True)
def _histogram(bits, top, bottom, left, right, shift, bins):  # type: ignore[no-untyped-def]
    """Bin 0 counts zeros, bin i + 1 the magnitudes whose bits start with i."""
    for r in range(top, bottom):
        row = bits[r, left:right]
        for c in range(right - left):
            magnitude = row[c] & SIGNLESS
            bins[(magnitude >> shift) + np.int32(magnitude != 0)] += 1


@compiled(parallel=True)
def _pass(values, bits, before, moments, largest, shift, bins, above, per_channel, per_row):  # type: ignore[no-untyped-def]
    """bins [parts, any], per_row [parts, rows]: one of each for every thread. What is not wanted is empty."""
    mean, m2, m3, m4, absolute = moments
    rows, channels = values.shape
    parts = bins.shape[0]
    for part in prange(parts):
        for left in range(part * STRIP, channels, parts * STRIP):
            right = min(left + STRIP, channels)
            for top in range(0, rows, ROWS):
                bottom = min(top + ROWS, rows)
                if mean.size:
                    _moments(values, before + top, top, bottom, left, right, mean, m2, m3, m4, absolute)
                if largest.size:
                    _largest(bits, top, bottom, left, right, largest)
                if per_channel.size:
                    _active(bits, top, bottom, left, right, above, per_channel, per_row[part])
                if bins.shape[1]:
                    _histogram(bits, top, bottom, left, right, shift, bins[part])


def summarise(
    x: Tensor,
    moments: tuple[int, Sequence[Tensor]] | None = None,
    largest: Tensor | None = None,
    histogram: tuple[int, Tensor] | None = None,
    active: tuple[float, Tensor, Tensor] | None = None,
) -> None:
    """Add rows x (float32 [n, channels], contiguous) to what is given.

    moments: the number of rows before; their mean, sums of the second to fourth power of x - mean, and of |x|: float64
    [channels] each. largest: float64 [channels]. histogram: how many bits of the magnitude's pattern are dropped, and
    the counts int64 [bins]. active: a threshold, and the counts of magnitudes above it, int64 per channel [channels],
    and of rows with so many of them [channels + 1].
    """
    values = x.numpy()
    before, sums = (moments[0], tuple(each.numpy() for each in moments[1])) if moments else (0, (SUMS,) * 5)
    shift, bins = (histogram[0], histogram[1].numpy()) if histogram else (0, COUNTS)
    above, per_channel = (active[0], active[1].numpy()) if active else (0.0, COUNTS)
    threshold = np.float32(above).view(np.int32)
    patterns = np.zeros(0 if largest is None else x.shape[1], np.int32)
    with LOCK:
        parts = min(follow_torch_threads(x.nbytes), -(-x.shape[1] // STRIP))
        found = np.zeros((parts, len(bins)), np.int64)
        per_row = np.zeros((parts, len(values) if active else 0), np.int32)
        _pass(values, values.view(np.int32), before, sums, patterns, shift, found, threshold, per_channel, per_row)
    for part in found:
        bins += part
    if largest is not None:
        torch.maximum(largest, torch.from_numpy(patterns.view(np.float32)), out=largest)
    if active:
        active[2].add_(torch.bincount(torch.from_numpy(per_row.sum(0)), minlength=len(active[2])))
