"""The laws against the paper's own coefficients, scipy's Levenberg-Marquardt and data with a known answer."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from actkit.sparsity.sparsing_law.laws import fit_relu_law, fit_silu_law, fit_width_law, relu_law, silu_law

RELU = {  # size: alpha, b, c, A0
    "0.1B": (0.101, -0.0151, 3.20, 0.0614),
    "0.2B": (0.449, -3.05, 0.286, 0.0674),
    "0.4B": (0.683, -3.46, 0.0790, 0.0690),
    "0.8B": (1.01, -3.49, 7.97e-3, 0.0721),
    "1.2B": (1.33, -3.89, 9.03e-4, 0.0782),
    "2.4B": (1.53, -3.46, 1.56e-4, 0.0648),
}
SILU = {
    "0.1B": (0.479, 0.102, 0.409),
    "0.2B": (0.844, 0.208, 0.390),
    "0.4B": (1.03, 0.420, 0.385),
    "0.8B": (0.995, 0.562, 0.383),
    "1.2B": (0.967, 0.538, 0.382),
}
TOKENS = np.geomspace(2e9, 200e9, 24)


@pytest.mark.parametrize("size", RELU)
def test_the_papers_relu_curves(size):
    """Its coefficients give the curve by hand, and a fit to that curve gives the coefficients back."""
    alpha, b, c, a0 = RELU[size]
    by_hand = [math.exp(-c * (d / 1e9) ** alpha + b) + a0 for d in TOKENS]
    np.testing.assert_allclose(relu_law(TOKENS / 1e9, alpha, b, c, a0), by_hand, rtol=1e-12)
    fit = fit_relu_law(TOKENS, by_hand)
    assert fit.r2 > 1 - 1e-6
    np.testing.assert_allclose(fit.predict(TOKENS), by_hand, rtol=1e-3)  # three digits
    if size != "0.1B":  # there alpha, c and b nearly cancel
        assert fit.parameters["a0"] == pytest.approx(a0, rel=0.02)


@pytest.mark.parametrize("size", SILU)
def test_the_papers_silu_curves(size):
    alpha, c, a0 = SILU[size]
    by_hand = [-c / (d / 1e9) ** alpha + a0 for d in TOKENS]
    np.testing.assert_allclose(silu_law(TOKENS / 1e9, alpha, c, a0), by_hand, rtol=1e-12)
    fit = fit_silu_law(TOKENS, by_hand)
    np.testing.assert_allclose(list(fit.parameters.values()), (alpha, c, a0), rtol=1e-3)
    assert fit.tokens_for(by_hand[7]) == pytest.approx(TOKENS[7], rel=1e-3)


def noisy(law, coefficients, seed=0):
    rng = np.random.default_rng(seed)
    return law(TOKENS / 1e9, *coefficients) + rng.normal(0, 5e-4, len(TOKENS))


def test_it_is_scipys_levenberg_marquardt_where_no_bound_is_reached():
    """Parameters and covariance, fitted in billions directly from good starts."""
    for law, fit, true in (
        (relu_law, fit_relu_law, RELU["0.4B"]),
        (silu_law, fit_silu_law, SILU["0.2B"]),
    ):
        ratios = noisy(law, true)
        expected, covariance = curve_fit(law, TOKENS / 1e9, ratios, true, method="lm", maxfev=20000)
        found = fit(TOKENS, ratios)
        np.testing.assert_allclose(list(found.parameters.values()), expected, rtol=1e-3)
        np.testing.assert_allclose(np.array(found.covariance), covariance, rtol=0.02, atol=1e-12)
        residuals = law(TOKENS / 1e9, *expected) - ratios
        assert found.sse == pytest.approx(float(residuals @ residuals), rel=1e-6)
        assert found.r2 == pytest.approx(1 - found.sse / (len(ratios) * ratios.var()), rel=1e-9)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_decades_of_small_or_large_token_counts_converge_alike(unit):
    ratios = silu_law(TOKENS / 1e9, *SILU["0.2B"])
    near, far = fit_silu_law(TOKENS, ratios), fit_silu_law(TOKENS * unit, ratios)
    np.testing.assert_allclose(far.predict(TOKENS * unit), near.predict(TOKENS), rtol=1e-6)
    assert far.parameters["c"] == pytest.approx(near.parameters["c"] * unit ** near.parameters["alpha"], rel=1e-3)


def test_the_wrong_law_has_the_larger_error_and_keeps_its_bounds():
    falling, rising = noisy(relu_law, RELU["0.8B"]), noisy(silu_law, SILU["0.1B"])
    assert fit_relu_law(TOKENS, falling).sse < fit_silu_law(TOKENS, falling).sse
    assert fit_silu_law(TOKENS, rising).sse < fit_relu_law(TOKENS, rising).sse
    for fit in (fit_relu_law(TOKENS, rising), fit_silu_law(TOKENS, falling)):
        assert fit.parameters["c"] >= 0 and fit.parameters["alpha"] > 0 and 0 <= fit.parameters["a0"] <= 1
        assert fit.r2 < 0.1


def test_tokens_for_a_ratio_and_where_there_are_none():
    fit = fit_relu_law(TOKENS, relu_law(TOKENS / 1e9, *RELU["0.8B"]))
    assert fit.predict(fit.tokens_for(0.09)) == pytest.approx(0.09, rel=1e-6)
    with pytest.raises(ValueError, match=r"ratio: 0\.05 was given; this law passes 0\.07"):
        fit.tokens_for(0.05)
    with pytest.raises(ValueError, match=r"ratio: 0\.5"):
        fit_silu_law(TOKENS, silu_law(TOKENS / 1e9, *SILU["0.2B"])).tokens_for(0.5)


def test_what_a_fit_shows():
    fit = fit_silu_law(TOKENS, noisy(silu_law, SILU["0.2B"]))
    assert json.loads(json.dumps(fit.to_dict()))["law"] == "silu"
    assert fit.table().row_count == 3
    assert isinstance(fit.predict(1e10), float) and fit.predict([1e10, 2e10]).shape == (2,)
    pytest.importorskip("plotly")
    assert len(fit.figure().data) == 2


def test_bad_points():
    good = silu_law(TOKENS / 1e9, *SILU["0.2B"])
    for fit, least in ((fit_relu_law, 5), (fit_silu_law, 4)):
        with pytest.raises(ValueError, match=f"tokens: {least - 1} points were given; this law needs at least {least}"):
            fit(TOKENS[: least - 1], good[: least - 1])
    for tokens, ratios, match in (
        (TOKENS - TOKENS[0], good, "tokens: 0 was given"),
        (TOKENS, good[:-1], r"shapes \(24,\) and \(23,\)"),
        (TOKENS, good * 3, "ratios: .* give shares above 0"),
        (TOKENS, np.where(good > 0.3, np.nan, good), "ratios: NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            fit_silu_law(tokens, ratios)


# -- shape -------------------------------------------------------------------------------------------------------------


def test_a_known_bottleneck_comes_back():
    shapes = np.array([20.0, 40, 60, 80, 100, 130, 170, 220, 300])
    exact = 0.02 + 0.0005 * np.minimum(shapes, 114)
    fit = fit_width_law(shapes, exact)
    assert (fit.slope, fit.intercept, fit.bottleneck) == pytest.approx((0.0005, 0.02, 114))
    assert fit.plateau == pytest.approx(0.077) and fit.r2 == pytest.approx(1)
    np.testing.assert_allclose(fit.predict(shapes), exact)
    assert isinstance(fit.predict(50), float) and fit.to_dict()["plateau"] == fit.plateau


def test_the_bottleneck_is_the_best_of_all():
    """Brute force over 2,000 bottlenecks on noisy points."""
    rng = np.random.default_rng(1)
    shapes = np.array([16.0, 24, 40, 64, 90, 128, 200, 256, 320])
    for _ in range(10):
        ratios = 0.03 + 0.0004 * np.minimum(shapes, 110) + rng.normal(0, 0.003, len(shapes))
        best = np.inf
        for bottleneck in np.linspace(shapes[1], shapes[-1], 2_000):
            design = np.stack([np.ones_like(shapes), np.minimum(shapes, bottleneck)], 1)
            residual = ratios - design @ np.linalg.lstsq(design, ratios, rcond=None)[0]
            best = min(best, float(residual @ residual))
        assert fit_width_law(shapes, ratios).sse <= best * (1 + 1e-6)


def test_without_a_flat_part_there_is_no_bottleneck():
    shapes = np.array([10.0, 20, 30, 40, 50])
    fit = fit_width_law(shapes, 0.01 * shapes)
    assert fit.bottleneck is None and fit.plateau is None and fit.slope == pytest.approx(0.01)
    assert fit.predict(60) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="shapes: 3 points"):
        fit_width_law(shapes[:3], 0.01 * shapes[:3])
    with pytest.raises(ValueError, match="shapes: 2 different"):
        fit_width_law([1.0, 1, 2, 2], [0.1, 0.1, 0.2, 0.2])
