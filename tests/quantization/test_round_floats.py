"""Weights in floats against torch's casts and compressed-tensors, and the bytes they take."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from torch import Tensor, nn

from actkit.core.layers.linear import ActLinear
from actkit.core.layers.weights import FloatWeight
from actkit.core.recipe.runner import apply
from actkit.quantization.round_floats import RoundFloats
from actkit.testing import tiny_model

PATH = "model.layers.0.mlp.up_proj"


def stored(settings: dict) -> tuple[Tensor, FloatWeight, nn.Module]:
    model = tiny_model("llama", hidden_size=32, intermediate_size=64)
    weight = model.get_submodule(PATH).weight.detach().clone()
    apply(model, RoundFloats(**settings), progress=False)
    layer = model.get_submodule(PATH)
    assert isinstance(layer, ActLinear) and isinstance(layer.storage, FloatWeight)
    return weight, layer.storage, model


def test_fp8_is_torchs_cast():
    weight, held, _ = stored({})
    scale = weight.abs().amax(1, keepdim=True) / 448
    torch.testing.assert_close(held.dequantize(), (weight / scale).to(torch.float8_e4m3fn).float() * scale)
    assert held.nbytes == weight.numel() + 4 * len(weight)


@pytest.mark.parametrize(
    ("settings", "size", "scale_bytes"),
    [({"format": "fp4", "group_size": 8}, 8, 2), ({"format": "nvfp4"}, 16, 1), ({"format": "mxfp4"}, 32, 1)],
)
def test_fp4_is_that_of_compressed_tensors(settings, size, scale_bytes):
    weight, held, _ = stored(settings)
    scale = held.scales()[..., None]
    groups = weight.unflatten(1, (-1, size))
    expected = cast_to_fp4((groups / scale).clamp(-6, 6)) * scale
    assert torch.equal(held.dequantize(), expected.flatten(1))
    whole = 4 if settings["format"] == "nvfp4" else 0
    assert held.nbytes == weight.numel() // 2 + scale_bytes * groups.shape[0] * groups.shape[1] + whole


def test_a_format_has_its_own_groups():
    with pytest.raises(ValueError, match="group_size: 64 was given, mxfp4 has 32; leave it out"):
        RoundFloats(format="mxfp4", group_size=64)
    with pytest.raises(ValueError, match="group_size"):
        RoundFloats(group_size=0)
