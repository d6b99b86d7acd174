"""Shift, scale, codes and weights against the formulas of the header in numpy; folded and unfolded; what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actkit.core.edit.edits import get_module
from actkit.core.ground.errors import RecipeError
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Sample
from actkit.quantization.gptq import Gptq
from actkit.quantization.outliertune import OutlierTune, weight_error
from actkit.quantization.round_inputs import RoundInputs
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.smooth import Smooth
from actkit.testing import check_transform, tiny_batches, tiny_model

SITE = "blocks.1.mlp.input"


def rows(model, batches, site=SITE):
    """What calibration sees at a site: values float64 [tokens, channels], and the sequence of each."""
    found = record(model, {site: Sample(10_000)}, batches, progress=False)[site]
    return found.rows.double().numpy(), found.sequences.numpy()


def by_hand(x, sequences, bits, shifted):
    """z and s of the header."""
    each = [x[sequences == number] for number in np.unique(sequences)]
    z = np.mean([(one.max(0) + one.min(0)) / 2 for one in each], 0) if shifted else np.zeros(x.shape[1])
    return z, np.maximum(np.abs(x - z).max(0) / (2 ** (bits - 1) - 1), 1e-5)


def up(model):
    """The layer that reads blocks.1.mlp.input first."""
    return anatomy(model).block(1).mlp.up


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("kind", ["llama", "vit", "bert"])
def test_codes_and_weights_are_those_of_numpy(kind, bits):
    model, batches = tiny_model(kind), tiny_batches(kind)
    x, sequences = rows(model, batches)
    linear = up(model)
    weight, path = linear.weight.detach().double().numpy(), linear.path
    bias = 0 if linear.bias is None else linear.bias.detach().double().numpy()
    z, s = by_hand(x, sequences, bits, shifted=kind != "llama")
    changed = apply(copy.deepcopy(model), OutlierTune(bits=bits), batches, min_coverage=0.0, progress=False).model
    layer = get_module(changed, path)
    given = torch.from_numpy(x if kind == "bert" else (x - z) / s).float()  # a norm has done it; after BERT's the layer
    codes = np.clip(np.round((x - z) / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (np.abs(layer.inputs(given).double().numpy() - codes) < 1e-3).mean() > 0.999  # but for ties
    top = 2 ** (bits - 1) - 1
    scaled = weight * s
    steps = np.abs(scaled).max(1, keepdims=True) / top
    expected = np.round(scaled / steps) * steps
    close = np.isclose(layer.dequantized().double().numpy(), expected, rtol=1e-3, atol=1e-3 * float(steps.max()))
    assert close.mean() > 0.995
    if kind != "llama":
        np.testing.assert_allclose(layer.bias.detach().double().numpy(), bias + weight @ z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "vit", "gpt2", "mixtral"])
def test_the_exact_part_alone(kind):
    model, batches = tiny_model(kind), tiny_batches(kind)
    if kind != "mixtral":  # whose products take no float64
        model.double()
        batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    with torch.no_grad():
        before = model(**batches[0])[0] if kind == "vit" else model(**batches[0]).logits
        apply(model, OutlierTune(round=()), batches, min_coverage=0.0, progress=False)
        after = model(**batches[0])[0] if kind == "vit" else model(**batches[0]).logits
    close = 1e-8 if kind != "mixtral" else 1e-4
    torch.testing.assert_close(after, before, rtol=close, atol=close * float(before.abs().max()))
    if kind != "mixtral":
        x, _ = rows(model, batches)
        np.testing.assert_allclose(np.abs(x).max(0), 127, rtol=1e-4)  # the largest code of each channel


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_folded_equals_unfolded(kind):
    batches = tiny_batches(kind)
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    found = []
    for fold in (True, False):
        model = tiny_model(kind).double()
        apply(model, OutlierTune(fold=fold), batches, min_coverage=0.0, progress=False)
        layer = get_module(model, up(tiny_model(kind)).path)
        assert (layer.inputs.divisor is None) == fold
        with torch.no_grad():
            found.append(model(**batches[0])[0] if kind == "vit" else model(**batches[0]).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5 * float(found[0].abs().max()))


def test_the_other_layers_read_tokens():
    model = apply(tiny_model("llama"), OutlierTune(), tiny_batches("llama"), progress=False).model
    block = model.model.layers[0]
    for layer in (block.self_attn.o_proj, block.mlp.down_proj):
        assert layer.inputs.describe() == "inputs rounded to 8 bits per token"
    for layer in (block.self_attn.q_proj, block.mlp.gate_proj):
        assert layer.inputs.describe() == "inputs rounded to 8 bits by one scale" and float(layer.inputs.scale) == 1
    model = apply(tiny_model("llama"), OutlierTune(others="none"), tiny_batches("llama"), progress=False).model
    assert model.model.layers[0].mlp.down_proj.inputs is None


def test_weights_may_be_left_to_gptq():
    batches = tiny_batches("llama")
    model = apply(
        tiny_model("llama"),
        [OutlierTune(round=("inputs",)), Gptq(bits=8, group_size=-1, symmetric=True)],
        batches,
        progress=False,
    ).model
    layer = model.model.layers[0].mlp.up_proj
    assert layer.storage.kind == "integer" and float(layer.inputs.scale) == 1


def test_centring_lowers_the_error_of_weights():
    """A channel that is shifted by far: its scale is large, and the rows' steps with it."""
    generator = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(32, 64, generator=generator), torch.full((64,), 0.01)
    shifted = scale.clone()
    shifted[3] = 0.5
    assert weight_error(weight, scale, 6) < 0.5 * weight_error(weight, shifted, 6)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "vit", "bert", "gpt2"])
def test_it_keeps_what_transforms_promise(kind):
    check_transform(OutlierTune(), tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(), RoundInputs()])


def test_the_report_says_what_it_found():
    batches = tiny_batches("llama")
    notes = apply(tiny_model("llama"), OutlierTune(), batches, progress=False).report.notes
    assert sum("largest over median channel" in note and "dead channels 0" in note for note in notes) == 4


def test_what_is_refused():
    for stack in ([RoundToNearest(), OutlierTune()], [OutlierTune(), Smooth()], [OutlierTune(), RoundInputs()]):
        with pytest.raises(RecipeError):
            Recipe(stack).check()
    Recipe([Smooth(), OutlierTune()]).check()
    for settings in ({"bits": 1}, {"sequences": 0}, {"round": ("bias",)}):
        with pytest.raises(ValidationError):
            OutlierTune(**settings)
