"""Each statistic against numpy, scipy or torch in float64, and against itself in any order and sharding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actkit.core.watch import streaming
from actkit.core.watch.sample import mix
from actkit.core.watch.spectrum import leading
from actkit.core.watch.statistics import (
    AbsMax,
    Density,
    Extremes,
    Gram,
    Histogram,
    Midpoints,
    Moments,
    Quantiles,
    Range,
    Rows,
    Sample,
    SequencePeaks,
    Spectrum,
    Statistic,
)
from actkit.kernels.gram import STRIP

CHANNELS = 3
MAKERS: dict[str, Callable[[], Statistic]] = {
    "moments": Moments,
    "absmax": AbsMax,
    "range": Range,
    "midpoints": lambda: Midpoints(4),
    "quantiles": Quantiles,
    "weighted quantiles": lambda: Quantiles(weight=torch.tensor([0.5, 2.0, 0.0])),
    "histogram": Histogram,
    "density": Density,
    "density above": lambda: Density(threshold=0.5),
    "density active": lambda: Density(active=positive),
    "gram": Gram,
    "spectrum": lambda: Spectrum(rank=2, centred=True),
    "sample": lambda: Sample(5),
    "extremes": lambda: Extremes(5),
}
EXACT = (
    "absmax",
    "range",
    "midpoints",
    "quantiles",
    "weighted quantiles",
    "histogram",
    "density",
    "density above",
    "density active",
    "sample",
    "extremes",
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def positive(x: Tensor) -> Tensor:
    return x > 0


@st.composite
def data(draw: Any, min_rows: int = 1) -> tuple[Tensor, Rows]:
    """Rows with zeros, repeated values and a wide range of magnitudes; keys that sometimes repeat."""
    seed = draw(st.integers(0, 2**31 - 1))
    n = draw(st.integers(min_rows, 60))
    shift = draw(st.sampled_from([0.0, -3.0, 100.0]))
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(n, CHANNELS, generator=generator) * 10 ** (4 * torch.rand(CHANNELS, generator=generator) - 2)
        + shift
    )
    x = torch.where(torch.rand(n, CHANNELS, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0])), 0.0, x)
    positions = torch.randint(draw(st.sampled_from([3, 10**6])), (n,), generator=generator)
    return x.to(draw(st.sampled_from(DTYPES))), Rows(torch.arange(n) // 7, positions)


def filled(make: Callable[[], Statistic], x: Tensor, rows: Rows) -> Statistic:
    statistic = make()
    statistic.update(x, rows)
    return statistic


@pytest.mark.parametrize("name", MAKERS)
@given(data=data(), seed=st.integers(0, 1000), shards=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_any_order_and_any_sharding_give_the_same(name: str, data: tuple[Tensor, Rows], seed: int, shards: int) -> None:
    x, rows = data
    whole = filled(MAKERS[name], x, rows)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = []
    for chosen in order.tensor_split(shards):  # some shards are empty when there are few rows
        shard = MAKERS[name]()
        for one in chosen.split(4):
            shard.update(x[one], rows[one])
        parts.append(shard)
    merged = MAKERS[name]()
    for shard in parts:
        assert merged.merge(shard) is merged
    assert merged.count == whole.count == len(x)
    for (key, a), b in zip(merged.state().items(), whole.state().values(), strict=True):
        if name in EXACT:
            assert torch.equal(a, b), key
        else:
            largest = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * largest + 1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = torch.randn(50, CHANNELS), Rows(torch.arange(50), torch.zeros(50, dtype=torch.int64))
    whole = filled(MAKERS[name], x, rows).state()
    monkeypatch.setattr(streaming, "CHUNK", 7 * CHANNELS)
    torch.testing.assert_close(filled(MAKERS[name], x, rows).state(), whole)


@given(data=data(min_rows=2))
@settings(max_examples=80, deadline=None)
def test_moments_are_those_of_numpy_and_scipy(data: tuple[Tensor, Rows]) -> None:
    x, rows = data
    moments = Moments()
    for part in x.split(9):
        moments.update(part, rows[: len(part)])
    exact = x.double().numpy()
    np.testing.assert_allclose(moments.mean, np.mean(exact, 0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moments.mean_abs, np.mean(np.abs(exact), 0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, np.var(exact, 0), rtol=1e-9, atol=1e-20 * np.square(exact).max())
    np.testing.assert_allclose(moments.std, np.sqrt(np.var(exact, 0)), rtol=1e-9, atol=1e-10 * np.abs(exact).max())
    moving = np.var(exact, 0) > 1e-12 * np.square(exact).mean(0)
    if moving.any():
        kurtosis = scipy.stats.kurtosis(exact[:, moving], fisher=False)
        np.testing.assert_allclose(moments.kurtosis[moving], kurtosis, rtol=1e-6)
        np.testing.assert_allclose(moments.skewness[moving], scipy.stats.skew(exact[:, moving]), rtol=1e-6, atol=1e-6)


def test_moments_of_a_constant_channel_and_far_from_zero() -> None:
    moments = Moments()
    x = torch.stack([torch.full((1000,), 0.1), 1e6 + torch.randn(1000)], dim=1).double()
    for part in x.split(13):
        moments.update(part)
    assert moments.kurtosis[0].isnan() and moments.skewness[0].isnan()
    np.testing.assert_allclose(moments.variance[1], np.var(x[:, 1].numpy()), rtol=1e-9)
    np.testing.assert_allclose(moments.kurtosis[1], scipy.stats.kurtosis(x[:, 1].numpy(), fisher=False), rtol=1e-6)


@given(data=data())
@settings(max_examples=40, deadline=None)
def test_absmax_is_exact(data: tuple[Tensor, Rows]) -> None:
    x, rows = data
    statistic = filled(AbsMax, x, rows)
    assert isinstance(statistic, AbsMax)
    assert torch.equal(statistic.value, x.double().abs().amax(0))
    assert statistic.overall == x.double().abs().max()


@given(data=data())
@settings(max_examples=40, deadline=None)
def test_signed_extremes_and_midpoints_are_those_of_numpy(data: tuple[Tensor, Rows]) -> None:
    x, rows = data
    found, midpoints = filled(Range, x, rows), filled(Midpoints, x, rows)
    assert isinstance(found, Range) and isinstance(midpoints, Midpoints)
    exact = x.double().numpy()
    np.testing.assert_array_equal(found.low, exact.min(0))
    np.testing.assert_array_equal(found.high, exact.max(0))
    each = [exact[rows.sequences.numpy() == number] for number in np.unique(rows.sequences.numpy())]
    np.testing.assert_allclose(midpoints.value, np.mean([(one.min(0) + one.max(0)) / 2 for one in each], 0), rtol=1e-12)
    first = filled(lambda: Midpoints(1), x, rows)
    assert isinstance(first, Midpoints)
    np.testing.assert_allclose(first.value, (each[0].min(0) + each[0].max(0)) / 2, rtol=1e-12)


@given(data=data(), p=st.floats(0, 1), weighted=st.booleans())
@settings(max_examples=150, deadline=None)
def test_quantiles_lie_within_a_bin_of_the_order_statistic(data: tuple[Tensor, Rows], p: float, weighted: bool) -> None:
    x, rows = data
    weight = torch.tensor([0.5, 2.0, 0.0]) if weighted else None
    statistic = Quantiles(weight)
    statistic.update(x, rows)
    magnitude = x.float().abs() * (1 if weight is None else weight)
    flat, n = magnitude.flatten().double().sort().values, magnitude.numel()
    rank = int(np.ceil(p * n))
    found = statistic.quantile(p)
    if rank == 0:
        assert found == 0.0
        return
    exact = float(torch.quantile(flat, (rank - 1) / (n - 1) if n > 1 else 0.0, interpolation="nearest"))
    assert exact == float(flat[rank - 1])  # the oracle takes the order statistic that is meant
    assert abs(found - exact) <= exact / 512 + 1e-38
    if found > 0:
        np.testing.assert_allclose(statistic.cdf(found), p, rtol=1e-4, atol=1e-9)


def test_quantiles_of_many_values_are_those_of_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 16)
    statistic = Quantiles()
    statistic.update(x)
    for p in (0.01, 0.25, 0.5, 0.9, 0.999):
        # ranks count from p * n here and from p * (n - 1) in torch, so up to one order statistic lies between them
        low, t, high = (float(x.double().abs().quantile(p, interpolation=i)) for i in ("lower", "linear", "higher"))
        assert low * (1 - 1 / 512) <= statistic.quantile(p) <= high * (1 + 1 / 512)
        np.testing.assert_allclose(statistic.cdf(t), float((x.abs() <= t).double().mean()), atol=1e-3)
    assert statistic.quantile(1.0) >= x.abs().max()
    assert statistic.cdf(1e30) == 1.0 and statistic.cdf(-1.0) == 0.0


@given(data=data(), p=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_the_histogram_knows_signs(data: tuple[Tensor, Rows], p: float) -> None:
    """Quantiles lie within a bin of the order statistic, and the bins hold what numpy counts in their edges."""
    x, rows = data
    statistic = Histogram()
    statistic.update(x, rows)
    flat = x.float().flatten().double().sort().values
    rank = max(int(np.ceil(p * len(flat))), 1)
    exact = float(flat[rank - 1])
    assert abs(statistic.quantile(p) - exact) <= abs(exact) / 512 + 1e-38
    lower, upper, counts = statistic.cells()
    assert counts.sum() == statistic.total == x.numel()
    for low, high, count in zip(lower, upper, counts):
        if low >= 0:
            assert int(((flat >= low) & (flat < high) & (flat > 0)).sum()) == count or (low == high == 0)
        else:
            assert int(((flat > low) & (flat <= high) & (flat < 0)).sum()) == count
    assert statistic.zeros == float((flat == 0).double().mean())


def test_the_histogram_of_many_values() -> None:
    """Against the normal distribution: shares, and the entropy in closed form; of the values that are not 0."""
    x = 0.5 + 2 * torch.randn(4000, 500, generator=torch.Generator().manual_seed(0))
    statistic = Histogram()
    statistic.update(torch.cat([x, torch.zeros(400, 500)]))
    assert statistic.zeros == 400 / 4400
    for value in (-3.0, 0.4, 2.5):
        expected = (float(torch.special.ndtr(torch.tensor((value - 0.5) / 2))) * 4000 + 400 * (value >= 0)) / 4400
        assert abs(statistic.cdf(value) - expected) < 1e-3
    expected = np.log(2 * np.sqrt(2 * np.pi * np.e))
    assert abs(statistic.entropy() - expected) < 2e-3
    rounded = Histogram()
    rounded.update(x.bfloat16())
    assert abs(rounded.entropy() - expected) < 5e-3
    lower, upper, counts = statistic.cells(bits=0)  # powers of two
    assert counts.sum() == statistic.total and torch.equal(upper[lower > 0], 2 * lower[lower > 0])
    assert statistic.cdf(-1e30) == 0 and statistic.cdf(1e30) == 1
    constant = Histogram()
    constant.update(torch.zeros(3, 2))
    assert constant.entropy() == -np.inf and constant.quantile(0.5) == 0
    with pytest.raises(ValueError, match=r"p: 1\.5 was given"):
        constant.quantile(1.5)


def test_zeros_have_their_own_bin() -> None:
    statistic = Quantiles()
    statistic.update(torch.tensor([[0.0, -0.0, 0.0, 1e-44], [1.0, 2.0, 3.0, 4.0]]))
    assert statistic.quantile(3 / 8) == 0.0
    assert statistic.cdf(0.0) == 3 / 8
    assert 0 < statistic.quantile(0.5) < 1e-38  # a denormal number is not zero
    assert statistic.quantile(0) == 0.0


def test_quantiles_take_the_largest_and_smallest_floats() -> None:
    statistic = Quantiles()
    statistic.update(torch.tensor([[torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny]]))
    assert statistic.quantile(1.0) == torch.finfo(torch.float32).max
    np.testing.assert_allclose(statistic.quantile(0.5), torch.finfo(torch.float32).tiny, rtol=1 / 256)


@given(data=data(), threshold=st.sampled_from([0.0, 0.5, 100.0]), p=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_density_counts_exactly(data: tuple[Tensor, Rows], threshold: float, p: float) -> None:
    x, rows = data
    density = Density(threshold=threshold)
    density.update(x, rows)
    active = (x.abs() > threshold).double().numpy()
    assert density.density == active.mean()
    np.testing.assert_array_equal(density.per_channel, active.mean(0))
    np.testing.assert_array_equal(density.dead, active.sum(0) == 0)
    np.testing.assert_array_equal(density.per_row, np.bincount(active.sum(1).astype(int), minlength=CHANNELS + 1))
    assert density.spread(p) == np.quantile(active.sum(1), p, method="inverted_cdf") / CHANNELS


@given(data=data(min_rows=2))
@settings(max_examples=40, deadline=None)
def test_gram_and_spectrum_are_those_of_numpy(data: tuple[Tensor, Rows]) -> None:
    x, rows = data
    exact = x.double().numpy()
    largest = float(np.square(exact).sum()) + 1e-300
    gram = filled(Gram, x, rows)
    assert isinstance(gram, Gram)
    np.testing.assert_allclose(gram.value, exact.T @ exact, rtol=1e-9, atol=1e-12 * largest)
    np.testing.assert_allclose(gram.mean_gram, exact.T @ exact / len(x), rtol=1e-9, atol=1e-12 * largest)
    for centred in (False, True):
        spectrum = Spectrum(centred=centred)
        spectrum.update(x, rows)
        matrix = exact - exact.mean(0) if centred else exact
        values = np.zeros(CHANNELS)
        found = np.linalg.svd(matrix, compute_uv=False)
        values[: len(found)] = found
        np.testing.assert_allclose(spectrum.values, values, rtol=1e-6, atol=1e-6 * np.sqrt(largest))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gram_of_more_channels_than_a_strip(dtype: torch.dtype, rtol: float) -> None:
    x = torch.randn(50, 2 * STRIP + 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    halves = [Gram(dtype), Gram(dtype)]
    for half, rows in zip(halves, (x[:20], x[20:]), strict=True):
        half.update(rows)
    gram = halves[0].merge(halves[1])
    assert gram.value.dtype == dtype and gram.memory(100) == 100 * 100 * dtype.itemsize
    exact = x.double().numpy()
    np.testing.assert_allclose(gram.value, exact.T @ exact, rtol=rtol, atol=rtol * 50)
    with pytest.raises(ValueError, match=r"merge: .* has other settings"):
        gram.merge(Gram(torch.float32 if dtype == torch.float64 else torch.float64))


def test_spectrum_summaries() -> None:
    spectrum = Spectrum(rank=1)
    spectrum.update(torch.diag(torch.tensor([3.0, 1.0, 0.0])))
    np.testing.assert_allclose(spectrum.values, [3.0])
    np.testing.assert_allclose(spectrum.effective_rank, np.exp(scipy.stats.entropy([0.75, 0.25])))
    np.testing.assert_allclose([spectrum.explained(k) for k in range(4)], [0, 0.9, 1, 1])
    nothing = Spectrum()
    nothing.update(torch.zeros(2, 3))
    assert nothing.effective_rank == 0.0 and nothing.explained(1) == 1.0


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_few_directions_of_many_channels_are_those_of_numpy(mean: float) -> None:
    scales = torch.arange(1, 129, dtype=torch.float64) ** -0.7
    x = torch.randn(400, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scales + mean
    spectrum = Spectrum(centred=True)
    spectrum.update(x[:150])
    spectrum.update(x[150:])
    assert leading(spectrum.scatter, 6) is not None  # not by way of all of them
    rows, singular = spectrum.directions(6)
    _, values, exact = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    np.testing.assert_allclose(singular, values[:6], rtol=1e-11)
    np.testing.assert_allclose((rows.numpy() * exact[:6]).sum(1) ** 2, 1, rtol=1e-11)
    assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all())


def test_directions_that_do_not_stand_apart_come_from_the_whole_decomposition() -> None:
    x = torch.randn(4000, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spectrum = Spectrum()
    spectrum.update(x)
    assert leading(spectrum.scatter, 6) is None and leading(spectrum.scatter, 9) is None
    values = np.linalg.svd(x.numpy(), compute_uv=False)
    np.testing.assert_allclose(spectrum.directions(6)[1], values[:6], rtol=1e-11)


def splitmix(x: int) -> int:
    """The published finaliser, in Python's integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@given(x=st.integers(-(2**63), 2**63 - 1))
