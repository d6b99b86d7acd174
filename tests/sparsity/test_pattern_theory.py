"""The error rates of sparse patterns against scipy, exact fractions, enumeration and the authors' published values."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import combinations, product
from statistics import median

import numpy as np
import pytest
from scipy.stats import hypergeom

from actkit.sparsity.active_dendrites.pattern_theory import (
    ThresholdCurve,
    capacity,
    choose_threshold,
    false_negative,
    false_positive,
    overlap_probability,
    population_false_positive,
    threshold_curve,
    union_false_positive,
    union_size,
)


def written_out(n: int, a: int, s: int, theta: int) -> Fraction:
    """The paper's formula in whole numbers."""
    hits = range(theta, min(s, a) + 1)
    return Fraction(sum(math.comb(s, b) * math.comb(n - s, a - b) for b in hits), math.comb(n, a))


def log10(p: Fraction) -> float:
    return math.log10(p.numerator) - math.log10(p.denominator)


# -- false positives ---------------------------------------------------------------------------------------------------


def test_the_published_values():
    cells = np.array([300, 500, 700, 900])
    np.testing.assert_allclose(
        false_positive(cells, 128, 24, 12), [0.29208, 7.3679e-3, 3.2011e-4, 2.5026e-5], rtol=5e-5
    )
    np.testing.assert_allclose(false_positive(cells[:3], 64, 24, 12), [1.09462e-3, 5.6957e-6, 1.4125e-7], rtol=5e-5)
    assert false_positive(300, 150, 24, 12) == pytest.approx(0.584015, rel=1e-5)
    assert false_positive(10_000, 300, 30, 12) == pytest.approx(2.279e-11, rel=1e-3)
    assert false_positive(10_000, 300, 30, 15) == pytest.approx(1.0492e-15, rel=1e-4)
    assert population_false_positive(10**6, 10_000, 300, 30, 15) == pytest.approx(1.049e-9, rel=1e-3)
    assert false_negative(300, 30, 12, 60) == pytest.approx(3.947e-8, rel=1e-3)
    replaced = np.array([38, 45, 51, 64])
    expected = [7.90e-10, 1.207e-7, 3.456e-6, 7.354e-4]
    np.testing.assert_allclose(false_negative(128, 30, 8, replaced), expected, rtol=1e-3)


def test_enumeration_of_all_codes():
    n, a, s = 9, 4, 3
    segment = set(range(s))
    codes = list(combinations(range(n), a))
    for theta in range(1, s + 1):
        matched = sum(len(segment & set(code)) >= theta for code in codes)
        assert false_positive(n, a, s, theta, form="fraction") == Fraction(matched, len(codes))
        assert false_positive(n, a, s, theta) == pytest.approx(matched / len(codes), rel=1e-12)


def test_enumeration_of_all_replacements():
    """Ones 0 to 4 are the code, 0 to 2 the segment; which others come on does not matter."""
    a, s = 5, 3
    for v, theta in product(range(a + 1), range(1, s + 1)):
        lost = list(combinations(range(a), v))
        missed = sum(len(set(range(s)) - set(each)) < theta for each in lost)
        assert false_negative(a, s, theta, v, form="fraction") == Fraction(missed, len(lost))
        assert false_negative(a, s, theta, v) == pytest.approx(missed / len(lost), rel=1e-12)


def test_scipy_and_exact_fractions_down_to_1e_minus_250():
    cases = [(300, 128, 24, 1), (2000, 40, 20, 8), (10_000, 300, 30, 28), (200_000, 1000, 50, 50), (400, 399, 24, 12)]
    cases += [(1_000_000, 200, 75, 67), (5000, 2500, 1200, 700), (20_000, 100, 90, 80), (500, 450, 440, 430)]
    smallest = 0.0
    for n, a, s, theta in cases:
        found, exact = false_positive(n, a, s, theta, form="log10"), log10(written_out(n, a, s, theta))
        smallest = min(smallest, exact)
        assert (found - exact) * math.log(10) == pytest.approx(0, abs=1e-10), (n, a, s, theta)  # a relative error
        reference = hypergeom.logsf(theta - 1, n, s, a)
        assert found * math.log(10) == pytest.approx(reference, rel=1e-9, abs=1e-9)
        assert false_positive(n, a, s, theta, form="fraction") == written_out(n, a, s, theta)
    assert -260 < smallest < -200
    assert false_positive(1_000_000, 100, 80, 80, form="log10") < -320  # what a float cannot hold


def test_it_is_symmetric_in_synapses_and_ones():
    assert overlap_probability(500, 20, 90, 7) == pytest.approx(overlap_probability(500, 90, 20, 7), rel=1e-12)


