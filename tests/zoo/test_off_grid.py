"""The twin computes the same function, and no group of its weights lies on the grid that the original's lie on."""

from __future__ import annotations

import pytest
import torch

from actkit.core.edit import changes
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import UnsupportedModelError
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.transforms import State, outputs
from actkit.zoo.off_grid import off_grid_twin


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gemma3_text", "phi3"])
def test_the_function_stays_and_the_original_too(kind: str) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind)
    before = State.of(model)
    twin = off_grid_twin(model)
    for a, b in zip(outputs(twin, batches), outputs(model, batches), strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4
    before.compare(model, "the original")


def test_no_group_is_on_the_grid_any_more() -> None:
    grid = IntegerGrid(4, 8, "input", False)
    model, draw = tiny_model("llama"), torch.Generator().manual_seed(0)
    linears = [name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear) and "." in name]
    for name in linears:
        weight = model.get_submodule(name).weight
        codes = torch.randint(16, (weight.shape[0], weight.shape[1] // 8, 8), generator=draw)
        codes[..., 0], codes[..., 1] = 0, 15  # so that the group's range, and with it the grid, is found again
        weight.data.copy_(((codes - 8) * 0.02).flatten(1))
    twin = off_grid_twin(model, seed=3)
    for name in linears:
        on, off = (each.get_submodule(name).weight.detach() for each in (model, twin))
        assert float((grid.fake(on) - on).abs().max()) < 1e-6
        errors = (grid.fake(off) - off).square().unflatten(1, (-1, 8)).mean(-1).sqrt()
        assert float(errors.min()) > 1e-4 and float(errors.mean()) > 2e-3, name  # a step is 0.02


def test_factors_are_moderate_and_the_seed_decides() -> None:
    model = tiny_model("llama")
    norms = [off_grid_twin(model, seed).model.layers[0].input_layernorm.weight.detach() for seed in (0, 0, 1)]
    factor = norms[0] / model.model.layers[0].input_layernorm.weight
    assert 0.7 <= float(factor.min()) < float(factor.max()) <= 1.4001
    assert torch.equal(norms[0], norms[1]) and not torch.equal(norms[0], norms[2])


def test_the_twin_has_no_source() -> None:
    model = tiny_model("llama")
    model.__dict__[changes.SOURCE] = changes.Source.of("somewhere", model)
    assert changes.source(off_grid_twin(model)) is None


def test_where_no_scale_can_move_it_is_refused() -> None:
    for kind, words in (
        ("bert", "post-norm"),
        ("gpt2", "a nonlinearity stands between"),
        ("mixtral", "its experts are 3-D"),
    ):
        with pytest.raises(UnsupportedModelError, match=f"cannot leave its grid here: .*{words}"):
            off_grid_twin(tiny_model(kind))
