"""CETT and its thresholds against brute force, and against the release's search written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from actkit.sparsity.sparsing_law.cett import CettCurve, cett, cett_thresholds


def layer(tokens: int = 40, neurons: int = 30, outputs: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states with exact zeros and columns of different norms, float32."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, neurons, generator=generator) * torch.randn(neurons, generator=generator).exp()
    h[torch.rand(tokens, neurons, generator=generator) < 0.2] = 0
    return h, torch.randn(outputs, neurons, generator=generator) * torch.randn(neurons, generator=generator).exp()


def slow_cett(h: Tensor, w_out: Tensor, eps: float) -> float:
    """The definition, token by token and neuron by neuron, in float64; the norms as the layer compares them."""
    norms = (h.abs() * w_out.norm(dim=0)).numpy()
    hidden, weight = h.double().numpy(), w_out.double().numpy()
    shares = []
    for token in range(len(hidden)):
        lost, whole = np.zeros(len(weight)), np.zeros(len(weight))
        for neuron in range(weight.shape[1]):
            contribution = hidden[token, neuron] * weight[:, neuron]
            whole += contribution
            if norms[token, neuron] <= eps:
                lost += contribution
        shares.append(np.linalg.norm(lost) / np.linalg.norm(whole))
    return float(np.mean(shares))


def release(h: Tensor, w_out: Tensor, target: float) -> tuple[float, float]:
    """The published search: bisection over 65,536 candidates. Returns its threshold, and the distance of candidates."""
    norms = h.abs() * w_out.norm(dim=0)
    highest = norms.view(-1)[:: max(norms.numel() // 65536, 1)].quantile(0.99)
    candidates = torch.linspace(float(norms.min()), float(highest), 65536)
    left, right = 0, 65535
    while left < right:
        middle = (left + right) // 2
        small = torch.where(norms > candidates[middle], torch.zeros(()), h)
        error = ((small @ w_out.t()).norm(dim=-1) / (h @ w_out.t()).norm(dim=-1)).mean()
        if error > target:
            right = middle
        else:
            left = middle + 1
    return float(candidates[left - 1]), float(candidates[1] - candidates[0])


def test_cett_is_its_definition():
    h, w_out = layer()
    norms = (h.abs() * w_out.norm(dim=0)).flatten()
    for eps in (0.0, *torch.quantile(norms, torch.tensor([0.3, 0.6, 0.95])).tolist(), float(norms.max())):
        assert cett(h, w_out, eps) == pytest.approx(slow_cett(h, w_out, eps), rel=1e-5, abs=1e-7)
    assert cett(h, w_out, 0.0) == 0
    assert cett(h, w_out, float(norms.max())) == pytest.approx(1)
    assert cett(torch.zeros(3, 30), w_out, 1.0) == 0  # no output, nothing to lose


def test_the_curve_is_cett_at_every_threshold():
    for neurons in (30, 32, 70):  # below, at and over a block of the running sum
        h, w_out = layer(neurons=neurons)
        curve = CettCurve.of(h, w_out)
        exact = [cett(h, w_out, eps) for eps in curve.eps.tolist()]
        np.testing.assert_allclose(curve.cett.numpy(), np.maximum.accumulate(exact), rtol=1e-4, atol=1e-6)
        norms = (h.abs() * w_out.norm(dim=0)).flatten()
        assert curve.dropped_at(float(norms.median())) == pytest.approx(float((norms <= norms.median()).float().mean()))
        assert curve.dropped_at(-1.0) == 0


def test_the_threshold_is_the_largest_that_keeps_cett():
    """Brute force over all norms that occur: the first one that breaks the target bounds it."""
    h, w_out = layer(20, 25)
    norms = sorted(set((h.abs() * w_out.norm(dim=0)).flatten().tolist()))
    errors = [slow_cett(h, w_out, eps) for eps in norms]
    for target in (0.02, 0.1, 0.3, 0.7):
        first = next(k for k, error in enumerate(errors) if error > target)
        assert cett_thresholds(h, w_out, target) == norms[first - 1]
        assert cett(h, w_out, cett_thresholds(h, w_out, target)) <= target + 1e-6


def test_equal_norms_are_dropped_together():
    curve = CettCurve.of(torch.tensor([[1.0, 1.0, 2.0]]), torch.eye(3))
    assert curve.eps.tolist() == [1, 2]
    np.testing.assert_allclose(curve.cett.numpy(), [math.sqrt(2 / 6), 1], rtol=1e-6)
    assert curve.threshold(0.5) == 0  # one of the two alone would fit


def test_the_grid_is_that_of_the_release():
    for seed in range(3):
        h, w_out = layer(2000, 48, seed=seed)  # smooth: where CETT wavers, bisection may end at another crossing
        for target in (0.05, 0.2, 0.5):
            theirs, step = release(h, w_out, target)
            ours = cett_thresholds(h, w_out, target, method="grid")
            assert abs(ours - theirs) <= step * 1.01
            assert abs(cett(h, w_out, ours) - cett(h, w_out, theirs)) <= 1e-4
            assert cett(h, w_out, ours) <= target + 1e-5


def test_where_even_the_smallest_is_too_much_the_threshold_is_zero():
    """The release's index -1 gives its largest candidate there."""
    h, w_out = torch.tensor([[1.0, 1.5, 2.0], [1.2, 1.1, 3.0]]), torch.eye(3)
    theirs, _ = release(h, w_out, 1e-3)
    assert theirs > 2
    for method in ("sort", "grid"):
        assert cett_thresholds(h, w_out, 1e-3, method) == 0


def test_bad_input():
    h, w_out = layer()
    with pytest.raises(ValueError, match=r"h, w_out: \[40, 30\] and \[12, 29\] were given"):
        cett(h, w_out[:, :29], 1.0)
    with pytest.raises(ValueError, match="at least one token"):
        cett(h[:0], w_out, 1.0)
    with pytest.raises(ValueError, match="threshold: -1"):
        cett(h, w_out, -1.0)
    with pytest.raises(ValueError, match=r"target: -0\.1"):
        cett_thresholds(h, w_out, -0.1)
    with pytest.raises(ValueError, match="method: 'newton'"):
        cett_thresholds(h, w_out, 0.1, method="newton")  # type: ignore[arg-type]
