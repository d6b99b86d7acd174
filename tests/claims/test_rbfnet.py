"""RBFNet's experiments on tiny sizes: the decoders' sizes, the shape, and what is judged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actkit.claims import rbfnet
from actkit.claims.rbfnet import DECODERS, LINEAR, MATCHED, OURS, SHALLOW, WIDE, Sizes

TINY = Sizes(seeds=(0, 1), rates=(3e-3, 1e-2), steps=2, pixels=64, shape_steps=2, points=64, side=8)


def test_decoders_have_the_sizes_of_the_conditions() -> None:
    sizes = {name: rbfnet.size(make()) for name, make in DECODERS.items()}
    assert sizes == {OURS: 2499, WIDE: 5571, MATCHED: 2523, SHALLOW: 2489, LINEAR: 57}
    assert rbfnet.operations(DECODERS[OURS]()) == 4 * 18 * 64 + 2 * 64 * 3
    assert rbfnet.operations(DECODERS[WIDE]()) == 2 * (18 * 64 + 64 * 64 + 64 * 3)
    grid = rbfnet.new_field(2, 3, resolutions=rbfnet.RESOLUTIONS).encoder
    assert 6_000 < rbfnet.size(grid) < 7_500


@pytest.mark.parametrize(
    ("scores", "passed"),
    [
        ({OURS: 30.0, WIDE: 30.7, MATCHED: 30.3, SHALLOW: 29.5}, True),
        ({OURS: 30.0, WIDE: 30.7, MATCHED: 30.3, SHALLOW: 29.6}, False),
        ({OURS: 30.0, WIDE: 30.7, MATCHED: 30.4, SHALLOW: 29.5}, False),
        ({OURS: 30.0, WIDE: 30.8, MATCHED: 30.3, SHALLOW: 29.5}, False),
    ],
)
def test_images_are_judged_by_means(scores: dict[str, float], passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted(sizes: Sizes, image: Any, decoder: str, rate: float, seed: int, **more: Any) -> Any:
        score = scores.get(decoder, 20.0) - (rate < 5e-3)  # the higher rate is better
        return SimpleNamespace(score=score, held_out=10.0)

    monkeypatch.setattr(rbfnet, "fitted", fitted)
    monkeypatch.setattr(rbfnet, "picture", lambda name: torch.rand(4, 4, 3))
    found = rbfnet.images(TINY)
    assert found.passed is passed and f"{OURS} (2499 parameters, 4992 operations, rate 0.01) 30.00" in found.here


def test_the_shape_is_a_torus_and_a_sphere() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.0, 0.0], [0.0, -0.6, 0.1], [1.0, 0.0, 0.0], [0.0, 0.0, 0.5]])
    expected = torch.tensor([-0.3, -0.2, -0.1, 0.2, 0.2])
    torch.testing.assert_close(rbfnet.torus_and_sphere(x), expected)
    found = rbfnet.solid(TINY)
    assert not found.passed and "32 radial neurons (1185 parameters" in found.here


def test_an_image_of_scikit_learn_is_made_small() -> None:
    pytest.importorskip("PIL")
    image = rbfnet.picture("china.jpg")
    assert image.shape == (96, 144, 3) and 0.2 < float(image.mean()) < 0.8 and float(image.max()) <= 1