def test_the_hash_is_splitmix64(x: int) -> None:
    assert int(mix(torch.tensor(x))) % 2**64 == splitmix(x % 2**64)


def test_a_sample_is_fair_and_sorted() -> None:
    documents, positions = torch.arange(40).repeat_interleave(100), torch.arange(100).repeat(40)
    x = torch.stack([documents, positions], dim=1).float()
    sample = Sample(400)
    sample.update(x, Rows(documents, positions))
    assert sample.rows.shape == (400, 2)
    assert torch.equal(sample.rows, torch.stack([sample.documents, sample.positions], dim=1).float())
    keys = (sample.documents * 100 + sample.positions).tolist()
    assert keys == sorted(set(keys))
    assert scipy.stats.kstest(keys, scipy.stats.uniform(0, 4000).cdf).pvalue > 0.001
    other = Sample(400, seed=1)
    other.update(x, Rows(documents, positions))
    assert not torch.equal(other.rows, sample.rows)
    few = Sample(400)
    few.update(x[:3], Rows(documents[:3], positions[:3]))
    assert len(few.rows) == 3


def test_rows_of_one_document_in_many_sequences() -> None:
    """Document and position are shared there; the choice goes by them alone, sequence and position tell them apart."""
    generator = torch.Generator().manual_seed(0)
    sequences, positions = torch.arange(64).repeat_interleave(16), torch.arange(16).repeat(64)
    documents, x = sequences // 20, torch.randn(1024, 3, generator=generator)
    rows = Rows(documents, positions, sequences)
    assert len(torch.stack([documents, positions]).unique(dim=1).T) == 64 < 1024
    sample = filled(lambda: Sample(300, seed=5), x, rows)
    found = torch.stack([sample.sequences, sample.positions])
    assert len(found.unique(dim=1).T) == 300
    assert torch.equal(sample.rows, x[sample.sequences * 16 + sample.positions])
    assert torch.equal(sample.documents, sample.sequences // 20)
    pairs = zip(documents.tolist(), positions.tolist(), strict=True)
    hashes = torch.tensor([signed(splitmix(splitmix(splitmix(5) ^ d) ^ p)) for d, p in pairs])
    last = hashes.sort().values[299]
    kept = torch.zeros(1024, dtype=torch.bool)
    kept[sample.sequences * 16 + sample.positions] = True
    assert bool((hashes[kept] <= last).all()) and bool(kept[hashes < last].all())
    # without sequences the same rows are chosen: recorded evidence rests on it
    assert torch.equal(filled(lambda: Sample(300, seed=5), x, Rows(documents, positions)).rows, sample.rows)


def test_extremes_are_those_of_a_sort_with_their_places() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator).round(decimals=1)  # so that some are equal
    rows = Rows(
        torch.arange(40) // 20, torch.arange(40) % 8, torch.arange(40) // 8, torch.arange(40) % 8 + 1, torch.arange(40)
    )
    found = filled(lambda: Extremes(25), x, rows).entries
    places = [(-abs(float(x[row, channel])), row, channel) for row in range(40) for channel in range(6)]
    expected = sorted(places)[:25]
    assert [(-abs(each.value), each.token_id, each.channel) for each in found] == expected
    for each in found:
        assert each.value == float(x[each.token_id, each.channel])
        assert (each.document, each.sequence, each.position, each.place) == (
            each.token_id // 20,
            each.token_id // 8,
            each.token_id % 8,
            each.token_id % 8 + 1,
        )


