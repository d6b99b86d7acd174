"""Tensors kept for a backward pass in few bits: affine codes of values, and codes of what a function's slope is.

    affine:     x ~ low + step * code         low and step of each group of numbers in 16 bits, `bits` for each code
    derivative: f'(x) ~ level[code(x)]        boundaries on x and levels of f', chosen for the function

Codes lie side by side in bytes (`core/grids/packing.py`): two of 4 bits, eight of 1 bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actkit.core.grids.packing import pack_codes, unpack_codes
from actkit.core.layers.activation_function import ActivationFunction

Rounding = Literal["nearest", "stochastic"]
Density = Literal["normal", "uniform", "mixed"]
REACH = 8.0  # inputs that a derivative is fitted on; beyond them the outermost levels hold
EXACT = 1e-9


def check_bits(bits: int) -> None:
    """Refuse a number of bits that codes cannot have.

    Args:
        bits: of a code.

    Raises:
        ValueError: it is not 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: {bits} was given, allowed are 1 to 8.")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Put codes side by side.

    Args:
        codes: uint8 of any shape, below 2^bits.
        bits: of each, 1 to 8.

    Returns:
        uint8 [ceil(codes * bits / 8)].
    """
    return pack_codes(codes.reshape(1, -1), bits)[0]


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Invert `pack`.

    Args:
        packed: what it gave.
        count: of the codes.
        bits: of each.

    Returns:
        uint8 [count].
    """
    return unpack_codes(packed[None], count, bits)[0]


# -- values ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AffineCodes:
    """How values are kept.

    Attributes:
        bits: of a code.
        group: numbers that share a low end and a step; they follow each other in the tensor, its last axis first.
        rounding: to the nearest code, or up and down at random so that the mean is right.
        rows: mean and standard deviation of each row (along the last axis) are kept in float32, and hold exactly.

    Raises:
        ValueError: bits or group out of bounds.
    """

    bits: int = 4
    group: int = 64
    rounding: Rounding = "nearest"
    rows: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group < 2:
            raise ValueError(f"group: {self.group} was given; give 2 numbers or more.")

    @property
    def parts(self) -> int:
        """How many tensors are kept."""
        return 6 if self.rows else 4

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return what is kept of a tensor.

        Args:
            x: of any shape.

        Returns:
            Packed codes, low ends and steps (both float16, in units of the largest number, which so cannot overflow
            them), the unit, and of rows their mean and deviation.
        """
        wide = x.detach().to(torch.float32)
        flat = wide.reshape(-1)
        missing = -len(flat) % self.group
        if missing:
            flat = torch.cat([flat, flat[-1:].expand(missing)])
        groups = flat.view(-1, self.group)
        unit = groups.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        most = 2**self.bits - 1
        kept_low, kept_step = (low / unit).half(), ((high - low) / (most * unit)).half()
        step = kept_step.float() * unit
        places = (groups - kept_low.float() * unit) / torch.where(step > 0, step, 1.0)
        places = places.round() if self.rounding == "nearest" else (places + torch.rand_like(places)).floor()
        codes = places.clamp(0, most).to(torch.uint8).view(-1)[: x.numel()]
        found = [pack(codes, self.bits), kept_low, kept_step, unit]
        if self.rows:
            deviation, mean = torch.std_mean(wide, -1, correction=0)
            found += [mean, deviation]
        return found

    def decode(self, kept: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the tensor that codes stand for.

        Args:
            kept: what `encode` gave.
            shape: of the tensor.
            dtype: of the tensor.
        """
        packed, low, step, unit = kept[:4]
        count = math.prod(shape)
        codes = unpack(packed, count, self.bits).to(torch.float32)
        missing = low.shape[0] * self.group - count
        if missing:
            codes = torch.cat([codes, codes.new_zeros(missing)])
        flat = ((codes.view(-1, self.group) * step.float() + low.float()) * unit).view(-1)
        x = flat[:count].view(shape)
        if self.rows:
            mean, deviation = (each.unsqueeze(-1) for each in kept[4:])
            own, about = torch.std_mean(x, -1, correction=0, keepdim=True)
            x = (x - about) * torch.where(own > 0, deviation / own, 0.0) + mean
        return x.to(dtype)


