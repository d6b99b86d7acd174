"""Corruptions against the moments that their distributions have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actkit.data.corruptions import CORRUPTIONS, SEVERITIES, add_label_noise, corrupt_images

GREY = torch.full((400, 1, 16, 16), 0.5)


def test_moments_of_the_noises() -> None:
    """On grey, where clipping hardly matters: the variance of each distribution."""
    assert float(corrupt_images(GREY, "gaussian", 2).std()) == pytest.approx(0.12, rel=0.02)
    shot = corrupt_images(GREY, "shot", 1)
    assert float(shot.mean()) == pytest.approx(0.5, rel=0.01) and float(shot.std()) == pytest.approx(
        (0.5 / 60) ** 0.5, rel=0.02
    )
    assert torch.equal((shot * 60).round(), shot * 60) or torch.allclose((shot * 60).round(), shot * 60, atol=1e-4)
    impulse = corrupt_images(GREY, "impulse", 4)
    for value in (0.0, 1.0):
        assert float((impulse == value).float().mean()) == pytest.approx(0.17 / 2, rel=0.05)
    assert float((impulse == 0.5).float().mean()) == pytest.approx(0.83, rel=0.01)


def test_severities_rise_and_seeds_repeat() -> None:
    x = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for kind in CORRUPTIONS:
        errors = [float((corrupt_images(x, kind, severity) - x).square().mean()) for severity in SEVERITIES]
        assert errors == sorted(errors) and errors[0] > 0
        again = corrupt_images(x, kind, 3, seed=5)
        assert torch.equal(again, corrupt_images(x, kind, 3, seed=5)) and again.shape == x.shape
        assert not torch.equal(again, corrupt_images(x, kind, 3, seed=6))
        assert again.min() >= 0 and again.max() <= 1


def test_label_noise_redraws_a_share_over_all_classes() -> None:
    labels = torch.arange(20_000) % 10
    noisy = add_label_noise(labels, 0.4, 10, seed=1)
    assert float((noisy != labels).float().mean()) == pytest.approx(0.4 * 0.9, abs=0.01)  # a tenth hits the true one
    counts = noisy[noisy != labels].bincount(minlength=10).double()
    assert float(counts.std() / counts.mean()) < 0.08
    assert torch.equal(noisy, add_label_noise(labels, 0.4, 10, seed=1)) and noisy.dtype == labels.dtype
    assert not torch.equal(noisy, add_label_noise(labels, 0.4, 10, seed=2))
    assert torch.equal(add_label_noise(labels, 0.0, 10), labels)
    assert torch.equal(labels, torch.arange(20_000) % 10)  # not in place


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((GREY, "snow", 1), "kind"),
        ((GREY, "shot", 0), "severity"),
        ((GREY, "shot", 6), "severity"),
        ((GREY * 3, "shot", 1), "x"),
        ((GREY.long(), "shot", 1), "x"),
        ((GREY * float("nan"), "gaussian", 1), "x"),
    ],
)
def test_bad_images(arguments: Any, names: str) -> None:
    with pytest.raises(ValueError, match=f"^{names}: "):
        corrupt_images(*arguments)


def test_bad_labels() -> None:
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"^share: 1\.5"):
        add_label_noise(labels, 1.5, 3)
    with pytest.raises(ValueError, match=r"^classes: 2"):
        add_label_noise(labels, 0.5, 2)
