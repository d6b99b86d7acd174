"""Factors against NumPy's singular values, closed forms of the weighted errors, and the randomised bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actkit.core.layers.low_rank import (
    SMALLEST,
    cached_factors,
    captured,
    decompose,
    factored,
    factored_by_head,
    low_rank,
    rank_within,
    whitening,
)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("algorithm", ["svd", "gram", "random"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_values_are_those_of_numpy(algorithm: str, shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    found = decompose(weight, 5, algorithm)  # type: ignore[arg-type]
    every = np.linalg.svd(weight.numpy(), compute_uv=False)
    np.testing.assert_allclose(found.values, every[:5], rtol=1e-9 if algorithm != "random" else 2e-2)
    left, right = found.factors()
    np.testing.assert_allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-12)  # both get the root
    error = float((weight - left @ right).norm())
    best = float(np.sqrt((every[5:] ** 2).sum()))
    assert best - 1e-9 <= error <= best * (1 + 1e-9 if algorithm != "random" else 1.02)
    assert captured(weight, found.values) == pytest.approx((every[:5] ** 2).sum() / (every**2).sum(), rel=2e-2)


def test_the_randomised_algorithm_finds_a_matrix_of_that_rank_and_goes_by_its_seed() -> None:
    weight = matrix(300, 12) @ matrix(12, 200, seed=1)
    left, right = decompose(weight, 12, "random", seed=3).factors()
    torch.testing.assert_close(left @ right, weight, rtol=0, atol=1e-9)
    again, other = (decompose(weight, 4, "random", seed=seed).left for seed in (3, 4))
    assert torch.equal(again, decompose(weight, 4, "random", seed=3).left) and not torch.equal(again, other)


def test_whitened_factors_lose_as_little_of_the_outputs_as_any() -> None:
    """The loss is that of the best matrix of the rank for W X, by Eckart and Young."""
    weight, x = matrix(12, 20), matrix(20, 500, seed=1) * torch.logspace(0, -3, 20, dtype=torch.float64)[:, None]
    left, right = factored(weight, 4, gram=x @ x.t() / 500)
    best = torch.linalg.svdvals(weight @ x)[4:].norm()
    torch.testing.assert_close((weight @ x - left @ (right @ x)).norm(), best, rtol=1e-5, atol=0)
    plain = decompose(weight, 4).factors()
    assert (weight @ x - plain[0] @ (plain[1] @ x)).norm() > 1.2 * best


def test_inputs_of_a_subspace_are_served_and_the_others_are_not_dropped() -> None:
    weight, basis = matrix(10, 16), torch.linalg.qr(matrix(16, 3, seed=1)).Q
    gram = basis @ basis.t()  # 13 eigenvalues are 0
    left, right = factored(weight, 3, gram=gram)
    torch.testing.assert_close(left @ right @ basis, weight @ basis, rtol=0, atol=1e-6)
    left, right = factored(weight, 10, gram=gram)
    torch.testing.assert_close(left @ right, weight, rtol=0, atol=1e-6)
    there, back = whitening(torch.zeros(4, 4))
    assert torch.equal(there @ back, torch.eye(4, dtype=torch.float64))


def test_fisher_weighs_channels_as_in_the_release() -> None:
    weight, importance = matrix(9, 14), torch.rand(14, generator=torch.Generator().manual_seed(2)).double()
    importance[3] = 0
    left, right = factored(weight, 4, importance=importance)
    weights = importance / importance.max() + 1e-6 + 1e-5
    assert pytest.approx(1.1e-5) == SMALLEST
    scaled = weights.sqrt().diag() @ weight.t()  # [in, out], as the release has it
    u, s, vh = torch.linalg.svd(scaled, full_matrices=False)
    literal = weights.rsqrt().diag() @ (u[:, :4] * s[:4]) @ vh[:4]
    torch.testing.assert_close(left @ right, literal.t())


def test_heads_are_factored_one_by_one() -> None:
    weight, gram = matrix(12, 8), matrix(8, 8, seed=1)
    gram = gram @ gram.t()
    left, right = factored_by_head(weight, 3, 2, gram=gram)
    assert left.shape == (12, 2) and right.shape == (6, 8)
    for head in range(3):
        own = factored(weight[4 * head : 4 * head + 4], 2, gram=gram)
        torch.testing.assert_close(left[4 * head : 4 * head + 4] @ right[2 * head : 2 * head + 2], own[0] @ own[1])


def test_ranks_from_a_budget() -> None:
    assert rank_within(576, 576, 0.5) == int(0.5 * 576 * 576 / 1152) == 144
    assert rank_within(1536, 576, 0.4, multiple_of=16) == 160 and rank_within(8, 8, 0.01) == 1
    for outputs, inputs in ((100, 37), (64, 1000)):
        rank = rank_within(outputs, inputs, 0.3)
        assert rank * (outputs + inputs) <= 0.3 * outputs * inputs < (rank + 1) * (outputs + inputs)


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_ranks_out_of_bounds(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank: {rank} was given, and the matrix has 8 inputs and 10 outputs"):
        decompose(matrix(10, 8), rank)


def test_each_weight_is_decomposed_once(monkeypatch) -> None:
    from actkit.core.layers import low_rank as room

    asked = []
    monkeypatch.setattr(room, "decompose", lambda *args: asked.append(args[1]) or decompose(*args))

    class Named(nn.Linear):
        path = "here"

    layer, factors = Named(10, 12), cached_factors(lambda outputs, inputs: 6)
    few, many = factors(layer, 2), factors(layer, 5)
    assert asked == [6] and few[0].shape == (12, 2) and many[1].shape == (5, 10)
    left, right = low_rank(layer.weight, 2)
    torch.testing.assert_close(few[0] @ few[1], left @ right)
