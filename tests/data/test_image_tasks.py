"""Tasks of images against what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actkit.data.image_tasks import IMAGE_TASKS, image_task


def test_tasks_are_what_they_say() -> None:
    x = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = x.numpy()
    rotated = np.rot90(pixels, 1, (2, 3))
    shifted = np.zeros_like(pixels)
    shifted[:, :, 1:, 1:] = pixels[:, :, :-1, :-1]
    padded = np.pad(pixels, ((0, 0), (0, 0), (0, 1), (0, 1)))
    thick = np.maximum.reduce([padded[:, :, i : i + 8, j : j + 8] for i in (0, 1) for j in (0, 1)])
    expected = {
        "inverted": 1 - pixels,
        "rotated": rotated,
        "mirrored": pixels[..., ::-1],
        "shifted": shifted,
        "thickened": thick,
        "contrast": 0.35 + 0.3 * pixels,
    }
    for task in IMAGE_TASKS:
        found = image_task(x, task)
        assert found.shape == x.shape and float(found.min()) >= 0 and float(found.max()) <= 1
        if task in expected:
            np.testing.assert_allclose(found.numpy(), expected[task], atol=1e-6)
    assert torch.equal(image_task(x, "noisy", 1), image_task(x, "noisy", 1))
    assert not torch.equal(image_task(x, "noisy", 1), image_task(x, "noisy", 2))


def test_bad_images_are_refused() -> None:
    with pytest.raises(ValueError, match="task: 'x' was given, allowed are inverted"):
        image_task(torch.zeros(1, 1, 8, 8), "x")  # type: ignore[arg-type]
    for x in (torch.zeros(8, 8), torch.full((1, 1, 8, 8), 2.0), torch.zeros(1, 1, 8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match="x: "):
            image_task(x, "inverted")
