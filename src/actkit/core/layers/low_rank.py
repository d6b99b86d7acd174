"""Low rank, once: the closest product of two factors to a weight, in which norm, of which rank, and by which algorithm.

    min ||(W - L R) M||_F,   W [out, in],   L [out, r],   R [r, in]
    W M = U S V^T,   L = U_r S_r^(1/2),   R = S_r^(1/2) V_r^T M^-1

M = 1 is the plain norm; M M^T = E[x x^T], the Gram matrix of the inputs, makes it the mean squared error of the outputs
(SVD-LLM, 2024, arXiv:2403.07378; DRONE); a diagonal M weighs input channels, such as by the root of their summed
squared gradients (FWSVD, 2022, arXiv:2207.00112). All is computed in float64. Both factors get the root of the singular
values, so that they are of one size, which rounding them needs.

`algorithm`: 'svd' decomposes whole; 'gram' takes eigenvectors of the smaller of A A^T and A^T A (faster; singular
values below 1e-8 of the largest are lost); 'random' is the randomised range finder with two power iterations (Halko,
Martinsson and Tropp, 2011), seeded, for large weights and small ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Algorithm = Literal["svd", "gram", "random"]
OVERSAMPLING, POWERS = 16, 2  # of the randomised algorithm
SMALLEST = 1.1e-5  # importance of a channel beside that of the largest, as in FWSVD's release
FLOOR = 1e-6  # of the mean eigenvalue of a Gram matrix: what no input reached still counts that much


class Spectrum(NamedTuple):
    """The largest singular values of a matrix and their vectors, float64.

    Attributes:
        left: [out, rank].
        values: [rank], descending.
        right: [rank, in].
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return [out, rank] and [rank, in], each with the root of the singular values."""
        root = self.values.sqrt()
        return self.left * root, root[:, None] * self.right


class Weighted(Protocol):
    """What `cached_factors` reads of a linear layer."""

    @property
    def path(self) -> str:
        """Its name."""
        ...

    @property
    def weight(self) -> Tensor:
        """[out, in]."""
        ...


def decompose(matrix: Tensor, rank: int, algorithm: Algorithm = "svd", seed: int = 0) -> Spectrum:
    """Find the closest matrix of a rank.

    Args:
        matrix: [out, in].
        rank: 1 to the smaller of the two.
        algorithm: see above.
        seed: of 'random'.

    Raises:
        ValueError: the rank is out of bounds.
    """
    check_rank(rank, matrix.shape)
    matrix = matrix.detach().double()
    if algorithm == "gram":
        return _by_gram(matrix, rank)
    if algorithm == "random":
        return _by_chance(matrix, rank, seed)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return Spectrum(u[:, :rank], s[:rank], vh[:rank])


def _by_gram(matrix: Tensor, rank: int) -> Spectrum:
    wide = matrix.shape[0] <= matrix.shape[1]
    rows = matrix if wide else matrix.t()
    _, vectors = torch.linalg.eigh(rows @ rows.t())  # ascending
    first = vectors[:, -rank:].flip(1)  # [smaller, rank]
    second = first.t() @ rows  # [rank, larger]: singular values times the other vectors
    values = second.norm(dim=1)
    second = torch.where(values > 0, second.t() / values, 0).t()
    return Spectrum(first, values, second) if wide else Spectrum(second.t(), values, first.t())


def _by_chance(matrix: Tensor, rank: int, seed: int) -> Spectrum:
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return Spectrum((basis @ u)[:, :rank], s[:rank], vh[:rank])


def low_rank(weight: Tensor, rank: int, algorithm: Algorithm = "svd") -> tuple[Tensor, Tensor]:
    """Return the closest factors [out, rank] and [rank, in] of a weight [out, in], in its dtype.

    Args:
        weight: [out, in].
        rank: 1 to the smaller of the two.
        algorithm: see above.
    """
    left, right = decompose(weight, rank, algorithm).factors()
    return stored(left, weight.dtype), stored(right, weight.dtype)


def factored(
    weight: Tensor,
    rank: int,
    *,
    gram: Tensor | None = None,
    importance: Tensor | None = None,
    algorithm: Algorithm = "svd",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the factors of a weight that are closest where it matters, float64.

    Args:
        weight: [out, in].
        rank: 1 to the smaller of the two.
        gram: [in, in], the mean of x x^T over inputs; None for no whitening.
        importance: [in], how much the square of an error in each input channel's weights counts; None for all alike.
        algorithm: see above.
        seed: of 'random'.

    Returns:
        [out, rank] and [rank, in].
    """
    given = weight.detach().double()
    if gram is not None:
        there, back = whitening(gram.to(given.device))
    elif importance is not None:
        root = (importance.to(given) / float(importance.max().clamp(min=1e-300)) + SMALLEST).sqrt()
        there, back = root.diag(), root.reciprocal().diag()
    else:
        return decompose(given, rank, algorithm, seed).factors()
    left, right = decompose(given @ there, rank, algorithm, seed).factors()
    return left, right @ back