def test_arrays_broadcast_and_numbers_stay_numbers():
    cells, thresholds = np.array([[300], [900]]), np.array([4, 8, 12])
    found = false_positive(cells, 64, 24, thresholds)
    assert found.shape == (2, 3)
    for (i, n), (j, theta) in product(enumerate((300, 900)), enumerate((4, 8, 12))):
        assert found[i, j] == pytest.approx(float(written_out(n, 64, 24, theta)), rel=1e-12)
    assert isinstance(false_positive(300, 64, 24, 4), float)
    fractions = false_positive(cells, 64, 24, thresholds, form="fraction")
    assert fractions.shape == (2, 3) and fractions[1, 2] == written_out(900, 64, 24, 12)
    assert false_positive(300, 64, 24, 12) == pytest.approx(10 ** false_positive(300, 64, 24, 12, form="log10"))
    assert false_positive(50, 50, 20, 20) == 1  # every code is all cells
    assert false_negative(50, 20, 20, 0) == 0 and false_negative(50, 20, 10, 10) == 0
    assert false_negative(50, 20, 10, 0, form="log10") == -math.inf


# -- populations and unions --------------------------------------------------------------------------------------------


def test_a_population():
    p = written_out(200, 20, 10, 4)
    exact = population_false_positive(7, 200, 20, 10, 4, form="fraction")
    assert exact == 1 - (1 - p) ** 7
    assert population_false_positive(7, 200, 20, 10, 4) == pytest.approx(float(exact), rel=1e-12)
    tiny = written_out(10_000, 100, 60, 60)
    assert population_false_positive(1000, 10_000, 100, 60, 60, form="log10") == pytest.approx(log10(tiny) + 3)
    assert population_false_positive(5, 50, 50, 20, 20) == 1
    many = population_false_positive(np.array([1, 10, 10**6]), 200, 20, 10, 4)
    assert many[0] == pytest.approx(float(p)) and many[2] == 1


def test_the_size_of_a_union():
    assert union_size(20_000, 25, 10) == pytest.approx(248.6, abs=0.05)
    assert union_size(20, 4, 3, fraction=True) == 20 * (1 - Fraction(4, 5) ** 3)
    assert union_size(10**9, 20, 2) == pytest.approx(40, rel=1e-6)
    assert union_size(20, 20, 3) == 20
    sizes = [len(set(x) | set(y)) for x, y in product(combinations(range(6), 2), repeat=2)]
    assert union_size(6, 2, 2, fraction=True) == Fraction(sum(sizes), len(sizes))


def test_a_union_by_enumeration():
    """Two stored codes of two synapses each and a random code of three ones, among six cells: every combination."""
    n, a, s, theta = 6, 3, 2, 2
    sets, codes = list(combinations(range(n), s)), list(combinations(range(n), a))
    outcomes = Counter(len((set(x) | set(y)) & set(code)) >= theta for x in sets for y in sets for code in codes)
    expected = Fraction(outcomes[True], outcomes.total())
    assert union_false_positive(n, a, s, theta, 2, form="fraction") == expected
    assert union_false_positive(n, a, s, theta, 2) == pytest.approx(float(expected), rel=1e-12)
    assert union_false_positive(n, a, s, theta, 2, form="log10") == pytest.approx(log10(expected), rel=1e-12)


def test_unions_of_the_sheet():
    plugin = union_false_positive(2000, 40, 20, 8, 6, method="plugin")
    assert plugin == pytest.approx(0.001710, abs=5e-7)
    exact = union_false_positive(2000, 40, 20, 8, np.array([1, 6]))
    assert exact[0] == pytest.approx(float(written_out(2000, 40, 20, 8)), rel=1e-12)
    assert exact[1] == pytest.approx(float(union_false_positive(2000, 40, 20, 8, 6, form="fraction")), rel=1e-11)
    assert exact[1] > plugin
    assert union_false_positive(20_000, 100, 25, 15, 10, method="plugin") == pytest.approx(1.73e-12, rel=5e-3)
    assert union_false_positive(20_000, 100, 25, 15, 10, form="log10") == pytest.approx(-11.77, abs=0.01)


def test_a_cue_that_must_match_whole_is_a_bloom_filter():
    """(1 - (1 - q/n)^M)^q, which takes the cells of the union as independent: close for many cells."""
    n, q, patterns = 20_000, 4, 50
    bloom = (1 - (1 - q / n) ** patterns) ** q
    assert union_false_positive(n, q, q, q, patterns) == pytest.approx(bloom, rel=0.05)


# -- choices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [(200, 20, 10, 4), (1000, 30, 20, 4), (300, 128, 24, 12), (500, 50, 20, 9)])
@pytest.mark.parametrize("error", [1e-4, 0.01, 0.3, 0.9])
def test_capacity_is_the_largest_population_within_the_error(setting, error):
    count = capacity(*setting, error)
    p = float(written_out(*setting))
    assert -math.expm1(count * math.log1p(-p)) <= error
    assert -math.expm1((count + 1) * math.log1p(-p)) > error


