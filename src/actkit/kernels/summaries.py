"""Moments, largest magnitudes, active values and magnitude histograms of rows on the CPU, in Numba: one pass for all.

The plain torch reference is each statistic's own `_update` in `core/watch/statistics.py`, with which the integers here
agree bit for bit and the moments to rounding. Rows are read in pieces that stay in the cache: the mean of a piece
first, then its central moments, which join those of the rows before by the pairwise formulas of Pébay (2008). The
strips of channels are dealt out to the threads in turn, and are the same for any number of threads; so are all results.

Imported on first use, as is everything that imports Numba.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from actkit.kernels.process import LOCK, compiled, follow_torch_threads

ROWS, STRIP = 256, 128  # of a piece: 128 KB of values, 5 KB of sums
SIGNLESS, INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)  # bits of a float32
FLOATS, COUNTS, WORDS = np.zeros(0), np.zeros(0, np.int64), np.zeros((0, 0), np.uint16)  # if nothing is given


@compiled(inner=True)
def _widen(words, bits, piece):  # type: ignore[no-untyped-def]
    """The float32 patterns of a piece of bfloat16 words."""
    top, bottom, left, right = piece
    for r in range(bottom - top):
        row, wide = words[top + r, left:right], bits[r]  # a row at a time: LLVM sees that its values are neighbours
        for c in range(row.size):
            wide[c] = np.int32(row[c]) << np.int32(16)


@compiled(inner=True)
def _moments(values, piece, before, sums, mean, m2, m3, m4, absolute):  # type: ignore[no-untyped-def]
    """Add a piece to five sums per channel, in which `before` rows are. sums: room for those of the piece."""
    top, bottom, left, right = piece
    own, magnitude, second, third, fourth = sums[0], sums[1], sums[2], sums[3], sums[4]
    sums[:] = 0
    for r in range(top, bottom, 2):  # two rows at a time, as the sums cost more to load and store than the values
        row, below, both = (
            values[r, left:right],
            values[min(r + 1, bottom - 1), left:right],
            np.float64(r + 1 < bottom),
        )
        for c in range(row.size):
            x, y = np.float64(row[c]), np.float64(below[c]) * both
            own[c] += x + y
            magnitude[c] += abs(x) + abs(y)
    na, nb = np.float64(before), np.float64(bottom - top)
    n = na + nb
    for c in range(right - left):
        own[c] /= nb
    for r in range(top, bottom, 2):
        row, below, both = (
            values[r, left:right],
            values[min(r + 1, bottom - 1), left:right],
            np.float64(r + 1 < bottom),
        )
        for c in range(row.size):
            d, e = np.float64(row[c]) - own[c], (np.float64(below[c]) - own[c]) * both
            second[c] += d * d + e * e
            third[c] += d * d * d + e * e * e
        for c in range(row.size):  # apart: with more arrays LLVM gives up on vectors
            d, e = np.float64(row[c]) - own[c], (np.float64(below[c]) - own[c]) * both
            fourth[c] += d * d * (d * d) + e * e * (e * e)
    for c in range(right - left):
        d = own[c] - mean[c]
        m4[c] += (
            fourth[c]
            + d * d * d * d * (na * nb * (na * na - na * nb + nb * nb) / (n * n * n))
            + 6 * d * d * (na * na * second[c] + nb * nb * m2[c]) / (n * n)
            + 4 * d * (na * third[c] - nb * m3[c]) / n
        )
        m3[c] += third[c] + d * d * d * (na * nb * (na - nb) / (n * n)) + 3 * d * (na * second[c] - nb * m2[c]) / n
        m2[c] += second[c] + d * d * (na * nb / n)
        mean[c] += d * (nb / n)
        absolute[c] += magnitude[c]


@compiled(inner=True)
def _largest(bits, piece, largest):  # type: ignore[no-untyped-def]
    """largest: bits of the largest magnitude per channel; those of a NaN are above all others."""
    top, bottom, left, right = piece
    for r in range(top, bottom):
        row = bits[r, left:right]
        for c in range(row.size):
            largest[c] = max(largest[c], row[c] & SIGNLESS)


@compiled(inner=True)
def _active(bits, piece, above, per_channel, per_row):  # type: ignore[no-untyped-def]
    """Count magnitudes with more than the bits `above`, per channel and per row; a NaN is none."""
    top, bottom, left, right = piece
    for r in range(top, bottom):
        row = bits[r, left:right]
        count = np.int32(0)
        for c in range(row.size):
            magnitude = row[c] & SIGNLESS
            active = np.int32((magnitude > above) & (magnitude <= INFINITY))
            per_channel[c] += active
            count += active
        per_row[r - top] += count


@compiled(inner=True)
def _histogram(bits, piece, shift, bins):  # type: ignore[no-untyped-def]
    """Bin 0 counts zeros, bin i + 1 the magnitudes whose bits start with i."""
    top, bottom, left, right = piece
    for r in range(top, bottom):
        row = bits[r, left:right]
        for c in range(row.size):
            magnitude = row[c] & SIGNLESS
            bins[(magnitude >> shift) + np.int32(magnitude != 0)] += 1


@compiled(parallel=True)
def _pass(words, values, bits, room, wide, before, sums, moments, largest, histogram, active):  # type: ignore[no-untyped-def]
    """words: bfloat16 rows, or empty; then values and bits are float32 rows.

    The first dimension of room (bits and their values `wide`, of one piece), sums, bins and per_row is the thread's.
    What is not wanted is empty.
    """
    mean, m2, m3, m4, absolute = moments
    shift, bins, others = histogram
    above, per_channel, per_row = active
    narrow = words.size > 0
    rows, channels = words.shape if narrow else values.shape
    parts = sums.shape[0]
    for part in prange(parts):
        for left in range(part * STRIP, channels, parts * STRIP):
            right = min(left + STRIP, channels)
            for top in range(0, rows, ROWS):
                bottom = min(top + ROWS, rows)
                piece, source, patterns = (top, bottom, left, right), values, bits
                if narrow:
                    _widen(words, room[part], piece)
                    piece, source, patterns = (0, bottom - top, 0, right - left), wide[part], room[part]
                if mean.size:
                    own = (mean[left:right], m2[left:right], m3[left:right], m4[left:right], absolute[left:right])
                    _moments(source, piece, before + top, sums[part], *own)
                if largest.size:
                    _largest(patterns, piece, largest[left:right])
                if per_channel.size:
                    _active(patterns, piece, above, per_channel[left:right], per_row[part, top:bottom])
                if bins.size:
                    _histogram(patterns, piece, shift, bins if part == 0 else others[part - 1])


def summarise(
    x: Tensor,
    moments: tuple[int, Sequence[Tensor]] | None = None,
    largest: Tensor | None = None,
    histogram: tuple[int, Tensor] | None = None,
    active: tuple[float, Tensor, Tensor] | None = None,
) -> None:
    """Add rows to what is given.

    Args:
        x: bfloat16 or float32 [n, channels], contiguous.
        moments: the number of rows before; their mean, sums of the second to fourth power of x - mean, and of |x|:
            float64 [channels] each.
        largest: float64 [channels].
        histogram: how many bits of the magnitude's pattern are dropped, and the counts int64 [bins].
        active: a threshold, and the counts of magnitudes above it, int64 per channel [channels], and of rows with so
            many of them [channels + 1].
    """
    narrow = x.dtype == torch.bfloat16
    words = x.view(torch.uint16).numpy() if narrow else WORDS
    values = np.zeros((0, 0), np.float32) if narrow else x.numpy()
    before, kept = (moments[0], tuple(each.numpy() for each in moments[1])) if moments else (0, (FLOATS,) * 5)
    shift, bins = (histogram[0], histogram[1].numpy()) if histogram else (0, COUNTS)
    above, per_channel = (active[0], active[1].numpy()) if active else (0.0, COUNTS)
    threshold = np.float32(above).view(np.int32)
    patterns = np.zeros(0 if largest is None else x.shape[1], np.int32)
    with LOCK:
        parts = min(follow_torch_threads(x.nbytes), -(-x.shape[1] // STRIP))
        room = np.empty((parts, ROWS, STRIP) if narrow else (0, 0, 0), np.int32)
        others = np.zeros((parts - 1, len(bins)), np.int64)  # of all threads but the first
        per_row = np.zeros((parts, len(x) if active else 0), np.int32)
        sums = np.empty((parts, 5, STRIP))
        _pass(
            words,
            values,
            values.view(np.int32),
            room,
            room.view(np.float32),
            before,
            sums,
            kept,
            patterns,
            (shift, bins, others),
            (threshold, per_channel, per_row),
        )
    for each in others:
        bins += each
    if largest is not None:
        torch.maximum(largest, torch.from_numpy(patterns.view(np.float32)), out=largest)
    if active:
        active[2].numpy()[:] += np.bincount(per_row.sum(0), minlength=len(active[2]))
