"""Simulations against enumeration and scipy, and the comparison on activations against a loop over pairs."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from scipy.stats import beta, chisquare

from actkit.core.ground.errors import DataError
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.sparsity.active_dendrites.pattern_simulation import (
    Overlaps,
    Rate,
    SiteMatches,
    expected_vs_observed,
    random_codes,
    random_subsets,
    simulate,
)
from actkit.sparsity.active_dendrites.pattern_theory import false_negative, false_positive, union_false_positive
from actkit.sparsity.active_dendrites.segments import sparse_code
from actkit.testing import tiny_batches, tiny_model


def within(rate: Rate, expected: float, sigmas: float = 4) -> bool:
    return abs(rate.value - expected) <= sigmas * math.sqrt(expected * (1 - expected) / rate.trials)


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_every_code_is_as_likely():
    codes = random_codes(30_000, 6, 3, torch.Generator().manual_seed(0))
    counts = Counter(map(tuple, codes.nonzero()[:, 1].view(-1, 3).tolist()))
    assert len(counts) == math.comb(6, 3) and chisquare(list(counts.values())).pvalue > 0.001


def test_every_subset_is_as_likely():
    sets = torch.zeros(30_000, 9, dtype=torch.bool)
    sets[:, [0, 2, 5, 7, 8]] = True
    chosen = random_subsets(sets, 2, torch.Generator().manual_seed(0))
    assert not (chosen & ~sets).any()
    counts = Counter(map(tuple, chosen.nonzero()[:, 1].view(-1, 2).tolist()))
    assert len(counts) == math.comb(5, 2) and chisquare(list(counts.values())).pvalue > 0.001


def test_none_and_all():
    assert not random_codes(4, 6, 0).any() and random_codes(4, 6, 6).all()


# -- simulation --------------------------------------------------------------------------------------------------------


def test_false_positives_agree_with_the_formula():
    overlaps = simulate(200, 20, 10, trials=50_000, progress=False)
    assert overlaps.trials == 50_000
    for theta in (2, 3, 4):
        assert within(overlaps.matched(theta), false_positive(200, 20, 10, theta))
    assert simulate(200, 20, 10, trials=50_000, progress=False) == overlaps
    assert simulate(200, 20, 10, trials=50_000, seed=1, progress=False) != overlaps


def test_false_negatives_agree_with_the_formula():
    overlaps = simulate(100, 30, 12, replaced=15, trials=50_000, progress=False)
    for theta in (4, 6, 8):
        assert within(overlaps.missed(theta), false_negative(30, 12, theta, 15))
    assert simulate(100, 30, 12, replaced=0, trials=50, progress=False).counts == (0,) * 12 + (50,)


def test_unions_agree_with_the_formula_and_never_miss():
    overlaps = simulate(300, 30, 10, patterns=4, trials=50_000, progress=False)
    for theta in (5, 7):
        assert within(overlaps.matched(theta), union_false_positive(300, 30, 10, theta, 4))
    noisy = simulate(300, 30, 10, replaced=4, patterns=4, trials=2000, progress=False)
    assert noisy.missed(6).count == 0


def test_the_interval_is_clopper_and_pearsons():
    low, high = Rate(7, 1000).interval()
    assert low == pytest.approx(beta.ppf(0.025, 7, 994)) and high == pytest.approx(beta.ppf(0.975, 8, 993))
    assert Rate(0, 100).interval()[0] == 0 and Rate(0, 100).interval(0.9)[1] == pytest.approx(1 - 0.05 ** (1 / 100))


def test_bad_simulations():
    for given, broken in (
        ((100, 20, 21), "1 <= synapses <= active <= cells"),
        ((10, 20, 5), "1 <= synapses <= active <= cells"),
    ):
        with pytest.raises(ValueError, match=f"{broken} does not hold"):
            simulate(*given)
    for keywords, broken in (
        ({"replaced": -1}, "0 <= replaced <= active"),
        ({"replaced": 21}, "0 <= replaced <= active"),
        ({"patterns": 0}, "patterns >= 1"),
        ({"trials": 0}, "trials >= 1"),
    ):
        with pytest.raises(ValueError, match=f"{broken} does not hold: cells=100"):
            simulate(100, 20, 10, **keywords)
    with pytest.raises(ValueError, match="replaced <= cells - active does not hold"):
        simulate(30, 20, 10, replaced=15)


# -- activations -------------------------------------------------------------------------------------------------------


def site(counts: tuple[int, ...], threshold: int = 2, cells: int = 100, active: int = 10) -> SiteMatches:
    total = sum(counts)
    return SiteMatches("x", cells, active, len(counts) - 1, threshold, total, 1, Overlaps(counts))


def test_effective_cells_are_where_the_theory_gives_the_observed_rate():
    for n in (20, 37, 250):
        p = false_positive(n, 10, 5, 2)
        matched = math.ceil(p * 10**9)  # rounded up: the theory at n is the first at or below it
        assert site((10**9 - matched, 0, matched, 0, 0, 0)).effective_cells == n
    assert site((100, 0, 0, 0, 0, 0)).effective_cells is None
    assert site((0, 0, 100, 0, 0, 0)).effective_cells == 10


def test_the_threshold_that_is_needed():
    expected = false_positive(100, 10, 5, 2)  # 0.077
    found = site((80, 5, 5, 3, 4, 3))
    assert found.expected == pytest.approx(expected) and found.observed == 0.15
    assert found.factor == pytest.approx(0.15 / expected)
    assert found.threshold_needed == 4
    assert site((99, 0, 0, 0, 0, 1)).threshold_needed == 2
    assert site((50, 0, 0, 0, 0, 50)).threshold_needed is None


def test_overlaps_are_those_of_every_stored_with_every_tested_code():
    """A code that is all of the channels overlaps in all synapses, and one with so many ones that it must, in some."""
    model, batches = tiny_model("bert"), tiny_batches("bert", lengths=((9, 6), (8, 7)))
    seen = record(model, {"mlp.hidden": Sample(1000)}, batches, progress=False)
    found = expected_vs_observed(model, batches, active=8, synapses=6, threshold=2, progress=False)
    assert [each.site for each in found.sites] == [str(each) for each in seen]
    for each, sample in zip(found.sites, seen.values(), strict=True):
        assert each.cells == sample.rows.shape[1] and each.stored + each.tested == 30
        assert each.overlaps.trials == each.stored * each.tested
    whole = expected_vs_observed(model, batches, active=found.sites[0].cells, synapses=6, threshold=2, progress=False)
    assert all(each.overlaps.counts == (0,) * 6 + (each.overlaps.trials,) for each in whole.sites)


def test_overlaps_against_a_loop():
    """With all ones stored nothing is drawn, so pairs can be counted from the codes of the two halves of documents."""
    model, batches = tiny_model("bert"), tiny_batches("bert", lengths=((9, 6), (8, 7)))
    found = expected_vs_observed(model, batches, active=5, synapses=5, threshold=2, by="value", progress=False)
    seen = record(model, {"mlp.hidden": Sample(1000)}, batches, progress=False)
    for each, sample in zip(found.sites, seen.values(), strict=True):
        codes = [frozenset(code.nonzero().flatten().tolist()) for code in sparse_code(sample.rows, 5, by="value")]
        documents = sample.documents.tolist()
        possible = []
        for first in range(4):
            for second in range(first):
                half = (first, second)
                stored = [c for c, d in zip(codes, documents, strict=True) if d in half]
                tested = [c for c, d in zip(codes, documents, strict=True) if d not in half]
                counts = Counter(len(s & t) for s in stored for t in tested)
                possible.append(tuple(counts[i] for i in range(6)))
        assert each.overlaps.counts in possible


def test_independent_activations_match_as_the_theory_says():
    """A linear layer with random weights on random inputs makes nearly independent channels of one distribution."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(400, 200, bias=False)
    batches = [torch.randn(500, 400), torch.randn(500, 400)]
    model = torch.nn.Sequential(linear)
    settings = {"active": 20, "synapses": 10, "threshold": 3, "tokens": 1000, "progress": False}
    (found,) = expected_vs_observed(model, batches, "layer.output:0", **settings).sites
    assert found.factor == pytest.approx(1, rel=0.15)
    assert found.effective_cells == pytest.approx(200, rel=0.07)


