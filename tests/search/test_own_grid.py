"""Rounding to the grid that weights were rounded to before is told apart from rounding weights that lie anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actkit.core.edit import changes
from actkit.core.recipe.runner import apply
from actkit.search.own_grid import own_grid_warning
from actkit.testing import tiny_model
from actkit.zoo.off_grid import off_grid_twin

PATHS = [f"model.layers.{block}.mlp.{name}_proj" for block in (0, 1) for name in ("gate", "up", "down")]


def from_a_grid() -> Any:
    """A model whose MLPs lie on a grid of 4 bits in groups of 8 inputs, as a source of that kind is read."""
    model, draw = tiny_model("llama"), torch.Generator().manual_seed(0)
    for path in PATHS:
        weight = model.get_submodule(path).weight
        codes = torch.randint(16, (weight.shape[0], weight.shape[1] // 8, 8), generator=draw)
        codes[..., 0], codes[..., 1] = 0, 15
        weight.data.copy_(((codes - 8) * 0.02).flatten(1))
    return model


def rounded(model: Any, bits: int) -> Any:
    recipe = {"actkit": 1, "transforms": [{"rtn": {"bits": bits, "group_size": 8}}]}
    return apply(model, recipe, None, inplace=False, min_coverage=0.0, progress=False).model


def with_source(model: Any) -> Any:
    grid = changes.SourceGrid("gguf", dict.fromkeys(PATHS, "Q4_1"))
    model.__dict__[changes.SOURCE] = changes.Source.of("somewhere", model, grid=grid)
    return model


@pytest.mark.parametrize(("bits", "warns"), [(4, True), (3, False)])
def test_the_sources_own_grid_is_seen_in_the_weights(bits: int, warns: bool) -> None:
    model = with_source(from_a_grid())
    found = own_grid_warning(model, rounded(model, bits))
    assert (found is not None) == warns
    assert found is None or "in 6 of 6 layers (gguf: 6 x Q4_1" in found


def test_the_twin_and_other_models_are_judged_without_a_warning() -> None:
    model = from_a_grid()
    assert own_grid_warning(model, rounded(model, 4)) is None  # not from a quantized source, as far as anyone knows
    twin = with_source(off_grid_twin(model))
    assert own_grid_warning(twin, rounded(twin, 4)) is None
    assert own_grid_warning(with_source(model), model) is None  # nothing was rounded
