"""Search, noise and folding against brute force and closed forms; what stacks and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from actkit.core.ground.errors import RecipeError
from actkit.core.model.anatomy import anatomy
from actkit.core.model.parts import Linear
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.quantization.noisyquant import NoisyQuant, fold_noise, noisy_gain, sample_noisy_bias
from actkit.quantization.outliertune import OutlierTune
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.teal import Teal
from actkit.testing import check_transform, tiny_batches, tiny_model

WEIGHTS = RoundToNearest(bits=6, group_size=-1, symmetric=True)
SMALL = NoisyQuant(bits=4, clip_grid=10, n_grid=8, rows=64)
SITE = "blocks.0.attention.input"


def changed(kind, *recipe, batches=None):
    batches = tiny_batches(kind) if batches is None else batches
    return apply(tiny_model(kind), list(recipe), batches, min_coverage=0.0, progress=False)


def layers(model, kind):
    """The modules of query, key and value of the first block."""
    return [linear.module for linear in anatomy(model).block(0).attention.inputs]


def error(x, weights, step, noise, bits=4):
    """The mean squared error of the outputs in numpy, float64."""
    top = 2 ** (bits - 1)
    q = np.clip(np.round((x + noise) / step), -top, top - 1) * step - noise
    return sum(float(np.square((q - x) @ w.T).mean()) for w in weights)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_the_search_is_brute_force(kind):
    """Of the first layers of a model, whose inputs nothing changed: scale, shift and strength, one after another."""
    batches = tiny_batches(kind)
    before = changed(kind, WEIGHTS).model
    x = record(before, {SITE: Sample(64, 0)}, batches, progress=False)[SITE].rows.double().numpy()
    weights = [layer.dequantized().detach().double().numpy() for layer in layers(before, kind)]
    values = changed(kind, WEIGHTS, SMALL).report.values
    found = next(found for _, _, found in values if "scale" in found)
    full = np.abs(record(before, {SITE: Sample(10_000)}, batches, progress=False)[SITE].rows.numpy()).max() / 7
    scales = [full * i / 10 for i in range(10, 0, -1)]
    errors = [error(x, weights, step, 0.0) for step in scales]
    step = scales[int(np.argmin(errors))]
    assert found["scale"] == pytest.approx(step, rel=1e-5)
    assert found["clipped"] == pytest.approx(min(errors), rel=1e-3)
    shifts = [0.0, *(step * i / 8 for i in range(-8, 9) if i)]
    errors = [error(x, weights, step, shift) for shift in shifts]
    assert found["shifted"] == pytest.approx(min(errors), rel=1e-3)
    assert found["with noise"] <= found["shifted"] <= found["clipped"] <= found["by the largest"]


def test_the_bias_takes_the_noise_back():
    """y = W q(x + N) + (b - W N), against q(x + N) - N followed by the layer as it was."""
    model = changed("bert", WEIGHTS, SMALL).model
    plain = changed("bert", WEIGHTS).model
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for layer, before in zip(layers(model, "bert"), layers(plain, "bert"), strict=True):
        noise, step = -layer.inputs.shift, layer.inputs.scale
        q = ((x + noise) / step).round().clamp(-8, 7) * step - noise
        with torch.no_grad():
            torch.testing.assert_close(layer(x), before(q), rtol=1e-5, atol=1e-5)
    one = nn.Linear(6, 3, bias=False)
    noise = torch.randn(6)
    torch.testing.assert_close(fold_noise(Linear("a", "layer", one), noise), -one.weight @ noise)


def test_a_norm_with_a_bias_takes_the_noise():
    with_bias, without = changed("vit", WEIGHTS, SMALL).model, changed("llama", WEIGHTS, SMALL).model
    assert all(layer.inputs.shift is None for layer in layers(with_bias, "vit"))
    assert all(layer.inputs.shift is not None for layer in layers(without, "llama"))
    apart = changed("vit", WEIGHTS, SMALL.model_copy(update={"fold": False})).model
    assert all(layer.inputs.shift is not None for layer in layers(apart, "vit"))
    batch = tiny_batches("vit")[0]
    with torch.no_grad():
        folded, unfolded = with_bias(**batch)[0], apart(**batch)[0]
    assert float((folded - unfolded).norm() / unfolded.norm()) < 0.05  # codes at a border may flip
    down = anatomy(with_bias).block(0).mlp.down.module  # behind GELU it stays an addition
    assert down.inputs.shift is not None


def test_layers_that_read_one_tensor_share_the_noise():
    q, k, v = layers(changed("llama", WEIGHTS, SMALL).model, "llama")
    assert torch.equal(q.inputs.shift, k.inputs.shift) and torch.equal(q.inputs.scale, v.inputs.scale)
    other = layers(changed("llama", WEIGHTS, SMALL.model_copy(update={"seed": 1})).model, "llama")[0]
    assert not torch.equal(q.inputs.shift, other.inputs.shift)


@pytest.mark.parametrize("earlier", [RoundInputs(bits=4, per="tensor"), OutlierTune(bits=4, others="none")])
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_over_a_quantizer_that_is_there(kind, earlier):
    """Scale and grid stay; the error on calibration data falls or stays."""
    before, after = changed(kind, earlier), changed(kind, earlier, SMALL)
    for old, new in zip(layers(before.model, kind), layers(after.model, kind), strict=True):
        assert new.inputs.grid == old.inputs.grid and torch.equal(new.inputs.scale, old.inputs.scale)
        if old.inputs.divisor is not None:
            assert torch.equal(new.inputs.divisor, old.inputs.divisor)
    found = [found for _, method, found in after.report.values if method == "NoisyQuant"]
    assert found and all(each["with noise"] <= each["clipped"] for each in found)


def test_the_closed_form_of_the_gain():
    generator = torch.Generator().manual_seed(0)
    for distance, n in ((0.1, 0.3), (0.5, 0.8), (0.9, 1.0), (0.2, 1.5), (0.7, 0.4)):
        x = torch.tensor(1.0 - distance, dtype=torch.float64)  # b = 1: levels at 0 and 2, the border at 1
        noise = (2 * torch.rand(400_000, generator=generator, dtype=torch.float64) - 1) * n
        q = 2 * torch.round((x + noise) / 2)
        found = (q - (x + noise)).square().mean() - x.square()
        expected = noisy_gain(torch.tensor(distance), torch.tensor(n), 1.0)
        assert abs(float(found) - float(expected)) < 5e-3


def test_the_noise_is_as_described():
    generator = torch.Generator().manual_seed(0)
    uniform = sample_noisy_bias(100_000, 0.5, generator)
    assert float(uniform.abs().max()) <= 0.25 and abs(float(uniform.mean())) < 2e-3
    code = sample_noisy_bias(100_000, 0.5, generator, "code")
    assert abs(float(code.mean()) + 0.5) < 0.02 and abs(float(code.std()) - 1.0) < 0.02


@pytest.mark.parametrize("kind", ["llama", "mixtral", "vit", "bert"])
def test_it_keeps_what_transforms_promise(kind):
    check_transform(SMALL, tiny_model(kind), tiny_batches(kind), conflicting=[RoundInputs(), Teal(sparsity=0.5)])


def test_what_stacks_and_what_is_refused():
    Recipe([WEIGHTS, RoundInputs(per="tensor"), SMALL]).check()
    Recipe([OutlierTune(), SMALL]).check()
    for stack, text in (
        ([RoundInputs(), SMALL], "scale for each token"),
        ([Teal(sparsity=0.5), SMALL], "a dropped input would become the noise"),
        ([SMALL, NoisyQuant()], "applied already"),
        ([SMALL, RoundInputs()], "both fill the inputs slot"),
    ):
        with pytest.raises(RecipeError, match=text):
            Recipe(stack).check()


def test_layers_that_round_tokens_are_left_as_they_are():
    """OutlierTune's other layers have a scale for each token."""
    skipped = changed("vit", OutlierTune(bits=4), SMALL).report.skipped
    assert {reason for _, method, reason in skipped if method == "NoisyQuant"} == {
        "its inputs have a scale for each token, or are no integers"
    }
