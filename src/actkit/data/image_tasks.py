"""Tasks made of one set of images: the same labels, other pixels. For task vectors, transfer and forgetting.

x [images, channels, height, width] in [0, 1] -> the same shape, in [0, 1]
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.data.corruptions import corrupt_images

ImageTask = Literal["inverted", "rotated", "mirrored", "shifted", "thickened", "noisy", "contrast"]
IMAGE_TASKS: tuple[ImageTask, ...] = get_args(ImageTask)
GREY = 0.3  # how far pixels of 'contrast' are from grey, of what they were


def image_task(x: Tensor, task: ImageTask, seed: int = 0) -> Tensor:
    """Change images to those of a task.

    Args:
        x: [images, channels, height, width], float in [0, 1].
        task: 'inverted' is 1 - x, 'rotated' by 90 degrees to the left, 'mirrored' left to right, 'shifted' down and to
            the right by an eighth with black behind, 'thickened' the largest of 2 x 2 pixels, 'noisy' with normal noise
            (ImageNet-C's severity 3), 'contrast' drawn towards grey.
        seed: of the noise.

    Raises:
        ValueError: the task is unknown, or x holds no images in [0, 1].
    """
    if task not in IMAGE_TASKS:
        raise ValueError(f"task: {task!r} was given, allowed are {', '.join(IMAGE_TASKS)}.")
    if x.dim() != 4 or not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"x: {x.dtype} of shape {list(x.shape)} was given; give images [n, c, h, w] in [0, 1].")
    if task == "inverted":
        return 1 - x
    if task == "rotated":
        return torch.rot90(x, 1, (2, 3))
    if task == "mirrored":
        return x.flip(3)
    if task == "shifted":
        down, right = max(1, x.shape[2] // 8), max(1, x.shape[3] // 8)
        return F.pad(x, (right, 0, down, 0))[:, :, : x.shape[2], : x.shape[3]]
    if task == "thickened":
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, stride=1)
    if task == "noisy":
        return corrupt_images(x, "gaussian", 3, seed)
    return 0.5 + GREY * (x - 0.5)
