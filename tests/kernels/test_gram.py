"""Second moments of bfloat16 in the compiled kernel and in plain torch, against float64."""

from __future__ import annotations

import pytest
import torch

from actkit.kernels.gram import LEAST, add_products, reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (7, LEAST), (33, 100), (513, 144), (2048, 192)])
def test_the_upper_half_is_that_of_float64(rows: int, channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, channels, generator=generator) * torch.logspace(-2, 2, channels)).to(dtype)
    start = torch.randn(channels, channels, generator=generator)
    expected = (start.double() + x.double().t() @ x.double()).triu()
    size = (x.double().abs().t() @ x.double().abs()).triu() + start.double().abs()
    for engine in (add_products, reference):
        found = start.clone()
        engine(found, x)
        # each sum to the rounding of float32
        assert bool(((found.triu().double() - expected).abs() <= 2**-24 * (8 + rows**0.5) * size + 1e-12).all())


def test_sums_in_float64_stay_there() -> None:
    x = torch.randn(50, LEAST, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = torch.zeros(LEAST, LEAST, dtype=torch.float64)
    add_products(found, x)
    torch.testing.assert_close(found.triu(), (x.double().t() @ x.double()).triu(), rtol=1e-14, atol=1e-14)


def test_rows_that_do_not_lie_side_by_side() -> None:
    x = torch.randn(40, 2 * LEAST, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, expected = torch.zeros(LEAST, LEAST), torch.zeros(LEAST, LEAST)
    add_products(found, x[:, ::2])
    reference(expected, x[:, ::2].contiguous())
    torch.testing.assert_close(found.triu(), expected.triu())
