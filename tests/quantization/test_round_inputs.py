"""What layers read after `round_inputs`, against the formulas of the header in numpy; what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import actkit
from actkit.core.ground.errors import DataError, RecipeError, UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.measure.cost import measure_cost
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store.card import card_of
from actkit.core.store.checkpoint import load, save
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.quantization.awq import Awq
from actkit.quantization.gptq import Gptq
from actkit.quantization.noisyquant import NoisyQuant
from actkit.quantization.outliertune import OutlierTune
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth
from actkit.runtime.decoder import supports
from actkit.sparsity.r_sparse.r_sparse import RSparse
from actkit.sparsity.wina.wina import Wina
from actkit.testing import check_transform, tiny_batches, tiny_model

WEIGHTS = RoundToNearest(bits=8, group_size=-1, symmetric=True)
UP = "model.layers.0.mlp.up_proj"
RECIPES = Path(__file__).parents[2] / "recipes"


def values(site: str, model, batches) -> np.ndarray:
    """All rows that calibration sees at a site, in float32."""
    return record(model, {site: Sample(10_000)}, batches, progress=False)[site].rows.float().numpy()


def read(model, path: str = UP) -> tuple[np.ndarray, np.ndarray]:
    """What a layer is given, and what it multiplies."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    return x.numpy(), model.get_submodule(path).inputs(x).numpy()


def by_hand(
    x: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, symmetric: bool, half_step: bool
) -> np.ndarray:
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    top, middle = np.float32(2**bits - 1), np.float32(2 ** (bits - 1))
    if symmetric:
        step, zero = np.maximum(-low, high) / (middle - np.float32(0.5 if half_step else 1)), middle
    else:
        step = (high - low) / top
        zero = -np.round(low / step)
    return (np.clip(np.round(x / step) + zero, 0, top) - zero) * step


@pytest.mark.parametrize("settings", [{}, {"half_step": True}, {"bits": 6}, {"bits": 4, "symmetric": False}])
def test_each_token_has_its_own_scale(settings):
    model = apply(tiny_model("llama"), RoundInputs(**settings), progress=False).model
    x, found = read(model)
    how = (settings.get("bits", 8), settings.get("symmetric", True), settings.get("half_step", False))
    np.testing.assert_allclose(found, by_hand(x, x.min(1, keepdims=True), x.max(1, keepdims=True), *how), rtol=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"bits": 6, "symmetric": False}, {"share": 0.9}, {"share": 0.9, "symmetric": False}]
)
def test_one_scale_is_that_of_what_calibration_saw(settings):
    """The inputs that the rounded weights before give, in the block as it stood before its inputs were rounded."""
    batches = tiny_batches("llama")
    model = apply(tiny_model("llama"), [WEIGHTS, RoundInputs(per="tensor", **settings)], batches, progress=False).model
    before = apply(tiny_model("llama"), WEIGHTS, progress=False).model
    seen = values("blocks.0.mlp.input", before, batches)
    low, high = seen.min(), seen.max()
    if "share" in settings:
        most = np.quantile(np.abs(seen), 0.9)
        low, high = max(low, -most), min(high, most)
    x, found = read(model)
    how = (settings.get("bits", 8), settings.get("symmetric", True), False)
    tolerance = {"rtol": 1e-5} if "share" not in settings else {"atol": 0.02 * float(high)}  # its bins: 1/512
    np.testing.assert_allclose(found, by_hand(x, low, high, *how), **tolerance)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "vit", "bert", "mlp"])
@pytest.mark.parametrize("per", ["token", "tensor"])
def test_every_family(kind, per):
    model, batches = tiny_model(kind), tiny_batches(kind)
    wanted = sum(len(block.linears()) for block in anatomy(tiny_model(kind), batches[0]).blocks)
    apply(model, RoundInputs(per=per), batches, progress=False)
    found = [m for m in model.modules() if isinstance(m, ActLinear) and m.inputs is not None]
    assert len(found) == wanted or kind == "mixtral"  # experts that no token reached, by one scale
    assert all((m.inputs.scale is None) == (per == "token") for m in found)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "vit"])
@pytest.mark.parametrize("settings", [{}, {"per": "tensor"}])
def test_it_keeps_what_transforms_promise(kind, settings):
    check_transform(RoundInputs(**settings), tiny_model(kind), tiny_batches(kind), conflicting=[RoundInputs(bits=6)])