def factored_by_head(
    weight: Tensor, heads: int, rank: int, **settings: Tensor | Algorithm | int | None
) -> tuple[Tensor, Tensor]:
    """Return the factors of each head's rows of a weight, float64.

    Args:
        weight: [heads * size, in].
        heads: how many.
        rank: of each head, 1 to the smaller of size and in.
        settings: as those of `factored`.

    Returns:
        [heads * size, rank] and [heads * rank, in], as `LowRankWeight` takes them.
    """
    parts = [factored(each, rank, **settings) for each in weight.unflatten(0, (heads, -1))]  # type: ignore[arg-type]
    return torch.cat([left for left, _ in parts]), torch.cat([right for _, right in parts])


def whitening(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return M with M M^T = gram, and its inverse, float64.

    Eigenvalues below 1e-6 of their mean are raised to that, so that a direction that no input took is the last to go,
    and not the first.

    Args:
        gram: [in, in], symmetric.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    floor = float(values.mean()) * FLOOR
    root = values.clamp(min=floor if floor > 0 else 1.0).sqrt()
    return vectors * root, (vectors / root).t()


def rank_within(outputs: int, inputs: int, budget: float, multiple_of: int = 1) -> int:
    """Return the largest rank whose factors take at most a share of a weight's numbers; at least one multiple.

    Args:
        outputs: of the weight.
        inputs: of the weight.
        budget: the share.
        multiple_of: the rank is a multiple of it.
    """
    rank = int(budget * outputs * inputs / (outputs + inputs))
    return min(max(rank // multiple_of, 1) * multiple_of, outputs, inputs)


def check_rank(rank: int, shape: tuple[int, ...] | torch.Size, path: str = "") -> None:
    """Raise ValueError if no matrix of this shape has factors of that rank.

    Args:
        rank: that was asked for.
        shape: (out, in).
        path: of the layer, for the error.
    """
    if not 1 <= rank <= min(shape):
        where = f"{path} has" if path else "the matrix has"
        raise ValueError(
            f"rank: {rank} was given, and {where} {shape[1]} inputs and {shape[0]} outputs; give 1 to {min(shape)}."
        )


def captured(matrix: Tensor, values: Tensor) -> float:
    """Return the share of a matrix's squared entries that singular values [rank] hold; 1 if all are 0."""
    total = float(matrix.double().square().sum())
    return float(values.square().sum()) / total if total else 1.0


def cached_factors(largest: Callable[[int, int], int]) -> Callable[[Weighted, int], tuple[Tensor, Tensor]]:
    """Return `low_rank` for layers, with each weight decomposed once, at the largest rank that will be asked for.

    Args:
        largest: of (outputs, inputs).
    """
    known: dict[str, tuple[Tensor, Tensor]] = {}

    def factors(linear: Weighted, rank: int) -> tuple[Tensor, Tensor]:
        if linear.path not in known:
            known[linear.path] = low_rank(linear.weight, largest(*linear.weight.shape))
        left, right = known[linear.path]
        return left[:, :rank], right[:rank]

    return factors


def stored(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor in the dtype of its layer, laid out as it loads: other strides round differently."""
    return factor.to(dtype).contiguous()
