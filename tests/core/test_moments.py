"""Densities, moment maps, fixed points and entropies, against closed forms, scipy and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import gaussian_kde, norm

from actkit.core.layers.activation_function import Break, thresholded
from actkit.core.layers.activations import activation_function, function_names
from actkit.core.layers.moments import Density, entropy, fixed_points, moment_map, rescaling, slope_of

ELEMENTWISE = [name for name in function_names() if activation_function(name).elementwise]


def test_a_normal_density_is_scipys() -> None:
    density, theirs, x = Density.normal(0.5, 2.0), norm(0.5, 2.0), torch.linspace(-5, 6, 23, dtype=torch.float64)
    for found, expected in ((density(x), theirs.pdf(x)), (density.below(x), theirs.cdf(x))):
        torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(density.slope(x), -(x - 0.5) / 4 * density(x), rtol=1e-12, atol=1e-15)
    assert abs(density.entropy() - theirs.entropy()) < 1e-12
    assert density.mean == 0.5 and density.deviation == 2.0


def test_a_measured_density_is_scipys_kernel_estimate() -> None:
    """Values within half of the kernel's width share a center, which moves the density by no more than a fiftieth."""
    x = torch.cat([torch.randn(3000), 4 + 0.5 * torch.randn(1000), torch.tensor([60.0])]).double()
    density = Density.measured(x)
    theirs = gaussian_kde(x.numpy(), bw_method=density.width / float(x.std()))
    at = torch.linspace(-4, 7, 45, dtype=torch.float64)
    expected = torch.as_tensor(theirs(at.numpy()))
    torch.testing.assert_close(density(at), expected, rtol=0, atol=2e-2 * float(expected.max()))
    nodes, weights = density.rule()
    total, mean = float(weights.sum()), float((weights * nodes).sum())
    assert abs(total - 1) < 1e-12 and abs(mean - float(x.mean())) < 1e-12
    assert abs(float((weights * (nodes - mean) ** 2).sum()) - density.deviation**2) < 1e-9
    step = 1e-5
    slope = (density(at + step) - density(at - step)) / (2 * step)
    torch.testing.assert_close(density.slope(at), slope, rtol=1e-5, atol=1e-8)
    counted = Density.measured(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([2, 1, 5]), width=0.3)
    repeated = Density.measured(torch.tensor([0.0, 0, 1, 3, 3, 3, 3, 3]), width=0.3)
    assert torch.equal(counted(at), repeated(at))


@pytest.mark.parametrize("values", [[], [1.0, 1.0], [0.0, math.nan], [0.0, math.inf]])
def test_values_without_a_density_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="a density needs finite ones that differ"):
        Density.measured(torch.tensor(values))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_jacobian_is_that_of_finite_differences(name: str) -> None:
    record, at, step = activation_function(name), (0.3, 1.4), 1e-4
    settings = {"omega": 0.2, "tau": 0.9}
    mapped = moment_map(record, *at, **settings)
    for column in range(2):
        low, high = (
            moment_map(record, *(value + side * step * (index == column) for index, value in enumerate(at)), **settings)
            for side in (-1, 1)
        )
        found = [row[column] for row in mapped.jacobian]
        expected = [(high.mean - low.mean) / (2 * step), (high.variance - low.variance) / (2 * step)]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_the_jacobian_holds_for_jumps() -> None:
    record = thresholded(activation_function("relu"), 0.5)
    assert record.breaks[0] == Break(0.5, 0)
    low, high = (moment_map(record, 0.0, 1.0 + side * 1e-4).variance for side in (-1, 1))
    assert moment_map(record, 0.0, 1.0).jacobian[1][1] == pytest.approx((high - low) / 2e-4, rel=1e-6)


def test_selu_has_its_fixed_point_and_others_have_none() -> None:
    mapped = moment_map(activation_function("selu"), 0.0, 1.0)
    assert (mapped.mean, mapped.variance) == pytest.approx((0, 1), abs=1e-12)
    assert mapped.jacobian == ((0, pytest.approx(0.088835, abs=1e-6)), (0, pytest.approx(0.782648, abs=1e-6)))
    assert mapped.norm == pytest.approx(0.7877, abs=1e-4)
    (point,) = fixed_points(activation_function("selu"))
    assert (point.mean, point.variance, point.radius) == pytest.approx((0, 1, 0.782648), abs=1e-6) and point.attracts
    (square,) = fixed_points(activation_function("relu2"))  # E x^4 / 2 - (E x^2 / 2)^2 = 5/4 v^2
    assert (square.mean, square.variance, square.radius) == pytest.approx((0.4, 0.8, 2)) and not square.attracts
    for name in ("relu", "gelu", "silu", "tanh", "elu", "identity"):
        assert fixed_points(activation_function(name)) == ()
    (near,) = fixed_points(activation_function("selu"), omega=0.05, tau=1.05)
    back = moment_map(activation_function("selu"), near.mean, near.variance, omega=0.05, tau=1.05)
    assert (back.mean, back.variance) == pytest.approx((near.mean, near.variance), abs=1e-8)


def test_any_function_is_rescaled_to_a_fixed_point() -> None:
    """By samples; for SELU nothing is left to do. A ReLU that is rescaled attracts nothing: its radius is 1."""
    assert rescaling(activation_function("selu")) == pytest.approx((1, 0), abs=1e-12)
    z = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, (mean, variance) in (("gelu", (0.0, 1.0)), ("relu", (0.3, 2.0)), ("tanh", (-0.5, 0.7))):
        record = activation_function(name)
        scale, shift = rescaling(record, mean, variance)
        y = scale * record.function(math.sqrt(variance) * z) + shift
        assert (float(y.mean()), float(y.var())) == pytest.approx((mean, variance), abs=5e-3)
    scale, _ = rescaling(activation_function("relu"))
    assert scale**2 * moment_map(activation_function("relu"), 0.0, 1.0).jacobian[1][1] == pytest.approx(1)
    with pytest.raises(ValueError, match="constant for these inputs"):
        rescaling(thresholded(activation_function("hardtanh"), 2.0))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (torch.special.ndtr, 0.0),
        (lambda x: (torch.tanh(x) + 1) / 2, -0.023343),
        (torch.sigmoid, -0.193180),
        (lambda x: torch.atan(x) / math.pi + 0.5, -0.259245),
        (lambda x: 3 * x - 1, 0.5 * math.log(2 * math.pi * math.e) + math.log(3)),
    ],
)
def test_entropies(function: object, expected: float) -> None:
    assert entropy(function, Density.normal()) == pytest.approx(expected, abs=1e-6)  # type: ignore[arg-type]


def test_entropy_and_slope_take_records() -> None:
    for name in ("sigmoid", "softplus", "leaky_relu"):
        record = activation_function(name)
        assert entropy(record, Density.normal()) == pytest.approx(entropy(record.function, Density.normal()), abs=1e-6)
    with pytest.raises(ValueError, match=r"does not rise from -9.* to -1\.28"):
        entropy(activation_function("silu"), Density.normal())
    with pytest.raises(ValueError, match="mixes channels"):
        slope_of(activation_function("softmax"))


def test_bad_moments_are_refused() -> None:
    for settings, name in (
        ((0.0, 0.0, 1.0), "variance"),
        ((0.0, 1.0, -1.0), "tau"),
        ((0.0, math.inf, 1.0), "variance"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .* give a number above 0"):
            moment_map(activation_function("relu"), settings[0], settings[1], tau=settings[2])
    with pytest.raises(ValueError, match="deviation"):
        Density.normal(deviation=0)
