"""Tasks whose inputs have a known geometry: how their kernel is aligned with that of the targets is chosen.

    K_x = a K_y / |K_y| + b R / |R|,   a / sqrt(a^2 + b^2) = alignment,   R orthogonal to K_y, trace d
    x = sqrt(dim) E sqrt(K_x) + noise,   E orthonormal

R has the span of the complement of the targets and of the constant; its eigenvalues are equal or drawn from a Dirichlet
distribution. Targets are columns of a Hadamard matrix: balanced, orthogonal, none constant.
Settled by the reference code (Kelarion/repler): the map is orthonormal times sqrt(dim), so that x x^T / dim is K_x and
noise of standard deviation 1 is small beside a condition. Without that factor no net could reach the accuracies that
the paper trains to. `NudgedXor` is XOR with a third axis that makes it linearly separable by epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actkit.interpretation.representational_geometry.dichotomies import balanced_dichotomies
from actkit.interpretation.representational_geometry.kernels import Matrix, cka, kernel


class Samples(NamedTuple):
    """Noisy samples.

    Attributes:
        x: float32 [samples, dim].
        y: float32 [samples, targets], 0 or 1.
        condition: int64 [samples].
    """

    x: Tensor
    y: Tensor
    condition: Tensor


class Task:
    """Conditions with noise-free inputs [conditions, dim] and targets [conditions, targets]."""

    inputs: NDArray[np.float64]
    targets: NDArray[np.float64]
    noise: float

    def sample(self, count: int, seed: int = 0, noise: float | None = None) -> Samples:
        """Draw samples of random conditions.

        Args:
            count: how many.
            seed: of the drawing.
            noise: standard deviation of each input; None for the task's.
        """
        draw = np.random.default_rng([seed, 1])
        condition = draw.integers(0, len(self.inputs), count)
        scale = self.noise if noise is None else noise
        x = self.inputs[condition] + scale * draw.standard_normal((count, self.inputs.shape[1]))
        return Samples(
            torch.from_numpy(x).float(), torch.from_numpy(self.targets[condition]).float(), torch.from_numpy(condition)
        )

    @property
    def clean(self) -> Tensor:
        """The noise-free inputs: float32 [conditions, dim]."""
        return torch.from_numpy(self.inputs).float()

    @property
    def input_kernel(self) -> Matrix:
        """Of the noise-free inputs, centred."""
        return kernel(self.inputs)

    @property
    def target_kernel(self) -> Matrix:
        """Of the targets as -1 and 1, centred."""
        return kernel(2 * self.targets - 1)

    @property
    def reached(self) -> float:
        """CKA of the two: the alignment as it is."""
        return cka(self.input_kernel, self.target_kernel)


@dataclass(frozen=True)
class KernelTask(Task):
    """Random classification with a chosen alignment of inputs and targets.

    Attributes:
        conditions: a power of two.
        number: of binary targets, 1 to log2 of the conditions.
        alignment: 0 to sqrt(number / (conditions - 1)), that of isotropic inputs.
        rank: of the part of the input kernel that is orthogonal to the targets; None for all that is left.
        spectrum: 0 for equal eigenvalues, else the scale of their Dirichlet distribution (the paper: 0.5).
        dim: inputs of a sample.
        noise: standard deviation of each of them.
        seed: of everything.

    Raises:
        ValueError: a value is out of bounds.
    """

    conditions: int = 32
    number: int = 1
    alignment: float = 0.0
    rank: int | None = None
    spectrum: float = 0.0
    dim: int = 100
    noise: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        d, k = self.conditions, self.number
        bits = d.bit_length() - 1
        if d < 4 or d != 1 << bits:
            raise ValueError(f"conditions: {d} were given; give a power of two, 4 or more.")
        if not 1 <= k <= bits:
            raise ValueError(f"number: {k} targets were given for {d} conditions; give 1 to {bits}.")
        most = float(np.sqrt(k / (d - 1)))
        if not 0 <= self.alignment <= most + 1e-9:
            raise ValueError(f"alignment: {self.alignment} was given; give 0 to {most:.4f} for {k} of {d} conditions.")
        left = d - 1 - k
        if self.rank is not None and not bits <= self.rank <= left:
            raise ValueError(f"rank: {self.rank} was given; give {bits} to {left}, what targets and mean leave.")
        if self.dim < d or self.spectrum < 0 or self.noise < 0:
            raise ValueError(
                f"dim, spectrum, noise: {self.dim}, {self.spectrum}, {self.noise} were given; give at least {d}, and 0 "
                f"or more."
            )

    @cached_property
    def targets(self) -> NDArray[np.float64]:  # type: ignore[override]
        """[conditions, targets], 0 or 1."""
        from scipy.linalg import hadamard

        columns = [1 << bit for bit in range(self.number)]  # each halves what the others leave whole
        return np.asarray((hadamard(self.conditions)[:, columns] + 1) / 2, dtype=np.float64)

    @cached_property
    def inputs(self) -> NDArray[np.float64]:  # type: ignore[override]
        """[conditions, dim], noise-free."""
        from scipy.stats import ortho_group

        d, draw = self.conditions, np.random.default_rng([self.seed, 0])
        signs = 2 * self.targets - 1
        used = np.concatenate((np.ones((d, 1)), signs), axis=1) / np.sqrt(d)  # orthonormal
        rest = np.linalg.svd(np.eye(d) - used @ used.T)[0][:, : d - 1 - self.number]
        size = self.rank or rest.shape[1]
        axes = rest @ ortho_group.rvs(rest.shape[1], random_state=draw)[:, :size] if rest.shape[1] > 1 else rest
        flat = np.full(size, 1 / size)
        values = draw.dirichlet(np.full(size, 1 / self.spectrum)) if self.spectrum else flat
        c = self.alignment
        ours = signs @ signs.T / np.linalg.norm(signs @ signs.T)
        other = (axes * values) @ axes.T
        found = c * ours + np.sqrt(1 - c**2) * other / np.linalg.norm(other)
        found *= d / np.trace(found)
        eigenvalues, vectors = np.linalg.eigh(found)
        kept = eigenvalues > 1e-9
        points = vectors[:, kept] * np.sqrt(eigenvalues[kept])  # [conditions, rank]
        expansion = ortho_group.rvs(self.dim, random_state=draw)[: points.shape[1]] * np.sqrt(self.dim)
        return np.asarray(points @ expansion)


@dataclass(frozen=True)
class NudgedXor(Task):
    """XOR of two inputs, and a third one that is the answer times epsilon.

    Attributes:
        epsilon: 0 for XOR alone.
        dim: inputs of a sample, a multiple of 3: a third for each axis.
        noise: standard deviation of each.
        seed: of the directions.
    """

    epsilon: float = 0.0
    dim: int = 99
    noise: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim < 3 or self.dim % 3 or self.noise < 0:
            raise ValueError(f"dim, noise: {self.dim}, {self.noise} were given; give a multiple of 3, and 0 or more.")

    @cached_property
    def bits(self) -> NDArray[np.float64]:
        """[4, 2], 0 or 1."""
        return np.array(list(product((0.0, 1.0), repeat=2)))

    @cached_property
    def targets(self) -> NDArray[np.float64]:  # type: ignore[override]
        """[4, 1], 0 or 1."""
        return self.bits.sum(1, keepdims=True) % 2

    @cached_property
    def inputs(self) -> NDArray[np.float64]:  # type: ignore[override]
        """[4, dim], noise-free."""
        third = self.dim // 3
        axes = np.abs(np.random.default_rng([self.seed, 0]).standard_normal((3, third)))
        axes *= np.sqrt(third) / np.linalg.norm(axes, axis=1, keepdims=True)
        strengths = np.concatenate((2 * self.bits - 1, self.epsilon * (2 * self.targets - 1)), axis=1)
        return np.concatenate([strengths[:, [axis]] * axes[axis] for axis in range(3)], axis=1)


@dataclass(frozen=True)
class CubeTask(Task):
    """The corners of a cube, divided by one of its six types of balanced dichotomies.

    Attributes:
        kind: 0 to 5, from the linear one, which cuts 4 of the 12 edges, to the parity, which cuts all.
        dim: inputs of a sample.
        noise: standard deviation of each.
        seed: of the directions.
    """

    kind: int = 0
    dim: int = 100
    noise: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.kind <= 5 or self.dim < 3 or self.noise < 0:
            raise ValueError(
                f"kind, dim, noise: {self.kind}, {self.dim}, {self.noise} were given; give 0 to 5, 3 or more, and 0 or "
                f"more."
            )

    @cached_property
    def targets(self) -> NDArray[np.float64]:  # type: ignore[override]
        """[8, 1], 0 or 1."""
        return cube_dichotomies()[self.kind][:, None].astype(np.float64)

    @cached_property
    def inputs(self) -> NDArray[np.float64]:  # type: ignore[override]
        """[8, dim], noise-free."""
        from scipy.stats import ortho_group

        draw = np.random.default_rng([self.seed, 0])
        corners = np.array(list(product((-1.0, 1.0), repeat=3))) / np.sqrt(3)
        return np.asarray(corners @ ortho_group.rvs(self.dim, random_state=draw)[:3] * np.sqrt(self.dim))


def cube_dichotomies() -> list[NDArray[np.bool_]]:
    """List one balanced dichotomy of the cube's corners for each type, up to rotation, reflection and exchange.

    Returns:
        Six of them [8], in the order of the edges they cut.
    """
    corners = np.array(list(product((0, 1), repeat=3)))
    near = np.abs(corners[:, None] - corners[None]).sum(-1) == 1
    types: dict[tuple[int, tuple[tuple[int, ...], ...]], NDArray[np.bool_]] = {}
    for dichotomy in balanced_dichotomies(8):
        cut = int(near[dichotomy][:, ~dichotomy].sum())
        inside = sorted(tuple(sorted(near[side][:, side].sum(0).tolist())) for side in (dichotomy, ~dichotomy))
        types.setdefault((cut, tuple(inside)), dichotomy)
    return [types[each] for each in sorted(types)]
