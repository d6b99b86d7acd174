"""How well class activation maps find what masks show: the mean intersection over union of seeds.

pixel -> class with the largest map if that is above a threshold, else ground
IoU_c = |found and true| / |found or true| over all images,   mIoU = mean over ground and classes that occur
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


def cam_miou(cams: Tensor, masks: Tensor, threshold: float) -> float:
    """Return the mean intersection over union at one threshold.

    Args:
        cams: [images, classes, height, width] from 0 to 1; 0 for classes that an image does not show.
        masks: int64 [images, height, width]; 0 is ground, c + 1 is class c.
        threshold: of the ground, 0 to 1.

    Raises:
        ValueError: shapes do not fit, a mask names a class without a map, or the threshold is out of bounds.
    """
    count = cams.shape[1] + 1
    if cams.dim() != 4 or masks.shape != (len(cams), *cams.shape[2:]) or not 0 <= threshold <= 1:
        raise ValueError(
            f"cams, masks, threshold: {list(cams.shape)}, {list(masks.shape)} and {threshold} were given; give "
            f"[images, classes, height, width], [images, height, width], and 0 to 1."
        )
    if not 0 <= int(masks.min()) <= int(masks.max()) < count:
        raise ValueError(
            f"masks: {int(masks.min())} to {int(masks.max())} were given for {count - 1} maps; give 0 for the ground "
            f"and c + 1 for class c."
        )
    best, which = cams.max(1)
    found = torch.where(best > threshold, which + 1, 0)
    pairs = torch.bincount((masks * count + found).flatten(), minlength=count * count).reshape(count, count).double()
    either = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
    return float((pairs.diagonal()[either > 0] / either[either > 0]).mean())


def miou_at_best_threshold(
    cams: Tensor, masks: Tensor, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[float, float]:
    """Return the threshold with the largest mean intersection over union, and that.

    Search on other images than those that you report.

    Args:
        cams: as of `cam_miou`.
        masks: as of `cam_miou`.
        thresholds: that are tried.

    Raises:
        ValueError: there is none, or as `cam_miou`.
    """
    if not thresholds:
        raise ValueError("thresholds: none were given; give at least one.")
    found = {each: cam_miou(cams, masks, each) for each in thresholds}
    best = max(found, key=lambda each: found[each])
    return best, found[best]
