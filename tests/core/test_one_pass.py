"""The one pass over all statistics against each statistic's own update, the reference in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actkit.core.watch import one_pass, streaming
from actkit.core.watch.one_pass import update_all
from actkit.core.watch.statistics import AbsMax, Density, Gram, Moments, Quantiles, Rows, Sample, Statistic
from actkit.kernels import summaries

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHANNELS = (1, 7, 256, 300)  # less than a strip, one, and more


def kinds() -> list[Statistic]:

    return [Moments(), AbsMax(), Density(), Density(threshold=0.3), Quantiles(), Gram(), Sample(5)]


@st.composite
def data(draw: Any) -> Tensor:
    """Rows with zeros of both signs, denormals, and magnitudes far apart; at times not contiguous."""
    n, channels = draw(st.sampled_from([1, 3, 255, 257, 600])), draw(st.sampled_from(CHANNELS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    spread = 10 ** (4 * torch.rand(channels, generator=generator) - 2)
    x = torch.randn(n, channels, generator=generator) * spread + draw(st.sampled_from([0.0, 50.0]))
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e-38, 0.3, -0.3])
    chosen = torch.rand(n, channels, generator=generator) < draw(st.sampled_from([0.0, 0.5]))
    x = torch.where(chosen, special[torch.randint(len(special), x.shape, generator=generator)], x)
    x = x.to(draw(st.sampled_from(DTYPES)))
    return x.t().contiguous().t() if draw(st.booleans()) else x


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(one_pass, "LEAST", 0)
    monkeypatch.setattr(streaming, "CHUNK", 40_000)
    yield


@given(x=data(), parts=st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_the_pass_gives_what_each_update_gives(x: Tensor, parts: int) -> None:
    rows = Rows(torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64))
    together, alone = kinds(), kinds()
    size = -(-len(x) // parts)
    for start in range(0, len(x), size):
        chosen = slice(start, start + size)
        update_all(together, x[chosen], rows[chosen])
        for statistic in alone:
            statistic.update(x[chosen], rows[chosen])
    for one, other in zip(together, alone, strict=True):
        for name, expected in other.state().items():
            found = one.state()[name]
            assert found.dtype == expected.dtype
            if isinstance(one, Moments):
                scale = x.double().abs().amax() ** {"m2": 2, "m3": 3, "m4": 4}.get(name, 1) * len(x) + 1e-300
                assert ((found - expected).abs() <= 1e-13 * scale).all(), name
            else:
                assert torch.equal(found, expected), (one, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_are_counted_as_the_reference_counts_them(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, torch.nan, -torch.inf], [0.0, 2.0, 3.0]]).to(dtype)
    for make in (AbsMax, Density, Quantiles):
        one, other = make(), make()
        update_all([one], x)
        other.update(x)
        assert all(
            torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
            for a, b in zip(one.state().values(), other.state().values())
        )


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x = torch.randn(600, 700, generator=torch.Generator().manual_seed(0))
    before, states = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = kinds()[:5]
            update_all(found, x)
            states.append([tensor for statistic in found for tensor in statistic.state().values()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_moments_of_a_far_offset_agree_with_float64() -> None:
    x = (torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) + 1000).float()
    moments = Moments()
    update_all([moments], x)
    centred = x.double() - x.double().mean(0)
    torch.testing.assert_close(moments.variance, centred.square().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        moments.kurtosis, centred.pow(4).mean(0) / centred.square().mean(0) ** 2, rtol=1e-11, atol=0
    )


def test_errors_are_those_of_update_and_small_or_unknown_ones_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="give float rows"):
        update_all([Moments()], torch.zeros(4, dtype=torch.float32))
    moments = Moments()
    update_all([moments], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="earlier rows had 3"):
        update_all([moments], torch.zeros(2, 4))
    called: list[Any] = []
    monkeypatch.setattr(summaries, "summarise", lambda *args, **kwargs: called.append(args))
    update_all([Density(active=torch.isfinite), Quantiles(weight=torch.ones(3)), Gram()], torch.ones(2, 3))
    update_all([Moments()], torch.ones(2, 3, dtype=torch.float64))
    monkeypatch.setattr(one_pass, "LEAST", 7)
    update_all([Moments()], torch.ones(2, 3))
    assert not called
