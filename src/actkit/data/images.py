"""Image data with no download: the 1,797 digits of 8 x 8 pixels in scikit-learn (UCI, Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from actkit.data.text import Split, check_split, split_of

# Fewer for training than of the text: a test split of 8 % would be 144 images, too coarse for an accuracy.
_BOUNDS = (0.6, 0.7, 0.8, 1.0)


def digits(split: Split) -> tuple[Tensor, Tensor]:
    """The handwritten digits of one split; train has 60, calibration 10, search 10 and test 20 % of them.

    Args:
        split: which part.

    Returns:
        Images float32 [n, 1, 8, 8] in [0, 1], and labels int64 [n].

    Raises:
        DataError: the split is unknown.
        ImportError: scikit-learn is missing.
    """
    check_split(split)
    images, labels = _all()
    chosen = torch.tensor([split_of(f"digits.{index}", _BOUNDS) == split for index in range(len(images))])
    return images[chosen], labels[chosen]


@cache
def _all() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits: they come with scikit-learn, which is missing; pip install 'actkit[zoo]'."
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # stored as 0 .. 16
    return images, torch.from_numpy(bunch.target).long()