def test_peaks_of_sequences_are_those_of_torch() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    sequences = torch.tensor([0] * 7 + [2] * 12 + [1] * 11)
    rows = Rows(sequences, torch.arange(30), sequences)
    first, second = SequencePeaks(), SequencePeaks()
    first.update(x[:19], rows[:19])
    second.update(x[19:], rows[19:])
    first.merge(second)
    parts = [x[sequences == number].abs() for number in range(3)]
    assert first.largest.tolist() == [float(part.max()) for part in parts]
    assert first.median.tolist() == [float(part.median()) for part in parts]
    with pytest.raises(ValueError, match="sequence 1 came in two parts"):
        first.update(x[25:], rows[25:])
    with pytest.raises(ValueError, match="SequencePeaks tells sequences apart"):
        SequencePeaks().update(x)
    with pytest.raises(ValueError, match="Extremes says where values stand"):
        Extremes().update(x)
    with pytest.raises(ValueError, match="k: 0 was given"):
        Extremes(0)


def test_equal_rows_of_one_document_are_told_apart_in_any_order() -> None:
    sequences = torch.arange(12)
    rows = Rows(torch.zeros(12, dtype=torch.int64), torch.zeros(12, dtype=torch.int64), sequences)
    x = torch.ones(12, 2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    first, second = filled(lambda: Sample(5), x, rows), filled(lambda: Sample(5), x, rows[order])
    assert first.sequences.sort().values.tolist() == second.sequences.sort().values.tolist() == [0, 1, 2, 3, 4]


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def test_a_sample_of_16_bit_rows_is_that_of_their_values() -> None:
    """Also where rows of several dtypes come together, by updates, by a merge, and from a saved state."""
    x = torch.randn(90, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = [Rows(torch.full((30,), document), torch.arange(30)) for document in range(3)]
    parts = list(zip([x[:30], x[30:60].float(), x[60:].half()], rows, strict=True))
    expected = Sample(20)
    for part, keys in parts:
        expected.update(part.float(), keys)
    one, first, second = Sample(20), Sample(20), Sample(20)
    for part, keys in parts:
        one.update(part, keys)
    first.update(*parts[0])
    second.update(*parts[2])
    assert first.state()["rows"].dtype == torch.bfloat16
    second = Sample(20).load_state(second.state())
    second.update(*parts[1])
    first.merge(second)
    for sample in (one, first):
        assert sample.rows.dtype == torch.float32 and torch.equal(sample.rows, expected.rows)


@pytest.mark.parametrize("name", MAKERS)
def test_state_goes_round(name: str) -> None:
    x, rows = torch.randn(20, CHANNELS), Rows(torch.arange(20), torch.arange(20))
    statistic = filled(MAKERS[name], x[:10], rows[:10])
    again = MAKERS[name]().load_state(statistic.state())
    assert again.count == 10
    for one in (statistic, again):
        one.update(x[10:], rows[10:])
    assert all(torch.equal(a, b) for a, b in zip(statistic.state().values(), again.state().values(), strict=True))
    assert MAKERS[name]().load_state(MAKERS[name]().state()).count == 0


@pytest.mark.parametrize("name", MAKERS)
def test_memory_is_what_the_state_takes(name: str) -> None:
    statistic = filled(MAKERS[name], torch.randn(20, CHANNELS), Rows(torch.arange(20), torch.arange(20)))
    held = sum(tensor.nbytes for key, tensor in statistic.state().items() if key not in ("count", "channels"))
    assert statistic.memory(CHANNELS) == held


@pytest.mark.parametrize("name", MAKERS)
def test_empty_has_the_settings_and_no_rows(name: str) -> None:
    statistic = filled(MAKERS[name], torch.randn(4, CHANNELS), Rows(torch.arange(4), torch.arange(4)))
    fresh = statistic.empty()
    assert fresh.count == 0 and fresh.matches(statistic) and statistic.matches(MAKERS[name]())
    assert [k for k, other in MAKERS.items() if statistic.matches(other())] == [name]
    assert type(statistic).__name__ in repr(statistic) and "4 rows" in repr(statistic)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_not_kept(name: str) -> None:
    x = torch.randn(4, CHANNELS, requires_grad=True)
    statistic = filled(MAKERS[name], x, Rows(torch.arange(4), torch.arange(4)))
    assert not any(tensor.requires_grad for tensor in statistic.state().values())


def test_errors_say_what_to_do() -> None:
    x = torch.randn(4, CHANNELS)
    with pytest.raises(TypeError, match="merge: AbsMax was given"):
        Moments().merge(AbsMax())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other settings"):
        Density().merge(Density(threshold=1.0))
    with pytest.raises(ValueError, match="other settings"):
        Quantiles().merge(Quantiles(weight=torch.ones(3)))
    moments = Moments()
    with pytest.raises(ValueError, match="no rows yet"):
        _ = moments.kurtosis
    moments.update(x)
    with pytest.raises(ValueError, match="2 channels were given, earlier rows had 3"):
        moments.update(x[:, :2])
    narrow = Moments()
    narrow.update(x[:, :2])
    with pytest.raises(ValueError, match="2 channels were given, this one has 3"):
        moments.merge(narrow)
    with pytest.raises(ValueError, match="give float rows"):
        moments.update(torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="give float rows"):
        moments.update(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight: 3 scores were given for 2 channels"):
        Quantiles(torch.ones(3)).update(x[:, :2])
    with pytest.raises(ValueError, match="one score per channel"):
        Quantiles(torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"p: 1\.5 was given"):
        Quantiles().quantile(1.5)
    with pytest.raises(ValueError, match="beside active="):
        Density(active=positive, threshold=1.0)
    with pytest.raises(ValueError, match="return a bool mask"):
        Density(active=lambda x: x).update(x)
    with pytest.raises(ValueError, match="pass Rows"):
        Sample(2).update(x)
    with pytest.raises(ValueError, match="3 keys were given for 4 rows"):
        Sample(2).update(x, Rows(torch.arange(3), torch.arange(3)))
    with pytest.raises(ValueError, match="size: 0"):
        Sample(0)
    with pytest.raises(ValueError, match="state: it holds largest"):
        filled(AbsMax, x, Rows(torch.arange(4), torch.arange(4)))
        Moments().load_state(filled(AbsMax, x, Rows(torch.arange(4), torch.arange(4))).state())
