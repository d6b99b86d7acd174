"""NoisyQuant's experiments on tiny sizes: errors of layers against the sums written out, and what is judged."""

from __future__ import annotations

import copy

import pytest
import torch

from actkit.claims import noisyquant
from actkit.claims.noisyquant import BOTH, CLIPPED, LARGEST, NOISY, SHIFTED, Bench, Judged
from actkit.core.edit.edits import get_module

TINY = noisyquant.Sizes(seeds=(0, 1), calibration=16, rows=64, clip_grid=3, n_grid=3, draws=20_000)


@pytest.fixture(scope="module")
def bench():
    return Bench("vit", TINY)


def test_the_theorem_is_compared_with_draws():
    assert noisyquant.theorem(noisyquant.Sizes(draws=200_000)).here.endswith("200 of 200")


def test_arms_are_judged_by_layer_and_by_the_whole(bench):
    found = {arm: bench.judge(4, arm) for arm in (LARGEST, CLIPPED, SHIFTED, NOISY, BOTH)}
    assert len({round(each.every, 9) for each in found.values()}) == 5
    assert all(0.5 < each.quality <= 1 and 0 < each.every < 0.1 for each in found.values())
    assert bench.judge(4, BOTH, seed=1).every != found[BOTH].every


def test_the_error_of_a_layer_is_that_of_its_output(bench):
    rounded, inputs = bench._rounded(4, noisyquant.RoundToNearest(bits=4, group_size=-1, symmetric=True))
    path, x = next(iter(inputs.items()))
    layer = get_module(rounded, path)
    other = copy.deepcopy(rounded)
    get_module(other, path).bias.data += 1.0
    with torch.no_grad():
        exact = layer(x).double()
    expected = exact.numel() / float(exact.square().sum())
    assert bench._error(other, rounded, path, x) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("second", "every", "quality", "passed"),
    [(0.9, 0.9, 0.95, True), (0.96, 0.9, 0.95, False), (0.9, 1.01, 0.95, False), (0.9, 0.9, 0.947, False)],
)
def test_the_claim_is_judged_by_errors_and_quality(monkeypatch, second, every, quality, passed):
    arms = {CLIPPED: Judged(1.0, 1.0, 0.95), SHIFTED: Judged(0.95, 0.905, 0.95), BOTH: Judged(second, every, quality)}
    monkeypatch.setattr(Bench, "judge", lambda self, bits, arm, seed=0: arms.get(arm, arms[CLIPPED]))
    found = noisyquant.on_a_model("vit", TINY)
    assert found.passed is passed
    assert "noise adds nothing" in found.here  # 0.9 of 0.905
