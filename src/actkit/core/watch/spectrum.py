"""Second moments across channels: the Gram matrix, and the singular values that follow from it."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from actkit.core.watch.streaming import Rows, Statistic
from actkit.kernels.gram import add_products

ROUNDS = 12  # of leading(), after which the whole decomposition is the shorter way
PRODUCTS = 8  # in a round
FEW = 16  # channels for each direction at least, or it does not pay


def leading(matrix: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The largest eigenvalues of a symmetric matrix with eigenvectors, as exact as `torch.linalg.eigh` has them.

    Subspace iteration from random columns, until each pair leaves a residual of rounding (1e-12 of the largest value).
    Of 1,536 channels the first 16 take a quarter of the time of all.

    Args:
        matrix: float64 [n, n], without negative eigenvalues.
        k: how many.

    Returns:
        Ascending [k] and [n, k]; None if they are many or do not stand apart, so that all are to be computed.
    """
    channels = len(matrix)
    if k * FEW > channels or not torch.isfinite(matrix).all():
        return None
    start = torch.randn(channels, 3 * k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start.to(matrix.device))[0]
    for _ in range(ROUNDS):
        for _ in range(PRODUCTS // 2):
            basis = torch.linalg.qr(matrix @ (matrix @ basis))[0]
        image = matrix @ basis
        squares, turns = torch.linalg.eigh(basis.t() @ image)
        squares, turns = squares[-k:], turns[:, -k:]
        vectors = basis @ turns
        if bool(((image @ turns - vectors * squares).norm(dim=0) <= 1e-12 * squares[-1]).all()):
            return squares, vectors
    return None


class Gram(Statistic):
    """X^T X of all rows. Memory: 8 * channels^2 bytes in float64, half of it in float32.

    It is symmetric, so that only its upper half is computed (`kernels/gram.py`).

    Args:
        dtype: in which products are taken and summed; float32 is twice as fast.
    """

    _settings = ("dtype",)

    _gram: Tensor

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"dtype: {dtype} was given; sums of products take torch.float64 or torch.float32.")
        self.dtype = dtype

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        return {"gram": torch.zeros(channels, channels, dtype=self.dtype, device=device)}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        add_products(self._gram, x)

    def _merge(self, other: Self) -> None:
        self._gram += other._gram.to(self._device)

    @property
    def value(self) -> Tensor:
        """X^T X: [channels, channels]."""
        self._needs_rows()
        return self._gram.triu() + self._gram.triu(1).t()

    @property
    def mean_gram(self) -> Tensor:
        """X^T X / n: [channels, channels]."""
        return self.value / self.count


class Spectrum(Statistic):
    """Singular values of the rows X [n, channels], from X^T X.

    Singular values below about 1e-8 of the largest are lost to rounding. Memory: 8 * channels^2 bytes. Only the upper
    half of X^T X is computed.

    Args:
        rank: how many `values` to give, None for all.
        centred: of X minus its mean.
    """

    _settings = ("rank", "centred")

    _gram: Tensor
    _sum: Tensor

    def __init__(self, rank: int | None = None, centred: bool = False) -> None:
        if rank is not None and rank < 1:
            raise ValueError(f"rank: {rank} was given; give at least 1, or None for all.")
        self.rank, self.centred = rank, centred

    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        shapes = {"gram": (channels, channels), "sum": (channels,)}
        return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    def _update(self, x: Tensor, rows: Rows | None) -> None:
        x = x.double()
        add_products(self._gram, x)
        self._sum += x.sum(0)

    def _merge(self, other: Self) -> None:
        self._gram += other._gram.to(self._device)
        self._sum += other._sum.to(self._device)

    @property
    def values(self) -> Tensor:
        """The largest singular values, descending: [rank], or [channels]."""
        return self._all()[: self.rank]

    @property
    def scatter(self) -> Tensor:
        """The sum of products of channels over rows, of X minus its mean if `centred`: float64 [channels, channels]."""
        self._needs_rows()
        gram = self._gram.triu() + self._gram.triu(1).t()
        return gram - torch.outer(self._sum, self._sum) / self.count if self.centred else gram

    def directions(self, k: int) -> tuple[Tensor, Tensor]:
        """The first k right singular vectors, each with its largest entry positive, and their singular values.

        Args:
            k: how many, at most as many as there are channels.

        Returns:
            Float64 [k, channels] and [k], descending.

        Raises:
            ValueError: k is below 1 or above the channels.
        """
        if not 1 <= k <= (self.channels or k):
            raise ValueError(f"k: {k} was given; give 1 to {self.channels}, the number of channels.")
        scatter = self.scatter
        found = leading(scatter, k)
        squares, vectors = torch.linalg.eigh(scatter) if found is None else found
        rows = vectors.flip(1).t()[:k]
        signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        return rows * signs, squares.flip(0)[:k].clamp(min=0).sqrt()

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the singular values as shares (Roy and Vetterli 2007); 0 for X = 0."""
        values = self._all()
        if not values.any():
            return 0.0
        shares = values / values.sum()
        return float(torch.special.entr(shares).sum().exp())

    def explained(self, k: int) -> float:
        """The share of the sum of squares that lies in the first k directions; 1 for X = 0."""
        if k < 0:
            raise ValueError(f"k: {k} was given; give 0 or more.")
        squares = self._all().square()
        return float(squares[:k].sum() / squares.sum()) if squares.any() else 1.0

    def _all(self) -> Tensor:
        return torch.linalg.eigvalsh(self.scatter).clamp(min=0).sqrt().flip(0)
