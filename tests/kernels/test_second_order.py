"""The compiled loop over columns against plain torch, and both against the formula with numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from actkit.kernels.second_order import reference, round_columns


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (40, 128), (600, 33)])
def test_both_engines_give_the_same(rows: int, columns: int) -> None:
    torch.manual_seed(rows)
    block, upper = torch.randn(rows, columns), torch.randn(columns, columns).triu() * 0.1
    upper.diagonal().abs_().add_(0.5)
    scale, zero = torch.rand(rows, 3) + 0.2, torch.randint(0, 16, (rows, 3)).float()
    groups = torch.randint(0, 3, (columns,))
    found = []
    for engine in (round_columns, reference):
        left = block.clone()
        codes, errors = engine(left, upper, scale, zero, groups, 15)
        assert codes.dtype == torch.uint8 and codes.shape == errors.shape == (rows, columns)
        assert left[:, 0].equal(block[:, 0])
        found.append((codes, errors, left))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("engine", [round_columns, reference])
def test_by_hand(engine) -> None:
    upper = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
    left = torch.tensor([[1.4, 0.5], [-9.0, 2.5]])
    one = torch.ones(2, 1)
    codes, errors = engine(left, upper, one, 2 * one, torch.zeros(2, dtype=torch.long), 7)
    # first column: 1.4 -> 1 (code 3), error 0.4 / 2; -9 is out of range -> -2 (code 0), error -7 / 2
    # second: 0.5 - 0.2 = 0.3 -> 0 (code 2); 2.5 + 3.5 = 6 is out of range -> 5 (code 7), error 1 / 4
    assert codes.tolist() == [[3, 2], [0, 7]]
    torch.testing.assert_close(errors, torch.tensor([[0.2, 0.075], [-3.5, 0.25]]))
    torch.testing.assert_close(left, torch.tensor([[1.4, 0.3], [-9.0, 6.0]]))
