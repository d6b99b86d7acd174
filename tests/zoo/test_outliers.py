"""The twin computes the same function, with exactly the planted channels in front of the linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.recipe.runner import apply
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Moments
from actkit.sparsity.teal import Teal
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.transforms import State, outputs
from actkit.zoo.outliers import outlier_twin


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "vit"])
def test_the_function_stays_and_the_original_too(kind: str) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind)
    before = State.of(model)
    twin = outlier_twin(model)
    for a, b in zip(outputs(twin, batches), outputs(model, batches), strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4
    before.compare(model, "the original")


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_each_norm_has_its_own_channels(kind: str) -> None:
    model, batches = tiny_model(kind), tiny_batches(kind)
    twin = outlier_twin(model, channels=3, factor=10.0, seed=5)
    sites = {Site(name, block): Moments() for name in ("attention.input", "mlp.input") for block in (0, 1)}
    means = [record(m, sites, batches, progress=False) for m in (model, twin)]
    planted = []
    for site in sites:
        ratio = means[1][site].mean_abs / means[0][site].mean_abs
        chosen = ratio > 5
        assert int(chosen.sum()) == 3
        torch.testing.assert_close(ratio[chosen], torch.full((3,), 10.0).to(ratio), rtol=1e-3, atol=0)
        torch.testing.assert_close(ratio[~chosen], torch.ones(13).to(ratio), rtol=1e-3, atol=0)
        planted.append(tuple(chosen.nonzero().flatten().tolist()))
    assert len(set(planted)) > 1


def test_the_seed_decides() -> None:
    model = tiny_model("llama")
    weights = [outlier_twin(model, seed=seed).model.layers[0].input_layernorm.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_factor_of_one_is_a_plain_copy() -> None:
    model = tiny_model("gpt2")
    State.of(model).compare(outlier_twin(model, factor=1.0), "the twin", modules=False)


def test_where_no_scale_can_move_it_is_refused() -> None:
    for kind, text in (("bert", "post-norm"), ("mixtral", "its experts are 3-D"), ("mlp", "of no known family")):
        with pytest.raises(UnsupportedModelError, match=text):
            outlier_twin(tiny_model(kind))
    shared: Any = tiny_model("llama")
    shared.model.layers[1].self_attn.q_proj.weight = shared.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(UnsupportedModelError, match=r"q_proj is shared with another part"):
        outlier_twin(shared)
    changed = tiny_model("llama")
    apply(changed, Teal(), tiny_batches("llama"), progress=False)
    with pytest.raises(UnsupportedModelError, match="changed its layers already"):
        outlier_twin(changed)


def test_values_out_of_bounds_are_refused() -> None:
    model = tiny_model("llama")
    for settings, text in (
        ({"channels": 0}, "channels: 0 was given"),
        ({"channels": 17}, "channels: 17 were given"),
        ({"factor": 0.0}, "factor: 0.0 was given"),
        ({"factor": float("inf")}, "factor: inf was given"),
    ):
        with pytest.raises(ValueError, match=text):
            outlier_twin(model, **settings)  # type: ignore[arg-type]


def test_ties_of_the_embeddings_stay() -> None:
    twin = outlier_twin(tiny_model("llama"))
    assert twin.get_input_embeddings().weight is twin.get_output_embeddings().weight
    assert anatomy(twin).tied
