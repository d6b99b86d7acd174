"""The stable top-k against Python's sort, budgets against their own equations."""

from __future__ import annotations

import math

import pytest
import torch

from actkit.core.ground.largest import allocate, largest


@pytest.mark.parametrize("k", [0, 1, 5, 12, 20])
def test_of_equals_the_first_are_marked(k: int) -> None:
    x = torch.randint(-2, 4, (100, 12), generator=torch.Generator().manual_seed(1)).float()
    for row, mask in zip(x.tolist(), largest(x, k).tolist(), strict=True):
        kept = sorted(range(12), key=lambda i: -row[i])[:k]  # Python's sort is stable
        assert [i for i in range(12) if mask[i]] == sorted(kept)


def test_nan_and_infinity() -> None:
    x = torch.tensor([1.0, math.nan, -math.inf, math.inf, 2.0])
    assert largest(x, 3).tolist() == [False, True, False, True, True]
    assert largest(torch.full((4,), math.nan), 2).tolist() == [True, True, False, False]
    assert largest(torch.full((4,), -math.inf), 2).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="k: -1 was given; give 0 or more"):
        largest(x, -1)


def test_shares_are_in_proportion_within_bounds_and_meet_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(100):
        parts = 1 + case % 9
        scores = torch.rand(parts, generator=generator, dtype=torch.float64) ** 3
        scores[::3] = scores[::3] * (case % 2)
        sizes = torch.rand(parts, generator=generator, dtype=torch.float64) + 0.1
        low, budget, high = torch.rand(3, generator=generator, dtype=torch.float64).sort().values.tolist()
        shares = allocate(scores, budget, low, high, sizes)
        assert float((shares * sizes).sum() / sizes.sum()) == pytest.approx(budget, abs=1e-9)
        assert float(shares.min()) >= low and float(shares.max()) <= high
        inner = (shares > low + 1e-9) & (shares < high - 1e-9) & (scores > 0)
        if int(inner.sum()) > 1 and bool((shares[scores == 0] <= low + 1e-9).all()):
            ratios = shares[inner] / scores[inner]
            torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-6, atol=0)


def test_equal_scores_share_alike_and_parts_without_one_get_what_is_left() -> None:
    assert allocate([2, 2, 2], 0.3).tolist() == pytest.approx([0.3] * 3)
    assert allocate([0, 0], 0.3).tolist() == pytest.approx([0.3] * 2)
    assert allocate([1, 0, 0], 0.5).tolist() == pytest.approx([1.0, 0.25, 0.25])
    assert allocate([1, 3], 0.2).tolist() == pytest.approx([0.1, 0.3])
    assert allocate([1, 3], 0.0).tolist() == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"scores": [1, 2], "budget": 1.5}, "budget: 1.5 was given with low=0.0 and high=1.0"),
        ({"scores": [1, -2], "budget": 0.5}, r"scores: \[1.0, -2.0\] were given"),
        ({"scores": [], "budget": 0.5}, r"scores: \[\] were given"),
        ({"scores": [1, 2], "budget": 0.5, "sizes": [1]}, r"sizes: \[1.0\] were given"),
    ],
)
def test_bad_values_are_refused(given: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        allocate(**given)  # type: ignore[arg-type]