def test_the_result_is_shown_and_saved():
    model, batches = tiny_model("llama"), tiny_batches("llama")
    found = expected_vs_observed(model, batches, active=6, synapses=4, threshold=2, progress=False)
    assert json.loads(json.dumps(found.to_dict()))["sites"][0]["synapses"] == 4
    assert found.table().row_count == len(found.sites) == 2
    again = expected_vs_observed(model, batches, active=6, synapses=4, threshold=2, progress=False)
    assert again == found
    pytest.importorskip("plotly")
    assert len(found.figure().data) == 3  # one theory for both sites


def test_bad_comparisons():
    model, batches = tiny_model("bert"), tiny_batches("bert")
    with pytest.raises(ValueError, match=r"1 <= threshold <= synapses <= active does not hold: threshold=9"):
        expected_vs_observed(model, batches, threshold=9, synapses=8)
    with pytest.raises(ValueError, match=r"1 <= active <= cells does not hold: active=1000"):
        expected_vs_observed(model, batches, active=1000, synapses=8, progress=False)
    with pytest.raises(DataError, match=r"of 1 document"):
        one = tiny_batches("bert", lengths=((9,),))
        expected_vs_observed(model, one, active=6, synapses=4, threshold=2, progress=False)
    with pytest.raises(ValueError, match="site"):
        expected_vs_observed(model, batches, "mlp.nowhere", progress=False)