def test_capacity_beyond_what_a_float_counts():
    expected = 1e-3 / float(written_out(10_000, 300, 30, 30))
    assert capacity(10_000, 300, 30, 30, 1e-3) == pytest.approx(expected, rel=1e-3)
    assert capacity(1_000_000, 100, 80, 80, 0.5) > 10**320
    assert capacity(50, 50, 20, 20, 0.5) == 0


def test_thresholds_are_all_that_satisfy_both_rates():
    found = choose_threshold(10_000, 300, 30, 1e-9, replaced=60, max_false_negative=1e-6)
    expected = [
        theta
        for theta in range(1, 31)
        if written_out(10_000, 300, 30, theta) <= 1e-9
        and false_negative(300, 30, theta, 60, form="fraction") <= Fraction(1, 10**6)
    ]
    assert list(found) == expected == [11, 12, 13]
    assert max(choose_threshold(2000, 40, 20, 1e-9, replaced=5)) == 15  # none missed at all: s - v


def test_no_threshold_is_an_error_that_says_what_each_rate_needs():
    message = r"none satisfies both\..*needs at least 24.*replaced=60 allows at most 3 .*more synapses"
    with pytest.raises(ValueError, match=message):
        choose_threshold(300, 128, 24, 1e-9, replaced=60, max_false_negative=1e-6)


def test_the_threshold_curve():
    curve = threshold_curve()
    assert curve.combinations == 20 * 6 * 7
    medians = dict(zip(curve.thresholds, curve.log10_errors, strict=True))
    for theta, expected in {8: 4.8e-8, 9: 2.0e-9, 10: 7.4e-11, 12: 7.7e-14, 20: 4.1e-28}.items():
        assert 10 ** medians[theta] == pytest.approx(expected, rel=0.03)
    assert curve.smallest(1e-9) == 10 and curve.smallest(1e-300) is None
    small = threshold_curve([1000, 3000], [0.02, 0.03], [20], [5])
    rates = [log10(written_out(n, round(n * share), 20, 5)) for n in (1000, 3000) for share in (0.02, 0.03)]
    assert small.log10_errors[0] == pytest.approx(median(rates), rel=1e-12)


def test_the_curve_is_shown_and_saved():
    curve = ThresholdCurve((8, 9), (-7.3, -8.7), 840)
    assert json.loads(json.dumps(curve.to_dict())) == {**curve.to_dict()}
    assert curve.table().row_count == 2
    pytest.importorskip("plotly")
    assert list(curve.figure().data[0].y) == [-7.3, -8.7]


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_names_the_violated_inequality():
    with pytest.raises(ValueError, match=r"threshold <= synapses does not hold: threshold=25 and synapses=24"):
        false_positive(300, 128, 24, 25)
    with pytest.raises(ValueError, match=r"threshold >= 1 does not hold: threshold=0"):
        false_positive(300, 128, 24, 0)
    with pytest.raises(ValueError, match=r"synapses <= active does not hold: synapses=24 and active=20"):
        false_positive(300, 20, 24, 12)
    with pytest.raises(ValueError, match=r"active <= cells does not hold"):
        false_positive(100, 128, 24, np.array([12, 13]))
    with pytest.raises(ValueError, match=r"does not hold: threshold=25 and synapses=24 were given"):
        false_positive(300, 128, 24, np.array([[12, 25], [26, 3]]))
    with pytest.raises(ValueError, match=r"replaced >= 0 does not hold: replaced=-1"):
        false_negative(128, 24, 12, -1)
    with pytest.raises(ValueError, match=r"replaced <= active does not hold"):
        false_negative(128, 24, 12, 129)
    with pytest.raises(ValueError, match=r"segments >= 1 does not hold"):
        population_false_positive(0, 300, 128, 24, 12)
    with pytest.raises(ValueError, match=r"patterns >= 1 does not hold"):
        union_false_positive(300, 128, 24, 12, 0)
    with pytest.raises(ValueError, match=r"size <= cells does not hold"):
        overlap_probability(100, 10, 101, 5)
    with pytest.raises(ValueError, match=r"cells: 300\.5 was given; it is a count"):
        false_positive(300.5, 128, 24, 12)
    with pytest.raises(ValueError, match=r"method: 'floor' was given"):
        union_false_positive(300, 128, 24, 12, 2, method="floor")
    with pytest.raises(ValueError, match=r"form: 'log' was given"):
        false_positive(300, 128, 24, 12, form="log")
    with pytest.raises(ValueError, match=r"max_error: 1 was given"):
        capacity(300, 128, 24, 12, 1)
