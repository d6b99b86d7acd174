"""Damaged data for tests of robustness: noisy images, and labels of which a share is random.

The image noises and their five severities are those of ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Corruption = Literal["gaussian", "shot", "impulse"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
SEVERITIES = range(1, 6)

_STRENGTH = {
    "gaussian": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot": (60, 25, 12, 5, 3),  # photons of a white pixel
    "impulse": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of the values that become black or white
}


def corrupt_images(x: Tensor, kind: Corruption, severity: int, seed: int = 0) -> Tensor:
    """Images with noise, in [0, 1] like x.

    Args:
        x: float, any shape, in [0, 1] (before any normalisation).
        kind: 'gaussian' adds normal noise, 'shot' draws each value from a Poisson distribution, 'impulse' makes some
            values 0 or 1.
        severity: 1 to 5.
        seed: of the noise.

    Raises:
        ValueError: kind or severity is unknown, or values lie outside [0, 1].
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind: {kind!r} was given, allowed are {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: {severity!r} was given, allowed are 1 to 5.")
    if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError("x: give images as floats in [0, 1]; corrupt them before they are normalised.")
    strength = _STRENGTH[kind][severity - 1]
    generator = torch.Generator(x.device).manual_seed(seed)
    if kind == "gaussian":
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return (x + strength * noise).clamp(0, 1)
    if kind == "shot":
        return (torch.poisson(x * strength, generator=generator) / strength).clamp(0, 1)
    drawn = torch.rand(x.shape, generator=generator, device=x.device)
    noisy = torch.where(drawn < strength / 2, torch.zeros_like(x), x)
    return torch.where(drawn > 1 - strength / 2, torch.ones_like(x), noisy)


def add_label_noise(labels: Tensor, share: float, classes: int, seed: int = 0) -> Tensor:
    """Labels of which a share is redrawn uniformly from all classes, so that some keep their value by chance.

    The items are fixed by the seed: draw once and keep the result. Noise that is drawn anew in each epoch is another
    thing.

    Args:
        labels: int64 [n].
        share: of the items, 0 to 1.
        classes: how many there are.
        seed: of the choice and of the new labels.

    Raises:
        ValueError: the share lies outside [0, 1], there is no class, or a label is beyond the classes.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: {share} was given; it is a share of the items, give 0 to 1.")
    if classes < 1 or (labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes)):
        raise ValueError(f"classes: {classes} was given; give 1 or more, and more than the largest label.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy = labels.clone()
    noisy[chosen] = torch.randint(classes, (len(chosen),), generator=generator).to(labels)
    return noisy
