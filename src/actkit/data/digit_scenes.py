"""Scenes of written digits on clutter, with the mask of every digit: for models that are told classes and find places.

A scene is a square of colours. Its ground is smooth noise with pieces of digits in random colours; on it stand two or
three digits of different classes, 14 to 20 pixels high, and in every fourth scene one of them twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.data.images import digits
from actkit.data.text import Split

SMALLEST, LARGEST = 14, 20  # of a digit
PIECES, FAINT = 4, 0.6  # of clutter, and how bright it is at most
TWICE = 0.25
TRIES = 30  # for a place that is free


class Scenes(NamedTuple):
    """Images and what they show.

    Attributes:
        pixel_values: float32 [scenes, 3, size, size] in [0, 1].
        labels: float32 [scenes, 10], 1 for classes that are shown.
        masks: int64 [scenes, size, size]; 0 is ground, c + 1 a digit of class c.
    """

    pixel_values: Tensor
    labels: Tensor
    masks: Tensor


def digit_scenes(count: int, split: Split = "train", seed: int = 0, size: int = 56) -> Scenes:
    """Draw scenes of the embedded digits.

    Args:
        count: how many.
        split: of the digits that stand in them.
        seed: of all that is drawn.
        size: of a side in pixels.

    Returns:
        Images, classes and masks.

    Raises:
        ValueError: no scene, or a size in which digits have no place.
        ImportError: scikit-learn is missing.
    """
    if count < 1 or size < 2 * LARGEST:
        raise ValueError(f"count, size: {count} and {size} were given; give 1 or more, and at least {2 * LARGEST}.")
    draw = torch.Generator().manual_seed(seed)
    images, classes = digits(split)
    by_class = [images[classes == each] for each in range(10)]
    found = [_scene(by_class, size, draw) for _ in range(count)]
    pixels, labels, masks = (torch.stack(each) for each in zip(*found, strict=True))
    return Scenes(pixels, labels, masks)


def _scene(by_class: list[Tensor], size: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One image, its classes and its mask."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    def digit(kind: int) -> Tensor:
        return by_class[kind][number(0, len(by_class[kind]))]

    scales = [torch.rand(1, 3, side, side, generator=draw) for side in (4, 14)]
    smooth = [F.interpolate(each, (size, size), mode="bilinear", align_corners=False)[0] for each in scales]
    ground = (smooth[0] + smooth[1]) / 4
    for _ in range(PIECES):
        y, x, side = number(0, 5), number(0, 5), number(6, 10)
        piece = _enlarged(digit(number(0, 10))[:, y : y + 4, x : x + 4], side)
        top, left = number(0, size - side), number(0, size - side)
        ground = _painted(ground, piece, top, left, FAINT * torch.rand(3, generator=draw))
    kinds = torch.randperm(10, generator=draw)[: number(2, 4)].tolist()
    if float(torch.rand((), generator=draw)) < TWICE:
        kinds.append(kinds[0])
    mask = torch.zeros(size, size, dtype=torch.long)
    taken: list[tuple[int, int, int]] = []
    shown = []
    for kind in kinds:
        side = number(SMALLEST, LARGEST + 1)
        for _ in range(TRIES):
            top, left = number(0, size - side + 1), number(0, size - side + 1)
            if all(abs(top - y) >= max(side, s) or abs(left - x) >= max(side, s) for y, x, s in taken):
                break
        else:
            continue  # there is no room left: it is not in the scene, nor among its classes
        taken.append((top, left, side))
        shown.append(kind)
        strokes = _enlarged(digit(kind), side)
        ground = _painted(ground, strokes, top, left, 0.5 + 0.5 * torch.rand(3, generator=draw))
        place = mask[top : top + side, left : left + side]
        place[strokes[0] > 0.5] = kind + 1
    labels = torch.zeros(10)
    labels[shown] = 1
    return ground, labels, mask


def _enlarged(image: Tensor, side: int) -> Tensor:
    """[1, side, side] of [1, h, w]."""
    return F.interpolate(image[None], (side, side), mode="bilinear", align_corners=False)[0]


def _painted(ground: Tensor, strokes: Tensor, top: int, left: int, colour: Tensor) -> Tensor:
    """The ground with strokes of a colour on it."""
    side = strokes.shape[-1]
    painted = ground.clone()
    place = painted[:, top : top + side, left : left + side]
    place.copy_(place * (1 - strokes) + colour[:, None, None] * strokes)
    return painted