def test_what_stacks_and_what_is_refused():
    wina, low = Wina(sparsity=0.5), RSparse(sparsity=0.5)
    batches = tiny_batches("llama")
    for stack in (
        [WEIGHTS, RoundInputs(), wina],
        [wina, RoundInputs(), WEIGHTS],
        [Awq(bits=8, group_size=-1), RoundInputs()],
    ):
        model = apply(tiny_model("llama"), stack, batches, progress=False).model
        assert model.get_submodule(UP).inputs is not None
    for stack, text in (
        ([RoundInputs(), Awq(bits=4, group_size=8)], "put it first"),
        ([low, RoundInputs()], "corrects what its selection drops"),
        ([RoundInputs(), low], "from inputs that are not rounded"),
        ([RoundInputs(), RoundInputs(bits=6)], "applied already"),
    ):
        with pytest.raises(RecipeError, match=text):
            Recipe(stack).check()


STACKS = {
    "smooth, rtn": [Smooth(), WEIGHTS, RoundInputs()],
    "smooth, gptq": [Smooth(), Gptq(bits=8, group_size=-1, symmetric=True), RoundInputs(per="tensor")],
    "one scale, noise": [WEIGHTS, RoundInputs(per="tensor"), NoisyQuant(clip_grid=4, n_grid=4, rows=64)],
    "outliertune, noise": [OutlierTune(), NoisyQuant(clip_grid=4, n_grid=4, rows=64)],
    "outliertune, gptq": [OutlierTune(round=("inputs",)), Gptq(bits=8, group_size=-1, symmetric=True)],
}


@pytest.mark.parametrize("kind", ["llama", "vit"])
@pytest.mark.parametrize("name", STACKS)
def test_stacks_are_saved_loaded_and_undone(name, kind, tmp_path):
    model, batches = tiny_model(kind), tiny_batches(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    applied = apply(model, STACKS[name], batches, undo="memory", progress=False)
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0])[0], model(**batches[0])[0])
    applied.undo()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_roles_are_left_out():
    model = apply(tiny_model("llama"), RoundInputs(skip=("down",)), progress=False).model
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert model.get_submodule(UP).inputs is not None


def test_whoever_reads_models_knows_the_slot():
    model = apply(tiny_model("llama"), [WEIGHTS, RoundInputs()], progress=False).model
    assert "inputs rounded to 8 bits per token" in " ".join(actkit.show(model).linears)
    assert "14 linear layers: inputs rounded to 8 bits per token" in card_of(model).text()
    assert "q_proj rounds its inputs, which the decoder does not" in str(supports(model))
    with pytest.raises(UnsupportedModelError, match="also rounds its inputs"):
        torch.relu(model.get_submodule(UP).weight)
    weights = apply(tiny_model("llama"), WEIGHTS, progress=False).model
    head = tiny_model("llama", tie_word_embeddings=False)
    head.lm_head = ActLinear.of(head.lm_head, inputs=model.get_submodule(UP).inputs)
    assert supports(head) == "lm_head rounds its inputs, which the decoder does not"
    assert measure_cost(model, progress=False).bytes_per_token == measure_cost(weights, progress=False).bytes_per_token


def test_the_recipe_of_the_folder():
    model = tiny_model("llama")
    batches = tiny_batches("llama")
    before = model(**batches[0]).logits
    apply(model, str(RECIPES / "w8a8.yaml"), batches, progress=False)
    with torch.no_grad():
        moved = (model(**batches[0]).logits - before).norm() / before.norm()
    assert 1e-3 < float(moved) < 0.15


def test_wrong_settings():
    for settings, text in (
        ({"bits": 1}, "bits"),
        ({"per": "channel"}, "per"),
        ({"share": 0.9}, "the range of a token is its own"),
        ({"per": "tensor", "share": 0}, "share"),
        ({"half_step": True, "symmetric": False}, "half_step: it divides the range of a symmetric grid"),
    ):
        with pytest.raises(ValidationError, match=text):
            RoundInputs(**settings)
    with pytest.raises(DataError, match="RoundInputs calibrates on data and none was given"):
        apply(tiny_model("llama"), RoundInputs(per="tensor"), progress=False)
