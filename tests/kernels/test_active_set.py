import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actkit.kernels import compact

NAN, INF = math.nan, math.inf


def indices(active, row=0):
    return active.indices[row, : active.counts[row]].tolist()


def chosen_by_python(x, score, threshold, k):
    """The rule, spelled out: NaN above all, then the larger |x| * score, of equal ones the first."""
    scored = [abs(v) if s is None else (torch.tensor(v).abs() * torch.tensor(s)).item() for v, s in zip(x, score)]
    if k is not None:
        nans = [j for j, s in enumerate(scored) if math.isnan(s)]
        others = sorted((j for j in range(len(x)) if j not in nans), key=lambda j: (-scored[j], j))
        return sorted((nans + others)[:k])
    cut = -1 if threshold is None else torch.tensor(threshold).item()  # as a float32
    return [j for j, s in enumerate(scored) if math.isnan(s) or s > cut]


floats = st.floats(width=32) | st.sampled_from([0.0, 1.0, -1.0, 2.0, NAN, INF, -INF, 1e-45])


@settings(deadline=None, max_examples=150)
@given(data=st.data(), n=st.integers(1, 40))
def test_the_active_set_follows_the_rule(data, n):
    x = data.draw(st.lists(floats, min_size=n, max_size=n))
    mode = data.draw(st.sampled_from(["threshold", "k", "all"]))
    threshold = data.draw(st.sampled_from([0.0, 1e-45, 0.5, 1.0, INF])) if mode == "threshold" else None
    k = data.draw(st.integers(0, n + 3)) if mode == "k" else None
    weighted = mode != "all" and data.draw(st.booleans())
    score = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=n, max_size=n)) if weighted else None
    active = compact(torch.tensor(x), threshold, k, None if score is None else torch.tensor(score))
    expected = chosen_by_python(x, score or [None] * n, threshold, k)
    assert indices(active) == expected
    count = len(expected)
    torch.testing.assert_close(active.values[0, :count], torch.tensor(x)[expected], rtol=0, atol=0, equal_nan=True)
    assert not active.indices[0, count:].any() and not active.values[0, count:].any()


def test_ties_go_to_the_lowest_index():
    assert indices(compact(torch.tensor([1.0, -2.0, 2.0, 1.0, 2.0]), k=2)) == [1, 2]
    assert indices(compact(torch.ones(5), k=3)) == [0, 1, 2]


def test_more_nans_than_k_are_taken_in_order():
    assert indices(compact(torch.tensor([INF, NAN, 1.0, NAN, NAN]), k=2)) == [1, 3]


def test_each_row_has_its_own_set_and_keeps_the_shape():
    active = compact(torch.tensor([[[0.0, 3.0, 1.0]], [[2.0, 0.0, 0.0]]]).bfloat16(), threshold=0.5)
    assert (indices(active, 0), indices(active, 1)) == ([1, 2], [0])
    assert (active.shape, active.dtype, active.density) == ((2, 1, 3), torch.bfloat16, 0.5)


def test_scores_are_compared_in_float32():
    x = torch.tensor([1e-30, 1e30]).bfloat16()
    score = torch.tensor([1e-10, 1e8])
    assert indices(compact(x, threshold=1e37, score=score)) == [1]
    assert indices(compact(x, threshold=0.0, score=score)) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"threshold": -0.1}, "threshold: -0.1"),
        ({"threshold": NAN}, "threshold: nan"),
        ({"k": -2}, "k: -2"),
        ({"k": 1, "threshold": 1.0}, "one of them"),
        ({"score": torch.ones(4)}, "nothing would be selected"),
        ({"k": 1, "score": torch.ones(5)}, "score: shape"),
        ({"x": torch.ones(3, 4)}, "3 rows"),
        ({"x": torch.tensor(1.0)}, r"shape \(\)"),
        ({"x": torch.ones(2, 0)}, "not empty"),
        ({"x": torch.ones(4, dtype=torch.float64)}, "float64"),
        ({"x": torch.ones(4, dtype=torch.int32)}, "int32"),
    ],
)
def test_bad_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        compact(**{"x": torch.ones(4), **arguments})