# -- slopes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DerivativeCode:
    """Which code stands for the slope at an input.

    Attributes:
        boundaries: inputs, in order; an interval ends with its boundary.
        codes: of the intervals, one more than there are boundaries.
        levels: the slope that each code stands for.
        rmse: root mean square error of the slope, under the density that it was fitted on; 0 if it is exact.
    """

    boundaries: tuple[float, ...]
    codes: tuple[int, ...]
    levels: tuple[float, ...]
    rmse: float = 0.0

    @property
    def bits(self) -> int:
        """That a code needs."""
        return max(1, (len(self.levels) - 1).bit_length())

    @classmethod
    def fit(
        cls, function: ActivationFunction, bits: int = 4, density: Density = "mixed", grid: int | None = None
    ) -> DerivativeCode:
        """Find the boundaries and levels with the least mean square error of the slope.

        A function that is linear between kinks, with no more slopes than there are codes, is coded exactly and in as
        few bits as that takes. For others the intervals are the best of all between cells of a grid (by dynamic
        programming), their levels the means of the slope.

        Args:
            function: an element-wise one.
            bits: of a code, 1 to 8.
            density: of the inputs: standard normal, uniform on [-8, 8], or the mean of both.
            grid: cells of [-8, 8]; by default 4,096, and 1,024 for more than 5 bits, of which the search takes longer.

        Raises:
            ValueError: bits out of bounds, or the slope is not finite somewhere on the grid, or not known.
        """
        check_bits(bits)
        return _fit(function, bits, density, grid or (4096 if bits <= 5 else 1024))

    def encode(self, x: Tensor) -> Tensor:
        """Return the packed codes of inputs.

        Args:
            x: of any shape; 16-bit numbers are compared in float32.
        """
        wide = x.detach() if x.dtype == torch.float64 else x.detach().to(torch.float32)
        if len(self.boundaries) == 1:
            intervals = (wide > self.boundaries[0]).to(torch.uint8)
        else:
            edges = torch.tensor(self.boundaries, dtype=wide.dtype, device=x.device)
            intervals = torch.bucketize(wide, edges, out_int32=True).to(torch.uint8)
        if self.codes != tuple(range(len(self.codes))):
            intervals = torch.tensor(self.codes, dtype=torch.uint8, device=x.device)[intervals.int()]
        return pack(intervals, self.bits)

    def decode(self, packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the slopes that codes stand for.

        Args:
            packed: what `encode` gave.
            shape: of the inputs.
            dtype: of the slopes.
        """
        levels = torch.tensor(self.levels, dtype=dtype, device=packed.device)
        return levels[unpack(packed, math.prod(shape), self.bits).int()].view(shape)


@lru_cache(maxsize=64)
def _fit(function: ActivationFunction, bits: int, density: Density, grid: int) -> DerivativeCode:
    width = 2 * REACH / grid
    edges = -REACH + width * np.arange(grid + 1)
    x = (edges[:-1] + edges[1:]) / 2
    slope = _slope(function, torch.from_numpy(x)).numpy()
    weight = _weights(x, density)
    exact = _exact(function, x, slope, 2**bits)
    if exact is not None:
        return exact
    starts = _best_intervals(slope, weight, min(2**bits, grid))
    levels = [
        float(np.average(slope[start:end], weights=weight[start:end]))
        for start, end in zip(starts, [*starts[1:], grid], strict=True)
    ]
    chosen = np.repeat(levels, np.diff([*starts, grid]))
    rmse = math.sqrt(float((weight * (slope - chosen) ** 2).sum()))
    boundaries = tuple(float(edges[start]) for start in starts[1:])
    return DerivativeCode(boundaries, tuple(range(len(levels))), tuple(levels), rmse)


def _slope(function: ActivationFunction, x: Tensor) -> Tensor:
    """f'(x) in float64; finite."""
    if function.mixes or function.derivative is None:
        raise ValueError(f"function: the slope of {function.name!r} is not known; give an element-wise function.")
    slope = function.derivative(x)
    if not bool(torch.isfinite(slope).all()):
        at = float(x[~torch.isfinite(slope)][0])
        raise ValueError(
            f"function: the slope of {function.name!r} at {at:.4g} is not finite, so no level can stand for it; leave "
            f"this function uncoded."
        )
    return slope


def _weights(x: np.ndarray, density: Density) -> np.ndarray:
    """The probability of each cell."""
    normal = np.exp(-(x**2) / 2)
    normal, uniform = normal / normal.sum(), np.full(len(x), 1 / len(x))
    return {"normal": normal, "uniform": uniform, "mixed": (normal + uniform) / 2}[density] + 1e-300


def _exact(function: ActivationFunction, x: np.ndarray, slope: np.ndarray, codes: int) -> DerivativeCode | None:
    """The code of a function that is linear between its breaks; None for others, and for more slopes than codes."""
    breaks = [each.at for each in function.breaks if abs(each.at) < REACH]
    pieces = np.split(slope, np.searchsorted(x, breaks))
    if not all(len(piece) and np.ptp(piece) < EXACT for piece in pieces):
        return None
    slopes = [float(piece.mean().round(9)) for piece in pieces]
    levels = sorted(set(slopes))
    if len(levels) > codes:
        return None
    boundaries = tuple(_boundary(function, at, slopes[index + 1]) for index, at in enumerate(breaks))
    return DerivativeCode(boundaries, tuple(levels.index(each) for each in slopes), tuple(levels))


def _boundary(function: ActivationFunction, at: float, right: float) -> float:
    """The break, or the number before it if autograd gives the break itself the slope of its right side."""
    x = torch.tensor([at], requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(function.function(x).sum(), x)
    if abs(float(slope) - right) > 1e-6:
        return at
    return float(torch.nextafter(torch.tensor(at), torch.tensor(-math.inf)))


def _best_intervals(values: np.ndarray, weight: np.ndarray, count: int) -> list[int]:
    """The first cells of `count` intervals with the least weighted square error to their means."""
    cells = len(values)
    zeroth, first, second = (
        np.concatenate([[0.0], np.cumsum(weight * values**power)]) for power in range(3)
    )  # sums up to each cell
    best = np.full((count + 1, cells + 1), np.inf)
    best[0, 0] = 0.0
    came = np.zeros((count + 1, cells + 1), dtype=np.int32)
    for end in range(1, cells + 1):
        mass, total, square = (sums[end] - sums[:end] for sums in (zeroth, first, second))
        lost = np.divide(total**2, mass, out=np.zeros(end), where=mass > 0)  # far out a density rounds to nothing
        cost = np.maximum(square - lost, 0.0)  # of one interval from each start to here
        tried = best[:-1, :end] + cost
        came[1:, end] = tried.argmin(1)
        best[1:, end] = tried[np.arange(count), came[1:, end]]
    starts, end = [], cells
    for used in range(count, 0, -1):
        end = int(came[used, end])
        starts.append(end)
    return starts[::-1]
